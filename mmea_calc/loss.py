"""The training loss: energies per atom, forces and stress, each with its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .config import TrainConfig
from .dataset import Labelled
from .potential import Prediction


@dataclass
class Labels:
    """Labels of a batch; where a structure has none, the mask is 0 and the value counts for nothing.

    Attributes:
        energy: total energy, (n_graphs,), eV, float64. `energy_mask`: (n_graphs,).
        forces: (n_atoms, 3), eV/A. `forces_mask`: (n_atoms, 1).
        stress: (n_graphs, 3, 3), eV/A^3. `stress_mask`: (n_graphs, 1, 1).
        atoms_per_graph: (n_graphs,).
    """

    energy: Tensor
    energy_mask: Tensor
    forces: Tensor
    forces_mask: Tensor
    stress: Tensor
    stress_mask: Tensor
    atoms_per_graph: Tensor


def collect_labels(structures: Sequence[Labelled], *, dtype: torch.dtype, device: torch.device) -> Labels:
    """Labels of the structures of a batch, in its order."""

    def to(values: object, kind: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float64)).to(device=device, dtype=kind)

    counts = np.array([len(s.atoms) for s in structures])
    has_forces = np.repeat([s.forces is not None for s in structures], counts)
    forces = [np.zeros((n, 3)) if s.forces is None else s.forces for s, n in zip(structures, counts, strict=True)]
    return Labels(
        energy=to([0.0 if s.energy is None else s.energy for s in structures], torch.float64),
        energy_mask=to([s.energy is not None for s in structures], dtype),
        forces=to(np.concatenate(forces), dtype),
        forces_mask=to(has_forces[:, None], dtype),
        stress=to([np.zeros((3, 3)) if s.stress is None else s.stress for s in structures], dtype),
        stress_mask=to([[[s.stress is not None]] for s in structures], dtype),
        atoms_per_graph=to(counts, dtype),
    )


@dataclass(frozen=True)
class LabelCounts:
    """How many structures have an energy, and how many components of forces and stresses are labelled."""

    energies: int
    forces: int
    stresses: int

    @classmethod
    def of(cls, structures: Sequence[Labelled]) -> LabelCounts:
        return cls(
            sum(s.energy is not None for s in structures),
            sum(3 * len(s.atoms) for s in structures if s.forces is not None),
            sum(9 for s in structures if s.stress is not None),
        )


@dataclass
class Loss:
    """Weighted terms of a batch; `total` is their sum and is what training lowers."""

    energy: Tensor
    forces: Tensor
    stress: Tensor

    @property
    def total(self) -> Tensor:
        return self.energy + self.forces + self.stress


def batch_loss(
    prediction: Prediction,
    labels: Labels,
    config: TrainConfig,
    *,
    energy_weight: float,
    forces_weight: float,
    counts: LabelCounts | None = None,
) -> Loss:
    """Mean over labelled structures (energy per atom, stress components) and force components, times the weights.

    With `counts`, those of a whole batch of which these structures are a part: the part's share of the whole's means.
    """
    # The difference of two numbers near -17,000 eV is taken in float64, and only then rounded.
    difference = (prediction.energy - labels.energy).to(labels.atoms_per_graph)
    n_energies, n_forces, n_stresses = astuple(counts) if counts is not None else (None, None, None)
    energy = _mean(difference / labels.atoms_per_graph, labels.energy_mask, config, n_energies)
    zero = energy.new_zeros(())
    forces = stress = zero
    if prediction.forces is not None:
        forces = _mean(prediction.forces - labels.forces, labels.forces_mask, config, n_forces)
    if prediction.stress is not None:
        stress = _mean(prediction.stress - labels.stress, labels.stress_mask, config, n_stresses)
    return Loss(energy_weight * energy, forces_weight * forces, config.stress_weight * stress)


def _mean(error: Tensor, mask: Tensor, config: TrainConfig, count: int | None) -> Tensor:
    """Mean over the entries that carry a label; 0 if none does. With `count`, the sum over so many."""
    if config.loss == "huber":
        # Twice the Huber loss is the squared error inside delta and grows linearly outside.
        each = 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=config.huber_delta)
    else:
        each = error * error
    weight = mask.expand_as(each)
    total = (each * weight).sum()
    return total / (weight.sum().clamp(min=1) if count is None else max(count, 1))
