"""Errors of a potential on labelled structures: the adapter, and its bare backbone beside it.

Energies are total energies. "per atom" divides the error of every structure by its number of atoms before averaging;
errors of forces are over Cartesian components, so that structures weigh as much as they have atoms; those of stresses
over the nine components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from .data.dataset import Dataset
from .data.preflight import shortest_distance
from .data.prepared import PreparedDataset
from .errors import DataError
from .graph import Graph, check_elements
from .potential import Potential
from .training.team import SOLO, Team

if TYPE_CHECKING:
    from .plots import ParitySeries

FloatArray = NDArray[np.float64]
MEV = 1e3


@dataclass(frozen=True)
class ForcesErrors:
    """Errors of force components; None where no structure has forces.

    Attributes:
        n_atoms: atoms with labelled forces; each has three components.
        mae_meV_per_A, rmse_meV_per_A: mean absolute and root mean square error.
    """

    n_atoms: int
    mae_meV_per_A: float | None
    rmse_meV_per_A: float | None


@dataclass(frozen=True)
class EnergyErrors:
    """Errors of total energies; None where no structure has an energy.

    Attributes:
        n_structures: structures with a labelled energy.
        mae_meV, rmse_meV: of the energy of a structure.
        mae_meV_per_atom, rmse_meV_per_atom: of that energy over the structure's number of atoms.
    """

    n_structures: int
    mae_meV: float | None
    rmse_meV: float | None
    mae_meV_per_atom: float | None
    rmse_meV_per_atom: float | None


@dataclass(frozen=True)
class StressErrors:
    """Errors of the nine components of stresses; None where no structure has one.

    Attributes:
        n_structures: structures with a labelled stress.
        mae_meV_per_A3, rmse_meV_per_A3: mean absolute and root mean square error; 1 meV/A^3 is 0.16 GPa.
    """

    n_structures: int
    mae_meV_per_A3: float | None
    rmse_meV_per_A3: float | None


@dataclass(frozen=True)
class GroupErrors:
    """Errors over all structures, or over those of one `config_type`."""

    n_structures: int
    energy: EnergyErrors
    forces: ForcesErrors
    stress: StressErrors


@dataclass(frozen=True)
class ModelEvaluation:
    """One model's errors, and its predictions for parity plots.

    Attributes:
        label: "adapter" or "backbone".
        overall: over all structures.
        by_config_type: config_type -> errors, in alphabetical order.
        forces_by_element: chemical symbol -> errors of the forces on its atoms, by atomic number.
        energies: predicted total energies, (n_structures,), eV.
        forces: predicted forces, one (n_atoms, 3) array per structure, eV/A.
        stresses: predicted stresses, (n_structures, 3, 3), eV/A^3, ASE's sign; empty where no label asks for them.
    """

    label: str
    overall: GroupErrors
    by_config_type: dict[str, GroupErrors]
    forces_by_element: dict[str, ForcesErrors]
    energies: FloatArray = field(repr=False)
    forces: tuple[FloatArray, ...] = field(repr=False)
    stresses: FloatArray = field(repr=False, default_factory=lambda: np.zeros((0, 3, 3)))

    def to_dict(self) -> dict[str, Any]:
        """The errors as plain, JSON-ready values, without the predictions."""
        return {
            "overall": asdict(self.overall),
            "by_config_type": {name: asdict(errors) for name, errors in self.by_config_type.items()},
            "forces_by_element": {symbol: asdict(errors) for symbol, errors in self.forces_by_element.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        dataset: the structures and their labels.
        backbone: the bare backbone.
        adapter: the same with the adapter; None where the potential has none.
        backbone_name: of the backbone.
        same_reference_energies: whether the bare backbone was given the adapter's reference energies.
    """

    dataset: Dataset = field(repr=False)
    backbone: ModelEvaluation
    adapter: ModelEvaluation | None
    backbone_name: str
    same_reference_energies: bool

    @property
    def models(self) -> tuple[ModelEvaluation, ...]:
        """Adapter first, then the backbone."""
        return (self.backbone,) if self.adapter is None else (self.adapter, self.backbone)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, as plain, JSON-ready values."""
        return {
            "data": {"name": self.dataset.name, "structures": len(self.dataset), "sha256": self.dataset.hash},
            "backbone_name": self.backbone_name,
            "same_reference_energies": self.same_reference_energies,
            **{model.label: model.to_dict() for model in self.models},
        }

    def parity(self) -> list[ParitySeries]:
        """Predictions against labels as `mmea_calc.plots` draws them, the backbone first and the adapter over it.

        Structures without a label are left out. Where there are several compositions, of two structures each or more,
        energies are relative to the mean label of theirs: those of unlike molecules are so far apart that no error
        would be seen.
        """
        from .plots import ParitySeries

        structures = self.dataset.structures
        energy_rows = [i for i, s in enumerate(structures) if s.energy is not None]
        force_rows = [i for i, s in enumerate(structures) if s.forces is not None]
        stress_rows = [i for i, s in enumerate(structures) if s.stress is not None]
        n_atoms = np.array([len(structures[i].atoms) for i in energy_rows], dtype=float)
        energies = np.array([structures[i].energy for i in energy_rows], dtype=float)
        made_of = [structures[i].atoms.numbers for i in energy_rows]
        origin = _means_of_compositions(made_of, energies / n_atoms)
        return [
            ParitySeries(
                label=model.label,
                energy=model.energies[energy_rows] / n_atoms,
                reference_energy=energies / n_atoms,
                energy_origin=origin,
                forces=_stack(model.forces[i] for i in force_rows),
                reference_forces=_stack(structures[i].forces for i in force_rows),
                stress=model.stresses[stress_rows],
                reference_stress=np.array([structures[i].stress for i in stress_rows]).reshape(-1, 3, 3),
            )
            for model in reversed(self.models)
        ]


def evaluate(
    potential: Potential,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    same_reference_energies: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team = SOLO,
) -> Evaluation:
    """Errors of a potential on labelled structures.

    Args:
        potential: a backbone, with an adapter or without.
        dataset: structures with energies, forces or both.
        batch_size: structures per call of the network.
        same_reference_energies: give the bare backbone the adapter's reference energies, so that its energy errors
            are those before training (zero-shot) and not a difference of levels of theory; False: its own.
        progress: called with the number of evaluated structures and their total, counting both models.
        team: processes that share the work; all of them return the same.

    Raises:
        DataError: no structures or no labels; an element the backbone lacks; positions that are not finite.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    counts = dataset.counts
    if not counts["energy"] and not counts["forces"]:
        apart = ", but for isolated atoms, which are not compared" if dataset.isolated_atoms else ""
        raise DataError(
            f"{dataset.name}: expected structures with energies or forces to compare with, found none{apart}"
        )
    graphs = _graphs(potential, dataset)
    adapted = potential.adapter is not None and potential.adapter.enabled
    total = len(graphs) * (1 + adapted)
    want_forces, want_stress = counts["forces"] > 0, counts["stress"] > 0

    def run(label: str, done: int) -> ModelEvaluation:
        mine = {}
        starts = range(0, len(graphs), batch_size)
        for start in team.mine(starts):
            some = graphs[start : start + batch_size]
            mine[start] = _predicted(potential, some, forces=want_forces, stress=want_stress)
            progress(done + min(start + team.size * batch_size, len(graphs)), total)
        found = {start: part for parts in team.gather(mine) for start, part in parts.items()}
        energies, stresses = (np.concatenate([found[start][k] for start in starts]) for k in (0, 2))
        forces = tuple(f for start in starts for f in found[start][1])
        _check_finite(dataset, energies, forces)
        return _compare(label, dataset, energies, forces, stresses)

    with potential.folded():
        with_adapter = run("adapter", 0) if adapted else None
    shared = potential.reference_energies
    with potential.adapter_disabled():
        if same_reference_energies:
            potential.reference_energies = shared
        bare = run("backbone", len(graphs) * adapted)
    return Evaluation(dataset, bare, with_adapter, potential.backbone.name, same_reference_energies)


