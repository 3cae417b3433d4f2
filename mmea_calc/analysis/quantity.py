"""A run's quantities, each as curves to draw and columns to write: what the page shows, before any ink."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import motion, structure
from .reader import Frames, Replica, Run
from .statistics import block_average

FloatArray = NDArray[np.float64]
Columns = dict[str, list[Any]]

# Part of a run that averages leave out unless told otherwise: it is still forgetting how it was started.
SKIP_FRACTION = 0.2


@dataclass(frozen=True)
class Line:
    """One curve. Lines with the same `kelvin` share a colour; `label` is for the legend, at most once per label."""

    x: FloatArray
    y: FloatArray
    label: str
    kelvin: float
    style: str = "-"
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    level: float | None = None  # a dashed horizontal line
    logarithmic: bool = False  # both axes


@dataclass(frozen=True)
class Quantity:
    """One picture and one table of numbers.

    Attributes:
        name: of its files.
        title: of the picture and of its place on the page.
        note: what is shown, in a sentence or two.
        panels: axes of the picture.
        columns: of the csv file, name with unit -> values, all of the same length.
        per_row: panels side by side.
    """

    name: str
    title: str
    note: str
    panels: list[Panel]
    columns: Columns
    per_row: int = 3


@dataclass
class Selection:
    """Replicas of one start structure, with their frames after the part that is left out, read once.

    Attributes:
        run: where they are from.
        replicas: of one start structure.
        skip_fs: what averages leave out.
        omitted: sentences on what could not be shown, and on what to beware of.
    """

    run: Run
    replicas: tuple[Replica, ...]
    skip_fs: float
    omitted: list[str] = field(default_factory=list)
    _frames: dict[str, Frames] = field(default_factory=dict)

    def frames(self, replica: Replica) -> Frames:
        """Frames after the part that is left out."""
        if replica.name not in self._frames:
            self._frames[replica.name] = self.run.frames(replica, self.skip_fs)
        return self._frames[replica.name]

    def long_enough(self, least: int) -> list[Replica]:
        """Replicas with at least so many frames."""
        return [r for r in self.replicas if len(self.frames(r).time_fs) >= least]

    def samples(self, replica: Replica, name: str) -> tuple[FloatArray, FloatArray]:
        """Times (fs) and finite values of an observable after the part that is left out."""
        values = replica.observables.get(name, np.full(len(replica.time_fs), np.nan))
        keep = np.isfinite(values) & (replica.time_fs >= self.skip_fs - 1e-6)
        return replica.time_fs[keep], values[keep]


def temperatures(replicas: Sequence[Replica]) -> Iterator[tuple[float, list[Replica]]]:
    """Replicas of every temperature, coldest first."""
    for kelvin in sorted({r.target_K for r in replicas}):
        yield kelvin, [r for r in replicas if r.target_K == kelvin]


def finite(replica: Replica, name: str, *others: str) -> tuple[FloatArray, FloatArray]:
    """Times and values of an observable where it and the others were measured."""
    missing = np.full(len(replica.time_fs), np.nan)
    keep = np.all([np.isfinite(replica.observables.get(key, missing)) for key in (name, *others)], axis=0)
    return replica.time_fs[keep], replica.observables.get(name, missing)[keep]


def running_mean(values: FloatArray) -> FloatArray:
    return np.cumsum(values) / np.arange(1, values.size + 1)


def start_columns(*names: str) -> Columns:
    return {"replica": [], "target_K": [], **{name: [] for name in names}}


def extend(columns: Columns, replica: Replica, **values: Sequence[Any] | NDArray[Any]) -> None:
    n = len(next(iter(values.values())))
    for key, more in {"replica": [replica.name] * n, "target_K": [replica.target_K] * n, **values}.items():
        columns[key].extend(more)


def quantity(
    name: str, title: str, note: str, panels: list[Panel], columns: Columns, selection: Selection, per_row: int = 3
) -> Quantity | None:
    if not panels:
        selection.omitted.append(f"{title}: the run has stored nothing to show.")
        return None
    return Quantity(name, title, note, panels, columns, per_row)


def too_short(what: str, frames: int) -> str:
    return f"{what} need at least {frames} frames after the part that is left out: run for longer."
