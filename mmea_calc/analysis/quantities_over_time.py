"""Quantities over time: temperature, energies, the conserved quantity, the monitor, and errors of means."""

from __future__ import annotations

import numpy as np

from .quantity import Line, Panel, Quantity, Selection, extend, finite, quantity, start_columns, temperatures
from .statistics import block_average


def temperature(selection: Selection) -> Quantity | None:
    """Kinetic temperature over time, with its running mean."""
    panels, columns = [], start_columns("time_fs", "temperature_K")
    for kelvin, replicas in temperatures(selection.replicas):
        lines = []
        for r in replicas:
            t, y = finite(r, "temperature")
            extend(columns, r, time_fs=t, temperature_K=y)
            lines.append(Line(t / 1000, y, "instantaneous", kelvin, faint=True))
            lines.append(Line(t / 1000, running_mean(y), "running mean", kelvin))
        panels.append(Panel(f"{kelvin:g} K", "Time (ps)", "Temperature (K)", lines, level=kelvin))
    note = "Kinetic temperature of every replica; dashed: the temperature that was asked for."
    return quantity("temperature", "Temperature", note, panels, columns, selection)


def energies(selection: Selection) -> Quantity | None:
    """Potential and total energy over time, relative to the start."""
    potential, total, columns = [], [], start_columns("time_fs", "potential_energy_eV", "kinetic_energy_eV")
    for kelvin, replicas in temperatures(selection.replicas):
        below, above = [], []
        for r in replicas:
            t, p = finite(r, "potential_energy", "kinetic_energy")
            _, k = finite(r, "kinetic_energy", "potential_energy")
            if not t.size:
                continue
            extend(columns, r, time_fs=t, potential_energy_eV=p, kinetic_energy_eV=k)
            below.append(Line(t / 1000, p - p[0], r.name, kelvin, faint=True))
            above.append(Line(t / 1000, p + k - p[0], r.name, kelvin, faint=True))
        potential.append(Panel(f"{kelvin:g} K: potential", "Time (ps)", axis, below))
        total.append(Panel(f"{kelvin:g} K: potential + kinetic", "Time (ps)", axis, above))
    note = "Potential energy, and the sum of potential and kinetic energy, relative to the potential energy at the start."
    panels = [p for p in (*potential, *total) if p.lines]
    return quantity("energies", "Energies", note, panels, columns, selection, per_row=max(1, len(potential)))


def conserved(selection: Selection) -> Quantity | None:
    """The conserved quantity over time, per atom."""
    lines, columns = [], start_columns("time_fs", "conserved_energy_eV")
    for kelvin, replicas in temperatures(selection.replicas):
        for r in replicas:
            t, y = finite(r, "conserved_energy")
            if t.size:
                extend(columns, r, time_fs=t, conserved_energy_eV=y)
                lines.append(Line(t / 1000, 1e3 * (y - y[0]) / len(r.numbers), f"{kelvin:g} K", kelvin, faint=True))
    note = (
        "Potential plus kinetic energy minus the heat that the thermostat has put in, per atom. Exact dynamics would "
        "keep it; what it does measures the time step and the noise of the forces."
    )
    panel = Panel("", "Time (ps)", "Conserved energy from start (meV/atom)", lines)
    return quantity("conserved", "Conserved quantity", note, [panel] if lines else [], columns, selection)


MONITOR = {
    "max_force": ("Largest force", "max_force_eV_per_A", "eV/Å"),
    "min_distance_ratio": ("Smallest distance / sum of covalent radii", "min_distance_ratio", ""),
    "broken_bonds": ("Bonds of the start that are open", "broken_bonds", ""),
    "formed_bonds": ("Bonds that the start had not", "formed_bonds", ""),
    "gate_excess": ("Gates outside the range of training", "gate_excess", "range widths"),
    "adapted_minus_bare": ("Adapted minus bare forces, RMS", "adapted_minus_bare_eV_per_A", "eV/Å"),
}


def monitor(selection: Selection) -> Quantity | None:
    """What was watched."""
    panels, columns = [], start_columns("time_fs", *(column for _, column, _ in MONITOR.values()))
    for r in selection.replicas:
        values = {
            column: r.observables.get(key, np.full(len(r.time_fs), np.nan)) for key, (_, column, _) in MONITOR.items()
        }
        extend(columns, r, time_fs=r.time_fs, **values)
    for key, (title, _, unit) in MONITOR.items():
        lines = []
        for r in selection.replicas:
            t, y = finite(r, key)
            if t.size:
                lines.append(Line(t / 1000, y, f"{r.target_K:g} K", r.target_K, "-" if t.size > 30 else ".-", True))
        if lines:
            panels.append(Panel(title, "Time (ps)", unit or "Value", lines))
    note = "What is watched while the run goes on; a replica beyond a bound is stopped."
    return quantity("monitor", "Monitor", note, panels, columns, selection)


def blocking(selection: Selection) -> Quantity | None:
    """Standard errors of mean potential energy and temperature against the length of a block."""
    panels = []
    columns = start_columns("observable", "block_fs", "standard_error", "uncertainty")
    for name, title, unit in (
        ("potential_energy", "Potential energy", "eV"),
        ("temperature", "Temperature", "K"),
    ):
        lines = []
        for r in selection.replicas:
            t, y = selection.samples(r, name)
            if t.size < 8 or np.ptp(y) == 0.0:
                continue
            average = block_average(y)
            block_fs = average.block_lengths * (t[1] - t[0])
            n = len(block_fs)
            extend(
                columns, r, observable=[f"{name}_{unit}"] * n, block_fs=block_fs,
                standard_error=average.errors, uncertainty=average.error_uncertainties,
            )  # fmt: skip
            lines.append(Line(block_fs, average.errors, f"{r.target_K:g} K", r.target_K, ".-", faint=True))
        if lines:
            y_label = f"Standard error of the mean ({unit})"
            panels.append(Panel(title, "Length of a block (fs)", y_label, lines, logarithmic=True))
    note = (
        "Standard error of the mean over blocks of growing length. It rises until blocks are independent and levels off "
        "there; a curve that still rises belongs to a run that is too short."
    )
    return quantity("blocking", "Block averages", note, panels, columns, selection, per_row=2)
