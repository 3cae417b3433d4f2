"""What can be said against a training before it begins."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from ..adapter_file import is_adapter
from ..config import TrainConfig
from ..data.dataset import LABELS, Dataset
from ..errors import DataError, TrainingError
from .optimiser import check_optimiser
from .team import Team


def check_numbers(settings: object, least_of: Mapping[str, float]) -> None:
    """Raise a TrainingError where a field of the settings is below what it is at least, infinite, or no number."""
    for name, least in least_of.items():
        value = getattr(settings, name)
        if value is not None and not least <= value < math.inf:
            finite = "" if math.isfinite(value) else " and finite"
            raise TrainingError(f"{name} must be at least {least}{finite}, got {value}")


def check_settings(training: TrainConfig, team: Team) -> None:
    """Raise a TrainingError for settings that cannot be, or do not go together."""
    if training.batch_size < team.size:
        raise TrainingError(
            f"a batch of {training.batch_size} structures leaves some of {team.size} processes without work: give "
            f"--batch-size at least {team.size}, or start fewer processes"
        )
    least_of = {"epochs": 0, "steps": 1, "batch_size": 1, "replay": 0, "seed": 0, "lr": 1e-12, "clip_norm": 1e-12}
    check_numbers(training, least_of)
    weights = training.energy_weight, training.forces_weight, training.stress_weight
    if not all(0 <= weight < math.inf for weight in weights):
        raise TrainingError(f"the weights of the loss must be finite and not negative, got {weights}")
    if not 0 <= training.ema_decay < 1:
        raise TrainingError(f"ema_decay must lie in [0, 1), got {training.ema_decay}")
    check_optimiser(training)


def check_labels(train: Dataset, valid: Dataset, test: Dataset | None) -> None:
    """Raise a DataError for sets that nothing could be learnt from, or compared with."""
    if not any(train.counts[name] for name in LABELS):
        raise DataError(f"{train.name}: no structure has a label: there is nothing to learn")
    for dataset in (valid, test):
        if dataset is not None and not (dataset.counts["energy"] or dataset.counts["forces"]):
            raise DataError(f"{dataset.name}: expected structures with energies or forces to compare with, found none")


def check_writable(output: Path, run_dir: Path) -> None:
    """Raise a TrainingError where the results could not be written: better known now than after an hour."""
    if output.is_dir():
        raise TrainingError(f"{output} is a folder; expected the name of an adapter file to write")
    if output.exists() and not is_adapter(output):
        raise TrainingError(f"{output} is there and no adapter: choose another name to write to")
    if run_dir.exists() and not run_dir.is_dir():
        raise TrainingError(f"{run_dir} is a file; expected the name of a run folder")
    if (run_dir / "trajectory.h5").exists():
        raise TrainingError(f"{run_dir} is the folder of a run of dynamics; choose another name with --output")
    for target in (output.parent, run_dir):
        existing = next(p for p in (target, *target.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK):
            raise TrainingError(f"{existing} cannot be written to: choose another place with --output")
