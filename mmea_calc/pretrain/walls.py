"""Two atoms alone, from their bond inwards: what a network needs to have a wall for every pair of elements.

Molecules show few pairs closer than a bond, and most pairs of the rarer elements not at all; a network makes up the
rest. GFN2-xTB falls nowhere on the way in. Energies here are its own above those of its separate atoms, on top of the
separate atoms of another level: of walls that are electron volts high, levels of theory differ by little.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from ase.data import covalent_radii

from ..errors import DataError
from .dataset import check_ending, read_e0, write_arrays
from .label import xtb_energy_and_forces

INNER, OUTER, STEP = 0.45, 1.0, 0.03  # A; the outer end in units of the sum of the covalent radii
# Further in than this above the energy at the outer end, the wall goes on with the slope that it has there, eV.
HIGHEST = 100.0
VALENCE = {1: 1, 6: 4, 7: 5, 8: 6, 9: 7, 15: 5, 16: 6, 17: 7, 35: 7, 53: 7}


def wall(a: int, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of two atoms of these elements: distances (ascending, A), total energies (eV) and their slopes (eV/A).

    Raises:
        DataError: GFN2-xTB gives no finite number. MMEAError: tblite is not installed.
    """
    outer = OUTER * (covalent_radii[a] + covalent_radii[b])
    distances = outer - STEP * np.arange(int((outer - INNER) / STEP) + 1)
    energies, slopes = np.zeros(len(distances)), np.zeros(len(distances))
    for i, r in enumerate(distances):
        if i and energies[i - 1] - energies[0] > HIGHEST:
            slopes[i:] = slopes[i - 1]
            energies[i:] = energies[i - 1] + slopes[i - 1] * (distances[i:] - distances[i - 1])
            break
        energies[i], forces = xtb_energy_and_forces(
            np.array([a, b]), np.array([[0, 0, 0], [0, 0, r]]), unpaired=(VALENCE[a] + VALENCE[b]) % 2
        )
        slopes[i] = -forces[1, 2]
        if not np.isfinite([energies[i], slopes[i]]).all():
            raise DataError(f"GFN2-xTB gives {energies[i]} eV for elements {a} and {b} at {r:.2f} A")
    return distances[::-1], energies[::-1], slopes[::-1]


def walls(*, data: Path, cheap: Path, out: Path) -> int:
    """Write a packed set of all pairs of elements; the number of its structures.

    Args:
        data: folder with e0.json of the level that the set is to stand beside.
        cheap: folder with GFN2-xTB's.
        out: file, .npz.

    Raises:
        DataError: an energy of an atom is missing, or GFN2-xTB fails. MMEAError: tblite is not installed.
    """
    check_ending(out)
    here, there = read_e0(data), read_e0(cheap)
    if missing := sorted(set(VALENCE) - (here.keys() & there.keys())):
        raise DataError(f"energies of isolated atoms are missing for the elements {missing} in {data} or {cheap}")
    numbers, positions, forces, energy = [], [], [], []
    for a, b in combinations_with_replacement(VALENCE, 2):
        shift = here[a] + here[b] - there[a] - there[b]
        for r, e, slope in zip(*wall(a, b), strict=True):
            numbers += [a, b]
            positions += [(0.0, 0.0, 0.0), (0.0, 0.0, r)]
            forces += [(0.0, 0.0, slope), (0.0, 0.0, -slope)]
            energy.append(e + shift)
    write_arrays(
        out,
        numbers=np.array(numbers, np.uint8),
        n_atoms=np.full(len(energy), 2, np.uint8),
        positions=np.array(positions, "f4"),
        forces=np.array(forces, "f4"),
        energy=np.array(energy),
    )
    return len(energy)


__all__ = ["HIGHEST", "wall", "walls"]
