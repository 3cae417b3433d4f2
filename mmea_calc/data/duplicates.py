"""The same geometry twice: within a set it counts double, between training and test it makes errors look small."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ..neighbours import periodic_cell
from .dataset import Dataset, Labelled

FloatArray = NDArray[np.float64]

# Geometries that agree to this are the same; steps of dynamics (0.5 fs) move atoms by some 0.005 A.
_SAME_GEOMETRY_A = 1e-3


def _features(item: Labelled) -> tuple[Hashable, FloatArray]:
    """A key that equal structures share, and numbers in A that are equal for equal geometries.

    Without periodicity: for each atom the distance from the centroid and the mean distance to all atoms, sorted within
    elements; they do not change under translation, rotation, reflection and permutation. In crystals: positions
    relative to the first atom as points on circles (so that wrapping does not matter) and the cell's lengths and
    angles; they do not change under translation and rotation.
    """
    atoms = item.atoms
    z = atoms.numbers
    if not atoms.pbc.any():
        x = atoms.positions - atoms.positions.mean(axis=0)
        squares = (x**2).sum(axis=1)
        # |x_i - x_j|^2 by way of the scalar products: one matrix product instead of n_atoms^2 vectors.
        d2 = squares[:, None] + squares[None, :] - 2.0 * x @ x.T
        mean = np.sqrt(np.maximum(d2, 0.0)).mean(axis=1)
        radius = np.sqrt(squares)
        order = np.lexsort((mean, radius, z))
        by_mean = np.lexsort((mean, z))
        return (z[order].tobytes(), atoms.pbc.tobytes()), np.concatenate([radius[order], mean[by_mean]])
    cell = periodic_cell(np.array(atoms.cell.array), np.array(atoms.pbc))
    turns = 2.0 * np.pi * np.linalg.solve(cell.T, (atoms.positions - atoms.positions[0]).T).T
    lengths = np.linalg.norm(cell, axis=1)
    gram = cell @ cell.T / lengths[:, None]
    periodic = lengths / (2.0 * np.pi) * np.where(atoms.pbc, np.sin(turns), turns)
    partner = lengths / (2.0 * np.pi) * np.where(atoms.pbc, np.cos(turns), 0.0)
    return (z.tobytes(), atoms.pbc.tobytes()), np.concatenate([gram.ravel(), periodic.ravel(), partner.ravel()])


def fingerprints(structures: Sequence[Labelled]) -> list[tuple[Hashable, Hashable]]:
    """Two hashable fingerprints per structure; geometries are the same when either agrees.

    The features are rounded on two grids, half a step apart: a value that noise carries over an edge of one grid lies
    in the middle of a cell of the other.
    """
    result: list[tuple[Hashable, Hashable]] = []
    for item in structures:
        key, values = _features(item)
        grid = values / _SAME_GEOMETRY_A
        first, second = (np.floor(grid + shift).astype(np.int64).tobytes() for shift in (0.0, 0.5))
        result.append(((key, 0, first), (key, 1, second)))
    return result


class FirstOfEach:
    """Structures one after the other: for each the number of the first one with the same geometry.

    What is kept of a structure is two numbers of eight bytes.
    """

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}
        self._n = 0

    def of(self, item: Labelled) -> int:
        """Of the next structure; its own number if none before it has its geometry."""
        (prints,) = fingerprints([item])
        keys = [blake2b(repr(p).encode(), digest_size=8).digest() for p in prints]
        first = next((self._seen[key] for key in keys if key in self._seen), self._n)
        for key in keys:
            self._seen.setdefault(key, first)
        self._n += 1
        return first


def first_of_each(structures: Sequence[Labelled]) -> list[int]:
    """For every structure the number of the first one with the same geometry."""
    seen = FirstOfEach()
    return [seen.of(item) for item in structures]


def find_duplicates(dataset: Dataset) -> tuple[int, list[str]]:
    """How many structures repeat an earlier one, and a sentence if some do so with another energy."""
    structures, count = dataset.structures, 0
    contradictions: list[str] = []
    for i, first in enumerate(first_of_each(structures)):
        if first == i:
            continue
        item, earlier = structures[i], structures[first]
        count += 1
        if item.energy is None or earlier.energy is None:
            continue
        if abs(item.energy - earlier.energy) > 1e-3 * len(item.atoms):
            contradictions.append(f"{earlier.where} and {item.where}")
    if contradictions:
        contradictions = [
            f"{len(contradictions)} pairs have the same geometry but energies that differ by more than 1 meV/atom "
            f"(first: {contradictions[0]})"
        ]
    return count, contradictions
