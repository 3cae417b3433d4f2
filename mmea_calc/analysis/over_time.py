"""Quantities over time: temperature, energies, the conserved quantity, what was watched, and errors of means."""

from __future__ import annotations

import numpy as np

from ..statistics import LEAST_SAMPLES, block_average
from .quantity import Columns, Line, Panel, Quantity, Selection, extend, finite, temperatures

TIME = "Time (ps)"
# Errors from fewer blocks than this are all scatter.
LEAST_BLOCKS = 4


def temperature(selection: Selection) -> Quantity | None:
    """Kinetic temperature over time, with its running mean."""
    panels: list[Panel] = []
    columns: Columns = {}
    for target_K, replicas in temperatures(selection.replicas):
        lines = []
        for r in replicas:
            t, y = finite(r, "temperature")
            if t.size:
                extend(columns, replica=r.name, target_K=target_K, time_fs=t, temperature_K=y)
                running = np.cumsum(y) / np.arange(1, y.size + 1)
                lines.append(Line(t / 1000, y, "instantaneous", target_K, faint=True))
                lines.append(Line(t / 1000, running, "running mean", target_K))
        if lines:
            panels.append(Panel(f"{target_K:g} K", TIME, "Temperature (K)", lines, level=target_K))
    note = "Kinetic temperature of every replica; dashed: the temperature that was asked for."
    return Quantity("temperature", "Temperature", note, panels, columns) if panels else None


def energies(selection: Selection) -> Quantity | None:
    """Potential and total energy over time, relative to the start."""
    potential: list[Panel] = []
    total: list[Panel] = []
    columns: Columns = {}
    for target_K, replicas in temperatures(selection.replicas):
        below, above = [], []
        for r in replicas:
            t, p, k = finite(r, "potential_energy", "kinetic_energy")
            if t.size:
                extend(
                    columns, replica=r.name, target_K=target_K, time_fs=t, potential_energy_eV=p, kinetic_energy_eV=k
                )
                below.append(Line(t / 1000, p - p[0], "", target_K, faint=True))
                above.append(Line(t / 1000, p + k - p[0], "", target_K, faint=True))
        if below:
            potential.append(Panel(f"{target_K:g} K: potential", TIME, "Energy (eV)", below))
            total.append(Panel(f"{target_K:g} K: potential + kinetic", TIME, "Energy (eV)", above))
    note = "Potential energy, and the sum of potential and kinetic energy; zero is the potential energy at the start."
    if not potential:
        return None
    return Quantity("energies", "Energies", note, [*potential, *total], columns, per_row=len(potential))


def conserved(selection: Selection) -> Quantity | None:
    """The conserved quantity over time, per atom."""
    lines = []
    columns: Columns = {}
    for target_K, replicas in temperatures(selection.replicas):
        for r in replicas:
            t, y = finite(r, "conserved_energy")
            if t.size:
                extend(columns, replica=r.name, target_K=target_K, time_fs=t, conserved_energy_eV=y)
                per_atom = 1e3 * (y - y[0]) / len(r.numbers)
                lines.append(Line(t / 1000, per_atom, f"{target_K:g} K", target_K, faint=True))
    note = (
        "Potential plus kinetic energy minus the heat that the thermostat has put in, per atom. Exact dynamics would "
        "keep it; what it does tells of the time step and of noise in the forces."
    )
    panel = Panel("", TIME, "Change (meV/atom)", lines)
    return Quantity("conserved", "Conserved quantity", note, [panel], columns) if lines else None


# observable -> title of its panel, label of its axis, column
WATCHED = {
    "max_force": ("Largest force", "Force (eV/Å)", "max_force_eV_per_A"),
    "min_distance_ratio": ("Closest atoms", "Distance / covalent radii", "min_distance_ratio"),
    "broken_bonds": ("Bonds of the start that are open", "Bonds", "broken_bonds"),
    "formed_bonds": ("Bonds that are new", "Bonds", "formed_bonds"),
    "gate_excess": ("Gates outside the range of training", "Widths of that range", "gate_excess"),
    "adapted_minus_bare": ("Adapted minus bare forces", "RMS (eV/Å)", "adapted_minus_bare_eV_per_A"),
}


def monitor(selection: Selection) -> Quantity | None:
    """What was watched while the run went on."""
    columns: Columns = {}
    lines: dict[str, list[Line]] = {name: [] for name in WATCHED}
    for r in selection.replicas:
        missing = np.full(len(r.time_fs), np.nan)
        values = {column: r.observables.get(name, missing) for name, (_, _, column) in WATCHED.items()}
        extend(columns, replica=r.name, target_K=r.target_K, time_fs=r.time_fs, **values)
        for name, some in lines.items():
            t, y = finite(r, name)
            if t.size:
                some.append(Line(t / 1000, y, f"{r.target_K:g} K", r.target_K, "-" if t.size > 50 else ".-", True))
    panels = [Panel(*WATCHED[name][:1], TIME, WATCHED[name][1], some) for name, some in lines.items() if some]
    note = "What is watched while the run goes on; a replica that passes a bound is stopped."
    return Quantity("monitor", "Monitor", note, panels, columns) if panels else None


def blocking(selection: Selection) -> Quantity | None:
    """Standard errors of mean potential energy and temperature against the length of a block."""
    panels = []
    columns: Columns = {}
    for name, title, unit in (("potential_energy", "Potential energy", "eV"), ("temperature", "Temperature", "K")):
        lines = []
        for target_K, replicas in temperatures(selection.replicas):
            for r in replicas:
                t, y = selection.samples(r, name)
                if t.size < LEAST_SAMPLES or np.ptp(y) == 0.0:
                    continue
                average = block_average(y)
                block_fs = average.block_lengths * float(t[1] - t[0])
                extend(
                    columns, observable=f"{name}_{unit}", replica=r.name, target_K=target_K, block_fs=block_fs,
                    standard_error=average.errors, uncertainty=average.error_uncertainties,
                )  # fmt: skip
                shown = t.size // average.block_lengths >= LEAST_BLOCKS
                lines.append(Line(block_fs[shown], average.errors[shown], f"{target_K:g} K", target_K, ".-", True))
        if lines:
            panels.append(Panel(title, "Length of a block (fs)", f"Standard error ({unit})", lines, logarithmic=True))
    note = (
        "Standard error of the mean over blocks of growing length. It rises until blocks are independent and is level "
        "from there on; where it still rises, the run is too short."
    )
    return Quantity("blocking", "Block averages", note, panels, columns, per_row=2) if panels else None