def _graphs(potential: Potential, dataset: Dataset) -> Sequence[Graph]:
    """Neighbour lists of all structures, every one checked before the first is computed."""
    if isinstance(dataset, PreparedDataset):
        dataset.check_elements(potential.backbone.elements)
        return dataset.graphs(potential.backbone.r_max, potential.check_charge)
    graphs = []
    for item in dataset.structures:
        check_elements(np.unique(item.atoms.numbers), potential.backbone.elements, item.where)
        try:
            graphs.append(potential.graph(item.atoms))
        except DataError as problem:
            raise DataError(f"{item.where}: {problem}") from problem
    return graphs


def _check_finite(dataset: Dataset, energies: FloatArray, forces: tuple[FloatArray, ...]) -> None:
    """Raise a DataError where two atoms at one place are why a result is not finite; others show in the errors."""
    for i, item in enumerate(dataset.structures):
        if not (np.isfinite(energies[i]) and np.isfinite(forces[i] if forces else 0.0).all()):
            shortest_distance(item)


def _predicted(
    potential: Potential, graphs: Sequence[Graph], *, forces: bool, stress: bool
) -> tuple[FloatArray, list[FloatArray], FloatArray]:
    """Energies (n,), forces of every structure, stresses (n, 3, 3); empty where not wanted."""
    found = potential.predict(potential.collate(graphs), forces=forces, stress=stress)
    components = [] if found.forces is None else found.forces.double().cpu().split([g.n_atoms for g in graphs])
    stresses = np.zeros((0, 3, 3)) if found.stress is None else found.stress.double().cpu().numpy()
    return found.energy.cpu().numpy(), [f.numpy() for f in components], stresses


