"""LAMMPS in one process, with the forces of a calculator of ASE through `fix external`.

    with start_lammps(atoms, MMEACalculator("aspirin.adapter"), timestep_fs=0.5) as run:
        run.command("fix 1 all nvt temp 300 300 0.1")
        run.run(1000)
        atoms = run.structure()

In every step LAMMPS hands over positions and box, and takes forces, energy and, where there is a stress, the virial: so
thermostats, barostats, constraints, biases and computes of LAMMPS work as with any potential.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.calculators.lammps import Prism
from ase.data import atomic_numbers
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from ..errors import EngineError
from .library import new_lammps

FloatArray = NDArray[np.float64]

# ASE's unit of velocity in A/ps.
PER_PS = 1000 * units.fs
# Around atoms in directions that are not periodic, A: LAMMPS refuses boxes much thinner than its neighbour lists reach.
MARGIN = 5.0


class LammpsRun:
    """A LAMMPS whose atoms feel the forces of a calculator.

    Args:
        lammps: an instance of `lammps.lammps` with `units metal`, a box and its atoms.
        calculator: any calculator of ASE that has energies and forces.
        elements: symbol of the element of each atom type, in the order of the types.
        fix_id: name of the `fix external` that is added, on all atoms.

    Attributes:
        lammps: the instance; everything it can do is open.

    Raises:
        EngineError: other units, several processes, or elements that do not match the atom types.
    """

    def __init__(self, lammps: Any, calculator: Calculator, elements: Sequence[str], *, fix_id: str = "mmea") -> None:
        self.lammps, self._fix = lammps, fix_id
        self._numbers = np.array([0, *_checked(lammps, elements)])
        self._atoms = Atoms(calculator=calculator)
        self._problem: BaseException | None = None
        self._rotation: FloatArray = np.eye(3)
        self.command(f"fix {fix_id} all external pf/callback 1 1", f"fix_modify {fix_id} energy yes virial yes")
        lammps.set_fix_external_callback(fix_id, self._forces)

    def command(self, *lines: str) -> None:
        """Give LAMMPS lines of input.

        Raises:
            EngineError: LAMMPS refuses one.
            Exception: whatever the calculator raised, where a line made LAMMPS ask it.
        """
        for line in lines:
            refusal: Exception | None = None
            try:
                self.lammps.command(line)
            except Exception as problem:  # LAMMPS has no class of its own for this
                refusal = problem
            if self._problem is not None:
                cause, self._problem = self._problem, None
                self.lammps.command("timer timeout off")  # or the next run would end at once as well
                raise cause
            if refusal is not None:
                raise EngineError(f"LAMMPS refuses {line!r}: {' '.join(str(refusal).split())}") from refusal

    def run(self, n_steps: int) -> None:
        """Advance by `n_steps`; what else happens is up to the fixes. Raises as `command` does."""
        self.command(f"run {int(n_steps)}")

    def thermo(self, keyword: str) -> float:
        """A value as in LAMMPS's thermodynamic output, such as "temp" (K), "pe" or "etotal" (eV), after a run."""
        return float(self.lammps.get_thermo(keyword))

    def structure(self) -> Atoms:
        """Atoms in the order of their IDs: positions (unwrapped), velocities, masses, cell, pbc; ASE's units and frame.

        Raises:
            EngineError: the IDs are not 1 to the number of atoms.
        """
        lmp = self.lammps
        n = int(lmp.get_natoms())
        if not np.array_equal(np.sort(lmp.numpy.extract_atom("id")[:n]), np.arange(1, n + 1)):
            raise EngineError("the IDs of the atoms are not 1 to their number: `reset_atoms id` makes them so")
        order = np.argsort(lmp.numpy.extract_atom("id")[:n])
        types = lmp.numpy.extract_atom("type")[:n][order]
        cell, pbc, low = self._box()
        images = np.array(lmp.gather_atoms("image", 0, 3), dtype=np.float64).reshape(n, 3)
        positions = lmp.numpy.extract_atom("x")[:n][order] + images @ cell - np.where(pbc, low, 0.0)
        back = self._rotation.T
        atoms = Atoms(self._numbers[types], positions @ back, cell=cell @ back, pbc=pbc)
        if (masses := lmp.numpy.extract_atom("mass")) is not None:
            atoms.set_masses(masses[types])
        atoms.set_velocities(lmp.numpy.extract_atom("v")[:n][order] / PER_PS @ back)
        return atoms

    def close(self) -> None:
        """End this LAMMPS."""
        self.lammps.close()

    def __enter__(self) -> LammpsRun:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- called by LAMMPS ----------------------------------------------------------------------------------------

    def _forces(
        self, caller: Any, step: int, n_local: int, tags: NDArray[np.int64], x: FloatArray, f: FloatArray
    ) -> None:
        """Fill `f`, (n_atoms, 3), eV/A. An exception would be lost on its way through LAMMPS: it is kept."""
        f[:] = 0.0
        if self._problem is not None:
            return
        try:
            # LAMMPS reorders its atoms now and then; sorted by ID they stay the same structure.
            order = np.argsort(tags.ravel())
            f[order] = self._calculated(self.lammps.numpy.extract_atom("type")[:n_local][order], x[order], step)
        except BaseException as problem:
            self._problem = problem
            self.lammps.force_timeout()

    def _calculated(self, types: NDArray[np.int32], positions: FloatArray, step: int) -> FloatArray:
        cell, pbc, low = self._box()
        atoms = self._atoms
        if len(atoms) != len(types):
            self._atoms = atoms = Atoms(self._numbers[types], calculator=atoms.calc)
        atoms.numbers = self._numbers[types]
        atoms.set_cell(cell)
        atoms.pbc = pbc
        atoms.positions = positions - np.where(pbc, low, 0.0)
        forces = atoms.get_forces()
        if not np.isfinite(forces).all():
            raise EngineError(f"the calculator gives forces that are not finite at step {step}")
        self.lammps.fix_external_set_energy_global(self._fix, float(atoms.get_potential_energy()))
        self.lammps.fix_external_set_virial_global(self._fix, _virial(atoms))
        return forces

    def _box(self) -> tuple[FloatArray, NDArray[np.bool_], FloatArray]:
        """Lattice vectors (zero where LAMMPS's box only encloses the atoms), pbc, lower corner."""
        low, high, xy, yz, xz, periodic, _ = self.lammps.extract_box()
        x, y, z = np.subtract(high, low)
        pbc = np.array(periodic, dtype=bool)
        cell = np.array([[x, 0, 0], [xy, y, 0], [xz, yz, z]]) * pbc[:, None]
        return cell, pbc, np.array(low)


