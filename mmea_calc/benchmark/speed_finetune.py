"""How long a fine-tuning takes from data to adapter, as a user would start it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ..backbone import Backbone
from ..calculator import MMEACalculator
from ..config import TrainConfig
from ..data.reading import read_dataset
from ..training.finetuning import finetune
from .speed_setup import SpeedConfig, aspirin, open_backbone

STRUCTURES = 50
SPREAD = 0.05  # A, of each coordinate; about that of a carbon atom at 300 K
_TEACHERS = ("mmea-organic-s", "mmea-organic-s2")


@dataclass(frozen=True)
class FinetuneTime:
    """What a fine-tuning took and brought.

    Attributes:
        seconds: from opening data and backbone to the adapter's file.
        teacher: the backbone whose energies and forces it was trained on.
        before, after: validation errors (MAE) of forces, meV/A.
    """

    seconds: float
    teacher: str
    before: float
    after: float


def time_finetuning(config: SpeedConfig) -> FinetuneTime:
    """Fine-tune the backbone to another one by the default recipe, in a folder that is gone afterwards."""
    teacher = teacher_of(open_backbone(config))
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "aspirin.xyz", Path(folder) / "aspirin.adapter"
        write(data, labelled_aspirins(config, teacher), format="extxyz")
        began = time.perf_counter()
        training = TrainConfig(device=config.device, dtype=config.dtype)
        result = finetune(read_dataset(data), output, backbone=open_backbone(config), training=training)
        seconds = time.perf_counter() - began
    before, after = (errors["valid"].forces_mae_meV_per_A for errors in (result.zero_shot, result.fine_tuned))
    return FinetuneTime(seconds, teacher, before, after)


def teacher_of(backbone: Backbone) -> str:
    """An embedded backbone that is another one."""
    return next(name for name in _TEACHERS if name != backbone.name)


def labelled_aspirins(config: SpeedConfig, teacher: str) -> list[Atoms]:
    """Aspirins displaced at random, the same ones every time, with a backbone's energies and forces as results."""
    calculator = MMEACalculator(backbone=teacher, device=config.device, dtype="float64")
    rng, found = np.random.default_rng(0), []
    for _ in range(STRUCTURES):
        atoms = aspirin()
        atoms.positions += rng.normal(0, SPREAD, atoms.positions.shape)
        energy, forces = calculator.get_potential_energy(atoms), calculator.get_forces(atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        found.append(atoms)
    return found


__all__ = ["FinetuneTime", "labelled_aspirins", "teacher_of", "time_finetuning"]
