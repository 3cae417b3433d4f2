"""Polynomials and all of their derivatives are what their terms say."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from conftest import batch_of, crystal, ethanol, random_network
from mmea_calc.fast.arrangement import arrange
from mmea_calc.fast.contraction import TableContraction
from mmea_calc.fast.polynomials import Evaluate, OfAtoms, Term
from mmea_calc.mace_bridge import symmetric_contractions

# Of every degree from 0 to 4, with factors that occur once, twice and three times; the third has no terms.
TERMS: list[Term] = [
    *[(0, ()), (0, (1,)), (0, (0, 1)), (0, (1, 1)), (0, (0, 0, 2))],
    *[(1, (0, 1)), (1, (2, 2, 2)), (1, (0, 1, 1, 2))],
    (3, (2,)),
]
N_ATOMS, N_COMPONENTS, CHANNELS = 5, 3, 2


def some(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def directly(coefficients: Tensor, a: Tensor) -> Tensor:
    found = torch.zeros(N_ATOMS, 4, CHANNELS, dtype=torch.float64)
    for number, (w, monomial) in enumerate(TERMS):
        found[:, w] += coefficients[:, number].detach() * prod((a[:, i].detach() for i in monomial), start=1.0)
    return found


def inputs() -> tuple[Tensor, Tensor]:
    return some(N_ATOMS, len(TERMS), CHANNELS, seed=0), some(N_ATOMS, N_COMPONENTS, CHANNELS, seed=1)


def test_values_are_the_sums_of_their_terms() -> None:
    coefficients, a = inputs()
    found = Evaluate.apply(TERMS, 4, coefficients, a)
    torch.testing.assert_close(found, directly(coefficients, a), rtol=0, atol=1e-14)
    assert not found[:, 2].any()


def test_first_and_second_derivatives() -> None:
    def evaluate(coefficients: Tensor, a: Tensor) -> Tensor:
        return Evaluate.apply(TERMS, 4, coefficients, a)

    assert torch.autograd.gradcheck(evaluate, inputs())
    assert torch.autograd.gradgradcheck(evaluate, inputs())


def test_what_atoms_have_of_their_elements() -> None:
    atoms = (ethanol(), crystal())
    arrangement = arrange(batch_of(*atoms).tensors)
    element = arrangement.element
    values = some(len(arrangement.present), 3, seed=2)
    found = OfAtoms.apply(values, arrangement.atoms)
    assert torch.equal(found, values[torch.searchsorted(arrangement.present, element)])
    assert torch.autograd.gradcheck(lambda v: OfAtoms.apply(v, arrangement.atoms), (values,))


@pytest.mark.parametrize(("l_max", "hidden", "n"), [(1, "4x0e", 9), (2, "4x0e + 4x1o", 108), (3, "4x0e + 4x1o", 410)])
def test_terms_that_angular_momenta_forbid_are_left_out(l_max: int, hidden: str, n: int) -> None:
    """For an output 0e and orders up to 1 by hand: s; ss, xx, yy, zz; sss, sxx, syy, szz."""
    network = random_network(max_ell=l_max, hidden_irreps=hidden, correlation=3)
    _, first = symmetric_contractions(network)[0]
    assert len(TableContraction(first).terms) == n
