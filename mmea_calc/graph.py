"""Atoms -> neighbour list -> tensors for the network.

Conventions (mace's): an edge runs from sender to receiver, its vector is
positions[receiver] - positions[sender] + unit_shifts @ cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from .errors import DataError
from .neighbours import FloatArray, IntArray, pairs_within, periodic_cell

SMALLEST_VOLUME = 1e-8  # A^3, of a cell that has one


@dataclass(frozen=True)
class Graph:
    """One structure with its neighbour list; lengths in A.

    Attributes:
        numbers: atomic numbers, (n_atoms,).
        positions: (n_atoms, 3), moved to where single precision serves them best: a molecule about the origin,
            a crystal into its cell.
        cell: (3, 3), rows are lattice vectors; where the structure has none, a stand-in that is never crossed.
        pbc: (3,).
        edge_index: (2, n_edges), senders and receivers.
        unit_shifts: (n_edges, 3), lattice vectors crossed.
    """

    numbers: IntArray
    positions: FloatArray
    cell: FloatArray
    pbc: NDArray[np.bool_]
    edge_index: IntArray
    unit_shifts: FloatArray

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)


def charge_of(atoms: Atoms) -> float:
    """Total charge that a structure is said to have (`info["charge"]`), in elementary charges; 0 if nothing is said."""
    return _number(atoms.info.get("charge", atoms.info.get("total_charge", 0)), 0.0)


def spin_of(atoms: Atoms) -> float:
    """Spin multiplicity that a structure is said to have (`info["spin"]`); 1 if nothing is said."""
    return _number(atoms.info.get("spin", atoms.info.get("total_spin", 1)), 1.0)


def _number(value: object, otherwise: float) -> float:
    """A number, also one that a file gave as text or as an array of one."""
    try:
        return float(np.asarray(value).item())
    except (TypeError, ValueError):
        return otherwise


def build_graph(atoms: Atoms, r_max: float) -> Graph:
    """Neighbour list of a structure within `r_max` (A).

    Raises:
        DataError: no atoms, positions or cell that are not finite, or a periodic direction without a lattice vector.
    """
    _check(atoms)
    positions, cell, kept, _ = _placed(atoms)
    pbc = np.array(atoms.pbc, dtype=bool)
    first, second, shifts = pairs_within(positions, cell, pbc, r_max)
    return Graph(atoms.numbers.astype(np.int64), positions, kept, pbc, np.stack([first, second]), shifts)


def shifts_as_given(atoms: Atoms, graph: Graph) -> FloatArray:
    """The `unit_shifts` of this structure's graph if its atoms had been left where they are, (n_edges, 3).

    Into which cell an atom on the face between two is moved is a matter of rounding, which processors do differently.
    These do not depend on it.
    """
    *_, moved = _placed(atoms)
    sender, receiver = graph.edge_index
    return graph.unit_shifts - moved[receiver] + moved[sender]


def graph_with_edges(atoms: Atoms, edge_index: IntArray, shifts: FloatArray) -> Graph:
    """The graph that `build_graph` made of this structure, given the edges it found and their `shifts_as_given`."""
    positions, _, kept, moved = _placed(atoms)
    sender, receiver = edge_index
    unit_shifts = shifts + moved[receiver] - moved[sender]
    pbc = np.array(atoms.pbc, dtype=bool)
    return Graph(atoms.numbers.astype(np.int64), positions, kept, pbc, edge_index, unit_shifts)


def _check(atoms: Atoms) -> None:
    """What makes no graph is a DataError."""
    if len(atoms) == 0:
        raise DataError("the structure has no atoms; expected at least one")
    if not np.isfinite(atoms.positions).all():
        bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
        raise DataError(f"positions must be finite, got NaN or infinity for atom {bad[0]} ({len(bad)} atoms in all)")
    if not np.isfinite(atoms.cell.array).all():
        raise DataError("the cell must be finite, got NaN or infinity")


def _placed(atoms: Atoms) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Positions where single precision serves them best, the cell they were moved by, the cell of the graph, and by how
    many lattice vectors each atom was moved back, (n_atoms, 3).
    """
    positions = np.array(atoms.positions, dtype=np.float64)
    given, pbc = np.array(atoms.cell.array, dtype=np.float64), np.array(atoms.pbc, dtype=bool)
    cell, moved = periodic_cell(given, pbc), np.zeros_like(positions)
    if pbc.any():
        moved = np.where(pbc, np.floor(positions @ np.linalg.inv(cell)), 0.0)
        positions = positions - moved @ cell
    # mace-torch sizes the box of a molecule by its distance from the origin; here that distance is taken away.
    # Along periodic directions the atoms stay in their cell.
    if not pbc.any():
        positions = positions - positions.mean(axis=0)
    elif not pbc.all():
        middle = (positions @ np.linalg.inv(cell)).mean(axis=0)
        positions = positions - np.where(pbc, 0.0, middle) @ cell
    # The volume of a slab's own cell, vacuum included, is what its stress refers to.
    own = given.any() and abs(np.linalg.det(given)) > SMALLEST_VOLUME
    return positions, cell, given if own else cell, moved


