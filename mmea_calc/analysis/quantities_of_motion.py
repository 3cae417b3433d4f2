"""Quantities of motion: mean squared displacement, velocity autocorrelation, vibrational density of states."""

from __future__ import annotations

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from . import motion
from .quantity import Columns, Line, Panel, Quantity, Selection, extend, temperatures, too_short
from .reader import Replica

FloatArray = NDArray[np.float64]

# Fewer frames than this make no curve.
LEAST_FRAMES = 5
# Wavenumbers beyond the stretching vibrations of hydrogen are not shown.
HIGHEST_PER_CM = 4200.0
# Vibrations of bonds to hydrogen, which the spacing of frames should resolve.
HYDROGEN_PER_CM = 3800.0
LONGEST_VACF_FS = 1000.0


def msd(selection: Selection) -> Quantity | None:
    """Mean squared displacements of each element in a periodic system."""
    first = selection.replicas[0]
    if not first.pbc.any():
        return None
    replicas = selection.long_enough(LEAST_FRAMES)
    if not replicas:
        selection.omitted.append(too_short("Mean squared displacements", LEAST_FRAMES))
        return None
    from ase.data import chemical_symbols

    columns: Columns = {"replica": [], "target_K": [], "element": [], "lag_fs": [], "msd_A2": []}
    lines: dict[str, list[Line]] = {}
    for r in replicas:
        frames = selection.frames(r)
        lag = frames.time_fs - frames.time_fs[0]
        positions = motion.without_drift(frames.positions_A, r.masses_amu)
        for z in np.unique(r.numbers):
            element = chemical_symbols[z]
            curve = motion.mean_squared_displacement(positions[:, r.numbers == z])
            half = slice(0, len(lag) // 2 + 1)
            lines.setdefault(element, []).append(
                Line(lag[half] / 1000, curve[half], f"{r.target_K:g} K", r.target_K, faint=True)
            )
            extend(columns, r, element=[element] * len(lag), lag_fs=lag, msd_A2=curve)
    note = (
        "Displacement of atoms relative to the centre of mass, over all time origins and the atoms of an element; up "
        "to half the length of the run, beyond which there is little to average."
    )
    panels = [Panel(element, "Lag (ps)", "Mean squared displacement (Å²)", some) for element, some in lines.items()]
    return Quantity("msd", "Mean squared displacement", note, panels, columns)


def _velocities(selection: Selection, replica: Replica) -> tuple[FloatArray, float, bool]:
    """Velocities relative to the centre of mass, their spacing in fs, and whether they are differences."""
    frames = selection.frames(replica)
    spacing = motion.uniform_spacing_fs(frames.time_fs)
    if frames.velocities_A_per_fs is None:
        positions = motion.without_drift(frames.positions_A, replica.masses_amu)
        return motion.velocities_by_differences(positions, spacing), spacing, True
    return motion.without_drift(frames.velocities_A_per_fs, replica.masses_amu), spacing, False


def _moving(selection: Selection) -> list[Replica]:
    """Replicas whose velocities tell something about vibrations."""
    return [] if len(selection.replicas[0].numbers) < 2 else selection.long_enough(LEAST_FRAMES + 1)


def vacf(selection: Selection) -> Quantity | None:
    """Velocity autocorrelation functions, mean over replicas of a temperature."""
    replicas = _moving(selection)
    if not replicas:
        selection.omitted.append(too_short("Velocity autocorrelation and spectrum", LEAST_FRAMES + 1))
        return None
    columns: Columns = {"target_K": [], "lag_fs": [], "vacf": []}
    lines = []
    for kelvin, group in temperatures(replicas):
        curves, spacing = [], 0.0
        for r in group:
            v, spacing, _ = _velocities(selection, r)
            curves.append(motion.velocity_autocorrelation(v, r.masses_amu))
        # Half of the lags, as above.
        n = min(len(c) for c in curves) // 2 + 1
        mean, lag = np.mean([c[:n] for c in curves], axis=0), np.arange(n) * spacing
        shown = lag <= LONGEST_VACF_FS
        lines.append(Line(lag[shown], mean[shown], f"{kelvin:g} K", kelvin))
        for key, more in zip(columns, ([kelvin] * n, lag, mean), strict=True):
            columns[key].extend(more)
    note = "Mass-weighted, over all atoms and time origins, over its value at 0; the mean over replicas."
    panel = Panel("", "Lag (fs)", "Velocity autocorrelation", lines, level=0.0)
    return Quantity("vacf", "Velocity autocorrelation", note, [panel], columns)


def spectra(selection: Selection) -> dict[float, motion.Spectrum]:
    """Target temperature (K) -> mean spectrum over its replicas, on the wavenumbers of the shortest of them."""
    found: dict[float, motion.Spectrum] = {}
    for kelvin, group in temperatures(_moving(selection)):
        each = []
        for r in group:
            v, spacing, differences = _velocities(selection, r)
            each.append(motion.vibrational_spectrum(v, r.masses_amu, spacing, from_differences=differences))
        coarsest = max(each, key=lambda s: s.resolution_per_cm)
        x = coarsest.wavenumber_per_cm
        mean = np.mean([np.interp(x, s.wavenumber_per_cm, s.density_cm) for s in each], axis=0)
        found[kelvin] = motion.Spectrum(x, mean, coarsest.resolution_per_cm, coarsest.nyquist_per_cm)
    return found


def spectrum(selection: Selection) -> Quantity | None:
    """Vibrational densities of states."""
    found = spectra(selection)
    if not found:
        return None
    columns: Columns = {"target_K": [], "wavenumber_per_cm": [], "density_cm": []}
    lines = []
    for kelvin, s in found.items():
        shown = s.wavenumber_per_cm <= HIGHEST_PER_CM
        x, y = s.wavenumber_per_cm[shown], s.density_cm[shown]
        lines.append(Line(x, y, f"{kelvin:g} K", kelvin))
        for key, more in zip(columns, ([kelvin] * len(x), x, y), strict=True):
            columns[key].extend(more)
    one = next(iter(found.values()))
    note = (
        f"Power spectrum of the mass-weighted velocity autocorrelation, each curve of area 1; lines are at least "
        f"{one.resolution_per_cm:.0f} cm⁻¹ wide."
    )
    config = selection.run.config
    if config.get("ensemble") == "nvt" and (friction := config.get("friction_per_fs")):
        note += f" The thermostat's friction widens them by {friction * motion.PER_CM / (2 * np.pi):.0f} cm⁻¹."
    if 1 in selection.replicas[0].numbers and one.nyquist_per_cm < HYDROGEN_PER_CM:
        selection.omitted.append(
            f"The spectrum ends at {one.nyquist_per_cm:.0f} cm⁻¹, below the vibrations of bonds to hydrogen, which "
            "appear folded to lower wavenumbers: store frames at most 4 fs apart (--traj-every)."
        )
    panel = Panel("", "Wavenumber (cm⁻¹)", "Density of states (cm)", lines)
    return Quantity("spectrum", "Vibrational density of states", note, [panel], columns)
