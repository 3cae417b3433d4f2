"""Pictures: learning curves, parity of predictions and labels, energy and temperature of a trajectory.

Every function writes one file and returns its path; the suffix chooses the format (.png, .pdf, .svg).
Figures are objects of their own: nothing here touches pyplot or matplotlib's global settings.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import MMEAError
from .files import check_place, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: readable with every common colour blindness, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
# The palette goes on, for many series.
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "black", "#8A6D3B", "#6A3D9A", "#B2DF8A")
DPI = 150
PICTURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
# Beyond this many points a scatter is drawn with small, faint marks.
CROWDED = 5000


@dataclass(frozen=True)
class ParitySeries:
    """Predictions of one model on labelled structures.

    Attributes:
        label: name in the legend, e.g. "adapter".
        energy: predicted energy per atom, (n_structures,), eV/atom.
        reference_energy: labels, (n_structures,), eV/atom.
        forces: predicted force components, any shape, eV/A.
        reference_forces: labels, of the same shape, eV/A.
        energy_origin: what energies are drawn relative to, (n_structures,), eV/atom: the mean label of structures of
            one composition. Not given: that of all.
        stress, reference_stress: the same for stress components, any shape, eV/A^3; drawn where there are any.
    """

    label: str
    energy: np.ndarray
    reference_energy: np.ndarray
    forces: np.ndarray
    reference_forces: np.ndarray
    energy_origin: np.ndarray | None = None
    stress: np.ndarray = field(default_factory=lambda: np.zeros(0))
    reference_stress: np.ndarray = field(default_factory=lambda: np.zeros(0))


def learning_curve(
    history: str | Path | Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    zero_shot: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draw training losses and validation errors against the epoch.

    Args:
        history: the csv file of a run, or its rows; columns `epoch`, `loss`, `energy_loss`, `forces_loss`,
            `valid_energy_mae_meV_per_atom`, `valid_forces_mae_meV_per_A`. A column that is absent or empty is left out.
        path: the picture.
        zero_shot: the bare backbone's validation errors under the same column names, drawn as dashed lines.
        title: above the panels.

    Raises:
        MMEAError: no epoch in `history`.
    """
    rows = _read_rows(history) if isinstance(history, str | Path) else list(history)
    if not rows:
        raise MMEAError("a learning curve needs at least one epoch; the history is empty: train for one epoch or more")
    figure, (losses, energy, forces) = make_panels(1, 3, size=(12.0, 3.6), title=title)
    for column, label, colour in (
        ("loss", "total", "black"),
        ("energy_loss", "energy", ORANGE),
        ("forces_loss", "forces", BLUE),
    ):
        _curve(losses, rows, column, label, colour)
    finish_panel(losses, "Epoch", "Training loss")
    for axes, column, quantity, colour in (
        (energy, "valid_energy_mae_meV_per_atom", "Energy MAE (meV/atom)", ORANGE),
        (forces, "valid_forces_mae_meV_per_A", "Forces MAE (meV/Å)", BLUE),
    ):
        best = _curve(axes, rows, column, "validation", colour, name_best=True)
        bare = float((zero_shot or {}).get(column, math.nan))
        if best and math.isfinite(bare):
            axes.axhline(bare, color=GREY, linestyle="--", label=f"backbone alone ({_number(bare)})")
        finish_panel(axes, "Epoch", f"Validation: {quantity}")
    return save_figure(figure, Path(path))


