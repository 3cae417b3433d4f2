"""The neighbour list in torch operations against the list of the dynamics, which is matscipy's in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mmea_calc.errors import DataError
from mmea_calc.fast import pairs_on_device
from mmea_calc.fast.pairs_on_device import pairs_within
from mmea_calc.md.neighbours import _pairs_within

CUTOFF = 4.0  # A
System = Callable[[np.random.Generator], Atoms]


def listed(atoms: Atoms, cutoff: float = CUTOFF, device: str = "cpu") -> tuple[Tensor, Tensor]:
    positions = torch.tensor(atoms.positions, device=device)
    return pairs_within(positions, torch.tensor(atoms.cell.array, device=device), list(atoms.pbc), cutoff)


def vectors(atoms: Atoms, index: Tensor, unit_shifts: Tensor) -> Tensor:
    """Element by element, which rounds alike on every machine."""
    positions, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    shifts = sum((unit_shifts[:, i : i + 1] * cell[i] for i in range(3)), torch.zeros_like(unit_shifts))
    return positions[index[1]] - positions[index[0]] + shifts


def assert_same(atoms: Atoms, cutoff: float = CUTOFF) -> int:
    """Compare with the existing list; returns the number of pairs."""
    index, unit_shifts = listed(atoms, cutoff)
    expected_index, expected_shifts, _ = _pairs_within(atoms, atoms.positions, cutoff)
    assert index.dtype == torch.int64
    assert unit_shifts.dtype == torch.float64
    assert torch.equal(index, torch.tensor(expected_index))
    assert torch.equal(unit_shifts, torch.tensor(expected_shifts))
    assert not unit_shifts.signbit().logical_and(unit_shifts == 0).any()  # no minus zero
    return index.shape[1]


def filled(rng: np.random.Generator, n_atoms: int, cell: np.ndarray, pbc: tuple[bool, ...] | bool) -> Atoms:
    """Atoms anywhere in a cell, and a little outside."""
    cell = np.asarray(cell, dtype=float)
    return Atoms(f"H{n_atoms}", rng.uniform(-0.3, 1.3, (n_atoms, 3)) @ cell, cell=cell, pbc=pbc)


def molecule(rng: np.random.Generator) -> Atoms:
    return Atoms("H12", rng.uniform(-3, 3, (12, 3)))


def gas(rng: np.random.Generator) -> Atoms:
    return Atoms("H150", rng.uniform(-8, 12, (150, 3)))


def boxed_molecules(rng: np.random.Generator) -> Atoms:
    return filled(rng, 80, np.diag([3.0, 9.0, 14.0]), False)


def flown_apart(rng: np.random.Generator) -> Atoms:
    """Three clusters, one of them very far away."""
    places = rng.choice([0.0, 30.0, 1e6], (100, 1)) * [1.0, -2.0, 0.5]
    return Atoms("H100", rng.uniform(0, 6, (100, 3)) + places)


def one_in_a_tiny_cell(rng: np.random.Generator) -> Atoms:
    return filled(rng, 1, rng.uniform(1.2, 1.9, 3) * np.eye(3), True)


def tiny_cell(rng: np.random.Generator) -> Atoms:
    return filled(rng, 3, np.diag([2.1, 1.7, 2.4]) + rng.uniform(-0.4, 0.4, (3, 3)), True)


def one_bin_two_bins_three_bins(rng: np.random.Generator) -> Atoms:
    lengths = CUTOFF * rng.permutation([1.2, 2.3, 3.4])
    return filled(rng, 120, np.diag(lengths) + rng.uniform(-0.3, 0.3, (3, 3)), True)


def just_below_and_above_the_cutoff(rng: np.random.Generator) -> Atoms:
    return filled(rng, 40, np.diag(CUTOFF * rng.permutation([0.999, 1.001, 2.001])), True)


def many_bins(rng: np.random.Generator) -> Atoms:
    return filled(rng, 300, np.diag([25.0, 17.0, 21.0]) + rng.uniform(-4, 4, (3, 3)), True)


def skewed(rng: np.random.Generator) -> Atoms:
    return filled(rng, 25, np.array([[6.0, 0, 0], [21.0, 5.0, 0], [-33.0, 18.0, 7.0]]), True)


def skewed_and_turned(rng: np.random.Generator) -> Atoms:
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return filled(rng, 25, np.array([[5.0, 0, 0], [-9.0, 6.0, 0], [14.0, 11.0, 5.5]]) @ turn, True)


def left_handed(rng: np.random.Generator) -> Atoms:
    return filled(rng, 40, np.array([[0, 9.0, 1.0], [8.0, 0.5, 0], [1.0, 1.0, 7.0]]), True)


def far_outside(rng: np.random.Generator) -> Atoms:
    atoms = filled(rng, 40, np.array([[7.0, 1.0, 0], [0, 9.0, 2.0], [-3.0, 0, 5.0]]), True)
    atoms.positions += rng.integers(-5000, 5001, (40, 3)) @ atoms.cell.array
    return atoms


def on_the_faces(rng: np.random.Generator) -> Atoms:
    places = np.array([[0, 0, 0], [4.5, 0.25, 0], [1, -1e-17, 2], [1.5, 4.5 - 1e-16, 1], [-1e-17, 9.0, 2.5]])
    return Atoms("H5", places[rng.permutation(5)], cell=[4.5] * 3, pbc=True)


def coincident_molecule(rng: np.random.Generator) -> Atoms:
    return Atoms("H20", np.repeat(rng.uniform(0, 5, (10, 3)), 2, axis=0))


def coincident_gas(rng: np.random.Generator) -> Atoms:
    return Atoms("H100", np.repeat(rng.uniform(0, 12, (50, 3)), 2, axis=0))


def coincident_in_a_crystal(rng: np.random.Generator) -> Atoms:
    """Integer cell and places of few digits: also an atom that coincides with an image does so to the last bit."""
    places = np.repeat(rng.integers(0, 48, (6, 3)) / 16, 2, axis=0)
    places[1] += [3, -3, 6]
    return Atoms("H12", places, cell=[3.0] * 3, pbc=True)


SYSTEMS: list[System] = [
    molecule, gas, boxed_molecules, flown_apart, one_in_a_tiny_cell, tiny_cell, one_bin_two_bins_three_bins,
    just_below_and_above_the_cutoff, many_bins, skewed, skewed_and_turned, left_handed, far_outside, on_the_faces,
    coincident_molecule, coincident_gas, coincident_in_a_crystal,
]  # fmt: skip
MIXED = [pbc for pbc in itertools.product([False, True], repeat=3) if 0 < sum(pbc) < 3]


def partly_periodic(seed: int, pbc: tuple[bool, ...], other_vectors: bool) -> Atoms:
    """A slab or wire, some atoms far away along any direction; without the vectors that are not periodic, or with."""
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(2.5, 11.0, 3)) + rng.uniform(-1, 1, (3, 3))
    atoms = filled(rng, 60, cell, pbc)
    atoms.positions[:5] += rng.integers(-40, 41, (5, 3)) @ cell
    if not other_vectors:
        atoms.cell[[not p for p in pbc]] = 0.0
    return atoms


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("system", SYSTEMS)
def test_pairs_are_those_of_the_existing_list(system: System, seed: int) -> None:
    assert assert_same(system(np.random.default_rng(seed))) > 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("other_vectors", [False, True])
@pytest.mark.parametrize("pbc", MIXED)
def test_pairs_of_slabs_and_wires(pbc: tuple[bool, ...], other_vectors: bool, seed: int) -> None:
    assert assert_same(partly_periodic(seed, pbc, other_vectors)) > 0


@pytest.mark.parametrize("cutoff", [0.5, 1.7, 9.0, 30.0])
def test_pairs_within_other_cutoffs(cutoff: float) -> None:
    rng = np.random.default_rng(7)
    assert assert_same(filled(rng, 60, np.array([[9.0, 2, 0], [0, 10.0, 3], [4, 0, 11.0]]), True), cutoff) > 0
    assert assert_same(filled(rng, 100, np.diag([9.0, 7.0, 8.0]), False), cutoff) > 0


def test_pairs_of_some_thousand_atoms() -> None:
    atoms = bulk("C", "diamond", a=3.57, cubic=True) * (8, 8, 8)
    atoms.rattle(0.05, seed=3)
    atoms.positions += np.random.default_rng(3).integers(-2, 3, (len(atoms), 3)) @ atoms.cell.array
    assert len(atoms) == 4096
    assert assert_same(atoms, 5.0) > 300_000


@pytest.mark.parametrize("candidates", [1, 300])
@pytest.mark.parametrize("system", [gas, tiny_cell, many_bins])
def test_pairs_do_not_depend_on_how_many_candidates_are_looked_at_together(
    system: System, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_on_device, "CANDIDATES", candidates)
    assert_same(system(np.random.default_rng(11)))


@pytest.mark.parametrize("system", [gas, flown_apart, many_bins])
def test_pairs_do_not_depend_on_the_largest_number_of_bins(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_on_device, "MOST_BINS", 3)
    assert_same(system(np.random.default_rng(12)))
    for periodic in (True, False):
        assert pairs_on_device._bins(torch.linspace(0, 1, 30), 30.0, periodic, 1.5)[1] == 3


def test_an_atom_that_flew_away_leaves_the_bins_of_the_others_small() -> None:
    coordinate = torch.linspace(0, 99, 100, dtype=torch.float64)
    coordinate[50] = 1e30
    bins, count, around = pairs_on_device._bins(coordinate, 1.0, False, 5.0)
    assert (count, around) == (22, 1)
    assert int(bins.bincount().max()) == 5
    assert int(bins[50]) == 21


@pytest.mark.parametrize("repeat", [1, 3])
def test_shells_of_fcc(repeat: int) -> None:
    a = 4.0
    atoms = bulk("Al", "fcc", a=a) * (repeat, repeat, repeat)
    n_within = 0
    for squared, n_in_shell in zip([0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4], [12, 6, 24, 12, 24, 8, 48, 6], strict=True):
        shell = a * squared**0.5
        assert listed(atoms, shell - 1e-6)[0].shape[1] == n_within * len(atoms)
        n_within += n_in_shell
        index, unit_shifts = listed(atoms, shell + 1e-6)
        assert index[0].bincount().tolist() == [n_within] * len(atoms)
        lengths = vectors(atoms, index, unit_shifts).norm(dim=1)
        assert int((lengths > shell - 1e-6).sum()) == n_in_shell * len(atoms)
        assert float(lengths.max()) < shell + 1e-6


@pytest.mark.parametrize("pbc", [True, False])
def test_a_pair_at_the_cutoff_is_none(pbc: bool) -> None:
    places = list(itertools.product([0.0, 2.0, 4.0, 6.0], repeat=3))
    atoms = Atoms("H64", places, cell=[8.0] * 3, pbc=pbc)
    assert assert_same(atoms, 2.0) == 0
    assert assert_same(atoms, np.nextafter(2.0, 3.0)) == (64 * 6 if pbc else 2 * 3 * 48)


def test_positions_as_given_decide_what_is_near() -> None:
    """However far outside of the cell, where wrapping them would round distances differently."""
    atoms = far_outside(np.random.default_rng(13))
    index, unit_shifts = listed(atoms)
    lengths = vectors(atoms, index, unit_shifts).norm(dim=1)
    for pair in range(0, 100, 5):
        (sender, receiver), shift, length = index[:, pair], unit_shifts[pair], float(lengths[pair])
        for cutoff, n_expected in ((length - 1e-9, 0), (length + 1e-15 * length, 1)):
            found, shifts = listed(atoms, cutoff)
            same = (found[0] == sender) & (found[1] == receiver) & (shifts == shift).all(1)
            assert int(same.sum()) == n_expected


def test_every_pair_comes_both_ways_once_and_in_order() -> None:
    index, unit_shifts = listed(tiny_cell(np.random.default_rng(5)))
    rows = torch.cat([index.T.double(), unit_shifts], dim=1).tolist()
    assert rows == sorted(rows)
    there = {tuple(row) for row in rows}
    assert len(there) == len(rows)
    assert there == {(j, i, -x, -y, -z) for i, j, x, y, z in rows}
    assert not any(i == j and x == y == z == 0 for i, j, x, y, z in rows)
    assert any(i == j for i, j, *_ in rows)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True)])
def test_moving_atoms_by_lattice_vectors_changes_their_shifts_alone(pbc: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(6)
    atoms = filled(rng, 50, np.array([[7.0, 1, 0], [0, 5.0, 2], [-3.0, 0, 9.0]]), pbc)
    moved, by = atoms.copy(), rng.integers(-9, 10, (50, 3)) * np.array(pbc)
    by[::2] = 0
    moved.positions += by @ atoms.cell.array
    (index, before), (same, after) = listed(atoms), listed(moved)
    assert index.shape[1] > 0
    crossed = torch.tensor(by, dtype=torch.float64)
    back = after + crossed[same[1]] - crossed[same[0]]
    order = np.lexsort((*back.numpy().T[::-1], *same.numpy()[::-1]))
    assert torch.equal(same[:, order], index)
    assert torch.equal(back[order], before)
    torch.testing.assert_close(vectors(moved, same, after)[order], vectors(atoms, index, before), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "atoms",
    [Atoms("H"), Atoms("H", cell=[5.0] * 3, pbc=True), Atoms("H2", [[0, 0, 0], [0, 0, 9.0]]),
     Atoms("H", cell=[0, 5.0, 0], pbc=[False, True, False])],
)  # fmt: skip
def test_without_neighbours_the_list_is_empty(atoms: Atoms) -> None:
    assert assert_same(atoms) == 0
    index, unit_shifts = listed(atoms)
    assert index.shape == (2, 0)
    assert unit_shifts.shape == (0, 3)


def test_single_precision_and_derivatives_may_come_in() -> None:
    atoms = many_bins(np.random.default_rng(8))
    atoms.positions = atoms.positions.astype(np.float32)
    positions = torch.tensor(atoms.positions, dtype=torch.float32, requires_grad=True)
    cell = torch.tensor(atoms.cell.array, requires_grad=True)
    index, unit_shifts = pairs_within(positions, cell, torch.tensor(atoms.pbc), CUTOFF)
    expected = listed(atoms)
    assert torch.equal(index, expected[0])
    assert torch.equal(unit_shifts, expected[1])
    assert unit_shifts.dtype == torch.float64
    assert not unit_shifts.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_pairs_are_the_same_on_a_cuda_device() -> None:
    atoms = [system(np.random.default_rng(9)) for system in SYSTEMS]
    atoms += [partly_periodic(9, pbc, other_vectors) for pbc in MIXED for other_vectors in (False, True)]
    atoms.append(bulk("C", "diamond", a=3.57, cubic=True) * (8, 8, 8))
    for structure in atoms:
        (index, unit_shifts), found = listed(structure), listed(structure, device="cuda")
        assert all(t.is_cuda for t in found)
        assert index.shape[1] > 0
        assert torch.equal(found[0].cpu(), index)
        assert torch.equal(found[1].cpu(), unit_shifts)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cutoff_must_be_positive_and_finite(cutoff: float) -> None:
    with pytest.raises(DataError, match=f"expected a positive, finite cutoff in A, got {cutoff}"):
        listed(Atoms("H2", [[0, 0, 0], [0, 0, 1.0]]), cutoff)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_positions_and_cell_must_be_finite(value: float) -> None:
    atoms = tiny_cell(np.random.default_rng(0))
    broken = atoms.copy()
    broken.positions[1, 2] = value
    with pytest.raises(DataError, match=r"positions must be finite, got NaN or infinity for atom 1 \(1 atoms"):
        listed(broken)
    atoms.cell[0, 0] = value
    with pytest.raises(DataError, match="the cell must be finite"):
        listed(atoms)


def test_there_must_be_atoms() -> None:
    with pytest.raises(DataError, match="no atoms"):
        listed(Atoms())


@pytest.mark.parametrize(
    ("cell", "pbc", "message"),
    [
        ([[3.0, 0, 0], [0, 0, 0], [0, 0, 3.0]], True, "periodic along axis 1, but its lattice vector there is zero"),
        ([[3.0, 0, 0], [0, 3.0, 0], [1.0, 2.0, 0]], True, "linearly dependent"),
        ([[3.0, 0, 0], [6.0, 0, 0], [0, 0, 1.0]], (True, True, False), "linearly dependent"),
    ],
)
def test_periodic_directions_need_lattice_vectors(
    cell: list[list[float]], pbc: bool | tuple[bool, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        listed(Atoms("H", cell=cell, pbc=pbc))
