"""The page of plots of a check: everything in the table, as curves, adapted (full) beside bare (dashed)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase.data import atomic_numbers

from ..plots import BLUE, DPI, GREEN, GREY, ORANGE, PALETTE, finish_panel, save_figure
from .forgetting import OtherMolecules
from .report import CheckReport, ModelReport
from .scans import FloatArray, Scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"adapter": "adapter", "backbone": "backbone alone"}
# Walls are drawn from below the minimum to where nothing comes any more; logarithmic above 1 eV.
_LOWEST_EV, _HIGHEST_EV = -0.6, 300.0
_LONG_LEGEND = 10


def page(report: CheckReport, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the page: ramp, pairs of atoms, squeezed bonds, molecules pushed together, forgetting, constant energy.

    Args:
        report: from `check`.
        path: the picture (.png, .pdf, .svg).
        title: above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15.0, 9.0), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    models = [m for m in (report.subject, report.bare) if m is not None]
    _ramp(axes[0], models)
    config = report.config
    for axis, name, words, x in (
        (axes[1], "pairs", "two atoms in vacuum", "Distance (Å)"),
        (axes[2], "squeezes", "squeezed bonds", "Bond length (Å)"),
        (axes[3], "approaches", "two molecules pushed together", "Distance of the leading atoms (Å)"),
    ):
        _walls(axis, [getattr(m, name) for m in models], words, x, config.max_hole_rim_eV)
    _forgetting(axes[4], report)
    _energy(axes[5], models)
    verdict = "sound" if report.passed else f"not sound: {len(report.failures)} of the criteria not met"
    figure.suptitle(f"{title or report.formula}: {verdict}", fontsize=12)
    return save_figure(figure, Path(path))


def _ramp(axes: Axes, models: Sequence[ModelReport]) -> None:
    ramp = models[0].ramp
    for model, colour in zip(models, (BLUE, GREY), strict=False):
        for i, replica in enumerate(model.ramp.replicas):
            series = _smooth(model.ramp.temperature_K[:, i])
            label = _LABELS[model.label] if i == 0 else None
            axes.plot(model.ramp.time_ps, series, color=colour, linewidth=1.0, alpha=0.8, label=label)
            if replica.failed_K is not None:
                axes.plot(replica.survived_ps, replica.failed_K, "X", color="black", markersize=9, zorder=5)
            if replica.changed_K is not None:
                share = (replica.changed_K - ramp.from_K) / ((ramp.to_K - ramp.from_K) or 1.0)
                axes.plot(share * ramp.length_ps, replica.changed_K, "D", color=colour, markersize=6, zorder=4)
    axes.plot([0, ramp.length_ps], [ramp.from_K, ramp.to_K], color="black", linestyle="--", label="thermostat")
    axes.plot([], [], "X", color="black", linestyle="none", label="replica failed")
    axes.plot([], [], "D", color="black", markerfacecolor="none", linestyle="none", label="bonds first changed")
    axes.set_title("temperature ramp", fontsize=10)
    axes.set_ylim(0, 1.6 * max(ramp.to_K, ramp.from_K))
    finish_panel(axes, "Time (ps)", "Temperature (K)")


def _smooth(series: FloatArray) -> FloatArray:
    """Running mean over a fiftieth of the run: the ramp and not the vibrations."""
    width = max(1, len(series) // 50)
    kernel = np.ones(width)
    known = np.isfinite(series)
    total = np.convolve(np.where(known, series, 0.0), kernel, "same")
    count = np.convolve(known.astype(float), kernel, "same")
    return np.asarray(np.where(known, total / np.maximum(count, 1.0), np.nan))


def _walls(axes: Axes, by_model: Sequence[Sequence[Scan]], words: str, x: str, rim_eV: float) -> None:
    axes.set_title(words, fontsize=10)
    if not by_model[0]:
        axes.text(0.5, 0.5, "not for a periodic structure", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    kinds = sorted({_kind(s.label) for s in by_model[0]}, key=_order)
    colour = {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(kinds)}
    for kind in kinds:
        axes.plot([], [], color=colour[kind], linewidth=1.4, label=kind)
    for scans, style, width in zip(by_model, ("-", "--"), (1.4, 1.0), strict=False):
        for scan in scans:
            kind = _kind(scan.label)
            (line,) = axes.plot(scan.distances_A, scan.energies_eV, alpha=0.85, linewidth=width)
            line.set(color=colour[kind], linestyle=style)
            if scan.hole is not None:
                face = colour[kind] if style == "-" else "white"
                axes.plot(
                    scan.hole.rim_A, scan.hole.rim_eV, "v", color=colour[kind], markerfacecolor=face, markersize=6
                )
    if np.isfinite(rim_eV):
        axes.axhline(rim_eV, color="black", linewidth=0.8, linestyle=":", label=f"bound of holes, {rim_eV:g} eV")
    axes.plot([], [], "v", color="black", linestyle="none", label="rim of a hole")
    if len(by_model) > 1:
        axes.plot([], [], color="black", linestyle="--", linewidth=1.0, label="backbone alone")
    axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
    axes.set_ylim(_LOWEST_EV, _HIGHEST_EV)
    axes.set_yticks([0, 1, 3, 10, 30, 100], labels=["0", "1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.set_xlim(by_model[0][0].distances_A[0] - 0.03, max(s.distances_A[-1] for s in by_model[0]))
    finish_panel(axes, x, "Energy above the minimum (eV)")
    axes.legend(fontsize=8, framealpha=0.9, edgecolor="none", ncols=2 if len(kinds) > _LONG_LEGEND // 2 else 1)


def _kind(label: str) -> str:
    """ "O7-C3" as "C-O", "O2...C1" as "C...O": the elements alone, the lighter one first."""
    joint = "..." if "..." in label else "-"
    symbols = ("".join(c for c in part if c.isalpha()) for part in label.split(joint))
    return joint.join(sorted(symbols, key=lambda s: atomic_numbers[s]))


def _order(kind: str) -> list[int]:
    return [atomic_numbers[s] for s in kind.replace("...", "-").split("-")]


def _forgetting(axes: Axes, report: CheckReport) -> None:
    axes.set_title("adapted minus bare forces", fontsize=10)
    forgetting = report.forgetting
    if forgetting is None:
        axes.text(0.5, 0.5, "no adapter: nothing to compare", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    own = (
        f"{report.formula}, {len(forgetting.own_per_structure_meV_per_A)} thermal frames",
        forgetting.own_per_structure_meV_per_A,
    )
    series = [own, *((_with_errors(s), s.per_structure_meV_per_A) for s in forgetting.others)]
    for (name, values), colour in zip(series, ("black", BLUE, ORANGE, GREEN), strict=False):
        ordered = np.sort(values)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(ordered, share, where="post", color=colour, label=name, linewidth=1.6)
    if all(values.min() > 0 for _, values in series):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        axes.xaxis.set_minor_formatter(
            lambda v, _: f"{v:g}" if round(v / 10 ** np.floor(np.log10(v))) in (2, 5) else ""
        )
        axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.set_ylim(0, 1.02)
    finish_panel(axes, "Root mean square difference of a structure's forces (meV/Å)", "Share of structures below")


def _with_errors(item: OtherMolecules) -> str:
    name = f"{item.name} ({item.n_structures})"
    if not item.judged:
        return name
    return f"{name}\nMAE {item.adapted_mae_meV_per_A:.0f}, backbone alone {item.bare_mae_meV_per_A:.0f} meV/Å"


def _energy(axes: Axes, models: Sequence[ModelReport]) -> None:
    axes.set_title("constant energy", fontsize=10)
    for model, colour in zip(models, (BLUE, GREY), strict=False):
        nve = model.constant_energy
        drift, error = nve.drift_meV_per_atom_ps, nve.drift_error_meV_per_atom_ps
        slope = "" if drift is None else f" ({drift:.2f} ± {error:.2f} meV/atom/ps)"
        for i in range(nve.energy_meV_per_atom.shape[1]):
            label = f"{_LABELS[model.label]}{slope}" if i == 0 else None
            axes.plot(nve.time_ps, nve.energy_meV_per_atom[:, i], color=colour, linewidth=0.9, alpha=0.8, label=label)
    low, high = axes.get_ylim()
    middle, half = 0.5 * (low + high), max(0.5 * (high - low), 0.5)
    axes.set_ylim(middle - half, middle + half)
    axes.axhline(0.0, color="black", linewidth=0.6)
    finish_panel(axes, "Time (ps)", "Total energy from the start (meV/atom)")
