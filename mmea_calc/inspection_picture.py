"""The picture of an inspection: what gates do on the left, which weights change on the right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .inspection import GateActivity, Inspection, PathChange, TensorChange
from .plots import DPI, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# Nothing here: neither a value nor a zero.
_ABSENT = "#F2F2F2"
_ROW, _HEAD, _WIDTH = 0.26, 1.6, 8.0  # inches: one row of a heatmap, all that is around them, one half of the picture


def draw(inspection: Inspection, path: str | Path, *, title: str | None = None) -> Path:
    """Draw heatmaps of an inspection.

    Gates: a panel per layer, one column per multiplicity; the mean shift of even scalars in units of their root mean
    square before the gate, and the mean gain of every other order. Weights: a row per tensor, a column per path, by
    the order of its output; the change relative to the weights of the backbone's tensor (a path of its own may have
    hardly any) and, where some weights stay the same, the fraction of those that do not.

    Args:
        inspection: from `inspect`.
        path: the picture (.png, .pdf, .svg).
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    changes = inspection.changes
    sparse = any(0 < p.changed < p.entries for c in changes for p in c.paths)
    halves = bool(inspection.gates) + (1 + sparse) * bool(changes)
    heights = [_ROW * 1.5 * sum(_gate_rows(g) for g in inspection.gates), _ROW * len(changes)]
    figure = Figure(figsize=(_WIDTH * halves, _HEAD + max(2.0, *heights)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Sequence[SubFigure] = list(figure.subfigures(1, halves, wspace=0.02, squeeze=False).flat)
    if inspection.gates:
        _draw_gates(parts[0], inspection)
    if changes:
        label = "rms change of the path / rms weight of the tensor"
        _draw_changes(parts[-1], changes, label, _relative, logarithmic=True)
        if sparse:
            _draw_changes(parts[-2], changes, "fraction of weights that change", _fraction, logarithmic=False)
    if title:
        figure.suptitle(title, fontsize=12)
    return save_figure(figure, Path(path))


# --- gates ----------------------------------------------------------------------------------------------------------


def _gate_rows(gate: GateActivity) -> int:
    return max(1, len(gate.gains))


def _draw_gates(part: SubFigure, inspection: Inspection) -> None:
    from matplotlib.colors import LogNorm, Normalize

    gates = inspection.gates
    ratios = [_gate_rows(g) for g in gates]
    axes = part.subplots(len(gates), 2, squeeze=False, gridspec_kw={"height_ratios": ratios})
    shifts = [g.shift / g.scalar_rms if g.scalar_rms else g.shift for g in gates]
    widest = max((float(np.abs(s).max()) for s in shifts if s.size), default=0.0) or 1.0
    values = np.concatenate([v for g in gates for v in g.gains.values()] or [np.ones(1)])
    positive = values[np.isfinite(values) & (values > 0)]
    factor = max(float(np.exp(np.abs(np.log(positive)).max())) if positive.size else 1.0, 1.02)
    norms = Normalize(-widest, widest), LogNorm(1 / factor, factor)
    for (left, right), gate, shift in zip(axes, gates, shifts, strict=True):
        _strip(left, [shift] if shift.size else [], ["0e"], norms[0])
        _strip(right, list(gate.gains.values()), list(gate.gains), norms[1])
        left.set_ylabel(gate.layer, rotation=0, ha="right", va="center", fontsize=8, labelpad=10)
    for axis in axes[-1]:
        axis.set_xlabel("multiplicity", fontsize=9)
    part.suptitle(f"gates, mean over {inspection.n_atoms} atoms of {inspection.n_structures} structures", fontsize=10)
    for column, (norm, label) in enumerate(
        zip(norms, ("mean shift / rms of the scalars", "mean gain (factor)"), strict=True)
    ):
        bar = _colour_bar(part, axes[:, column], norm, "RdBu_r", label)
        if column == 1:
            ticks = [1 / factor, factor**-0.5, 1.0, factor**0.5, factor]
            # weak gains differ in late digits
            style = f".{1 - math.floor(math.log10(factor - 1))}f" if factor < 2 else ".2g"
            bar.set_ticks(ticks, labels=[format(t, style) for t in ticks])
            bar.minorticks_off()


def _strip(axis: Axes, rows: Sequence[np.ndarray], names: Sequence[str], norm: Any) -> None:
    """One order per line, one multiplicity per column."""
    from matplotlib.ticker import MaxNLocator

    if not rows:
        axis.axis("off")
        return
    width = max(len(r) for r in rows)
    image = np.full((len(rows), width), np.nan)
    for line, row in zip(image, rows, strict=True):
        line[: len(row)] = row
    axis.imshow(image, aspect="auto", cmap=_colours("RdBu_r"), norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    if width > 1:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axis.set_xticks([0])
    axis.tick_params(length=2, labelsize=7)


# --- weights --------------------------------------------------------------------------------------------------------


def _relative(path: PathChange, whole: PathChange) -> float:
    return path.rms_change / whole.rms_weight if whole.rms_weight > 0 else np.nan


def _fraction(path: PathChange, whole: PathChange) -> float:
    return path.changed / path.entries


def _draw_changes(
    part: SubFigure,
    changes: Sequence[TensorChange],
    label: str,
    value: Callable[[PathChange, PathChange], float],
    *,
    logarithmic: bool,
) -> None:
    from matplotlib.colors import LogNorm, Normalize

    orders = sorted({p.order for c in changes for p in c.paths}, key=lambda o: -1 if o is None else o)
    widths = [max(sum(p.order == o for p in c.paths) for c in changes) for o in orders]
    starts = np.concatenate([[0], np.cumsum(np.array(widths) + 1)])  # an empty column between orders
    image = np.full((len(changes), int(starts[-1]) - 1), np.nan)
    for line, change in zip(image, changes, strict=True):
        for order, start in zip(orders, starts, strict=False):
            values = [value(p, change.total) for p in change.paths if p.order == order]
            line[start : start + len(values)] = values
    positive = image[np.isfinite(image) & (image > 0)]
    norm: Any = Normalize(0, float(positive.max()) if positive.size else 1.0)
    if logarithmic:
        top = float(positive.max()) if positive.size else 1.0
        low = float(positive.min()) if positive.size else 0.1
        norm = LogNorm(max(min(low, top / 10), top * 1e-3), top, clip=True)
    axis = part.subplots()
    axis.imshow(image, aspect="auto", cmap=_colours("viridis"), norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(changes)), [_short(c.tensor) for c in changes], fontsize=8)
    middles = [start + (width - 1) / 2 for start, width in zip(starts, widths, strict=False)]
    names = ["no\norder" if o is None else f"l = {o}" for o in orders]
    axis.set_xticks(middles, names, fontsize=8)
    axis.tick_params(length=0)
    for start in starts[1:-1]:
        axis.axvspan(start - 1.5, start - 0.5, color="white")
    for row in range(1, len(changes)):
        axis.axhline(row - 0.5, color="white", linewidth=1.0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_xlabel("paths, by the order of their output", fontsize=9)
    part.suptitle(label, fontsize=10)
    _colour_bar(part, [axis], norm, "viridis")


def _short(name: str) -> str:
    """The path of a tensor without words that every one of its kind has."""
    return name.replace("symmetric_contractions.contractions", "contraction").removesuffix(".weight")


# --- both -----------------------------------------------------------------------------------------------------------


def _colours(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=_ABSENT)


def _colour_bar(part: SubFigure, axes: Any, norm: Any, name: str, label: str = "") -> Any:
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(norm, _colours(name))
    bar = part.colorbar(mappable, ax=axes, location="bottom", shrink=0.8, aspect=40, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return bar


__all__ = ["draw"]
