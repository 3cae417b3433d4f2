"""Radial functions are computed once for the two edges of a pair, and what has no opposite edge keeps its own."""

from __future__ import annotations

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from test_compiled import inputs_of

from conftest import batch_of, crystal, ethanol, random_network
from mmea_calc.fast.arrangement import Incidence, arrange, arrange_pairs
from mmea_calc.fast.pair_radial import remove_pair_radial
from mmea_calc.fast.switch import use_fast_path
from mmea_calc.fast.tracing import evaluator
from mmea_calc.graph import Batch
from mmea_calc.mace_bridge import radial_networks


def batches() -> dict[str, Batch]:
    images = bulk("C", "fcc", a=2.5)  # an atom alone in its cell, whose neighbours are its own images
    pair = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.2]])
    return {
        "molecule": batch_of(ethanol()),
        "images": batch_of(images),
        "mixed": batch_of(ethanol(), crystal(), images, pair),
    }


def pairs_of(batch: Batch) -> Incidence:
    return arrange(batch.tensors).pairs


@pytest.mark.parametrize("name", ["molecule", "images", "mixed"])
def test_a_pair_is_an_edge_and_its_opposite(name: str) -> None:
    batch = batches()[name]
    index, shifts = batch.tensors["edge_index"], batch.tensors["unit_shifts"]
    pairs = pairs_of(batch)
    one, other = pairs.slots
    assert 2 * len(one) == index.shape[1]
    assert pairs.missing is not None
    assert not pairs.missing.any()
    assert torch.equal(index[:, one], index[:, other].flip(0))
    assert torch.equal(shifts[one], -shifts[other])
    assert torch.equal(torch.cat([one, other]).sort().values, torch.arange(index.shape[1]))
    number = torch.arange(len(one))
    assert torch.equal(pairs.rows[0, one], number)
    assert torch.equal(pairs.rows[0, other], number)


def test_the_order_of_edges_does_not_matter() -> None:
    batch = batches()["mixed"]
    index, shifts = batch.tensors["edge_index"], batch.tensors["unit_shifts"]
    order = torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(0))
    pairs = arrange_pairs(index[:, order], shifts[order], batch.n_atoms)
    one, other = order[pairs.slots]
    assert torch.equal(index[:, one], index[:, other].flip(0))
    assert torch.equal(shifts[one], -shifts[other])


def test_edges_without_their_opposite_are_pairs_of_their_own() -> None:
    batch = batches()["molecule"]
    index, shifts = batch.tensors["edge_index"][:, 1:-1], batch.tensors["unit_shifts"][1:-1]
    pairs = arrange_pairs(index, shifts, batch.n_atoms)
    n = index.shape[1]
    assert torch.equal(pairs.rows[0], torch.arange(n))
    assert torch.equal(pairs.slots[0], torch.arange(n))
    assert pairs.missing is not None
    assert pairs.missing[1].all()
    assert not pairs.missing[0].any()


@pytest.mark.parametrize("name", ["molecule", "mixed"])
def test_slots_of_pairs_gather_and_scatter_the_derivative_of_each_other(name: str) -> None:
    arrangement = arrange(batches()[name].tensors)
    n_pairs, n_edges = arrangement.pairs.slots.shape[1], arrangement.pairs.rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    for incidence, n in ((arrangement.pairs, n_pairs), (arrangement.first_edges(), n_edges)):
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        y = incidence.gather(x)
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
        expected = torch.zeros_like(x).index_add(0, incidence.rows.flatten(), weights.flatten(0, 1))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("paired", [True, False])
def test_the_radial_networks_see_one_edge_of_a_pair(paired: bool) -> None:
    network = random_network()
    use_fast_path(network)
    if not paired:
        remove_pair_radial(network)
    batch, seen = batch_of(ethanol()), list[int]()
    for module, _ in radial_networks(network):
        first = next(child for child in module.modules() if child is not module)
        first.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    inputs = inputs_of(network, batch, frozen=False)
    evaluator(network, inputs, 0)(*inputs.tensors())
    n_edges = batch.tensors["edge_index"].shape[1]
    assert set(seen) == {n_edges // 2 if paired else n_edges}
