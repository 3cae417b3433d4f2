"""Quantities of motion: mean squared displacement, velocity autocorrelation, vibrational density of states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from . import motion
from .quantity import Columns, Line, Panel, Quantity, Selection, extend, temperatures
from .reader import Replica

FloatArray = NDArray[np.floating[Any]]

# Fewer frames than this make no curve.
LEAST_FRAMES = 5
# Wavenumbers beyond the stretching vibrations of hydrogen are not shown, and those are to be resolved.
HIGHEST_PER_CM = 4200.0
HYDROGEN_PER_CM = 3800.0
LONGEST_VACF_FS = 1000.0


def msd(selection: Selection) -> Quantity | None:
    """Mean squared displacement of each element in a periodic system."""
    if not selection.first.pbc.any():
        return None
    columns: Columns = {}
    lines: dict[str, list[Line]] = {}
    for target_K, replicas in temperatures(selection.long_enough(LEAST_FRAMES)):
        for r in replicas:
            frames = selection.frames(r)
            lag_fs = frames.time_fs - frames.time_fs[0]
            positions = motion.without_drift(frames.positions_A, r.masses_amu)
            shown = slice(0, len(lag_fs) // 2 + 1)
            for z in np.unique(r.numbers):
                element = chemical_symbols[z]
                curve = motion.mean_squared_displacement(positions[:, r.numbers == z])
                extend(columns, element=element, replica=r.name, target_K=target_K, lag_fs=lag_fs, msd_A2=curve)
                line = Line(lag_fs[shown] / 1000, curve[shown], f"{target_K:g} K", target_K, faint=True)
                lines.setdefault(element, []).append(line)
    if not lines:
        selection.remarks.append(_too_short("Mean squared displacements"))
        return None
    note = (
        "Displacement relative to the centre of mass, over all time origins and the atoms of an element; up to half "
        "of the run, beyond which there is little to average."
    )
    panels = [Panel(element, "Lag (ps)", "MSD (Å²)", some) for element, some in lines.items()]
    return Quantity("msd", "Mean squared displacement", note, panels, columns)


def vacf(selection: Selection) -> Quantity | None:
    """Velocity autocorrelation function, mean over the replicas of a temperature."""
    replicas = _moving(selection)
    columns: Columns = {}
    lines = []
    for target_K, some in temperatures(replicas):
        moving = _of_like_length(selection, some, target_K)
        curves = [motion.velocity_autocorrelation(velocities, r.masses_amu) for r, (velocities, _, _) in moving]
        _, (_, spacing_fs, _) = moving[-1]
        n = min(len(c) for c in curves) // 2 + 1
        mean, lag_fs = np.mean([c[:n] for c in curves], axis=0), np.arange(n) * spacing_fs
        extend(columns, target_K=target_K, lag_fs=lag_fs, vacf=mean)
        shown = lag_fs <= LONGEST_VACF_FS
        lines.append(Line(lag_fs[shown], mean[shown], f"{target_K:g} K", target_K))
    if not lines:
        if len(selection.first.numbers) > 1:
            selection.remarks.append(_too_short("Velocity autocorrelation and spectrum"))
        return None
    note = "Mass-weighted, over all atoms and time origins, relative to its value at 0; mean over replicas."
    panel = Panel("", "Lag (fs)", "C(t) / C(0)", lines, level=0.0)
    return Quantity("vacf", "Velocity autocorrelation", note, [panel], columns)


def _of_like_length(
    selection: Selection, replicas: Sequence[Replica], target_K: float
) -> list[tuple[Replica, tuple[FloatArray, float, bool]]]:
    """Replicas with their velocities, without those that ended before half of the longest: they would blur the mean."""
    found = [(r, _velocities(selection, r)) for r in replicas]
    longest = max(len(velocities) for _, (velocities, _, _) in found)
    kept = [(r, v) for r, v in found if 2 * len(v[0]) >= longest]
    remark = (
        f"{len(found) - len(kept)} of {len(found)} replicas at {target_K:g} K are less than half as long as the "
        "longest: velocity autocorrelation and spectrum leave them out."
    )
    if len(kept) < len(found) and remark not in selection.remarks:
        selection.remarks.append(remark)
    return kept


def spectra(selection: Selection) -> dict[float, motion.Spectrum]:
    """Target temperature (K) -> mean spectrum of its replicas, on the wavenumbers of the coarsest of them."""
    found: dict[float, motion.Spectrum] = {}
    for target_K, replicas in temperatures(_moving(selection)):
        each = []
        for r, (velocities, spacing_fs, differences) in _of_like_length(selection, replicas, target_K):
            each.append(motion.vibrational_spectrum(velocities, r.masses_amu, spacing_fs, from_differences=differences))
        coarsest = max(each, key=lambda s: s.resolution_per_cm)
        x = coarsest.wavenumber_per_cm
        mean = np.mean([np.interp(x, s.wavenumber_per_cm, s.density_cm) for s in each], axis=0)
        found[target_K] = motion.Spectrum(x, mean, coarsest.resolution_per_cm, coarsest.nyquist_per_cm)
    return found


def spectrum(selection: Selection) -> Quantity | None:
    """Vibrational density of states, mean over the replicas of a temperature."""
    found = spectra(selection)
    if not found:
        return None
    columns: Columns = {}
    lines = []
    for target_K, s in found.items():
        shown = s.wavenumber_per_cm <= HIGHEST_PER_CM
        x, y = s.wavenumber_per_cm[shown], s.density_cm[shown]
        peaks = motion.spectrum_peaks_per_cm(s)
        extend(columns, target_K=target_K, wavenumber_per_cm=x, density_cm=y)
        lines.append(Line(x, y, f"{target_K:g} K", target_K))
        if peaks.size:
            listed = ", ".join(f"{p:.0f}" for p in peaks)
            selection.remarks.append(f"Peaks of the spectrum at {target_K:g} K (cm⁻¹): {listed}.")
    coarsest = max(found.values(), key=lambda s: s.resolution_per_cm)
    note = (
        "Power spectrum of the mass-weighted velocity autocorrelation; each curve has the area 1. Lines are at least "
        f"{coarsest.resolution_per_cm:.0f} cm⁻¹ wide."
    )
    config = selection.run.config
    if config.get("ensemble") == "nvt" and (friction := config.get("friction_per_fs")):
        note += f" The friction of the thermostat adds {friction * motion.PER_CM / (2 * np.pi):.0f} cm⁻¹ to them."
    if 1 in selection.first.numbers and coarsest.nyquist_per_cm < HYDROGEN_PER_CM:
        selection.remarks.append(
            f"The spectrum ends at {coarsest.nyquist_per_cm:.0f} cm⁻¹, below the vibrations of bonds to hydrogen, "
            "which appear at false wavenumbers in it: store frames at most 4 fs apart."
        )
    panel = Panel("", "Wavenumber (cm⁻¹)", "Density of states (cm)", lines)
    return Quantity("spectrum", "Vibrational density of states", note, [panel], columns)


def _moving(selection: Selection) -> list[Replica]:
    """Replicas long enough; a single atom does not vibrate."""
    return selection.long_enough(LEAST_FRAMES) if len(selection.first.numbers) > 1 else []


def _velocities(selection: Selection, replica: Replica) -> tuple[FloatArray, float, bool]:
    """Velocities relative to the centre of mass (A/fs), their spacing (fs), and whether they are differences."""
    frames = selection.frames(replica)
    spacing_fs = motion.uniform_spacing_fs(frames.time_fs)
    if frames.velocities_A_per_fs is not None:
        return motion.without_drift(frames.velocities_A_per_fs, replica.masses_amu), spacing_fs, False
    positions = motion.without_drift(frames.positions_A, replica.masses_amu)
    return motion.velocities_by_differences(positions, spacing_fs), spacing_fs, True


def _too_short(what: str) -> str:
    return f"{what}: fewer than {LEAST_FRAMES} frames after the part that is left out; run for longer."
