"""One cell: fine-tune, measure, keep."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..adapter_file import read_adapter
from ..backbone import Backbone
from ..config import BenchmarkConfig, to_dict
from ..data.dataset import Dataset
from ..data.preflight import PreflightReport
from ..errors import CheckpointError, MMEAError
from ..evaluation import evaluate
from ..potential import Potential
from ..training.finetuning import finetune
from ..training.run_folder import versions
from ..training.trainer import Progress
from .cells import Cell, CellResult, Measured, SetErrors, write_result
from .results_folder import reference_energies_of
from .tasks import VALID, Task


def kept(cell: Cell) -> CellResult | None:
    """The result of a cell that needs no more: trained, and measured on all tests as they are now.

    Raises:
        TrainingError: what is kept is of other settings.
    """
    result = cell.result()
    if result is None or not result.finished or _unmeasured(cell, result):
        return None
    return result


def attempt(
    cell: Cell,
    task: Task,
    config: BenchmarkConfig,
    load: Callable[[], Backbone],
    report: PreflightReport | None,
    progress: Progress,
) -> CellResult:
    """Train and measure a cell, and keep the result; a failure that is understood is a result with a reason.

    A cell that is trained already is measured on the tests that have come since; one that was interrupted goes on.
    """
    blank = CellResult(
        cell.system.name, cell.method.label, cell.seed, to_dict(cell.adapter_config), to_dict(cell.training)
    )
    try:
        backbone, before = load(), cell.result()
        if before is not None and before.finished and cell.adapter.exists():
            result = _measured_on_all(cell, backbone, before)
        else:
            try:
                result = _train(cell, blank, task, config, backbone, report, progress)
            except CheckpointError:  # of another version, or damaged: nobody needs it
                cell.checkpoint.unlink()
                result = _train(cell, blank, task, config, backbone, report, progress)
    except (MMEAError, torch.cuda.OutOfMemoryError) as problem:
        result = replace(blank, reason=" ".join(str(problem).split()))
    write_result(cell.json, result)
    if result.finished:
        cell.checkpoint.unlink(missing_ok=True)
    return result


def measure_again(cell: Cell, load: Callable[[], Backbone]) -> CellResult | None:
    """Measure a finished cell on the tests that have come since, or have changed, and keep the result.

    Returns:
        None where another process has done so meanwhile, or the adapter cannot be used: the kept result stays.
    """
    result = cell.result()
    if result is None or not _unmeasured(cell, result):
        return None
    try:
        result = _measured_on_all(cell, load(), result)
    except (MMEAError, torch.cuda.OutOfMemoryError):
        return None
    write_result(cell.json, result)
    return result


def hardware(device: torch.device) -> str:
    """The machine in words, for tables with times."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} of {os.cpu_count()} cores"


def _unmeasured(cell: Cell, result: CellResult) -> dict[str, Dataset]:
    """Tests that have come since, or have changed."""
    known = {name: measured.sha256 for name, measured in result.errors.items()}
    return {name: test for name, test in cell.system.tests.items() if known.get(name) != test.hash}


def _train(
    cell: Cell,
    blank: CellResult,
    task: Task,
    config: BenchmarkConfig,
    backbone: Backbone,
    report: PreflightReport | None,
    progress: Progress,
) -> CellResult:
    train, valid = cell.system.split(cell.training.valid_fraction, cell.seed)
    trained = finetune(
        train,
        cell.adapter,
        valid=valid,
        backbone=backbone,
        adapter=cell.adapter_config,
        training=cell.training,
        E0s=reference_energies_of(task, config, cell.method.recipe),
        level_of_theory=task.level_of_theory,
        report=report,
        run_dir=cell.run_dir,
        resume=cell.checkpoint.exists(),
        progress=progress,
    )
    errors, parameters = _measure(cell, backbone, {VALID: valid, **cell.system.tests})
    return replace(
        blank,
        errors=errors,
        parameters=parameters,
        file_bytes=cell.adapter.stat().st_size,
        seconds=trained.seconds,
        best_epoch=trained.best_epoch,
        hardware=hardware(backbone.device),
        versions=versions(),
    )


def _measured_on_all(cell: Cell, backbone: Backbone, before: CellResult) -> CellResult:
    """The result of a trained cell with errors on all tests as they are now."""
    errors = _measure(cell, backbone, _unmeasured(cell, before))[0]
    return replace(before, errors={**before.errors, **errors})


def _measure(cell: Cell, backbone: Backbone, sets: Mapping[str, Dataset]) -> tuple[dict[str, Measured], int]:
    """Errors on every set, and the number of trained values."""
    found = {}
    with _adapted(cell, backbone) as potential:
        assert potential.adapter is not None
        for name, dataset in sets.items():
            evaluation = evaluate(potential, dataset)
            assert evaluation.adapter is not None
            errors = SetErrors.of(evaluation.backbone.overall), SetErrors.of(evaluation.adapter.overall)
            found[name] = Measured(dataset.hash, len(dataset), *errors)
        return found, potential.adapter.n_parameters


@contextmanager
def _adapted(cell: Cell, backbone: Backbone) -> Iterator[Potential]:
    """The backbone with the adapter of a cell, given back bare."""
    potential = Potential(backbone)
    potential.use(read_adapter(cell.adapter))
    try:
        yield potential
    finally:
        potential.use(None)
