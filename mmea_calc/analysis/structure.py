"""Geometry of trajectories: bonds, angles, torsions, their distributions, and radial distribution functions.

A bond, angle or dihedral is named once, at the start, by its atoms and by the lattice vectors between them; with
unwrapped positions it is then followed through the trajectory by plain differences, however far its atoms go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import ArrayLike, NDArray

from mmea_calc.errors import DataError
from mmea_calc.neighbours import neighbours

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]

# Two atoms are bonded up to this many times the sum of their covalent radii.
BOND_SCALE = 1.25
# A torsion is not defined where three of its atoms are nearly in line.
STRAIGHT_DEG = 170.0


@dataclass(frozen=True)
class InternalCoordinates:
    """Bonds (k = 2 atoms), angles (k = 3, the vertex in the middle) or dihedrals (k = 4).

    Attributes:
        atoms: indices, (n, k).
        images: lattice vectors to add to each atom, relative to the first, (n, k, 3).
    """

    atoms: IntArray
    images: IntArray

    def __len__(self) -> int:
        return len(self.atoms)

    def points(self, positions_A: FloatArray, cell_A: FloatArray) -> FloatArray:
        """Positions of the atoms, (n_frames, n, k, 3), from those of the trajectory, (n_frames, n_atoms, 3)."""
        return positions_A[:, self.atoms] + self.images @ cell_A

    def select(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> InternalCoordinates:
        """Some of them, by index or mask."""
        return InternalCoordinates(self.atoms[which], self.images[which])


def find_bonds(
    numbers: ArrayLike, positions_A: ArrayLike, cell_A: ArrayLike, pbc: ArrayLike, scale: float = BOND_SCALE
) -> InternalCoordinates:
    """Pairs of atoms closer than `scale` times the sum of their covalent radii (ASE's table), each named once.

    Args:
        numbers: atomic numbers, (n_atoms,).
        positions_A: of one frame, (n_atoms, 3), A.
        cell_A: (3, 3), A; rows are lattice vectors. Only those of periodic directions matter.
        pbc: (3,).
        scale: as said.
    """
    atoms = Atoms(np.asarray(numbers), positions=np.asarray(positions_A), cell=np.asarray(cell_A), pbc=np.asarray(pbc))
    radii = covalent_radii[atoms.numbers]
    near = neighbours(atoms, scale * 2.0 * float(radii.max()))
    i, j, d, images = near.first, near.second, near.distances, near.unit_shifts.astype(np.int64)
    # Of the two directions of a bond the first in order of atoms, and of images for an atom bonded to its own image.
    sign = np.where(images[:, 0] != 0, images[:, 0], np.where(images[:, 1] != 0, images[:, 1], images[:, 2]))
    keep = (d < scale * (radii[i] + radii[j])) & ((i < j) | ((i == j) & (sign > 0)))
    pairs = np.stack([i[keep], j[keep]], axis=1).astype(np.int64)
    shifts = np.zeros((len(pairs), 2, 3), dtype=np.int64)
    shifts[:, 1] = images[keep]
    order = np.lexsort((*shifts[:, 1].T, pairs[:, 1], pairs[:, 0]))
    return InternalCoordinates(pairs[order], shifts[order])


def find_angles(bonds: InternalCoordinates) -> InternalCoordinates:
    """All pairs of bonds that share an atom, which is the vertex."""
    partners = _partners(bonds)
    atoms, images = [], []
    for vertex in sorted(partners):
        for (a, s), (b, t) in combinations(partners[vertex], 2):
            atoms.append((a, vertex, b))
            images.append((np.zeros(3, dtype=np.int64), -s, t - s))
    return _coordinates(atoms, images, 3)


def find_torsions(numbers: ArrayLike, bonds: InternalCoordinates) -> InternalCoordinates:
    """One dihedral for every bond about which two parts of a molecule can turn.

    That is: a bond outside rings with a further neighbour on either side. Of several neighbours the one with the
    highest atomic number is taken, then the one with the lowest index.

    Args:
        numbers: atomic numbers, (n_atoms,).
        bonds: from `find_bonds`.
    """
    z = np.asarray(numbers)
    partners = _partners(bonds)
    atoms, images = [], []
    for (b, c), (_, s) in zip(bonds.atoms.tolist(), bonds.images, strict=True):
        left = [(a, t) for a, t in partners[b] if not (a == c and np.array_equal(t, s))]
        right = [(d, t) for d, t in partners[c] if not (d == b and np.array_equal(t, -s))]
        if b == c or not left or not right or _in_ring(partners, b, c, s):
            continue
        (a, t), (d, u) = (min(side, key=lambda item: (-z[item[0]], item[0])) for side in (left, right))
        atoms.append((a, b, c, d))
        images.append((np.zeros(3, dtype=np.int64), -t, s - t, s + u - t))
    return _coordinates(atoms, images, 4)


def _partners(bonds: InternalCoordinates) -> dict[int, list[tuple[int, IntArray]]]:
    """Atom -> its neighbours, each with the lattice vector to it."""
    found: dict[int, list[tuple[int, IntArray]]] = {}
    for (i, j), (_, shift) in zip(bonds.atoms.tolist(), bonds.images, strict=True):
        found.setdefault(i, []).append((j, shift))
        found.setdefault(j, []).append((i, -shift))
    return found


def _in_ring(partners: dict[int, list[tuple[int, IntArray]]], start: int, end: int, shift: IntArray) -> bool:
    """Whether `end` can be reached from `start` without the bond between them."""
    seen, front = {start}, [start]
    while front:
        further = []
        for atom in front:
            for other, image in partners[atom]:
                if atom == start and other == end and np.array_equal(image, shift):
                    continue
                if other == end:
                    return True
                if other not in seen:
                    seen.add(other)
                    further.append(other)
        front = further
    return False


def _coordinates(atoms: Sequence[Sequence[int]], images: Sequence[Sequence[IntArray]], k: int) -> InternalCoordinates:
    return InternalCoordinates(
        np.array(atoms, dtype=np.int64).reshape(-1, k), np.array(images, dtype=np.int64).reshape(-1, k, 3)
    )


def type_labels(numbers: ArrayLike, coordinates: InternalCoordinates) -> list[str]:
    """Elements of every coordinate, e.g. "C-O" or "H-C-H", from the end that is first in the alphabet."""
    rows = [[chemical_symbols[z] for z in row] for row in np.asarray(numbers)[coordinates.atoms].tolist()]
    return ["-".join(min(row, row[::-1])) for row in rows]


def atom_labels(numbers: ArrayLike, coordinates: InternalCoordinates) -> list[str]:
    """Elements and indices (from 0) of every coordinate, e.g. "C1-C7-O12-H20"."""
    z = np.asarray(numbers)
    return ["-".join(f"{chemical_symbols[z[i]]}{i}" for i in row) for row in coordinates.atoms.tolist()]


def distances(points_A: ArrayLike) -> FloatArray:
    """Distances between two points each, (...,), from (..., 2, 3), A."""
    p = _points(points_A, 2)
    return np.asarray(np.linalg.norm(p[..., 1, :] - p[..., 0, :], axis=-1))


def angles(points_A: ArrayLike) -> FloatArray:
    """Angles at the second of three points each, (...,), degrees in [0, 180], from (..., 3, 3), A.

    By the arc tangent, which keeps its digits near 0 and 180 degrees, where the arc cosine loses half of them.
    """
    p = _points(points_A, 3)
    a, b = p[..., 0, :] - p[..., 1, :], p[..., 2, :] - p[..., 1, :]
    cross = np.linalg.norm(np.cross(a, b), axis=-1)
    return np.degrees(np.arctan2(cross, np.einsum("...i,...i->...", a, b)))


def dihedrals(points_A: ArrayLike) -> FloatArray:
    """Dihedrals of four points each, (...,), degrees in (-180, 180], from (..., 4, 3), A.

    The sign is IUPAC's: positive when, seen along the middle bond, the far bond is turned clockwise against the near
    one. Where three points are in line the dihedral is not defined, and 0 is given.
    """
    p = _points(points_A, 4)
    first, middle, last = (p[..., i + 1, :] - p[..., i, :] for i in range(3))
    n1, n2 = np.cross(first, middle), np.cross(middle, last)
    y = np.einsum("...i,...i->...", first, n2) * np.linalg.norm(middle, axis=-1)
    angle = np.degrees(np.arctan2(y, np.einsum("...i,...i->...", n1, n2)))
    return np.where(angle <= -180.0, 180.0, angle)


def _points(points_A: ArrayLike, k: int) -> FloatArray:
    p = np.asarray(points_A, dtype=np.float64)
    if p.ndim < 2 or p.shape[-2:] != (k, 3):
        raise DataError(f"expected points of shape (..., {k}, 3), got {p.shape}")
    return p


@dataclass(frozen=True)
class Distribution:
    """A normalised histogram: `density` (n_bins,) over bins between `edges` (n_bins + 1,); its integral is 1."""

    edges: FloatArray
    density: FloatArray

    @property
    def centres(self) -> FloatArray:
        """Middles of the bins, (n_bins,)."""
        return 0.5 * (self.edges[1:] + self.edges[:-1])


def distribution(values: ArrayLike, edges: ArrayLike) -> Distribution:
    """Distribution of `values` (any shape) over bins; the density has the inverse unit of the values.

    Raises:
        DataError: no value lies within the bins.
    """
    bins = np.asarray(edges, dtype=np.float64)
    counts, _ = np.histogram(np.asarray(values, dtype=np.float64), bins)
    if not counts.sum():
        raise DataError(f"no value lies between {bins[0]:g} and {bins[-1]:g}: choose wider bins")
    return Distribution(bins, counts / (counts.sum() * np.diff(bins)))


@dataclass(frozen=True)
class RadialDistribution:
    """Radial distribution functions.

    Attributes:
        r_A: middles of the shells, (n_bins,), A.
        g: pair of elements such as "C-O", or "all" -> (n_bins,).
    """

    r_A: FloatArray
    g: dict[str, FloatArray]


def radial_distribution(
    numbers: ArrayLike, positions_A: ArrayLike, cell_A: ArrayLike, r_max_A: float, n_bins: int = 200
) -> RadialDistribution:
    """Radial distribution functions of a system that is periodic in three directions.

    g_ab(r) = V / (n_a n_b) <number of pairs a, b at distance r> / (volume of the shell), periodic images included, so
    that it tends to 1 at large r, in cells of any shape and for any r. An ideal gas of n atoms gives 1 for pairs of
    different elements and (n - 1) / n among equal ones below half the height of the cell.

    Args:
        numbers: atomic numbers, (n_atoms,).
        positions_A: (n_frames, n_atoms, 3), A, wrapped or not.
        cell_A: (3, 3), A.
        r_max_A: the largest distance, A.
        n_bins: number of shells of equal thickness.

    Raises:
        DataError: shapes that do not fit, or a cell without volume.
    """
    z, frames = np.asarray(numbers), np.asarray(positions_A, dtype=np.float64)
    cell = np.asarray(cell_A, dtype=np.float64)
    if frames.ndim != 3 or frames.shape[1:] != (len(z), 3) or not len(frames):
        raise DataError(f"expected positions of shape (n_frames, {len(z)}, 3), got {frames.shape}")
    volume = abs(float(np.linalg.det(cell)))
    if volume < 1e-9:
        raise DataError("a radial distribution refers to a density: it needs a cell with a volume")
    elements, kinds = np.unique(z, return_inverse=True)
    n = len(elements)
    edges = np.linspace(0.0, r_max_A, n_bins + 1)
    counts = np.zeros((n, n, n_bins))
    for frame in frames:
        i, j, d = _distances_in_cell(z, frame, cell, r_max_A)
        shell = np.minimum((d * (n_bins / r_max_A)).astype(np.int64), n_bins - 1)
        index = (kinds[i] * n + kinds[j]) * n_bins + shell
        counts += np.bincount(index, minlength=counts.size).reshape(counts.shape)
    shells = 4.0 / 3.0 * np.pi * (edges[1:] ** 3 - edges[:-1] ** 3)
    scale = volume / (len(frames) * shells)
    g = {"all": counts.sum(axis=(0, 1)) * scale / len(z) ** 2}
    number_of = np.bincount(kinds)
    for a in range(n):
        for b in range(a, n):
            name = f"{chemical_symbols[elements[a]]}-{chemical_symbols[elements[b]]}"
            g[name] = counts[a, b] * scale / (number_of[a] * number_of[b])
    return RadialDistribution(0.5 * (edges[1:] + edges[:-1]), g)


def _distances_in_cell(
    numbers: NDArray[np.int64], positions_A: FloatArray, cell_A: FloatArray, r_max_A: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
    fractional = np.linalg.solve(cell_A.T, positions_A.T).T
    # Wrapped here: unwrapped positions may be many cells away, and the neighbour list wants them near.
    wrapped = (fractional - np.floor(fractional)) @ cell_A
    near = neighbours(Atoms(numbers, positions=wrapped, cell=cell_A, pbc=True), r_max_A)
    return near.first, near.second, near.distances


def half_height(cell_A: ArrayLike) -> float:
    """Half of the smallest distance between opposite faces of a cell, A: beyond it atoms see their own images."""
    inverse = np.linalg.inv(np.asarray(cell_A, dtype=np.float64))
    return float(0.5 / np.linalg.norm(inverse, axis=0).max())


def nearly_straight(points_A: FloatArray) -> NDArray[np.bool_]:
    """Which dihedrals, (n,), come close to three atoms in line in some frame; from (n_frames, n, 4, 3), A."""
    first, second = angles(points_A[..., :3, :]), angles(points_A[..., 1:, :])
    bend = np.maximum(np.maximum(first, second), 180.0 - np.minimum(first, second))
    return np.asarray((bend > STRAIGHT_DEG).any(axis=0))


def groups(labels: list[str]) -> Iterator[tuple[str, IntArray]]:
    """Every label with the indices that bear it, the most frequent first."""
    names, inverse, counts = np.unique(np.array(labels), return_inverse=True, return_counts=True)
    for k in np.argsort(-counts, kind="stable"):
        yield str(names[k]), np.flatnonzero(inverse == k).astype(np.int64)
