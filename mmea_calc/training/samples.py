"""Structures as a trainer takes them, from memory or from a prepared file, and errors on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
import torch

from ..config import TrainConfig
from ..data.dataset import Dataset, LabelCounts, Labelled
from ..data.prepared import PreparedDataset
from ..graph import Graph
from ..loss import Labels, batch_loss, collect_labels
from ..potential import Potential
from .team import SOLO, Team


@dataclass(frozen=True)
class Errors:
    """Mean absolute errors; NaN where no structure carries the label. `loss` is weighted as in training."""

    loss: float
    energy_mae_meV: float
    energy_mae_meV_per_atom: float
    forces_mae_meV_per_A: float

    def to_dict(self) -> dict[str, float]:
        return {
            "energy_mae_meV": self.energy_mae_meV,
            "energy_mae_meV_per_atom": self.energy_mae_meV_per_atom,
            "forces_mae_meV_per_A": self.forces_mae_meV_per_A,
        }


T = TypeVar("T")


class _Joined(Sequence[T]):
    """One sequence and then another."""

    def __init__(self, first: Sequence[T], second: Sequence[T]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        n = len(self.first)
        return self.first[index] if index < n else self.second[index - n]


class Samples:
    """Structures with their neighbour lists, from which batches are made; those of a prepared file stay in it.

    Raises:
        DataError: a prepared file that was made for another cutoff.
    """

    structures: Sequence[Labelled]
    graphs: Sequence[Graph]

    def __init__(self, dataset: Dataset, potential: Potential) -> None:
        self.structures, self.hash = dataset.structures, dataset.hash
        self._prepared = dataset if isinstance(dataset, PreparedDataset) else None
        if self._prepared is not None:
            self.graphs = self._prepared.graphs(potential.backbone.r_max, potential.check_charge)
            self.has_stress = self._prepared.counts["stress"] > 0
        else:
            self.graphs = [potential.graph(s.atoms) for s in self.structures]
            self.has_stress = any(s.stress is not None for s in self.structures)

    def __len__(self) -> int:
        return len(self.structures)

    def joined(self, other: Samples) -> Samples:
        """These and then those of `other`; stresses are those of these."""
        both = copy(self)
        both.structures = _Joined(self.structures, other.structures)
        both.graphs = _Joined(self.graphs, other.graphs)
        both.hash = f"{self.hash}+{other.hash}"
        both._prepared = None
        return both

    def labels(self, indices: Sequence[int], potential: Potential, *, device: torch.device | None = None) -> Labels:
        """In the precision of a potential, on a device, its own if none is given."""
        chosen = [self.structures[i] for i in indices]
        return collect_labels(chosen, dtype=potential.dtype, device=potential.device if device is None else device)

    def for_reference_energies(self, dataset: Dataset) -> tuple[Dataset, Sequence[Graph]]:
        """Structures that reference energies are fitted to: `dataset` itself, or a sample of prepared data."""
        if self._prepared is None:
            return dataset, self.graphs
        some = self._prepared.sample()
        return some, some.graphs(self._prepared.file.r_max)

    def label_counts(self, indices: Sequence[int]) -> LabelCounts:
        """How much is labelled in these structures, which a process need not have read."""
        if self._prepared is not None:
            return self._prepared.label_counts(indices)
        return LabelCounts.of([self.structures[i] for i in indices])


@dataclass(frozen=True)
class _Part:
    """Sums over a batch, and errors of its labelled energies, eV and eV/atom."""

    loss: float
    energies: np.ndarray
    energies_per_atom: np.ndarray
    forces: float
    n_components: float


def measure(
    potential: Potential, samples: Samples, config: TrainConfig, *, stage: int = 1, team: Team = SOLO
) -> Errors:
    """Errors of the potential as it is, in batches of a fixed order, which the processes of a team share."""
    size = max(config.batch_size, 8)
    starts = range(0, len(samples), size)
    mine = {
        start: _measure_batch(potential, samples, range(start, min(start + size, len(samples))), config, stage)
        for start in team.mine(starts)
    }
    found = {start: part for some in team.gather(mine) for start, part in some.items()}
    parts = [found[start] for start in starts]
    energies = np.concatenate([p.energies for p in parts])
    energies_per_atom = np.concatenate([p.energies_per_atom for p in parts])
    # Added up in the order of the batches, so that the number of processes changes no bit.
    loss = forces_error = forces_count = 0.0
    for part in parts:
        loss += part.loss
        forces_error += part.forces
        forces_count += part.n_components
    return Errors(
        loss=loss / len(samples),
        energy_mae_meV=1e3 * float(energies.mean()) if len(energies) else math.nan,
        energy_mae_meV_per_atom=1e3 * float(energies_per_atom.mean()) if len(energies) else math.nan,
        forces_mae_meV_per_A=1e3 * forces_error / forces_count if forces_count else math.nan,
    )


def _measure_batch(potential: Potential, samples: Samples, rows: range, config: TrainConfig, stage: int) -> _Part:
    labels = samples.labels(rows, potential)
    batch = potential.collate([samples.graphs[i] for i in rows])
    prediction = potential.predict(batch, stress=config.stress_weight > 0 and samples.has_stress)
    energy_weight, forces_weight = stage_weights(config, stage)
    part = batch_loss(prediction, labels, config, energy_weight=energy_weight, forces_weight=forces_weight)
    known = labels.energy_mask.bool()
    error = (prediction.energy - labels.energy).abs()[known]
    assert prediction.forces is not None
    return _Part(
        loss=float(part.total) * len(rows),
        energies=error.cpu().numpy(),
        energies_per_atom=(error / labels.atoms_per_graph[known]).cpu().numpy(),
        forces=float(((prediction.forces - labels.forces).abs() * labels.forces_mask).double().sum()),
        n_components=3 * float(labels.forces_mask.sum()),
    )


def stage_weights(config: TrainConfig, stage: int) -> tuple[float, float]:
    """Weights of energy and forces in stage 1 or 2."""
    if stage == 2:
        return config.stage_two_energy_weight, config.stage_two_forces_weight
    return config.energy_weight, config.forces_weight


__all__ = ["Errors", "Samples", "measure", "stage_weights"]
