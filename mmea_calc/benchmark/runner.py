"""The benchmark itself: every cell that is not finished is trained, measured and kept, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..backbone import Backbone, load_backbone
from ..config import BenchmarkConfig, Precision
from ..data.preflight import PreflightReport, preflight
from ..errors import TrainingError
from ..training.auto import AUTO
from ..training.trainer import ProgressEvent
from .cells import Cell, CellResult, cell_of, read_results
from .method_spec import parse_methods
from .results_folder import CELLS, check_settings, keep_settings, shared_settings, valid_fraction
from .tasks import System, Task
from .training import attempt, kept, measure_again

What = Literal["report", "measured", "begin", "training", "finished", "failed", "kept", "elsewhere"]


@dataclass(frozen=True)
class BenchmarkEvent:
    """What happens.

    Attributes:
        what: "report" on the data of a system that is about to be trained on; a cell of an earlier call was
            "measured" anew, as its tests have changed; one of this call "begin"s, is "training", is "finished", has
            "failed", was "kept" from an earlier call, or is trained "elsewhere" by another process.
        cell: which; None for a report.
        number, total: its place among all cells of this call, from 1.
        result: of a cell that is measured, finished, failed or kept.
        training: progress within the cell.
        system, report: on the data.
    """

    what: What
    cell: Cell | None = None
    number: int = 0
    total: int = 0
    result: CellResult | None = None
    training: ProgressEvent | None = None
    system: System | None = None
    report: PreflightReport | None = None


BenchmarkProgress = Callable[[BenchmarkEvent], None]


def plan(task: Task, folder: str | Path, config: BenchmarkConfig) -> list[Cell]:
    """All cells, in the order in which they are trained: by seed, then system, then method.

    Nothing is trained or written; the folder is checked.

    Raises:
        AdapterError: a method that is unknown or wrongly written.
        DataError: a training set that is too small to be split.
        TrainingError: no seeds, or a folder that was begun with other settings.
    """
    folder = Path(folder)
    if not config.seeds or any(seed < 0 for seed in config.seeds):
        raise TrainingError(f"expected at least one seed, none below 0, got {list(config.seeds)}")
    if config.epochs is not None and config.epochs < 1:
        raise TrainingError(f"epochs must be at least 1, got {config.epochs}")
    check_settings(folder, shared_settings(task, config), config)
    fraction = valid_fraction(task, config)
    methods = parse_methods(config)
    cells = []
    # Seed by seed, so that an interrupted benchmark has every method on every system before it has error bars.
    for seed in dict.fromkeys(config.seeds):
        for system in task.systems:
            n_train = len(system.split(fraction, seed)[0])
            for method in methods:
                adapter, training = method.seeded(seed)
                training = replace(training, valid_fraction=fraction)
                # "auto" takes more steps where it decides to replay, which it does once it has seen the data.
                if adapter.method != AUTO or training.replay is not None:
                    training = training.for_structures(n_train)
                cells.append(Cell(system, method, seed, adapter, training, folder / CELLS))
    for cell in cells:
        cell.state()
    return cells


def run(
    task: Task,
    folder: str | Path,
    config: BenchmarkConfig,
    *,
    progress: BenchmarkProgress = lambda event: None,
    after_cell: Callable[[], object] = lambda: None,
) -> list[CellResult]:
    """Train and measure every cell that is not finished in `folder`; one that fails does not stop the others.

    Finished cells are kept, so the same call again trains nothing; interrupted ones go on from their checkpoint,
    failed ones are tried again. Finished cells of earlier calls on the same systems are measured on tests that have
    come since, or have changed, where their adapters are there. Several processes may work on one folder.

    Args:
        task: what is benchmarked.
        folder: of the results.
        config: methods, seeds, and how they are trained.
        progress: told what happens.
        after_cell: called when a cell has been finished, or has failed.

    Returns:
        results of the cells of this call; without those that another process is at.

    Raises:
        AdapterError, BackboneError, DataError, TrainingError: before anything is trained or written.
    """
    folder = Path(folder)
    cells = plan(task, folder, config)
    backbones = _Backbones(config)
    first = backbones.load(cells[0].training.dtype)
    settings = shared_settings(task, config, first)
    check_settings(folder, settings, config, lambda: backbones.default_head(first))
    reports = {}
    for system in _to_train(cells):
        reports[system.name] = _preflight(system, first)
        progress(BenchmarkEvent("report", system=system, report=reports[system.name]))
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    keep_settings(folder, settings)
    for cell in _to_measure_again(task, folder / CELLS, cells):
        with cell.claimed() as mine:
            again = measure_again(cell, partial(backbones.load, cell.training.dtype)) if mine else None
        if again is not None:
            progress(BenchmarkEvent("measured", cell, result=again))
    results = []
    for number, cell in enumerate(cells, 1):

        def tell(what: What, cell: Cell = cell, number: int = number, **more: Any) -> None:
            progress(BenchmarkEvent(what, cell, number, len(cells), **more))

        def train(cell: Cell = cell, tell: Callable[..., None] = tell) -> CellResult:
            tell("begin")
            load, report = partial(backbones.load, cell.training.dtype), reports.get(cell.system.name)
            return attempt(cell, task, config, load, report, lambda event: tell("training", training=event))

        what, result = _one(cell, train)
        if result is not None:
            results.append(result)
        if what in ("finished", "failed"):
            after_cell()
        tell(what, result=result)
    return results


def _to_measure_again(task: Task, folder: Path, cells: Sequence[Cell]) -> Iterator[Cell]:
    """Trained cells on systems of the task, not among those of this call, that lack errors on a test as it is now."""
    systems, own = {s.name: s for s in task.systems}, {cell.json for cell in cells}
    for result in read_results(folder):
        if not result.finished or result.system not in systems:
            continue
        try:
            cell = cell_of(result, systems[result.system], folder)
        except TrainingError:  # another version's settings: it stays as it is
            continue
        if cell.json not in own and cell.adapter.exists() and kept(cell) is None:
            yield cell


def _one(cell: Cell, train: Callable[[], CellResult]) -> tuple[What, CellResult | None]:
    """Train a cell, unless it is finished or another process is at it."""
    if (result := kept(cell)) is not None:
        return "kept", result
    with cell.claimed() as mine:
        if not mine:
            return "elsewhere", None
        if (result := kept(cell)) is not None:  # another process has finished it meanwhile
            return "kept", result
        result = train()
    return "finished" if result.finished else "failed", result


class _Backbones:
    """The backbone, once in every precision that some method trains in."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self._config, self._loaded = config, dict[Precision, Backbone]()

    def load(self, dtype: Precision) -> Backbone:
        if dtype not in self._loaded:
            config = self._config
            self._loaded[dtype] = load_backbone(config.backbone, head=config.head, device=config.device, dtype=dtype)
        return self._loaded[dtype]

    def default_head(self, loaded: Backbone) -> str:
        """The head that is taken where none is given. Raises BackboneError where one must be."""
        if self._config.head is None or len(loaded.heads) == 1:
            return loaded.head
        return load_backbone(self._config.backbone).head


def _to_train(cells: Sequence[Cell]) -> list[System]:
    """Systems with cells that are not finished."""
    return list({c.system.name: c.system for c in cells if c.state() != "finished"}.values())


def _preflight(system: System, backbone: Backbone) -> PreflightReport:
    test = next(iter(system.tests.values())) if len(system.tests) == 1 else None
    return preflight(
        system.train, system.valid, test, backbone_elements=backbone.elements, r_max=backbone.r_max
    )  # fmt: skip
