"""Structures in which atoms come too close: pairs in vacuum, squeezed bonds, molecules pushed together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..config import CheckConfig
from ..errors import DataError
from ..graph import Graph, build_graph
from ..md.monitor import BONDED
from .scans import FloatArray, Path

# Outer end of a scan, in units of the bond length or of the sum of the covalent radii.
OUTER = 1.3
APPROACH_FROM_A = 3.0
_DIRECTIONS, _TWISTS = 200, 12


def pairs(numbers: Sequence[int], config: CheckConfig) -> list[Path]:
    """Two atoms in vacuum, for every pair of the elements in `numbers`, each with itself among them."""
    result = []
    for a, b in combinations_with_replacement(sorted(set(numbers)), 2):
        outer = max(config.wall_to_A, OUTER * (covalent_radii[a] + covalent_radii[b]))
        r = _distances(config.wall_from_A, outer, config.pair_step_A)
        structures = tuple(Atoms([a, b], [[0, 0, 0], [0, 0, x]]) for x in r)
        tangent = np.array([[0, 0, -0.5], [0, 0, 0.5]])
        result.append(Path(f"{chemical_symbols[a]}-{chemical_symbols[b]}", r, structures, tangent))
    return result


def squeezes(atoms: Atoms, config: CheckConfig) -> tuple[list[Path], int]:
    """Every bond squeezed: both sides of it move rigidly; in a ring, or across a cell's border, the two atoms alone.

    Returns:
        the paths and the number of all bonds, which is larger if they were thinned out to `max_bonds`.
    """
    graph = build_graph(atoms, 2 * BONDED * float(covalent_radii[atoms.numbers].max()))
    bonds = _bonds(graph)
    start = Atoms(graph.numbers, graph.positions, cell=atoms.cell, pbc=atoms.pbc)
    chosen = _thinned(bonds, config.max_bonds)
    return [_squeeze(start, graph, bonds, edge, config) for edge in chosen], len(bonds)


def approaches(atoms: Atoms, config: CheckConfig) -> list[Path]:
    """Two copies of the molecule pushed together until two atoms, one of each, are as close as atoms get here.

    For every pair of elements the two atoms are those that stand out furthest: each copy is turned so that its atom
    leads, and the copies move along the line through both. The turn about this line is the one that keeps the other
    atoms furthest apart. None of a periodic structure.
    """
    if atoms.pbc.any():
        return []
    leading = {z: _leading(atoms, z) for z in sorted({int(z) for z in atoms.numbers})}
    kinds = _thinned(list(combinations_with_replacement(leading, 2)), config.max_approaches)
    return [_approach(atoms, leading[a], leading[b], config) for a, b in kinds]


def _distances(inner: float, outer: float, step: float) -> FloatArray:
    return np.asarray(inner + step * np.arange(round((outer - inner) / step) + 1))


def _thinned(items: list[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly."""
    if len(items) <= most:
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, most)]


# Bonds --------------------------------------------------------------------------------------------------------------


def _bonds(graph: Graph) -> list[int]:
    """Edges between bound atoms, each once, ordered by elements, so that thinning keeps all kinds."""
    first, second = graph.edge_index
    vectors = _vectors(graph)
    radii = covalent_radii[graph.numbers]
    bound = np.sqrt((vectors**2).sum(1)) < BONDED * (radii[first] + radii[second])
    edges = np.flatnonzero(bound & (first < second))
    kinds = np.sort(np.stack([graph.numbers[first[edges]], graph.numbers[second[edges]]]), axis=0)
    order = np.lexsort((second[edges], first[edges], kinds[1], kinds[0]))
    return [int(e) for e in edges[order]]


def _vectors(graph: Graph) -> FloatArray:
    first, second = graph.edge_index
    return np.asarray(graph.positions[second] - graph.positions[first] + graph.unit_shifts @ graph.cell)


