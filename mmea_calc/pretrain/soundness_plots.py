"""The page of plots of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase.data import atomic_numbers

from ..plots import BLUE, GREY, ORANGE, PALETTE, finish_panel, make_panels, save_figure
from .soundness import GAPS, Soundness

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of 55 pairs of elements: those of organic molecules have a colour, the others are grey.
_COLOURED = ("H-H", "H-C", "H-N", "H-O", "C-C", "C-N", "C-O", "N-N", "N-O", "O-O")


def soundness_page(found: Soundness, path: Path) -> Path:
    """Six panels; returns `path`."""
    figure, axes = make_panels(2, 3, size=(15.0, 8.4), title=found.backbone)
    walls, separation, torsion, bond, vibrations, errors = axes
    _walls(walls, found)
    _separation(separation, found)
    for panel, x, ours, reference, words, label in (
        (torsion, "dihedrals", found.butane, found.butane_reference, "Butane, one half turned", "C-C-C-C (°)"),
        (bond, "distances", found.water_dimer, found.water_dimer_reference, "Water dimer, moved apart", "O-O (Å)"),
    ):
        panel.plot(found.references[x], reference, "o-", color=GREY, label="PBE/def2-SVP", markersize=4)
        panel.plot(found.references[x], ours, "o-", color=BLUE, label=found.backbone, markersize=4)
        panel.set_title(words, fontsize=10)
        finish_panel(panel, label, "Energy above trans (meV)" if panel is torsion else "Interaction energy (meV)")
    _vibrations(vibrations, found)
    _errors(errors, found)
    return save_figure(figure, path)


def _walls(axes: Axes, found: Soundness) -> None:
    axes.set_title("Two atoms; rims of holes as triangles", fontsize=10)
    colours = dict(zip(_COLOURED, PALETTE, strict=True))
    for scan in sorted(found.walls, key=lambda s: s.label in colours):  # coloured ones on top
        kind = "-".join(sorted(scan.label.split("-"), key=lambda s: atomic_numbers[s]))
        known = kind in colours
        label = kind if known else None
        colour = colours.get(kind, "#D0D0D0")
        axes.plot(scan.distances_A, scan.energies_eV, color=colour, label=label, linewidth=1.4 if known else 0.7)
        if scan.hole is not None:
            axes.plot(scan.hole.rim_A, scan.hole.rim_eV, "v", color=colour, markersize=6)
    axes.plot([], [], color="#D0D0D0", linewidth=0.7, label="other pairs")
    axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
    axes.set_yticks([0, 1, 3, 10, 30, 100], labels=["0", "1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.set_xlim(0.5, 2.5)
    axes.set_ylim(-3, 300)
    finish_panel(axes, "Distance (Å)", "Energy above the minimum (eV)")
    axes.legend(fontsize=7, framealpha=0.9, edgecolor="none", ncols=2)


def _separation(axes: Axes, found: Soundness) -> None:
    axes.set_title("A molecule and its mirror image, moved apart", fontsize=10)
    for i, (name, energies) in enumerate(found.separated.items()):
        axes.plot(GAPS, energies, color=PALETTE[i % len(PALETTE)], linewidth=1.0, label=name)
    axes.set_ylim(-200, 200)
    finish_panel(axes, "Gap between nearest atoms (Å)", "Interaction energy (meV)")
    axes.legend(fontsize=6, framealpha=0.9, edgecolor="none", ncols=3)


def _vibrations(axes: Axes, found: Soundness) -> None:
    axes.set_title("Harmonic vibrations of small molecules", fontsize=10)
    reference = np.concatenate([v.reference for v in found.vibrating])
    ours = np.concatenate([v.wavenumbers for v in found.vibrating])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot(reference, ours - reference, ".", color=BLUE, markersize=5)
    finish_panel(axes, "PBE/def2-SVP (1/cm)", "Backbone minus PBE (1/cm)")


def _errors(axes: Axes, found: Soundness) -> None:
    axes.set_title("Bond lengths at rest, molecule by molecule", fontsize=10)
    for i, one in enumerate(found.vibrating):
        axes.plot([i] * len(one.bond_errors), 1e3 * np.array(one.bond_errors), ".", color=ORANGE)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(found.vibrating)), [v.name for v in found.vibrating], rotation=60, fontsize=7)
    finish_panel(axes, "", "Backbone minus PBE (mÅ)")
