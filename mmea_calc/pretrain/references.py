"""What a backbone is held against beside forces: geometries, vibrations, a torsion, a hydrogen bond, at PBE/def2-SVP.

    mmea pretrain references --out data/pbe/references.json

The level of theory is that of `label`; interaction energies carry its basis set superposition error, as labels do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.optimize import BFGS
from ase.vibrations import VibrationsData

from ..errors import DataError, MMEAError
from ..files import write_text
from .label import BOHR, HARTREE, LEVEL_OF_THEORY, energy_and_forces, mean_field

# Names of ASE's g2 collection; none of them is in a benchmark that this project measures itself by.
MOLECULES = (
    *("H2O", "NH3", "CH4", "CO2", "HCN", "C2H2", "C2H4", "C2H6", "H2CO", "CH3OH"),
    *("HCOOH", "CH3CN", "CH3CHO", "H3CNH2", "N2H4", "H2O2", "SH2", "CH3SH", "CH3Cl", "CH3OCH3"),
)
DIHEDRALS = tuple(range(0, 181, 15))  # of butane, degrees
SEPARATIONS = (-0.5, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0)  # beyond the optimum, A
CONVERGED = 0.003  # largest force of an optimised geometry, eV/A


class _PBE(Calculator):
    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's convention)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        assert atoms is not None
        found = energy_and_forces(atoms.numbers.tolist(), atoms.positions)
        if found is None:
            raise MMEAError(f"{atoms.get_chemical_formula()} does not converge")
        self.results = {"energy": float(found[0]), "forces": found[1]}


def make_references(out: Path, *, progress: Callable[[str], None] = lambda line: None) -> int:
    """Compute what is missing in `out` (json) and write it after every item; how many items it holds then.

    Raises:
        MMEAError: PySCF is not installed, or something does not converge. DataError: `out` cannot be read.
    """
    items: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: lambda name=name: _vibrating(molecule(name)) for name in MOLECULES},  # type: ignore[misc]
        "butane": _butane,
        "water dimer": _water_dimer,
    }
    found = read_references(out) if out.exists() else {}
    for name, make in items.items():
        if name not in found:
            found[name] = make()
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, json.dumps({"level_of_theory": LEVEL_OF_THEORY, "items": found}, indent=1) + "\n")
            progress(f"{name}: done")
    return len(found)


def read_references(file: Path) -> dict[str, dict[str, Any]]:
    """The items of a file of `make_references`. Raises DataError."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["items"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{file} has no references ({problem}): make them with `references --out {file}`") from problem


def _optimised(atoms: Atoms) -> Atoms:
    atoms.calc = _PBE()
    optimiser = BFGS(atoms, logfile=None)
    if not optimiser.run(fmax=CONVERGED, steps=200):
        raise MMEAError(f"{atoms.get_chemical_formula()} is not at rest after 200 steps")
    return atoms


def _kept(atoms: Atoms) -> dict[str, Any]:
    return {
        "numbers": atoms.numbers.tolist(),
        "positions": np.round(atoms.positions, 6).tolist(),
        "energy": float(atoms.get_potential_energy()),
    }


def _vibrating(atoms: Atoms) -> dict[str, Any]:
    """Optimised, with its harmonic wavenumbers, cm^-1."""
    atoms = _optimised(atoms)
    field = mean_field(atoms.numbers.tolist(), atoms.positions)
    field.kernel()
    if not field.converged:
        raise MMEAError(f"{atoms.get_chemical_formula()} does not converge")
    hessian = np.asarray(field.Hessian().kernel()).transpose(0, 2, 1, 3) * HARTREE / BOHR**2
    return {**_kept(atoms), "wavenumbers": wavenumbers(atoms, hessian).tolist()}


