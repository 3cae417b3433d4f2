"""Energies and forces along a path on which atoms come closer, and whether the wall there has a hole.

Going inwards, the wall begins where the energy is first `wall_rise_eV` above the lowest energy met so far. Inside of
it the energy must rise all the way: the force along the path stays repulsive. Where it falls there is a hole, from
which atoms that get over its rim do not come back. (The lowest energy *so far*: a deep hole would otherwise be taken
for the minimum.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ..config import CheckConfig
from ..potential import Potential

FloatArray = NDArray[np.float64]

# Atoms per call of the network: enough to fill two CPU cores, little enough for any memory.
ATOMS_PER_CALL = 400


@dataclass(frozen=True)
class Path:
    """Structures along which atoms come closer.

    Attributes:
        label: what comes closer, such as "C3-O7".
        distances_A: ascending, (n_points,).
        structures: one for every distance.
        tangent: derivative of the positions by the distance, (n_atoms, 3).
    """

    label: str
    distances_A: FloatArray
    structures: tuple[Atoms, ...]
    tangent: FloatArray


@dataclass(frozen=True)
class Hole:
    """A fall of the energy inside the wall.

    Attributes:
        rim_A: distance at which the energy begins to fall, going inwards.
        rim_eV: energy there above the minimum outside of the wall.
        bottom_A: distance of the lowest energy behind the rim.
        depth_eV: how far that is below the rim.
    """

    rim_A: float
    rim_eV: float
    bottom_A: float
    depth_eV: float

    def __str__(self) -> str:
        return f"{self.depth_eV:.2g} eV deep inside of {self.rim_A:.2f} Å, behind a rim of {self.rim_eV:.2g} eV"


@dataclass(frozen=True)
class Scan:
    """What a potential says along a `Path`.

    Attributes:
        label: of the path.
        distances_A: ascending, (n_points,).
        energies_eV: total energies above the minimum outside of the wall, (n_points,).
        forces_eV_per_A: along the path, positive is repulsive, (n_points,).
        largest_force_eV_per_A: on any atom; None if a force or energy is not finite.
        wall_A: where the wall begins; None if the energy never rises so far.
        hole: the outermost hole; None if there is none.
    """

    label: str
    distances_A: FloatArray = field(repr=False)
    energies_eV: FloatArray = field(repr=False)
    forces_eV_per_A: FloatArray = field(repr=False)
    largest_force_eV_per_A: float | None
    wall_A: float | None
    hole: Hole | None

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """As plain, JSON-ready values; the arrays are left out without `curves`."""
        arrays = ("distances_A", "energies_eV", "forces_eV_per_A")
        plain = {"label": self.label, "largest_force_eV_per_A": self.largest_force_eV_per_A, "wall_A": self.wall_A}
        result: dict[str, Any] = {**plain, "hole": None if self.hole is None else asdict(self.hole)}
        return result | ({name: getattr(self, name).tolist() for name in arrays} if curves else {})


def scan(
    potential: Potential,
    paths: Sequence[Path],
    config: CheckConfig,
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[Scan, ...]:
    """Evaluate all paths in batches. Raises DataError for an element that the backbone lacks."""
    structures = [atoms for path in paths for atoms in path.structures]
    energies, forces = evaluate(potential, structures, progress)
    results, start = [], 0
    for path in paths:
        these = slice(start, start := start + len(path.structures))
        along = np.array([(f * path.tangent).sum() for f in forces[these]])
        largest = max(float(np.sqrt((f * f).sum(1)).max()) for f in forces[these])
        results.append(_judge(path, energies[these], along, largest, config))
    return tuple(results)


def evaluate(
    potential: Potential, structures: Sequence[Atoms], progress: Callable[[float], None] = lambda done: None
) -> tuple[FloatArray, list[FloatArray]]:
    """Total energies (n_structures,), eV, and forces of every structure, eV/A. Raises DataError."""
    energies: list[FloatArray] = []
    forces: list[FloatArray] = []
    for start, end in _chunks([len(a) for a in structures]):
        graphs = [potential.graph(a) for a in structures[start:end]]
        energy, force = potential.predict_graphs(graphs, batch_size=len(graphs))
        energies.append(energy.numpy())
        forces += [f.numpy() for f in force]
        progress(end / len(structures))
    return np.concatenate(energies) if energies else np.zeros(0), forces


def _chunks(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of structures with about `ATOMS_PER_CALL` atoms together."""
    chunks, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > ATOMS_PER_CALL:
            chunks.append((start, i))
            start, total = i, 0
        total += size
    return [*chunks, (start, len(sizes))] if sizes else []


def _judge(path: Path, energies: FloatArray, along: FloatArray, largest: float, config: CheckConfig) -> Scan:
    r = path.distances_A
    if not (np.isfinite(energies).all() and np.isfinite(along).all() and np.isfinite(largest)):
        return Scan(path.label, r, energies - energies[-1], along, None, None, None)
    wall = _wall(energies, config.wall_rise_eV)
    bottom = float(energies.min() if wall is None else energies[wall:].min())
    hole = None if wall is None else _hole(r, energies - bottom, wall, config.min_hole_eV)
    return Scan(path.label, r, energies - bottom, along, largest, None if wall is None else float(r[wall]), hole)


def _wall(energies: FloatArray, rise: float) -> int | None:
    """The outermost point that is `rise` above the lowest outside of it."""
    lowest = np.minimum.accumulate(energies[::-1])[::-1]
    above = np.flatnonzero(energies >= lowest + rise)
    return int(above[-1]) if len(above) else None


def _hole(r: FloatArray, energies: FloatArray, wall: int, least: float) -> Hole | None:
    """The outermost fall of the energy by at least `least` inside of the point `wall`."""
    rim = wall
    for i in range(wall, -1, -1):
        if energies[i] > energies[rim]:
            rim = i
        elif energies[rim] - energies[i] >= least:
            # to the bottom: until the energy is above the rim again
            back = [j for j in range(i, -1, -1) if energies[j] > energies[rim]]
            last = back[0] + 1 if back else 0
            bottom = last + int(energies[last:rim].argmin())
            depth = float(energies[rim] - energies[bottom])
            return Hole(float(r[rim]), float(energies[rim]), float(r[bottom]), depth)
    return None


__all__ = ["Hole", "Path", "Scan", "evaluate", "scan"]
