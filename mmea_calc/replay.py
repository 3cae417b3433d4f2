"""Replay: other molecules, labelled by the model that training starts from, mixed into the training structures.

Fine-tuning on one molecule changes what the model gives for others, and nothing in the data says by how much it may.
Replayed structures say it: their labels are the starting model's own energies and forces (learning without forgetting,
arXiv 1606.09282). Every epoch draws some from a pool of small molecules that comes with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from ase import Atoms

from .dataset import Labelled
from .errors import TrainingError
from .potential import Potential

MOLECULES = "replay_molecules.npz"


@dataclass(frozen=True)
class Replay:
    """Which samples are replayed, and how many an epoch.

    Attributes:
        first: place of the first of them among the samples; those before it are the training structures.
        pool: how many there are.
        per_epoch: how many an epoch draws.
    """

    first: int
    pool: int
    per_epoch: int

    def deal(self, generator: np.random.Generator, n_batches: int) -> list[list[int]]:
        """The samples that an epoch's batches take beside their training structures, as evenly as it goes."""
        rounds = -(-self.per_epoch // self.pool)
        drawn = np.concatenate([generator.permutation(self.pool) for _ in range(rounds)])[: self.per_epoch]
        return [[self.first + int(i) for i in part] for part in np.array_split(drawn, n_batches)]


def replay_structures(potential: Potential) -> list[Labelled]:
    """The pool: all molecules of the package whose elements the backbone knows, labelled by `potential` as it is.

    Raises:
        TrainingError: the backbone knows the elements of none of them.
    """
    known = set(potential.backbone.elements)
    molecules = [(i, atoms) for i, atoms in enumerate(_molecules()) if set(atoms.numbers.tolist()) <= known]
    if not molecules:
        raise TrainingError(
            f"replay: the backbone {potential.backbone.name} knows the elements of none of the molecules that come "
            "with the package; leave --replay out"
        )
    energies, forces = potential.predict_graphs([potential.graph(atoms) for _, atoms in molecules])
    return [
        Labelled(atoms, energy=float(energy), forces=force.numpy(), config_type="replay", index=i, source=MOLECULES)
        for (i, atoms), energy, force in zip(molecules, energies, forces, strict=True)
    ]


def _molecules() -> list[Atoms]:
    """Neutral closed-shell molecules and dimers with at most 7 heavy atoms; see data/pbe/README.md."""
    with (files("mmea_calc") / MOLECULES).open("rb") as file, np.load(file) as data:
        ends = np.cumsum(data["n_atoms"], dtype=np.int64)
        numbers, positions = data["numbers"].astype(np.int64), data["positions"].astype(np.float64)
    starts = np.concatenate([[0], ends[:-1]])
    return [Atoms(numbers[a:b], positions[a:b]) for a, b in zip(starts, ends, strict=True)]
