"""The training loss: energies per atom, forces and stress, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from .config import TrainConfig
from .data.dataset import LabelCounts, Labelled

if TYPE_CHECKING:
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
        return torch.as_tensor(np.ascontiguousarray(values, dtype=np.float64)).to(device=device, dtype=kind)

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


@dataclass
class Loss:
    """Weighted terms of a batch; `total` is their sum and is what training lowers."""

    energy: Tensor
    forces: Tensor
    stress: Tensor

    @property
    def total(self) -> Tensor:
        return self.energy + self.forces + self.stress


@dataclass
class LossWeights:
    """What the deviation of each label counts; 0 where there is none.

    Attributes:
        energy: (n_graphs,), of energies per atom. forces: (n_atoms, 1). stress: (n_graphs, 1, 1).
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor

    @classmethod
    def of(
        cls,
        labels: Labels,
        config: TrainConfig,
        *,
        energy_weight: float,
        forces_weight: float,
        counts: LabelCounts | None = None,
    ) -> LossWeights:
        """Those of `batch_loss`."""
        of_whole = astuple(counts) if counts is not None else (None, None, None)

        def each(mask: Tensor, components: int, weight: float, n: int | None) -> Tensor:
            number = (components * mask.sum()).clamp(min=1) if n is None else max(n, 1)
            return mask * (weight / number)

        return cls(
            each(labels.energy_mask, 1, energy_weight, of_whole[0]),
            each(labels.forces_mask, 3, forces_weight, of_whole[1]),
            each(labels.stress_mask, 9, config.stress_weight, of_whole[2]),
        )


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
    weights = LossWeights.of(labels, config, energy_weight=energy_weight, forces_weight=forces_weight, counts=counts)
    return loss_of(prediction, labels, weights, config)


def loss_of(prediction: Prediction, labels: Labels, weights: LossWeights, config: TrainConfig) -> Loss:
    """Weighted sums of deviations."""
    delta = delta_of(config)
    # The difference of two numbers near -17,000 eV is taken in float64, and only then rounded.
    difference = (prediction.energy - labels.energy).to(labels.atoms_per_graph)
    energy = (deviation(difference / labels.atoms_per_graph, delta) * weights.energy).sum()
    forces = stress = energy.new_zeros(())
    if prediction.forces is not None:
        forces = (deviation(prediction.forces - labels.forces, delta) * weights.forces).sum()
    if prediction.stress is not None:
        stress = (deviation(prediction.stress - labels.stress, delta) * weights.stress).sum()
    return Loss(energy, forces, stress)


def delta_of(config: TrainConfig) -> float:
    """Where the loss turns from a square into a line; infinity: nowhere."""
    return config.huber_delta if config.loss == "huber" else math.inf


def deviation(error: Tensor, delta: float | Tensor) -> Tensor:
    """Twice the Huber loss of each error: its square up to `delta`, linear beyond."""
    size = error.abs()
    inside = size.clamp(max=delta)
    return inside * (2 * size - inside)


@dataclass(frozen=True)
class Targets:
    """What a batch is trained to. There is one structure more than in it, without atoms (see `tracing.Inputs.strain`).

    Attributes:
        atoms, none: the atoms of each structure, (most, n_graphs + 1), and where there are no more (bool).
        n_atoms: their numbers, (n_graphs + 1,).
        energy: interaction energies, (n_graphs + 1,), eV, float64.
        energy_weight: what each of them counts.
        forces: (n_atoms, 3), eV/A.
        forces_weight: what each component counts, (n_atoms, 1).
        delta: where the loss turns linear, a number.
    """

    DYNAMIC: ClassVar[tuple[set[int], ...]] = ({0, 1}, {0, 1}, {0}, {0}, {0}, {0}, {0}, set())

    atoms: Tensor
    none: Tensor
    n_atoms: Tensor
    energy: Tensor
    energy_weight: Tensor
    forces: Tensor
    forces_weight: Tensor
    delta: Tensor

    def tensors(self) -> list[Tensor]:
        """In the order of the graph's inputs."""
        return [getattr(self, field.name) for field in fields(self)]

    def energy_term(self, node_energy: Tensor) -> Tensor:
        """Of the loss, from energies of atoms (n_atoms,)."""
        of_atoms = node_energy.index_select(0, self.atoms.flatten()).view(self.atoms.shape).masked_fill(self.none, 0)
        error = (of_atoms.sum(0).double() - self.energy).to(self.n_atoms) / self.n_atoms
        return (deviation(error, self.delta) * self.energy_weight).sum()

    def forces_term(self, forces: Tensor) -> Tensor:
        """Of the loss, from forces (n_atoms, 3)."""
        return (deviation(forces - self.forces, self.delta) * self.forces_weight).sum()
