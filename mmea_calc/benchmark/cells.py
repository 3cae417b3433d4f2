"""One cell of a benchmark: one system, method and seed; its files, and what is kept of it.

RESULTS/settings.json               what the folder was begun with
RESULTS/cells/NAME.adapter          trained
RESULTS/cells/NAME.json             its errors: the cell is finished
RESULTS/cells/NAME.run/             log and plots; a checkpoint until it is finished
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..config import AdapterConfig, TrainConfig, from_dict, to_dict
from ..errors import TrainingError
from ..evaluation import GroupErrors
from ..files import json_ready, write_text
from .method_spec import MethodSpec, recipe_of
from .tasks import System

CELL_VERSION = 1

State = Literal["finished", "failed", "interrupted", "to do"]


@dataclass(frozen=True)
class SetErrors:
    """Errors on one set of structures; None where there are no labels. Energies in meV, forces in meV/A."""

    energy_mae: float | None
    energy_rmse: float | None
    forces_mae: float | None
    forces_rmse: float | None

    @classmethod
    def of(cls, group: GroupErrors) -> SetErrors:
        energy, forces = group.energy, group.forces
        return cls(energy.mae_meV, energy.rmse_meV, forces.mae_meV_per_A, forces.rmse_meV_per_A)


@dataclass(frozen=True)
class Measured:
    """Errors of an adapter on one set of structures (`sha256` of `Dataset.hash`), and of the bare backbone."""

    sha256: str
    structures: int
    zero_shot: SetErrors
    fine_tuned: SetErrors


@dataclass(frozen=True)
class CellResult:
    """What is kept of a cell.

    Attributes:
        system, method, seed: which cell it is; `method` is the label of its `MethodSpec`.
        adapter_config, training: its settings.
        reason: why it failed; None: it is finished.
        errors: "valid" and names of tests -> errors.
        parameters: trained values.
        file_bytes: size of the adapter file.
        seconds: of training, all parts of an interrupted one together.
        best_epoch: whose weights were kept.
        hardware: what it was trained on.
        versions: of the packages that made it.
    """

    system: str
    method: str
    seed: int
    adapter_config: dict[str, Any]
    training: dict[str, Any]
    reason: str | None = None
    errors: Mapping[str, Measured] = field(default_factory=dict)
    parameters: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Cell:
    """One training of the benchmark.

    Attributes:
        system, method, seed: what it is.
        adapter_config, training: its settings, complete.
        folder: of all cells.
    """

    system: System
    method: MethodSpec
    seed: int
    adapter_config: AdapterConfig
    training: TrainConfig
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.system.name}, {self.method.label}, seed {self.seed}"

    @property
    def stem(self) -> str:
        return stem_of(self.system.name, self.method.label, self.seed)

    @property
    def adapter(self) -> Path:
        return self.folder / f"{self.stem}.adapter"

    @property
    def run_dir(self) -> Path:
        return self.folder / f"{self.stem}.run"

    @property
    def checkpoint(self) -> Path:
        return self.run_dir / "checkpoint.pt"

    @property
    def json(self) -> Path:
        return self.folder / f"{self.stem}.json"

    def state(self) -> State:
        """How far it is. Raises TrainingError as `result`."""
        result = self.result()
        if result is not None:
            return "finished" if result.finished else "failed"
        return "interrupted" if self.checkpoint.exists() else "to do"

    def result(self) -> CellResult | None:
        """What is kept of it; None: nothing yet.

        Raises:
            TrainingError: what is kept is of other settings, or cannot be read.
        """
        if not self.json.exists():
            return None
        result = read_result(self.json)
        then = _complete(result.adapter_config, result.training, self.json)
        now = _complete(to_dict(self.adapter_config), to_dict(self.training), self.json)
        if differing := [k for k, v in now.items() if then[k] != v and k != "training.device"]:
            was = ", ".join(f"{k} was {then[k]!r}, is {now[k]!r}" for k in differing)
            raise TrainingError(f"{self.json} was made with other settings: {was}. Choose another --output folder")
        return result

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Within this context no other process trains this cell; False: one does. The system frees it by itself."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def cell_of(result: CellResult, system: System, folder: Path) -> Cell:
    """The cell in `folder` that a kept result is of. Raises TrainingError for settings of another version."""
    stem = stem_of(result.system, result.method, result.seed)
    adapter, training = _configs(result.adapter_config, result.training, folder / f"{stem}.json")
    spec = MethodSpec(result.method, adapter, training, recipe_of(result.method))
    return Cell(system, spec, result.seed, adapter, training, folder)


def stem_of(system: str, method: str, seed: int) -> str:
    """Name of the files of a cell, without what file systems do not like."""
    return "-".join(re.sub(r"[^\w=.+]+", "_", word) for word in (system, method, f"seed{seed}"))


def write_result(path: Path, result: CellResult) -> None:
    """Keep a result, whole or not at all."""
    write_text(path, json.dumps(json_ready({"version": CELL_VERSION, **asdict(result)}), indent=1))


def read_result(path: Path) -> CellResult:
    """The result in a file. Raises TrainingError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(CellResult)}
        errors = {
            name: Measured(
                **{**values, **{k: SetErrors(**values[k]) for k in ("zero_shot", "fine_tuned")}},
            )
            for name, values in content["errors"].items()
        }
        return CellResult(**{**{k: v for k, v in content.items() if k in known}, "errors": errors})
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise TrainingError(
            f"{path} cannot be read as the result of a cell ({problem}): delete it, and it is made again"
        ) from problem


def read_results(folder: Path) -> list[CellResult]:
    """All that is kept in a folder of cells, in the order of their names. Raises TrainingError."""
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def _complete(adapter: dict[str, Any], training: dict[str, Any], path: Path) -> dict[str, Any]:
    """All settings by name; those that did not exist when they were written have their defaults."""
    parts = zip(("adapter", "training"), _configs(adapter, training, path), strict=True)
    return {f"{part}.{key}": value for part, config in parts for key, value in to_dict(config).items()}


def _configs(adapter: dict[str, Any], training: dict[str, Any], path: Path) -> tuple[AdapterConfig, TrainConfig]:
    try:
        return from_dict(AdapterConfig, adapter), from_dict(TrainConfig, training)
    except ValueError as problem:
        raise TrainingError(f"{path} was made by another version of mmea: {problem}") from problem
