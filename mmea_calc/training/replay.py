"""Replay: other molecules, labelled by the model that training starts from, mixed into the training structures.

Fine-tuning on one molecule changes what the model gives for others, and nothing in the data says by how much it may.
Replayed structures say it: their labels are the starting model's own energies and forces (learning without forgetting,
arXiv 1606.09282). Every epoch draws some from a pool of small molecules that comes with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from ase import Atoms

from ..data.dataset import FloatArray, Labelled
from ..errors import TrainingError
from ..files import replacing
from ..potential import Potential
from .team import SOLO, Team

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


def replay_structures(
    potential: Potential, kept: Path, *, resume: bool = False, team: Team = SOLO
) -> tuple[Labelled, ...]:
    """The pool: all molecules of the package whose elements the backbone knows, labelled by `potential` as it is.

    Args:
        kept: file that keeps the labels.
        resume: take them from there, if it exists: made again they may differ in the last bit.
        team: the processes that train together; the first one makes the labels for all.

    Raises:
        TrainingError: the backbone knows the elements of none of them, or `kept` does not fit.
    """
    known = set(potential.backbone.elements)
    molecules = [(i, atoms) for i, atoms in enumerate(_molecules()) if set(atoms.numbers.tolist()) <= known]
    if not molecules:
        raise TrainingError(
            f"replay: the backbone {potential.backbone.name} knows the elements of none of the molecules that come "
            "with the package; leave --replay out"
        )
    sizes = [len(atoms) for _, atoms in molecules]

    def labels() -> tuple[FloatArray, FloatArray]:
        return _read(kept, sizes) if resume and kept.exists() else _made(potential, [a for _, a in molecules], kept)

    energies, forces = team.from_first(labels)
    of_each = np.split(forces, np.cumsum(sizes)[:-1])
    return tuple(
        Labelled(atoms, energy=float(energy), forces=force, config_type="replay", index=i, source=MOLECULES)
        for (i, atoms), energy, force in zip(molecules, energies, of_each, strict=True)
    )


def _made(potential: Potential, molecules: list[Atoms], kept: Path) -> tuple[FloatArray, FloatArray]:
    found = potential.predict_graphs([potential.graph(atoms) for atoms in molecules])
    energies, forces = found[0].numpy(), np.concatenate([force.numpy() for force in found[1]])
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as temporary, temporary.open("wb") as file:
        np.savez(file, energies=energies, forces=forces)
    return energies, forces


def _read(kept: Path, sizes: list[int]) -> tuple[FloatArray, FloatArray]:
    try:
        with np.load(kept, allow_pickle=False) as data:
            energies, forces = data["energies"], data["forces"]
    except (OSError, ValueError, KeyError, BadZipFile) as problem:
        raise TrainingError(f"{kept} cannot be read ({problem}); start without --resume") from problem
    if energies.shape != (len(sizes),) or forces.shape != (sum(sizes), 3):
        raise TrainingError(
            f"{kept} holds {len(energies)} energies and {len(forces)} forces, expected {len(sizes)} and {sum(sizes)}; "
            "start without --resume"
        )
    return energies, forces


def _molecules() -> list[Atoms]:
    """Neutral closed-shell molecules and dimers: those of data/pbe, and 500 larger ones with up to 19 heavy atoms.

    The latter are geometries of GFN2-xTB. Isomers of rMD17's molecules, 3BPA and acetylacetone are not among them, so
    that tables of what is forgotten remain fair.
    """
    with (files("mmea_calc.training") / MOLECULES).open("rb") as file, np.load(file) as data:
        ends = np.cumsum(data["n_atoms"], dtype=np.int64)
        numbers, positions = data["numbers"].astype(np.int64), data["positions"].astype(np.float64)
    starts = np.concatenate([[0], ends[:-1]])
    return [Atoms(numbers[a:b], positions[a:b]) for a, b in zip(starts, ends, strict=True)]
