"""The table as a picture: errors of energies and forces of every method, column by column."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import PALETTE, finish_panel, make_panels, plain_log_scale, save_figure
from .table import QUANTITIES, Quantity, ResultTable, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AXES: dict[Quantity, str] = {"energy": "Energy {} (meV)", "forces": "Forces {} (meV/Å)"}
_MARKS = "osD^vP*X<>"
# Inches that a column takes, and what is around the panels.
_COLUMN, _AROUND = 0.85, 2.0
# And a name in the legend.
_NAME = 2.6


def draw(table: ResultTable, path: str | Path) -> Path | None:
    """Draw means with standard deviations over seeds; the bare backbone as dashes, published figures hollow.

    Args:
        table: what is drawn.
        path: the picture (.png, .pdf, .svg).

    Returns:
        the picture; None where there is nothing to draw.
    """
    shown = [q for q in QUANTITIES if any(e.of(q) for row in table.rows for e in row.entries.values())]
    if not shown:
        return None
    width = max(4.0, _AROUND + _COLUMN * len(table.columns))
    across = max(2, int(width * len(shown) / _NAME))
    lines = -(-len(table.rows) // across)
    figure, panels = make_panels(1, len(shown), size=(width * len(shown), 4.2 + 0.2 * lines), title=table.title)
    for axes, quantity in zip(panels, shown, strict=True):
        _panel(axes, table, quantity)
        finish_panel(axes, "", _AXES[quantity].format(table.measure.upper()), legend=False)
    handles, names = panels[-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=across, fontsize=8, frameon=False)
    return save_figure(figure, Path(path))


def _panel(axes: Axes, table: ResultTable, quantity: Quantity) -> None:
    methods = [row.method for row in table.rows if row.kind == "method"]
    step = 0.7 / max(len(methods), 1)
    told = False
    for row in table.rows:
        if row.kind == "zero-shot":
            _bare(axes, table, row, quantity)
            continue
        i = methods.index(row.method)
        points = [
            (x + (i - (len(methods) - 1) / 2) * step, value)
            for x, column in enumerate(table.columns)
            if column in row.entries and (value := row.entries[column].of(quantity)) is not None
        ]
        hollow = row.kind == "published"
        colour = PALETTE[i % len(PALETTE)]
        axes.errorbar(
            [x for x, _ in points],
            [value.mean for _, value in points],
            yerr=None if hollow else [value.std or 0.0 for _, value in points],
            linestyle="none",
            marker=_MARKS[(i + i // len(PALETTE)) % len(_MARKS)],  # no two methods look the same
            markersize=6,
            capsize=3,
            color=colour,
            markerfacecolor="none" if hollow else colour,
            # One line for all that is published; what is hollow is of the method that looks the same.
            label=None if hollow and told else "published (hollow)" if hollow else row.label,
        )
        told = told or hollow
    axes.set_xticks(range(len(table.columns)), table.headings, rotation=30 if len(table.columns) > 3 else 0)
    axes.set_xlim(-0.6, len(table.columns) - 0.4)
    plain_log_scale(axes)


def _bare(axes: Axes, table: ResultTable, row: Row, quantity: Quantity) -> None:
    label: str | None = row.label
    for x, column in enumerate(table.columns):
        if (value := row.entries[column].of(quantity)) is not None:
            axes.plot([x - 0.4, x + 0.4], [value.mean] * 2, color="black", linestyle="--", linewidth=1.0, label=label)
            label = None
