"""Polynomials in the components of features, channel by channel, with the terms that vanish left out.

A symmetric contraction (MACE, arXiv 2206.07697, eqs. 10-11) gives, for every component w and channel c of an atom of
element e, a polynomial in the components A_x of that channel

    B_w = sum_M C[e,M,c] A_x A_v A_i,   M = (w; x <= v <= i) and monomials of lower degrees,

and angular momenta leave few of its terms: 108 of 876 for orders up to 2, correlation 3 and an output 0e + 1o. Written
out over channels that lie side by side they are what a compiler is good at, and take a tenth of the time of the matrix
products that do not know of zeros (`contraction`).

Gradients are polynomials again, written out likewise, of operations that torch can differentiate once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .arrangement import Incidence, total

# Component numbers of the factors, in ascending order.
Monomial = tuple[int, ...]
# Number of the polynomial, and the monomial.
Term = tuple[int, Monomial]


class Evaluate(torch.autograd.Function):
    """Values of polynomials, (n, number of polynomials, c).

    Takes their terms; how many polynomials there are; coefficients of the terms, (n, terms, c); components, (n,
    components, c).
    """

    @staticmethod
    def forward(ctx: Any, terms: Sequence[Term], number: int, coefficients: Tensor, a: Tensor) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(coefficients, a)
        each: list[dict[Monomial, Tensor]] = [{} for _ in range(number)]
        for (w, m), coefficient in zip(terms, coefficients.unbind(1), strict=True):
            each[w][m] = coefficient
        return torch.stack([_value(some, a.unbind(1)) for some in each], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        """Made of differentiable operations, as everywhere here."""
        coefficients, a = ctx.saved_tensors
        _, _, of_coefficients, of_a = ctx.needs_input_grad
        return (
            None,
            None,
            _of_coefficients(ctx.terms, a, grad) if of_coefficients else None,
            _of_components(ctx.terms, coefficients, a, grad) if of_a else None,
        )


def _value(terms: Mapping[Monomial, Tensor], a: Sequence[Tensor]) -> Tensor:
    """The sum of coefficients times monomials; what has a first factor in common is multiplied by it once (Horner)."""
    parts = [terms[()]] if () in terms else []
    for first in sorted({m[0] for m in terms if m}):
        parts.append(a[first] * _value({m[1:]: c for m, c in terms.items() if m and m[0] == first}, a))
    return total(parts) if parts else torch.zeros_like(a[0])


def _of_coefficients(terms: Sequence[Term], a: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the coefficients: a monomial each, times the gradient of its polynomial."""
    parts, g = a.unbind(1), grad.unbind(1)
    values: dict[Monomial, Tensor] = {(): torch.ones_like(parts[0]), **{(i,): part for i, part in enumerate(parts)}}

    def value(m: Monomial) -> Tensor:
        if m not in values:
            values[m] = value(m[:-1]) * parts[m[-1]]
        return values[m]

    return torch.stack([g[w] * value(m) for w, m in terms], dim=1)


def _of_components(terms: Sequence[Term], coefficients: Tensor, a: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the components: derivatives of the sum of all polynomials, each times its gradient."""
    g, joined = grad.unbind(1), dict[Monomial, Tensor]()
    for (w, m), coefficient in zip(terms, coefficients.unbind(1), strict=True):
        part = g[w] * coefficient
        joined[m] = joined[m] + part if m in joined else part
    found: list[dict[Monomial, Tensor]] = [{} for _ in range(a.shape[1])]
    for m, coefficient in joined.items():
        for i in set(m):
            rest = list(m)
            rest.remove(i)
            found[i][tuple(rest)] = coefficient if m.count(i) == 1 else m.count(i) * coefficient
    return torch.stack([_value(some, a.unbind(1)) for some in found], dim=1)


class OfAtoms(torch.autograd.Function):
    """Values of elements (n_elements, ...) -> of the atoms, (n_atoms, ...); `atoms` as in an `Arrangement`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, atoms: Incidence) -> Tensor:
        ctx.atoms = atoms
        # The atoms of one element stand in a row.
        return values.index_select(0, atoms.slots[0] // atoms.rows.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.atoms.gather(grad).sum(1), None


__all__ = ["Evaluate", "OfAtoms", "Term"]
