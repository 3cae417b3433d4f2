"""A picture of how time grows with the size of a system, and what a batch of replicas brings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MMEAError
from ..plots import BLUE, ORANGE, finish_panel, make_panels, plain_log_scale, save_figure

if TYPE_CHECKING:
    from .speed import Measured, Timed


def draw_speed(measured: Measured, path: str | Path) -> Path:
    """Draw time per call against atoms, and steps per second against replicas, for both sides; returns the path.

    Raises:
        MMEAError: neither was measured for any size.
    """
    atoms, replicas = (_of(measured, series) for series in ("atoms", "replicas"))
    if not atoms and not replicas:
        raise MMEAError("a picture of speed needs periodic systems or replicas; neither was measured")
    figure, (left, right) = make_panels(1, 2, size=(9.0, 4.0), title=measured.settings)
    for panel, rows, factor in ((left, atoms, 1e-3), (right, replicas, 1.0)):
        for name, key, colour, mark in (("mmea, adapter on", "ours", BLUE, "o"), ("mace-torch", "theirs", ORANGE, "s")):
            points = [(row.size, factor * value) for row in rows if (value := getattr(row, key))]
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, marker=mark, label=name)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        plain_log_scale(panel)
    finish_panel(left, x="atoms, periodic (diamond)", y="time per call, s", legend=False)
    finish_panel(right, x="replicas of aspirin in one batch", y="steps per second, all replicas", legend=False)
    handles, names = (left if atoms else right).get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    right.set_title("mace-torch: one calculator, one after the other", fontsize=8)
    return save_figure(figure, Path(path))


def _of(measured: Measured, series: str) -> list[Timed]:
    return sorted((row for row in measured.rows if row.series == series), key=lambda row: row.size)