def start_lammps(
    atoms: Atoms,
    calculator: Calculator,
    *,
    timestep_fs: float = 0.5,
    log: str | None = None,
    arguments: Sequence[str] = (),
) -> LammpsRun:
    """A LAMMPS with these atoms, their velocities and masses, and no fix but the one that gives forces.

    Args:
        atoms: the structure. Directions that are not periodic get a box that follows the atoms.
        calculator: its forces.
        timestep_fs: time step, fs.
        log: LAMMPS's log file; None: none.
        arguments: further ones of LAMMPS's command line.

    A cell that LAMMPS would have turned is turned here, and `LammpsRun.structure` turns everything back.

    Raises:
        EngineError: LAMMPS is not installed, or refuses the structure; a structure without atoms or with constraints.
    """
    if len(atoms) == 0:
        raise EngineError("the structure has no atoms; expected at least one")
    if atoms.constraints:
        named = ", ".join(sorted({type(c).__name__ for c in atoms.constraints}))
        raise EngineError(f"LAMMPS would not know of the constraints {named}: remove them, and use its own fixes")
    if not 0 < timestep_fs < np.inf:
        raise EngineError(f"timestep_fs must be positive, got {timestep_fs}")
    kinds, types = np.unique(np.stack([atoms.numbers, atoms.get_masses()]), axis=1, return_inverse=True)
    types = types.ravel() + 1
    prism = Prism(atoms.cell.complete().array, atoms.pbc)
    x = prism.vector_to_lammps(atoms.positions)
    v = prism.vector_to_lammps(atoms.get_velocities()) * PER_PS
    lmp = new_lammps(["-log", log or "none", "-screen", "none", "-nocite", *arguments])
    symbols = [Atoms(numbers=[int(z)]).get_chemical_symbols()[0] for z in kinds[0]]
    try:
        lmp.commands_list(_setting_up(atoms, prism, x, kinds[1], timestep_fs))
        # LAMMPS would bring atoms into the box by itself, and forget where they came from.
        images = np.where(atoms.pbc, np.floor(x @ np.linalg.inv(prism.cell)), 0.0)
        x = np.where(images.any(axis=1, keepdims=True), x - images @ prism.cell, x)
        flags = [lmp.encode_image_flags(*image) for image in images.astype(int).tolist()]
        ids = list(range(1, len(atoms) + 1))
        made = lmp.create_atoms(len(atoms), ids, types.tolist(), x.ravel(), v.ravel(), flags)
        if made != len(atoms):
            raise EngineError(f"LAMMPS took {made} of {len(atoms)} atoms: are there any that are not finite?")
        run = LammpsRun(lmp, calculator, symbols)
    except Exception as problem:
        lmp.close()
        if isinstance(problem, EngineError):
            raise
        raise EngineError(f"LAMMPS refuses this structure: {' '.join(str(problem).split())}") from problem
    run._rotation = prism.rot_mat
    return run


