"""Neighbour lists of structures as they come: without a cell, with part of one, drifted away from it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from matscipy.neighbours import neighbour_list
from numpy.typing import NDArray

from .errors import DataError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Neighbours:
    """Ordered pairs of atoms within a cutoff.

    Attributes:
        first, second: atoms, (n_pairs,).
        vectors: from first to second, (n_pairs, 3), A.
        distances: (n_pairs,), A.
        unit_shifts: lattice vectors crossed, (n_pairs, 3).
    """

    first: IntArray
    second: IntArray
    vectors: FloatArray
    distances: FloatArray
    unit_shifts: FloatArray


def neighbours(atoms: Atoms, cutoff: float) -> Neighbours:
    """Pairs of a structure within `cutoff` (A). Raises DataError for a cell that cannot be."""
    pbc = np.array(atoms.pbc, dtype=bool)
    cell = periodic_cell(np.array(atoms.cell.array, dtype=np.float64), pbc)
    positions = np.array(atoms.positions, dtype=np.float64)
    first, second, shifts = pairs_within(positions, cell, pbc, cutoff)
    vectors = positions[second] - positions[first] + shifts @ cell
    return Neighbours(first, second, vectors, np.linalg.norm(vectors, axis=1), shifts)


def pairs_within(
    positions: FloatArray, cell: FloatArray, pbc: NDArray[np.bool_], r_max: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """Ordered pairs of atoms within `r_max`: first, second, and the lattice vectors crossed, (n_pairs, 3).

    Args:
        positions: (n_atoms, 3), A.
        cell: from `periodic_cell`.
        pbc: (3,).
        r_max: A.
    """
    if not pbc.any() and len(positions) <= 64:
        # All pairs at once beat a cell list up to some tens of atoms.
        distance2 = ((positions[:, None] - positions[None]) ** 2).sum(-1)
        np.fill_diagonal(distance2, np.inf)
        first, second = np.nonzero(distance2 < r_max * r_max)
        return first, second, np.zeros((len(first), 3))
    box = cell
    if not pbc.all():
        # Directions that are not periodic: the cell list needs a box around the atoms, larger than the cutoff.
        coordinates = (positions @ np.linalg.inv(cell)).T
        for axis in np.flatnonzero(~pbc):
            coordinates[axis] = _without_gaps(coordinates[axis], r_max)
        lengths = np.where(pbc, 1.0, coordinates.max(axis=1) + 2 * r_max + 1.0)
        box = cell * lengths[:, None]
        positions = (coordinates + np.where(pbc, 0.0, r_max)[:, None]).T @ cell
    first, second, shifts = neighbour_list("ijS", positions=positions, cell=box, pbc=pbc, cutoff=float(r_max))
    return first.astype(np.int64), second.astype(np.int64), shifts.astype(np.float64)


def _without_gaps(coordinate: FloatArray, r_max: float) -> FloatArray:
    """Coordinates (A) from 0 with the same neighbours, empty stretches longer than the cutoff shortened.

    Otherwise the cell list's memory would grow with the distance of a molecule that flew away.
    """
    order = np.argsort(coordinate)
    steps = np.minimum(np.diff(coordinate[order]), r_max + 1.0)
    moved = np.empty_like(coordinate)
    moved[order] = np.concatenate([[0.0], np.cumsum(steps)])
    return moved


def periodic_cell(cell: FloatArray, pbc: NDArray[np.bool_]) -> FloatArray:
    """The cell with unit vectors, normal to the periodic ones, along directions that are not periodic.

    Raises:
        DataError: a periodic direction without a lattice vector, or lattice vectors that depend on each other.
    """
    if not pbc.any():
        return np.eye(3)
    lengths = np.linalg.norm(cell, axis=1)
    for axis in np.flatnonzero(pbc):
        if lengths[axis] < 1e-8:
            raise DataError(f"the structure is periodic along axis {axis}, but its lattice vector there is zero")
    rows = [cell[i] for i in range(3) if pbc[i]]
    full = cell.copy()
    free = list(np.flatnonzero(~pbc))
    if free:
        basis = np.linalg.svd(np.array(rows))[2][len(rows) :]
        for axis, vector in zip(free, basis, strict=True):
            full[axis] = vector
    volume = abs(np.linalg.det(full))
    if volume < 1e-8:
        raise DataError("the lattice vectors of the periodic directions are linearly dependent; check the cell")
    return full
