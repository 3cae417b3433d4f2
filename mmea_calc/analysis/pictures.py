"""Quantities drawn: one picture each, with a panel beside the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmea_calc.plots import finish_panel, make_panels, save_figure

from .quantity import Line, Panel, Quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_INCHES = (3.9, 2.7)
# More panels than this are not drawn; the csv file has them all.
MOST_PANELS = 24
# More points of a curve than this are thinned: a picture has not so many pixels.
MOST_POINTS = 4000
# Cold to hot, readable with colour blindness and in grey: parts of the map "plasma" that stand out on white.
COLOUR_MAP, COLDEST, HOTTEST = "plasma", 0.0, 0.75


def draw(quantity: Quantity, path: str | Path) -> Path:
    """Draw a quantity; the suffix of `path` chooses the format. Colours stand for target temperatures."""
    panels = quantity.panels[:MOST_PANELS]
    columns = min(len(panels), quantity.per_row)
    rows = math.ceil(len(panels) / columns)
    # A panel alone is wider than one among others.
    width, height = (7.5, 4.0) if len(panels) == 1 else (columns * PANEL_INCHES[0], rows * PANEL_INCHES[1])
    more = len(quantity.panels) - len(panels)
    title = f"{quantity.title} (and {more} more in the table)" if more else quantity.title
    figure, axes = make_panels(rows, columns, size=(width, height), title=title)
    colours = _colours(sorted({line.target_K for panel in quantity.panels for line in panel.lines}))
    for i, (panel, ax) in enumerate(zip(panels, axes, strict=False)):
        _panel(ax, panel, colours, legend=i == 0)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return save_figure(figure, Path(path))


def _colours(targets_K: Sequence[float]) -> dict[float, tuple[float, ...]]:
    from matplotlib import colormaps

    positions = np.linspace(COLDEST, HOTTEST, len(targets_K)) if len(targets_K) > 1 else [0.25]
    return {kelvin: tuple(colormaps[COLOUR_MAP](x)) for kelvin, x in zip(targets_K, positions, strict=True)}


def _panel(ax: Axes, panel: Panel, colours: dict[float, tuple[float, ...]], legend: bool) -> None:
    from matplotlib.ticker import LogLocator

    seen: set[str] = set()
    for line in panel.lines:
        label = line.label if line.label and line.label not in seen else "_"
        seen.add(line.label)
        x, y = _thinned(line)
        ax.plot(
            x,
            y,
            line.style,
            color=colours[line.target_K],
            alpha=0.5 if line.faint else 1.0,
            linewidth=0.8 if line.faint else 1.3,
            markersize=4,
            label=label,
            zorder=2 if line.faint else 3,
        )
    if panel.level is not None:
        ax.axhline(panel.level, color="black", linewidth=0.9, linestyle="--", zorder=4)
    if panel.logarithmic:
        for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda *_: "")
    else:
        ax.margins(x=0.01)
        ax.ticklabel_format(axis="y", useOffset=False)
        if not any(np.any(line.y) for line in panel.lines):
            ax.set_ylim(-0.05, 1.0)  # nothing but zeros, which would get an axis of hundredths
    if panel.title:
        ax.set_title(panel.title, fontsize=9)
    finish_panel(ax, panel.x_label, panel.y_label, legend=legend)
    if (box := ax.get_legend()) is not None:
        for handle in box.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)


def _thinned(line: Line) -> tuple[np.ndarray, np.ndarray]:
    step = max(1, math.ceil(line.x.size / MOST_POINTS))
    return line.x[::step], line.y[::step]