def wavenumbers(atoms: Atoms, hessian: np.ndarray) -> np.ndarray:
    """Harmonic vibrations, cm^-1, ascending, imaginary ones negative; without translations and rotations.

    Args:
        atoms: at rest; linear molecules are told by their moments of inertia.
        hessian: (n_atoms, 3, n_atoms, 3), eV/A^2.
    """
    n = len(atoms)
    matrix = hessian.reshape(3 * n, 3 * n)
    masses = np.repeat(atoms.get_masses(), 3)
    rigid = _rigid_motions(atoms) * np.sqrt(masses)
    basis, size, _ = np.linalg.svd(rigid.T, full_matrices=True)
    vibrating = basis[:, int((size > 1e-4 * size[0]).sum()) :]
    weighted = (matrix + matrix.T) / 2 / np.sqrt(np.outer(masses, masses))
    # a Hessian with the rigid motions taken out, back in the form that ASE takes
    projected = vibrating @ vibrating.T @ weighted @ vibrating @ vibrating.T * np.sqrt(np.outer(masses, masses))
    found = VibrationsData.from_2d(atoms, projected).get_frequencies()
    signed = np.where(np.abs(found.imag) > np.abs(found.real), -np.abs(found.imag), found.real)
    order = np.argsort(np.abs(signed))[int(3 * n - vibrating.shape[1]) :]
    return np.sort(signed[order])


def _rigid_motions(atoms: Atoms) -> np.ndarray:
    """Translations and rotations, (6, 3 n_atoms)."""
    about = atoms.positions - atoms.get_center_of_mass()
    shifts = [np.tile(axis, (len(atoms), 1)) for axis in np.eye(3)]
    turns = [np.cross(axis, about) for axis in np.eye(3)]
    return np.array([motion.ravel() for motion in (*shifts, *turns)])


def _butane() -> dict[str, Any]:
    """Energies while one half is turned about the middle bond, all else as in the optimised trans form."""
    atoms = _optimised(molecule("trans-butane"))
    found = []
    for turned in butane_scan(atoms):
        turned.calc = _PBE()
        found.append(_kept(turned))
    return {**_kept(atoms), "dihedrals": list(DIHEDRALS), "scan": found}


def butane_scan(atoms: Atoms) -> list[Atoms]:
    """Butane at the angles of `DIHEDRALS`."""
    carbons = np.flatnonzero(atoms.numbers == 6)
    bonds = {(int(i), int(j)) for i in carbons for j in carbons if i != j and atoms.get_distance(i, j) < 1.7}
    inner = [int(i) for i in carbons if sum(i == a for a, _ in bonds) == 2]
    outer = [next(j for i, j in bonds if i == k and j not in inner) for k in inner]
    # what hangs on the second inner carbon: all that is nearer to it than to the first
    near = atoms.get_distances(inner[1], range(len(atoms))) < atoms.get_distances(inner[0], range(len(atoms)))
    turned = []
    for angle in DIHEDRALS:
        one = Atoms(atoms.numbers, atoms.positions)
        one.set_dihedral(outer[0], inner[0], inner[1], outer[1], angle, mask=near.astype(int))
        turned.append(one)
    return turned


def _water_dimer() -> dict[str, Any]:
    """Interaction energies while the two molecules are moved apart along O-O, all else as in the optimised dimer."""
    water = float(_optimised(molecule("H2O")).get_potential_energy())
    # donor O-H towards the acceptor's oxygen
    start = Atoms(
        "OHHOHH",
        positions=[
            *([0.0, 0.0, 0.0], [0.97, 0.0, 0.0], [-0.24, 0.94, 0.0]),
            *([2.85, 0.0, 0.0], [3.20, -0.45, 0.77], [3.20, -0.45, -0.77]),
        ],
    )
    dimer = _optimised(start)
    found = []
    for apart in dimer_scan(dimer):
        apart.calc = _PBE()
        found.append({**_kept(apart), "interaction": float(apart.get_potential_energy()) - 2 * water})
    distance = float(dimer.get_distance(0, 3))
    return {**_kept(dimer), "distances": [distance + s for s in SEPARATIONS], "scan": found}


def dimer_scan(dimer: Atoms) -> list[Atoms]:
    """The dimer with its second half at the distances of `SEPARATIONS`."""
    axis = dimer.positions[3] - dimer.positions[0]
    axis /= np.linalg.norm(axis)
    moved = []
    for shift in SEPARATIONS:
        one = Atoms(dimer.numbers, dimer.positions)
        one.positions[3:] += shift * axis
        moved.append(one)
    return moved


__all__ = ["MOLECULES", "butane_scan", "dimer_scan", "make_references", "read_references", "wavenumbers"]
