"""A quantity of a run: curves to draw and columns to write, before any ink; and the selection that it is made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reader import Frames, Replica, Run
from .structure import InternalCoordinates, find_bonds

FloatArray = NDArray[np.floating[Any]]
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Line:
    """One curve. Lines of the same `target_K` share a colour; a label that several lines bear is shown once."""

    x: FloatArray
    y: FloatArray
    label: str
    target_K: float
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
    """Replicas of one start structure, without the part of the run that averages leave out. Frames are read once.

    Attributes:
        run: where they are from.
        replicas: all of one start structure, at least one.
        skip_fs: length of the part that is left out.
        remarks: sentences on what could not be shown, and on what to beware of.
    """

    run: Run
    replicas: tuple[Replica, ...]
    skip_fs: float
    remarks: list[str] = field(default_factory=list)
    _frames: dict[str, Frames] = field(default_factory=dict)

    @cached_property
    def _start(self) -> tuple[Replica, FloatArray]:
        """A replica with frames, where one has any, and its positions at the start."""
        found = ((r, self.run.frames(r).positions_A[:1]) for r in self.replicas)
        return next(
            (one for one in found if len(one[1])), (self.replicas[0], np.zeros((0, len(self.replicas[0].numbers), 3)))
        )

    @property
    def first(self) -> Replica:
        """For what all replicas share: atoms, cell, periodicity."""
        return self._start[0]

    @property
    def start_positions(self) -> FloatArray:
        """Positions at the start, (1, n_atoms, 3); (0, n_atoms, 3) for a run without frames."""
        return self._start[1]

    @cached_property
    def bonds(self) -> InternalCoordinates:
        """Bonds at the start."""
        if not len(self.start_positions):
            return InternalCoordinates(np.zeros((0, 2), np.int64), np.zeros((0, 2, 3), np.int64))
        return find_bonds(self.first.numbers, self.start_positions[0], self.first.cell_A, self.first.pbc)

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
        time, values = finite(replica, name)
        keep = time >= self.skip_fs - 1e-6
        return time[keep], values[keep]


def temperatures(replicas: Sequence[Replica]) -> Iterator[tuple[float, list[Replica]]]:
    """Replicas of every temperature, coldest first."""
    for target_K in sorted({r.target_K for r in replicas}):
        yield target_K, [r for r in replicas if r.target_K == target_K]


def finite(replica: Replica, *names: str) -> tuple[FloatArray, ...]:
    """Times (fs) at which all of these observables were measured, and their values there."""
    missing = np.full(len(replica.time_fs), np.nan)
    values = [replica.observables.get(name, missing) for name in names]
    keep = np.all(np.isfinite(values), axis=0)
    return replica.time_fs[keep], *(v[keep] for v in values)


def extend(columns: Columns, **values: Sequence[Any] | FloatArray | str | float) -> None:
    """Append to columns, which come to be in the order of the first call; a single value is repeated."""
    n = max(len(v) for v in values.values() if not isinstance(v, str | float))
    for key, more in values.items():
        columns.setdefault(key, []).extend([more] * n if isinstance(more, str | float) else more)
