"""Quantities of structure: distributions of bonds, angles and dihedrals, radial distribution functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import structure
from .quantity import Columns, Line, Panel, Quantity, Selection, extend, temperatures

FloatArray = NDArray[np.floating[Any]]

MOST_BINS, LEAST_CIRCLE_BINS = 120, 60
# Radial distributions converge with few frames, which are far from cheap.
RDF_FRAMES = 200
RDF_LARGEST_A, RDF_SMALLEST_A = 10.0, 6.0


def bonds(selection: Selection) -> Quantity | None:
    """Distributions of bond lengths, by elements."""
    labels = structure.type_labels(selection.first.numbers, selection.bonds)
    panels, columns = _distributions(selection, selection.bonds, labels, structure.distances, "Length (Å)", "length_A")
    note = "Lengths of the bonds of the start (by covalent radii), by elements; each curve has the area 1."
    return Quantity("bonds", "Bond lengths", note, panels, columns) if panels else None


def angles(selection: Selection) -> Quantity | None:
    """Distributions of bond angles, by elements."""
    found = structure.find_angles(selection.bonds)
    labels = structure.type_labels(selection.first.numbers, found)
    panels, columns = _distributions(selection, found, labels, structure.angles, "Angle (°)", "angle_deg")
    note = "Angles between bonds of the start, by elements, the vertex in the middle; each curve has the area 1."
    return Quantity("angles", "Angles", note, panels, columns) if panels else None


def dihedrals(selection: Selection) -> Quantity | None:
    """Distributions of one dihedral about every bond that can turn."""
    first = selection.first
    found = structure.find_torsions(first.numbers, selection.bonds)
    if len(found):
        found = found.select(~structure.nearly_straight(found.points(selection.start_positions, first.cell_A)))
    labels = structure.atom_labels(first.numbers, found)
    panels, columns = _distributions(
        selection, found, labels, structure.dihedrals, "Dihedral (°)", "dihedral_deg", limits=(-180.0, 180.0)
    )
    note = "One dihedral for every bond outside rings that can turn; atoms counted from 0; each curve has the area 1."
    return Quantity("dihedrals", "Dihedrals", note, panels, columns) if panels else None


def _distributions(
    selection: Selection,
    coordinates: structure.InternalCoordinates,
    labels: list[str],
    measure: Callable[[FloatArray], FloatArray],
    axis: str,
    column: str,
    limits: tuple[float, float] | None = None,
) -> tuple[list[Panel], Columns]:
    """One panel per label, one curve per temperature: all replicas of it, and all coordinates of that label."""
    replicas = selection.long_enough(1)
    unit = column.rpartition("_")[2]
    panels: list[Panel] = []
    columns: Columns = {}
    if not len(coordinates) or not replicas:
        return panels, columns
    measured = {r.name: measure(coordinates.points(selection.frames(r).positions_A, r.cell_A)) for r in replicas}
    for label, members in structure.groups(labels):
        values = {
            target_K: np.concatenate([measured[r.name][:, members].ravel() for r in some])
            for target_K, some in temperatures(replicas)
        }
        edges = _edges(list(values.values()), limits)
        lines = []
        for target_K, some_values in values.items():
            d = structure.distribution(some_values, edges)
            extend(columns, group=label, target_K=target_K, **{column: d.centres, f"density_per_{unit}": d.density})
            lines.append(Line(d.centres, d.density, f"{target_K:g} K", target_K))
        count = f" ({len(members)})" if len(members) > 1 else ""
        panels.append(Panel(f"{label}{count}", axis, "Density", lines))
    return panels, columns


def _edges(values: list[FloatArray], limits: tuple[float, float] | None) -> FloatArray:
    """Edges of bins around all values. Few values get few bins, or the curve would be all noise."""
    n = int(np.clip(np.sqrt(min(v.size for v in values)), 10, MOST_BINS))
    if limits is not None:
        # Over the whole circle most bins are empty: they may not be wider than the peaks.
        return np.linspace(*limits, max(n, LEAST_CIRCLE_BINS) + 1)
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    # A coordinate that does not move still gets bins wider than rounding.
    margin = max(0.02 * (high - low), 1e-3)
    return np.linspace(low - margin, high + margin, n + 1)


def rdf(selection: Selection) -> Quantity | None:
    """Radial distribution functions of a system that is periodic in three directions."""
    first, replicas = selection.first, selection.long_enough(1)
    if not first.pbc.all() or not replicas:
        return None
    half = structure.half_height(first.cell_A)
    r_max = min(RDF_LARGEST_A, max(half, RDF_SMALLEST_A))
    columns: Columns = {}
    lines: dict[str, list[Line]] = {}
    for target_K, some in temperatures(replicas):
        frames = np.concatenate([selection.frames(r).positions_A for r in some])
        chosen = frames[np.unique(np.linspace(0, len(frames) - 1, RDF_FRAMES).astype(int))]
        found = structure.radial_distribution(first.numbers, chosen, first.cell_A, r_max)
        for pair, g in found.g.items():
            extend(columns, pair=pair, target_K=target_K, r_A=found.r_A, g=g)
            lines.setdefault(pair, []).append(Line(found.r_A, g, f"{target_K:g} K", target_K))
    note = f"Pairs of atoms at a distance r over those of an ideal gas; up to {RDF_FRAMES} frames per temperature."
    if r_max > half:
        note += f" Beyond {half:.1f} Å, half the height of the cell, periodic images repeat what is nearer."
    panels = [Panel(pair, "r (Å)", "g(r)", some_lines, level=1.0) for pair, some_lines in lines.items()]
    return Quantity("rdf", "Radial distribution functions", note, panels, columns)