def _squeeze(start: Atoms, graph: Graph, bonds: Sequence[int], edge: int, config: CheckConfig) -> Path:
    a, b = (int(i) for i in graph.edge_index[:, edge])
    vector = _vectors(graph)[edge]
    length = float(np.linalg.norm(vector))
    if OUTER * length < config.wall_from_A:
        names = " and ".join(f"{start.symbols[i]}{i}" for i in (a, b))
        raise DataError(f"{names} of the start structure are {length:.2f} Å apart: relax it first (mmea md --minimize)")
    tangent = np.zeros((len(start), 3))
    sides = _sides(graph, [e for e in bonds if e != edge], a, b)
    if sides is None or graph.unit_shifts[edge].any():
        sides = np.array([a]), np.array([b])
    for side, sign in zip(sides, (-0.5, 0.5), strict=True):
        tangent[side] = sign * vector / length
    r = _distances(config.wall_from_A, OUTER * length, config.scan_step_A)
    structures = []
    for x in r:
        moved = start.copy()
        moved.positions += (x - length) * tangent
        structures.append(moved)
    symbols = start.symbols
    return Path(f"{symbols[a]}{a}-{symbols[b]}{b}", r, tuple(structures), tangent)


def _sides(
    graph: Graph, others: Sequence[int], a: int, b: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Atoms that hang together with `a` and with `b` without the bond between them; None if that is one set: a ring."""
    n = graph.n_atoms
    i, j = graph.edge_index[:, list(others)]
    _, part = connected_components(coo_array((np.ones(len(i)), (i, j)), shape=(n, n)), directed=False)
    if part[a] == part[b]:
        return None
    return np.flatnonzero(part == part[a]), np.flatnonzero(part == part[b])


# Approaches ---------------------------------------------------------------------------------------------------------


def _leading(atoms: Atoms, number: int) -> tuple[int, FloatArray]:
    """The atom of this element, and a direction, in which the other atoms lie furthest behind it."""
    others_ahead = np.inf
    best = (0, np.array([0.0, 0.0, 1.0]))
    directions = _sphere(_DIRECTIONS)
    for i in np.flatnonzero(atoms.numbers == number):
        ahead = np.delete(atoms.positions - atoms.positions[i], i, axis=0) @ directions.T
        highest = ahead.max(axis=0) if len(ahead) else np.zeros(len(directions))
        k = int(highest.argmin())
        if highest[k] < others_ahead:
            others_ahead, best = float(highest[k]), (int(i), directions[k])
    return best


def _approach(atoms: Atoms, one: tuple[int, FloatArray], other: tuple[int, FloatArray], config: CheckConfig) -> Path:
    (a, u), (b, v) = one, other
    still = atoms.positions - atoms.positions[a]
    coming = (atoms.positions - atoms.positions[b]) @ _rotation(v, -u).T
    turned = [coming @ _about(u, 2 * np.pi * k / _TWISTS).T for k in range(_TWISTS)]
    coming = max(turned, key=lambda x: _nearest_others(still, x + u, a, b))
    numbers = np.concatenate([atoms.numbers, atoms.numbers])
    r = _distances(config.wall_from_A, APPROACH_FROM_A, config.scan_step_A)
    structures = tuple(Atoms(numbers, np.concatenate([still, coming + x * u])) for x in r)
    tangent = np.concatenate([np.tile(-0.5 * u, (len(atoms), 1)), np.tile(0.5 * u, (len(atoms), 1))])
    return Path(f"{atoms.symbols[a]}{a}...{atoms.symbols[b]}{b}", r, structures, tangent)


def _nearest_others(still: FloatArray, coming: FloatArray, a: int, b: int) -> float:
    """Smallest distance between the copies, their two leading atoms aside."""
    distances = np.linalg.norm(still[:, None] - coming[None], axis=-1)
    distances[a, b] = np.inf
    return float(distances.min())


def _sphere(n: int) -> FloatArray:
    """Unit vectors spread evenly (a Fibonacci lattice), (n, 3)."""
    k = np.arange(n) + 0.5
    z, angle = 1 - 2 * k / n, np.pi * (1 + 5**0.5) * k
    s = np.sqrt(1 - z * z)
    return np.stack([s * np.cos(angle), s * np.sin(angle), z], axis=1)


def _about(axis: FloatArray, angle: float) -> FloatArray:
    """Rotation about a unit vector (Rodrigues' formula), (3, 3)."""
    x, y, z = axis
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k))


def _rotation(start: FloatArray, end: FloatArray) -> FloatArray:
    """A rotation that takes one unit vector to another, (3, 3)."""
    axis = np.cross(start, end)
    sine, cosine = float(np.linalg.norm(axis)), float(start @ end)
    if sine < 1e-9:  # parallel, or opposite: then about any normal
        normal = np.cross(start, np.eye(3)[int(np.abs(start).argmin())])
        return np.eye(3) if cosine > 0 else _about(normal / np.linalg.norm(normal), np.pi)
    return _about(axis / sine, float(np.arctan2(sine, cosine)))
