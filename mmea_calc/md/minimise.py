"""Relaxing start structures with ASE's optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.optimize import BFGS

from ..errors import DataError
from ..potential import Potential

FMAX = 0.02  # eV/A
MAX_STEPS = 500


class _OfPotential(Calculator):
    """A potential that is loaded already as a calculator of ASE."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's name, declared by ASE as a plain attribute)

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = tuple(all_changes)
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        prediction = self.potential.predict(self.potential.collate([self.potential.graph(atoms)]))
        assert prediction.forces is not None
        if not bool(torch.isfinite(prediction.forces).all()):
            raise DataError("forces are not finite: are two atoms at the same place?")
        self.results = {"energy": float(prediction.energy[0]), "forces": prediction.forces.double().cpu().numpy()}


def minimise(potential: Potential, starts: Sequence[Atoms], *, fmax: float = FMAX) -> tuple[list[Atoms], list[str]]:
    """Relaxed copies of the structures in their cells, and one sentence each for those that did not get there.

    Args:
        potential: whose minima are looked for.
        starts: structures to begin from.
        fmax: largest force of a relaxed structure, eV/A.

    Raises:
        DataError: forces that are not finite.
    """
    relaxed, messages = [], []
    for i, start in enumerate(starts):
        atoms = start.copy()
        atoms.calc = _OfPotential(potential)
        with BFGS(atoms, logfile=None) as optimiser:
            try:
                converged = optimiser.run(fmax=fmax, steps=MAX_STEPS)
            except DataError as problem:
                raise DataError(f"start structure {i} cannot be relaxed: {problem}") from problem
        if not converged:
            messages.append(f"start structure {i}: the largest force is above {fmax} eV/A after {MAX_STEPS} steps")
        atoms.calc = None
        relaxed.append(atoms)
    return relaxed, messages