def _setting_up(atoms: Atoms, prism: Prism, x: FloatArray, masses: FloatArray, timestep_fs: float) -> list[str]:
    low, span = np.zeros(3), prism.get_lammps_prism()
    high, tilts = span[:3].copy(), span[3:]
    free = np.flatnonzero(~atoms.pbc)
    low[free], high[free] = x.min(axis=0)[free] - MARGIN, x.max(axis=0)[free] + MARGIN
    edges = " ".join(f"{a!r} {b!r}" for a, b in zip(low.tolist(), high.tolist(), strict=True))
    skewed = any(atoms.pbc) and prism.is_skewed()
    shape = f"prism {edges} " + " ".join(repr(float(t)) for t in tilts) if skewed else f"block {edges}"
    return [
        "units metal",
        "atom_style atomic",
        "boundary " + " ".join("p" if periodic else "m" for periodic in atoms.pbc),
        "box tilt large",
        f"region box {shape} units box",
        f"create_box {len(masses)} box",
        *(f"mass {i} {mass!r}" for i, mass in enumerate(masses.tolist(), 1)),
        # No pair forces, yet a list of neighbours, whose renewal brings atoms back into the box.
        "pair_style zero 1.0 nocoeff",
        "pair_coeff * *",
        f"timestep {timestep_fs / 1000!r}",
    ]


def _checked(lammps: Any, elements: Sequence[str]) -> list[int]:
    """Atomic numbers of the types. Raises EngineError."""
    if lammps.extract_setting("world_size") != 1:
        raise EngineError(
            "fix external runs in one process here, got several: export the adapter for ML-IAP (`mmea export lammps`)"
        )
    if (found := lammps.extract_global("units")) != "metal":
        raise EngineError(f"LAMMPS runs with `units {found}`; expected `units metal` (eV, A, ps)")
    n_types = lammps.extract_global("ntypes")
    if isinstance(elements, str) or len(elements) != n_types:
        raise EngineError(f"LAMMPS has {n_types} atom types; expected an element for each, got {elements!r}")
    if unknown := [symbol for symbol in elements if symbol not in atomic_numbers]:
        raise EngineError(f"{unknown[0]!r} is no element")
    return [atomic_numbers[symbol] for symbol in elements]


def _virial(atoms: Atoms) -> list[float]:
    """In the order xx, yy, zz, xy, xz, yz and LAMMPS's sign, eV; zero where there is no stress."""
    if not atoms.pbc.all():
        return [0.0] * 6
    try:
        stress = voigt_6_to_full_3x3_stress(atoms.get_stress())
    except PropertyNotImplementedError:
        return [0.0] * 6
    rows, columns = (0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2)
    return (-atoms.get_volume() * stress[rows, columns]).tolist()


__all__ = ["LammpsRun", "start_lammps"]
