"""mace's symmetric contraction, with the coupling tensors contracted once per element instead of once per atom.

Stock (MACE, arXiv 2206.07697, eqs. 10-11), for one output component w and one channel c of an atom of element e:

    B_w = sum_xvi U3[w,x,v,i,k] W3[e,k,c] A_x A_v A_i
        + sum_xv U2[w,x,v,k] W2[e,k,c] A_x A_v + sum_x U1[w,x,k] W1[e,k,c] A_x

The products of U and W know nothing of the atom. With m = (A_x A_v for all x, v; A_x for all x; 1), the monomials of
degree below the correlation order, they are one matrix per element, channel and degree,

    B_w = sum_i A_i sum_q m_q T[e,c,q,(w,i)],

so a call is one batched matrix product per degree and element present. It is exact, and differentiable any number of
times. While the weights W are frozen the tables are constants and kept; while they train they are made anew in each
call.

A compiled network has the polynomials B_w term by term instead, with their coefficients sum_k U[w,x,v,i,k] W[e,k,c],
summed over what x, v and i have in common, in the place of T (`polynomials`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..mace_bridge import symmetric_contractions
from .arrangement import Stage, stage
from .polynomials import Evaluate, OfAtoms, Term
from .tensor_state import State, same_state, state_of

# Sums of couplings that vanish are so many times the rounding of one.
_ROUNDING = 100


def use_table_contraction(network: nn.Module) -> int:
    """Let every symmetric contraction of `network` use the table form. Parameters and their names stay.

    Returns:
        The number of contractions found (0 for a network that has none).
    """
    found = symmetric_contractions(network)
    for _, module in found:
        # On this instance alone; `remove_table_contraction` uncovers the class's own forward again. It is an object,
        # not a closure, so that a copy of the network gets a table form that reads the copy's weights.
        module.__dict__["forward"] = TableContraction(module)
    return len(found)


def remove_table_contraction(network: nn.Module) -> None:
    """Back to mace's own contraction."""
    for _, module in symmetric_contractions(network):
        module.__dict__.pop("forward", None)