def _compare(
    label: str, dataset: Dataset, energies: FloatArray, forces: tuple[FloatArray, ...], stresses: FloatArray
) -> ModelEvaluation:
    structures = dataset.structures
    has_energy = np.array([s.energy is not None for s in structures])
    energy_error = energies - np.array([s.energy or 0.0 for s in structures])
    forces_error = [None if s.forces is None else forces[i] - s.forces for i, s in enumerate(structures)]
    n_atoms = np.array([len(s.atoms) for s in structures], dtype=float)

    def group(rows: list[int]) -> GroupErrors:
        known = [i for i in rows if has_energy[i]]
        return GroupErrors(
            n_structures=len(rows),
            energy=_energy_errors(energy_error[known], n_atoms[known]),
            forces=_forces_errors(_stack(forces_error[i] for i in rows)),
            stress=_stress_errors([stresses[i] - s for i in rows if (s := structures[i].stress) is not None]),
        )

    by_type: dict[str, list[int]] = {}
    for i, item in enumerate(structures):
        by_type.setdefault(item.config_type, []).append(i)
    all_forces = _stack(forces_error)
    numbers = np.concatenate([s.atoms.numbers for s in structures if s.forces is not None] or [np.zeros(0, dtype=int)])
    return ModelEvaluation(
        label=label,
        overall=group(list(range(len(structures)))),
        by_config_type={name: group(rows) for name, rows in sorted(by_type.items())},
        forces_by_element={chemical_symbols[z]: _forces_errors(all_forces[numbers == z]) for z in np.unique(numbers)},
        energies=energies,
        forces=forces,
        stresses=stresses,
    )


def _energy_errors(errors: FloatArray, n_atoms: FloatArray) -> EnergyErrors:
    return EnergyErrors(len(errors), *_mae_rmse(errors), *_mae_rmse(errors / n_atoms))


def _forces_errors(errors: FloatArray) -> ForcesErrors:
    return ForcesErrors(len(errors), *_mae_rmse(errors))


def _stress_errors(errors: list[FloatArray]) -> StressErrors:
    return StressErrors(len(errors), *_mae_rmse(np.array(errors)))


def _mae_rmse(errors: FloatArray) -> tuple[float | None, float | None]:
    """In meV where `errors` is in eV."""
    if errors.size == 0:
        return None, None
    return MEV * float(np.abs(errors).mean()), MEV * float(np.sqrt((errors**2).mean()))


def _means_of_compositions(numbers: Sequence[NDArray[np.int_]], values: FloatArray) -> FloatArray | None:
    """For every structure the mean value of those with its composition, (n,); None for one composition or too many."""
    kinds: dict[bytes, list[int]] = {}
    for i, z in enumerate(numbers):
        kinds.setdefault(np.sort(z).astype(int).tobytes(), []).append(i)
    if len(kinds) < 2 or 2 * len(kinds) > len(values):
        return None
    means = np.zeros(len(values))
    for rows in kinds.values():
        means[rows] = values[rows].mean()
    return means


def _stack(forces: Iterable[FloatArray | None]) -> FloatArray:
    """(n, 3); an empty one where there is nothing."""
    return np.concatenate([np.zeros((0, 3)), *(f for f in forces if f is not None)])


__all__ = ["EnergyErrors", "Evaluation", "ForcesErrors", "GroupErrors", "ModelEvaluation", "StressErrors", "evaluate"]