def parity(series: Sequence[ParitySeries], path: str | Path, *, title: str | None = None) -> Path:
    """Draw predictions against labels: energies per atom, force components, and stress components if there are any.

    Energies are relative to `energy_origin`. Axes are equal. When a model is so far off that it would squeeze
    the others into a dot, the axes follow the labels and the last series, and the legend counts what lies outside.

    Args:
        series: drawn in this order, so the model of interest belongs last.
        path: the picture.
        title: above the panels.

    Raises:
        MMEAError: no series, or shapes of predictions and labels that differ.
    """
    if not series:
        raise MMEAError("a parity plot needs at least one series of predictions; none was given")
    for s in series:
        for quantity, a, b in (
            ("energies", s.energy, s.reference_energy),
            ("forces", s.forces, s.reference_forces),
            ("stresses", s.stress, s.reference_stress),
        ):
            if np.shape(a) != np.shape(b):
                raise MMEAError(f"{s.label}: predicted {quantity} have shape {np.shape(a)}, labels {np.shape(b)}")
    n_panels = 3 if any(np.size(s.stress) for s in series) else 2
    figure, panels = make_panels(1, n_panels, size=(5.0 * n_panels, 5.3), title=title)
    energy, forces = panels[:2]
    labels = np.asarray(series[-1].reference_energy, dtype=float)
    origin, relative_to = np.array(labels.mean() if labels.size else 0.0), "the mean label"
    if series[-1].energy_origin is not None:
        origin, relative_to = series[-1].energy_origin, "that composition's mean"
    _parity_panel(
        energy,
        [(s.label, 1e3 * (s.reference_energy - origin), 1e3 * (s.energy - origin)) for s in series],
        f"energy relative to {relative_to} (meV/atom)",
        unit="meV/atom",
    )
    _parity_panel(
        forces,
        [(s.label, np.ravel(s.reference_forces), np.ravel(s.forces)) for s in series],
        "force component (eV/Å)",
        unit="meV/Å",
        scale=1e3,
    )
    if n_panels == 3:
        _parity_panel(
            panels[2],
            [(s.label, 1e3 * np.ravel(s.reference_stress), 1e3 * np.ravel(s.stress)) for s in series],
            "stress component (meV/Å³)",
            unit="meV/Å³",
        )
    return save_figure(figure, Path(path))


def dynamics(
    time_fs: Sequence[float] | np.ndarray,
    potential_energy: Sequence[float] | np.ndarray,
    temperature: Sequence[float] | np.ndarray,
    path: str | Path,
    *,
    target_temperature_K: float | None = None,
    title: str | None = None,
) -> Path:
    """Draw potential energy and temperature of a trajectory against time.

    Args:
        time_fs: (n_frames,), fs.
        potential_energy: (n_frames,), eV; drawn relative to the first frame.
        temperature: instantaneous kinetic temperature, (n_frames,), K.
        path: the picture.
        target_temperature_K: the thermostat's temperature, drawn as a dashed line.
        title: above the panels.

    Raises:
        MMEAError: arrays of different lengths, or empty ones.
    """
    time, energy, kelvin = (np.asarray(a, dtype=float) for a in (time_fs, potential_energy, temperature))
    if time.size == 0 or not time.shape == energy.shape == kelvin.shape:
        raise MMEAError(
            f"time, potential energy and temperature need one value per frame, got {time.shape}, {energy.shape} and "
            f"{kelvin.shape}"
        )
    if time[-1] >= 2000:
        time, unit = time / 1000, "ps"
    else:
        unit = "fs"
    figure, (top, bottom) = make_panels(2, 1, size=(8.0, 5.4), title=title, sharex=True)
    top.plot(time, energy - energy[0], color=BLUE, linewidth=1.1)
    finish_panel(top, "", "Potential energy from start (eV)", legend=False)
    bottom.plot(time, kelvin, color=ORANGE, linewidth=1.1, label="instantaneous")
    running = np.cumsum(kelvin) / np.arange(1, kelvin.size + 1)
    bottom.plot(time, running, color="black", linewidth=1.6, label=f"running mean (last: {running[-1]:.0f} K)")
    if target_temperature_K is not None:
        bottom.axhline(
            target_temperature_K, color=GREY, linestyle="--", label=f"thermostat ({target_temperature_K:g} K)"
        )
    bottom.set_ylim(0, max(1.25 * float(kelvin.max()), 1.25 * (target_temperature_K or 0.0), 1.0))
    finish_panel(bottom, f"Time ({unit})", "Temperature (K)")
    if time.size > 1:
        bottom.set_xlim(time[0], time[-1])
    return save_figure(figure, Path(path))