@dataclass
class Batch:
    """Several structures as one graph without edges between them.

    Attributes:
        tensors: what a mace network takes: positions (n_atoms, 3), node_attrs (n_atoms, n_elements), edge_index
            (2, n_edges), shifts and unit_shifts (n_edges, 3), cell (3 * n_graphs, 3), batch (n_atoms,),
            ptr (n_graphs + 1,), head (n_graphs,).
        numbers: atomic numbers, (n_atoms,), on the device.
        atoms_per_graph: (n_graphs,).
    """

    tensors: dict[str, Tensor]
    numbers: Tensor
    atoms_per_graph: Tensor

    @property
    def n_graphs(self) -> int:
        return int(self.atoms_per_graph.shape[0])

    @property
    def n_atoms(self) -> int:
        return int(self.numbers.shape[0])


@dataclass(frozen=True)
class Found:
    """Of a batch: node energies (n_atoms,), eV; forces (n_atoms, 3), eV/A; stress (n_graphs, 3, 3), eV/A^3."""

    node_energy: Tensor
    forces: Tensor
    stress: Tensor | None


def collate(
    graphs: Sequence[Graph],
    elements: Sequence[int],
    *,
    head_index: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Batch:
    """Put structures together for one call of the network.

    Args:
        graphs: the structures.
        elements: atomic numbers the backbone knows, in the order of its one-hot encoding.
        head_index: head of the backbone.
        dtype: precision of the network.
        device: where to.

    Raises:
        DataError: an element that the backbone lacks; nothing to put together.
    """
    if not graphs:
        raise DataError("expected at least one structure, got none")
    elements_array = np.asarray(elements)
    numbers = np.concatenate([g.numbers for g in graphs])
    index = np.searchsorted(elements_array, numbers, sorter=(sorter := np.argsort(elements_array)))
    index = sorter[np.minimum(index, len(elements_array) - 1)]
    if (elements_array[index] != numbers).any():
        for i, graph in enumerate(graphs):
            check_elements(graph.numbers, elements, f"structure {i}")
    counts = np.array([g.n_atoms for g in graphs])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    edges = np.concatenate([g.edge_index + o for g, o in zip(graphs, offsets[:-1], strict=True)], axis=1)

    def to(array: np.ndarray, kind: torch.dtype) -> Tensor:
        return torch.as_tensor(array).to(device=device, dtype=kind)

    one_hot = np.zeros((len(numbers), len(elements_array)), dtype=np.float32)
    one_hot[np.arange(len(numbers)), index] = 1.0
    tensors = {
        "positions": to(np.concatenate([g.positions for g in graphs]), dtype),
        "node_attrs": to(one_hot, dtype),
        "edge_index": to(edges, torch.int64),
        "shifts": to(np.concatenate([g.unit_shifts @ g.cell for g in graphs]), dtype),
        "unit_shifts": to(np.concatenate([g.unit_shifts for g in graphs]), dtype),
        "cell": to(np.concatenate([g.cell for g in graphs]), dtype),
        "batch": to(np.repeat(np.arange(len(graphs)), counts), torch.int64),
        "ptr": to(offsets, torch.int64),
        "head": to(np.full(len(graphs), head_index), torch.int64),
    }
    return Batch(tensors, to(numbers, torch.int64), to(counts, torch.int64))


def same_neighbours(one: Graph, other: Graph) -> bool:
    """Whether two graphs differ in positions alone, so that `move` may take a batch from one to the other."""
    return (
        one.edge_index.shape == other.edge_index.shape
        and np.array_equal(one.edge_index, other.edge_index)
        and np.array_equal(one.numbers, other.numbers)
        and np.array_equal(one.unit_shifts, other.unit_shifts)
        and np.array_equal(one.cell, other.cell)
        and np.array_equal(one.pbc, other.pbc)
    )


def move(batch: Batch, graph: Graph) -> None:
    """Give a batch of one structure the positions of `graph`; all its other tensors stay the same objects."""
    old = batch.tensors["positions"]
    batch.tensors["positions"] = torch.as_tensor(graph.positions).to(device=old.device, dtype=old.dtype)


def check_elements(numbers: IntArray, elements: Sequence[int], where: str) -> None:
    """Raise a DataError that names `where` and the first element the backbone lacks."""
    for number in numbers:
        if number not in elements:
            known = ", ".join(chemical_symbols[z] for z in elements)
            raise DataError(
                f"{where} has {chemical_symbols[number]} ({number}); the backbone knows {known}: "
                "choose another backbone"
            )
