"""Quantities of structure: distributions of bonds, angles and dihedrals, radial distribution functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from . import structure
from .quantity import Columns, Line, Panel, Quantity, Selection, temperatures

FloatArray = NDArray[np.float64]

# Radial distributions converge with few frames, which are far from cheap.
RDF_FRAMES = 200
RDF_LARGEST_A, RDF_SMALLEST_A = 10.0, 6.0
N_BINS = 120


def _bonds_at_start(selection: Selection) -> structure.InternalCoordinates:
    first = selection.replicas[0]
    start = selection.run.frames(first).positions_A
    if not len(start):
        return structure.InternalCoordinates(np.zeros((0, 2), np.int64), np.zeros((0, 2, 3), np.int64))
    return structure.find_bonds(first.numbers, start[0], first.cell_A, first.pbc)


def bonds(selection: Selection) -> Quantity | None:
    """Distributions of bond lengths, by elements."""
    coordinates = _bonds_at_start(selection)
    labels = structure.type_labels(selection.replicas[0].numbers, coordinates)
    note = "Lengths of the bonds of the start (by covalent radii), by elements; each curve has the area 1."
    return _distributions(
        selection, coordinates, labels, structure.distances, ("bonds", "Bond lengths", note), ("Length (Å)", "length_A")
    )


def angles(selection: Selection) -> Quantity | None:
    """Distributions of bond angles, by elements."""
    coordinates = structure.find_angles(_bonds_at_start(selection))
    labels = structure.type_labels(selection.replicas[0].numbers, coordinates)
    note = "Angles between bonds of the start, by elements (the vertex in the middle); each curve has the area 1."
    return _distributions(
        selection, coordinates, labels, structure.angles, ("angles", "Angles", note), ("Angle (°)", "angle_deg")
    )


def torsions(selection: Selection) -> Quantity | None:
    """Distributions of one dihedral about every bond that can turn."""
    first = selection.replicas[0]
    coordinates = structure.find_torsions(first.numbers, _bonds_at_start(selection))
    start = selection.run.frames(first).positions_A[:1]
    if len(coordinates) and len(start):
        bent = ~structure.nearly_straight(coordinates.points(start, first.cell_A))
        coordinates = coordinates.select(np.flatnonzero(bent))
    labels = structure.atom_labels(first.numbers, coordinates)
    note = "One dihedral for every bond outside rings that can turn; indices of atoms from 0; each curve has the area 1."
    return _distributions(
        selection, coordinates, labels, structure.dihedrals, ("dihedrals", "Dihedrals", note),
        ("Dihedral (°)", "dihedral_deg"), (-180.0, 180.0),
    )  # fmt: skip


def _distributions(
    selection: Selection,
    coordinates: structure.InternalCoordinates,
    labels: list[str],
    measure: Callable[[FloatArray], FloatArray],
    names: tuple[str, str, str],
    axis: tuple[str, str],
    limits: tuple[float, float] | None = None,
) -> Quantity | None:
    """One panel per group of coordinates, one curve per temperature, all replicas of it together."""
    name, title, note = names
    x_label, column = axis
    columns: Columns = {"group": [], "target_K": [], column: [], "density": []}
    replicas = selection.long_enough(1)
    if not len(coordinates) or not replicas:
        return None
    measured = {
        r.name: measure(coordinates.points(selection.frames(r).positions_A, r.cell_A)) for r in replicas
    }  # (n_frames, n) each
    panels = []
    for label, members in structure.groups(labels):
        values = {k: np.concatenate([measured[r.name][:, members].ravel() for r in rs]) for k, rs in temperatures(replicas)}
        edges = _edges(np.concatenate(list(values.values())), limits)
        lines = []
        for kelvin, v in values.items():
            d = structure.distribution(v, edges)
            lines.append(Line(d.centres, d.density, f"{kelvin:g} K", kelvin))
            n = len(d.centres)
            for key, more in zip(columns, ([label] * n, [kelvin] * n, d.centres, d.density), strict=True):
                columns[key].extend(more)
        count = f" ({len(members)})" if len(members) > 1 else ""
        panels.append(Panel(f"{label}{count}", x_label, "Density", lines))
    return Quantity(name, title, note, panels, columns)


def _edges(values: FloatArray, limits: tuple[float, float] | None) -> FloatArray:
    """Bins around the values. Few values get wide bins: a bin should hold some, or the curve is all noise."""
    n = int(np.clip(np.sqrt(values.size), 10, N_BINS))
    if limits is not None:
        return np.linspace(*limits, n + 1)
    # The least width keeps a frozen coordinate from being a bin thinner than rounding.
    margin = max(0.02 * float(np.ptp(values)), 1e-3)
    return np.linspace(float(values.min()) - margin, float(values.max()) + margin, n + 1)


def rdf(selection: Selection) -> Quantity | None:
    """Radial distribution functions of systems that are periodic in three directions."""
    first = selection.replicas[0]
    replicas = selection.long_enough(1)
    if not first.pbc.all() or not replicas:
        return None
    half = structure.half_height(first.cell_A)
    r_max = min(RDF_LARGEST_A, max(half, RDF_SMALLEST_A))
    columns: Columns = {"pair": [], "target_K": [], "r_A": [], "g": []}
    lines: dict[str, list[Line]] = {}
    for kelvin, group in temperatures(replicas):
        frames = np.concatenate([selection.frames(r).positions_A for r in group])
        some = frames[np.unique(np.linspace(0, len(frames) - 1, RDF_FRAMES).astype(int))]
        found = structure.radial_distribution(first.numbers, some, first.cell_A, r_max)
        for pair, g in found.g.items():
            lines.setdefault(pair, []).append(Line(found.r_A, g, f"{kelvin:g} K", kelvin))
            n = len(g)
            for key, more in zip(columns, ([pair] * n, [kelvin] * n, found.r_A, g), strict=True):
                columns[key].extend(more)
    note = f"Pairs of atoms at distance r over those of an ideal gas; up to {RDF_FRAMES} frames per temperature."
    if r_max > half:
        note += f" Beyond {half:.1f} Å atoms also see the images of others that they saw before."
    panels = [Panel(pair, "r (Å)", "g(r)", some_lines, level=1.0) for pair, some_lines in lines.items()]
    # With one element there is one pair, and it is all there is.
    panels = panels[1:] if len(panels) == 2 else panels
    return Quantity("rdf", "Radial distribution functions", note, panels, columns)
