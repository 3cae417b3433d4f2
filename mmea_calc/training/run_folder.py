"""The folder of a training: all that a run was.

`config.json` (resolved settings), `data.json` (report on the data and the split), `log.csv`, `checkpoint.pt`,
`learning_curve.png`, `parity_valid.png` and `parity_test.png`; for a sparse method also `sparsity.csv`, the entries
left unchanged in every path, and with replayed molecules `replay.npz`, their labels.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..evaluation import Evaluation
from ..files import json_ready, write_text

DATA = "data.json"
PACKAGES = (
    "mmea",
    "torch",
    "mace-torch",
    "e3nn",
    "ase",
    "matscipy",
    "numpy",
    "safetensors",
    "schedulefree",
)


class RunFolder:
    """Writes into a folder.

    Args:
        path: the folder; made when something is first written.
        writes: False writes nothing, as it is for all processes of a training but one.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def replay(self) -> Path:
        return self.path / "replay.npz"

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / name, json.dumps(json_ready(dict(values)), indent=1))

    def write_csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """One line per row; a row may lack columns. Nothing is written without rows."""
        if not rows or not self.writes:
            return
        names = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / name, text.getvalue())

    def draw(
        self,
        log: Sequence[Mapping[str, float]],
        zero_shot: Mapping[str, float],
        evaluations: Mapping[str, Evaluation],
    ) -> None:
        """Learning curve and parity plots.

        Args:
            log: rows of `log.csv`.
            zero_shot: errors of the bare backbone on the validation set, by their names in the log without "valid_".
            evaluations: "valid", "test" -> errors of all structures.
        """
        if not self.writes:
            return
        from .. import plots  # matplotlib is slow to import and not needed before

        if log:
            before = {f"valid_{key}": value for key, value in zero_shot.items()}
            plots.learning_curve(log, self.path / "learning_curve.png", zero_shot=before)
        for name, evaluation in evaluations.items():
            title = f"{evaluation.dataset.name}: {len(evaluation.dataset)} structures"
            plots.parity(evaluation.parity(), self.path / f"parity_{name}.png", title=title)


def is_training(folder: Path) -> bool:
    """Whether it is the folder of a training, at whatever stage."""
    return (folder / DATA).exists()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
