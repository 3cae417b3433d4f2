"""Neighbour lists of ASE structures as they come: without a cell, with part of one, drifted away from it. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import complete_cell
from matscipy.neighbours import neighbour_list
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def full_cell(atoms: Atoms) -> FloatArray:
    """The cell (3, 3) in A, with unit vectors added along axes that have none."""
    cell = np.array(complete_cell(atoms.cell.array), dtype=np.float64)
    # A cell that is not periodic and has no volume says nothing.
    return cell if abs(np.linalg.det(cell)) > 1e-9 else np.eye(3)


def neighbours(atoms: Atoms, quantities: str, cutoff: float) -> tuple[NDArray[Any], ...]:
    """Matscipy's neighbour list.

    Args:
        quantities: letters of `matscipy.neighbours.neighbour_list`: "i", "j", "d" (A), "D" (A), "S".
        cutoff: A.
    """
    cell = full_cell(atoms)
    fractional = np.linalg.solve(cell.T, atoms.positions.T).T
    # Along axes that are not periodic the list needs a box around the atoms; their own cell may be anywhere.
    low, high = fractional.min(axis=0), fractional.max(axis=0)
    margin = 1.0 / np.linalg.norm(cell, axis=1)
    scale = np.where(atoms.pbc, 1.0, high - low + 2.0 * margin)
    origin = np.where(atoms.pbc, 0.0, low - margin) @ cell
    result = neighbour_list(
        quantities, positions=atoms.positions - origin, cell=cell * scale[:, None], pbc=atoms.pbc, cutoff=float(cutoff)
    )
    return result if isinstance(result, tuple) else (result,)