class TableContraction:
    """The table form of one `mace.modules.symmetric_contraction.SymmetricContraction`.

    Args:
        stock: the module whose coupling tensors and weights are used; they are read at each call, so a
            parametrization or a change of weights is seen.
    """

    def __init__(self, stock: Any) -> None:
        self.contractions: list[Any] = list(stock.contractions)
        self.correlations: list[int] = [int(c.correlation) for c in self.contractions]
        self.n = int(self.contractions[0].U_tensors(1).shape[-2])  # components of the input per channel
        self.sizes, self.widths = ([ir.dim for _, ir in irreps] for irreps in (stock.irreps_in, stock.irreps_out))
        self._kept: dict[int, list[Tensor]] = {}
        self._kept_for = State()
        self._grouped: tuple[Tensor, int, Tensor, dict[int, int], Tensor] | None = None
        self._kept_terms: tuple[_Terms, State] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """As mace's: x (n_atoms, channels, n), one-hot y (n_atoms, n_elements) -> (n_atoms, channels * sum(2l+1))."""
        if now := stage():
            form = self._term_by_term if now.compiled else self._by_products
            return form(now, x, now.tables[self])
        order, counts, back = self._atoms_by_element(y)
        if not counts:  # no atoms
            return x.new_zeros(0, x.shape[1] * sum(self.widths))
        tables = self._tables(list(counts))
        sorted_x = x.index_select(0, order).transpose(0, 1)  # (c, atoms, n)
        parts = []
        for e, a in zip(counts, sorted_x.split(list(counts.values()), dim=1), strict=True):
            parts.append(self._contracted(a, tables[e]))
        out = torch.cat(parts, dim=1).transpose(0, 1)  # (atoms, c, w)
        out = out.index_select(0, back)
        return torch.cat([piece.flatten(1) for piece in out.split(self.widths, dim=-1)], dim=1)

    def _term_by_term(self, now: Stage, x: Tensor, tables: list[Tensor]) -> Tensor:
        known = now.pieces_of(x).get(tuple((x.shape[1], size) for size in self.sizes))
        a = x.transpose(1, 2) if known is None else torch.cat(known, dim=1)  # (n_atoms, n, c)
        coefficients = OfAtoms.apply(tables[0], now.arrangement.atoms)
        out = Evaluate.apply(self.terms, sum(self.widths), coefficients, a)  # (n_atoms, w, c)
        return now.join(out.split(self.widths, dim=1))

    def _by_products(self, now: Stage, x: Tensor, tables: list[Tensor]) -> Tensor:
        at = now.arrangement.atoms
        out = self._contracted(at.gather(x).transpose(1, 2).flatten(0, 1), tables)
        out = at.scatter(out.unflatten(0, (at.rows.shape[0], x.shape[1])).transpose(1, 2))  # (n_atoms, c, w)
        return now.join([piece.transpose(1, 2) for piece in out.split(self.widths, dim=-1)])

    def _contracted(self, a: Tensor, tables: list[Tensor]) -> Tensor:
        """The module's last equation: (c, atoms, n) -> (c, atoms, w)."""
        *of_degree, out = tables
        m: Tensor | None = None
        for table in reversed(of_degree):  # of the lowest degree first
            m = a if m is None else (m.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)
            out = torch.baddbmm(out, m, table)  # (c, atoms, w * n)
        return (out.unflatten(-1, (-1, self.n)) * a.unsqueeze(-2)).sum(-1)

    def tables_of(self, present: Tensor, *, compiled: bool = True) -> list[Tensor]:
        """What a network within `arranged` takes for these elements.

        If it is compiled, coefficients (elements, terms, c); else T of each degree, the highest first, (elements * c,
        n**degree, w * n).
        """
        if self.contractions[0].weights_max.shape[0] == 1:  # a contraction that makes no difference between elements
            present = torch.zeros_like(present)
        if not compiled:
            return [table.flatten(0, 1) for table in self._table(present)]
        parts = []
        for contraction, couplings in zip(self.contractions, self._terms().couplings, strict=True):
            for w, u in zip(_weights(contraction), couplings, strict=True):
                parts.append(torch.einsum("kt,ekc->etc", u, w.index_select(0, present)))
        return [torch.cat(parts, dim=1)]

    @property
    def terms(self) -> list[Term]:
        """Of the polynomials that a compiled network has."""
        return self._terms().terms

    def _terms(self) -> _Terms:
        """What is left of the couplings, kept for as long as they are what they are."""
        flat = [u for c in self.contractions for u in _couplings(c)]
        # Tensors of inference mode have no version, and what is made there could not enter a later gradient.
        if torch.is_inference_mode_enabled() or any(u.is_inference() for u in flat):
            return _Terms.of(self.contractions, self.widths, self.n)
        state = state_of(flat)
        if self._kept_terms is None or not same_state(state, self._kept_terms[1]):
            with torch.no_grad():
                self._kept_terms = _Terms.of(self.contractions, self.widths, self.n), state
        return self._kept_terms[0]

    def _atoms_by_element(self, y: Tensor) -> tuple[Tensor, dict[int, int], Tensor]:
        """Atoms sorted by element, the number of each element present, and where each atom lies in that order.

        Kept for the one-hot tensor seen last: in dynamics it is the same one at every step.
        """
        # In inference mode changes of a tensor are not counted, and what is made there could not enter a gradient.
        version = -1 if y.is_inference() or torch.is_inference_mode_enabled() else y._version
        if self._grouped is None or self._grouped[0] is not y or self._grouped[1] != version or version < 0:
            element = y.argmax(dim=1)
            order = element.argsort(stable=True)
            found = torch.bincount(element, minlength=y.shape[1]).tolist()
            counts = {e: count for e, count in enumerate(found) if count}
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            self._grouped = (y, version, order, counts, back)
        return self._grouped[2:]

    def _tables(self, elements: list[int]) -> dict[int, list[Tensor]]:
        """Element -> T for the monomials of each degree, the highest one first: (c, n**degree, w * n)."""
        weights = [w for c in self.contractions for w in _weights(c)]
        couplings = [c.U_tensors(k) for c in self.contractions for k in (1, c.correlation)]
        # Tensors of inference mode have no version, and tables made there could not enter a later gradient.
        unkept = torch.is_inference_mode_enabled() or any(t.is_inference() for t in (*weights, *couplings))
        if unkept or any(w.requires_grad for w in weights):
            self._kept, self._kept_for = {}, State()
            return {e: self._one(e) for e in elements}
        state = state_of((*weights, *couplings))
        if not same_state(state, self._kept_for):
            self._kept, self._kept_for = {}, state
        for e in elements:
            if e not in self._kept:
                with torch.no_grad():
                    self._kept[e] = self._one(e)
        return self._kept

    def _one(self, element: int) -> list[Tensor]:
        return [table.squeeze(0) for table in self._table(slice(element, element + 1))]

    def _table(self, elements: Tensor | slice) -> list[Tensor]:
        highest = max(self.correlations)
        degrees: list[list[Tensor]] = [[] for _ in range(highest)]
        for contraction, width in zip(self.contractions, self.widths, strict=True):
            weights = dict(zip(range(contraction.correlation, 0, -1), _weights(contraction), strict=True))
            # U_k has k input components: k - 1 in the monomial, the last one apart
            for k, found in zip(range(highest, 0, -1), degrees, strict=True):
                if k > contraction.correlation:
                    chosen = weights[1][elements]
                    found.append(chosen.new_zeros(len(chosen), chosen.shape[-1], self.n ** (k - 1), width, self.n))
                    continue
                u = contraction.U_tensors(k)
                u = u.reshape(width, self.n ** (k - 1), self.n, u.shape[-1])
                found.append(torch.einsum("wqik,ekc->ecqwi", u, weights[k][elements]))
        return [torch.cat(found, dim=3).flatten(3) for found in degrees]

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: without the tables, which are made again."""
        return {**self.__dict__, "_kept": {}, "_kept_for": State(), "_kept_terms": None, "_grouped": None}


@dataclass(frozen=True)
class _Terms:
    """The terms of all B_w that do not vanish.

    Attributes:
        terms: of all contractions and degrees, one after the other.
        couplings: of each contraction and degree, the highest first: U of its terms, (k, n_terms).
    """

    terms: list[Term]
    couplings: list[list[Tensor]]

    @classmethod
    def of(cls, contractions: Sequence[Any], widths: Sequence[int], n: int) -> _Terms:
        """Of contractions with outputs of these widths, and n components."""
        terms, couplings, first = list[Term](), [], 0
        for contraction, width in zip(contractions, widths, strict=True):
            of_contraction = []
            for degree, u in zip(range(contraction.correlation, 0, -1), _couplings(contraction), strict=True):
                all_of_them = list(product(range(width), product(range(n), repeat=degree)))
                number: dict[Term, int] = {}
                of_each = [number.setdefault((w, tuple(sorted(m))), len(number)) for w, m in all_of_them]
                u = u.reshape(len(all_of_them), -1)
                summed = u.new_zeros(len(number), u.shape[1]).index_add(0, torch.tensor(of_each, device=u.device), u)
                largest = summed.abs().amax(1)
                left = largest > _ROUNDING * torch.finfo(u.dtype).eps * largest.max()
                of_contraction.append(summed[left].T.contiguous())
                terms += [(first + w, m) for (w, m), there in zip(number, left.tolist(), strict=True) if there]
            couplings.append(of_contraction)
            first += width
        return cls(terms, couplings)


def _couplings(contraction: Any) -> list[Tensor]:
    """Of the highest correlation first: (w, x, v, i, k), without w if there is one alone."""
    return [contraction.U_tensors(k) for k in range(contraction.correlation, 0, -1)]


def _weights(contraction: Any) -> list[Tensor]:
    """Of the highest correlation first."""
    return [contraction.weights_max, *contraction.weights]
