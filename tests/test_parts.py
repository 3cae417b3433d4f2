"""A batch that is taken in parts gives what the whole gives, and parts are renewed with their edges."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from conftest import batch_of, crystal, ethanol
from mmea_calc.fast.arrangement import Arrangement, arrange
from mmea_calc.fast.parts import Parts, divide
from mmea_calc.graph import Batch

SIZES = (len(ethanol()), len(crystal()), 8, 9)


def four() -> Batch:
    return batch_of(ethanol(), crystal(), molecule("CH3COOH"), molecule("CH3CH2OH"))


def assert_same_arrangement(one: Arrangement, other: Arrangement) -> None:
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("most", [1, 7, 30, 60, 1000])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_runs_hold_all_structures_in_order_and_are_as_long_as_they_may_be(n: int, most: int) -> None:
    sizes = np.random.default_rng(n).integers(1, 31, n).tolist()
    runs = divide(sizes, most)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(sizes)))
    atoms = [sum(sizes[run]) for run in runs]
    assert all(n <= most or run.stop - run.start == 1 for n, run in zip(atoms, runs, strict=True))
    assert all(n + sizes[after.start] > most for n, (_, after) in zip(atoms, pairwise(runs), strict=False))


def test_a_part_is_the_batch_of_its_structures() -> None:
    parts = Parts(2).of(four())
    alone = [batch_of(atoms) for atoms in (ethanol(), crystal(), molecule("CH3COOH"), molecule("CH3CH2OH"))]
    assert len(parts) == 4
    for part, own in zip(parts, alone, strict=True):
        assert part.batch.tensors.keys() == own.tensors.keys()
        for key, tensor in own.tensors.items():
            assert torch.equal(part.batch.tensors[key], tensor), key
        assert torch.equal(part.batch.numbers, own.numbers)
        assert torch.equal(part.batch.atoms_per_graph, own.atoms_per_graph)
        assert_same_arrangement(part.arrangement, arrange(own.tensors))


@pytest.mark.parametrize(
    ("most", "structures"),
    [(None, [4]), (1000, [4]), (SIZES[2] + SIZES[3], [2, 2]), (1, [1, 1, 1, 1])],
)
def test_parts_hold_as_many_atoms_as_asked_for(most: int | None, structures: list[int]) -> None:
    batch = four()
    parts = Parts(most).of(batch)
    assert [part.batch.n_graphs for part in parts] == structures
    if most is None:
        assert parts[0].batch is batch


def test_edges_that_do_not_stand_by_structure_leave_a_batch_whole() -> None:
    batch = four()
    order = torch.randperm(batch.tensors["edge_index"].shape[1], generator=torch.Generator().manual_seed(0))
    mixed = {
        "edge_index": batch.tensors["edge_index"][:, order],
        **{key: batch.tensors[key][order] for key in ("shifts", "unit_shifts")},
    }
    shuffled = replace(batch, tensors={**batch.tensors, **mixed})
    (part,) = Parts(2).of(shuffled)
    assert part.batch is shuffled
    assert_same_arrangement(part.arrangement, arrange(shuffled.tensors))


@pytest.mark.parametrize("lonely", [Atoms("H"), Atoms("HH", positions=[[0, 0, 0], [0, 0, 50.0]])])
def test_a_structure_without_neighbours_leaves_a_batch_whole(lonely: Atoms) -> None:
    batch = batch_of(ethanol(), lonely, ethanol())
    (part,) = Parts(2).of(batch)
    assert part.batch is batch


def with_edges(batch: Batch, which: torch.Tensor) -> Batch:
    t = batch.tensors
    fewer = {"edge_index": t["edge_index"][:, which], **{key: t[key][which] for key in ("shifts", "unit_shifts")}}
    return replace(batch, tensors={**t, **fewer})


def test_only_parts_whose_edges_have_changed_are_arranged_anew() -> None:
    parts, batch = Parts(2), four()
    before = parts.of(batch)
    same = parts.of(with_edges(batch, torch.arange(batch.tensors["edge_index"].shape[1])))
    assert [a.arrangement is b.arrangement for a, b in zip(before, same, strict=True)] == [True] * 4
    first_of_second = before[0].batch.tensors["edge_index"].shape[1]
    all_but_one = torch.arange(batch.tensors["edge_index"].shape[1]) != first_of_second
    fewer = with_edges(batch, all_but_one)
    after = parts.of(fewer)
    assert [a.arrangement is b.arrangement for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    for part in after:
        assert_same_arrangement(part.arrangement, arrange(part.batch.tensors))


@pytest.mark.parametrize("most", [None, 2])
def test_edges_that_are_changed_in_place_are_seen(most: int | None) -> None:
    parts, batch = Parts(most), four()
    parts.of(batch)
    edges = batch.tensors["edge_index"]
    n = int((edges[0] < SIZES[0]).sum())
    edges[:, :n] = edges[:, :n].flip(1)
    for part in parts.of(batch):
        assert_same_arrangement(part.arrangement, arrange(part.batch.tensors))


@pytest.mark.parametrize("most", [None, 2])
def test_elements_that_are_changed_in_place_are_seen(most: int | None) -> None:
    parts, batch = Parts(most), four()
    parts.of(batch)
    batch.tensors["node_attrs"][:3] = batch.tensors["node_attrs"][:3].flip(0)
    for part in parts.of(batch):
        assert_same_arrangement(part.arrangement, arrange(part.batch.tensors))