def _read_rows(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the rows that have one; epochs without a validation leave their cell empty."""
    pairs = [(float(r["epoch"]), float(r[name])) for r in rows if r.get(name) not in (None, "")]
    array = np.asarray(pairs, dtype=float).reshape(-1, 2)
    array = array[np.isfinite(array[:, 1])]
    return array[:, 0], array[:, 1]


def _curve(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    column: str,
    label: str,
    colour: str,
    name_best: bool = False,
) -> bool:
    """One line with a logarithmic axis where the values allow it. Returns whether there was something to draw."""
    from matplotlib.ticker import MaxNLocator

    epochs, values = _column(rows, column)
    if not values.size or not np.any(values):
        return False
    if name_best:
        label = f"{label} (best: {_number(float(values.min()))})"
    mark = "o" if values.size < 30 else None
    axes.plot(epochs, values, color=colour, label=label, linewidth=1.5, marker=mark, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if values.min() > 0:
        plain_log_scale(axes)
    return True


def plain_log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: 0.5 and 20 read better than powers of ten over one or two decades."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: _minor_label(y, *axes.get_ylim()))
    axes.tick_params(axis="y", which="minor", labelsize=8)


def _minor_label(value: float, low: float, high: float) -> str:
    """Label of a tick between two powers of ten: the fewer, the more decades there are."""
    digit = round(value / 10.0 ** math.floor(math.log10(value)))
    decades = math.log10(high / low)
    shown = (2, 3, 4, 5, 6, 8) if decades < 0.9 else (2, 5) if decades < 2.5 else ()
    return f"{value:g}" if digit in shown else ""


def _number(value: float) -> str:
    """Three significant digits, without an exponent for thousands."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _parity_panel(
    axes: Axes,
    data: Sequence[tuple[str, np.ndarray, np.ndarray]],
    quantity: str,
    *,
    unit: str,
    scale: float = 1.0,
) -> None:
    """One scatter of predictions against labels; `scale` takes their errors to `unit`."""
    low, high = _limits(data)
    axes.plot([low, high], [low, high], color="black", linewidth=0.8, zorder=1)
    colours = [GREY, BLUE, GREEN, ORANGE] if len(data) > 1 else [BLUE]
    for i, (label, reference, predicted) in enumerate(data):
        if not np.size(reference):
            continue
        error = np.asarray(predicted) - np.asarray(reference)
        text = f"{label}: MAE {_number(scale * float(np.mean(np.abs(error))))} {unit}"
        outside = int(np.sum((predicted < low) | (predicted > high)))
        if outside:
            text += f" ({outside} outside)"
        crowded = np.size(reference) > CROWDED
        axes.scatter(
            reference,
            predicted,
            s=5 if crowded else 14,
            alpha=0.3 if crowded else 0.6,
            color=colours[i % len(colours)],
            linewidths=0,
            label=text,
            zorder=2 + i,
            rasterized=True,
        )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal", adjustable="box")
    finish_panel(axes, f"Label: {quantity}", f"Prediction: {quantity}")
    if legend := axes.get_legend():
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)


def _limits(data: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Common limits of both axes: all points, unless some model would shrink the labels to less than a fifth."""
    _, reference, predicted = data[-1]
    focus = np.concatenate([np.ravel(reference), np.ravel(predicted)])
    everything = np.concatenate([np.ravel(a) for _, r, p in data for a in (r, p)])
    focus, everything = focus[np.isfinite(focus)], everything[np.isfinite(everything)]
    if not focus.size:
        return -1.0, 1.0
    chosen = everything if np.ptp(everything) <= 5 * np.ptp(focus) else focus
    margin = 0.05 * float(np.ptp(chosen)) or 1.0
    return float(chosen.min()) - margin, float(chosen.max()) + margin


def make_panels(
    rows: int, columns: int, *, size: tuple[float, float], title: str | None, sharex: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of its own, `size` in inches, and its rows x columns panels, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=sharex)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, list(np.ravel(axes))


def finish_panel(axes: Axes, x: str, y: str, legend: bool = True) -> None:
    """Labels with units, a faint grid, no frame, and a legend where something is labelled."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")


def check_picture(path: Path | None) -> None:
    """Raise an MMEAError for a name that no picture can have, and an OSError for a place that cannot be written."""
    if path is None:
        return
    if path.suffix and path.suffix.lower() not in PICTURES:
        raise MMEAError(f"{path} is no name for a picture: expected one that ends in {', '.join(PICTURES)}")
    check_place(path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure under a temporary name and rename it, so that a picture is whole or absent."""
    check_picture(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lower().lstrip(".") or "png")
    return path
