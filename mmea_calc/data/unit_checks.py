"""Do the labels look like eV and eV/A? Three independent tests, each silent where the data cannot tell.

Nothing here is fatal: physics says what is likely, the user knows what was computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from ase import units
from ase.data import covalent_radii
from numpy.typing import NDArray

from ..neighbours import neighbours
from .dataset import Labelled, composition

FloatArray = NDArray[np.float64]

# One unit in eV, and in eV/A.
_ENERGY_UNITS = {
    "eV": 1.0,
    "Hartree": units.Hartree,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
}
_FORCE_UNITS = {
    "eV/A": 1.0,
    "Hartree/Bohr": units.Hartree / units.Bohr,
    "Rydberg/Bohr or Hartree/A": units.Rydberg / units.Bohr,
    "kcal/mol/A": units.kcal / units.mol,
    "kJ/mol/A": units.kJ / units.mol,
}
_NONMETALS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 34, 35, 53)
# Median stiffness of covalent bonds in thermal structures, eV/A^2: `bond_stiffness` gives 25 to 43 over ethanol,
# aspirin, uracil, toluene, malonaldehyde, acetylacetone, 3BPA and two sets of mixed molecules (PBE, wB97X, GFN2-xTB).
_BOND_STIFFNESS = 34.0
_MAX_STRUCTURES = 300
_NO_BOND = 1.5  # times the sum of the covalent radii


def unit_warnings(structures: Sequence[Labelled]) -> list[str]:
    """Sentences about labels that do not look like eV, eV/A; empty when all is well or nothing can be said."""
    found = (
        position_warning(structures),
        total_energy_warning(structures),
        force_warning(structures),
        consistency_warning(structures),
    )
    return [sentence for sentence in found if sentence]


def _evenly(structures: Sequence[Labelled], n: int) -> list[Labelled]:
    return [structures[i] for i in np.unique(np.linspace(0, len(structures) - 1, min(n, len(structures)), dtype=int))]


def position_warning(structures: Sequence[Labelled]) -> str | None:
    """Are the positions in Bohr?

    In molecules of nonmetals some two atoms are bonded, at about the sum of their covalent radii; in Bohr the numbers
    are 1.9 times larger. Said where in no structure two atoms come that close.
    """
    closest = []
    for item in _evenly(structures, _MAX_STRUCTURES):
        if len(item.atoms) < 3 or not set(item.atoms.numbers.tolist()) <= set(_NONMETALS):
            continue
        pairs, radii = neighbours(item.atoms, 4.0), covalent_radii[item.atoms.numbers]
        ratios = pairs.distances / (radii[pairs.first] + radii[pairs.second])
        closest.append(float(ratios.min(initial=np.inf)))
    if not closest or min(closest) < _NO_BOND:
        return None
    return (
        f"no two atoms are bonded in any structure (the closest are {min(closest):.2f} times the sum of their covalent "
        "radii apart): are positions in Bohr? Expected A"
    )


# Energies against the total energy of atoms -------------------------------------------------------------------------


def all_electron_energy(z: int) -> float:
    """Total energy of a neutral atom, eV, from its atomic number alone.

    E = -0.7687 Z^(7/3) + Z^2 / 2 - 0.2699 Z^(5/3) Hartree: Thomas-Fermi energy with the corrections of Scott and
    Schwinger (Phys. Rev. A 24, 2353 (1981)); within 1 % of all-electron calculations from carbon on. Hydrogen, for
    which a statistical theory is too crude, has its exact -1/2 Hartree.
    """
    hartree = -0.5 if z == 1 else -0.7687 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3)
    return float(hartree * units.Hartree)


def total_energy_warning(structures: Sequence[Labelled]) -> str | None:
    """Are the energies all-electron totals in another unit?

    Chemistry changes a total energy by less than one percent, so the ratio of a label to the sum over its atoms is 1
    for an all-electron calculation in eV, 1/27.2 in Hartree, 23 in kcal/mol. Pseudopotential and tight-binding energies
    lie anywhere between 0 and 1, mostly not at 1/27.2 for all structures at once: hence the narrow window. A ratio well
    above 1 is impossible in eV.
    """
    sample = _evenly([s for s in structures if s.energy is not None], _MAX_STRUCTURES)
    sample = [s for s in sample if s.atoms.numbers.max() > 2]
    if not sample:
        return None
    elements = sorted({int(z) for s in sample for z in s.atoms.numbers})
    expected = composition(sample, elements) @ np.array([all_electron_energy(z) for z in elements])
    ratios = np.array([s.energy for s in sample], dtype=np.float64) / expected
    ratio = float(np.median(ratios))
    spread = float(np.quantile(np.abs(ratios / ratio - 1.0), 0.9)) if ratio else np.inf
    for name, value in _ENERGY_UNITS.items():
        if name != "eV" and spread < 0.02 and abs(ratio * value - 1.0) < 0.02:
            return (
                f"energies look like {name}: they are {ratio:.4g} times the all-electron total energy of their atoms "
                f"in eV, and 1 {name} is {value:.4g} eV; convert energies to eV"
            )
    if ratio > 1.2:
        return (
            f"energies are {ratio:.4g} times the all-electron total energy of their atoms in eV, lower than any method "
            "gives: they are not in eV"
        )
    return None


# Forces against the stiffness of bonds ------------------------------------------------------------------------------


def bond_stiffness(structures: Sequence[Labelled]) -> float | None:
    """Median of k = -cov(f, d) / var(d) over covalent bonds, in the unit of the forces per A.

    d is the length of a bond, f half the difference of its atoms' forces along it. The same bond is compared over
    structures of the same atoms; bonds to hydrogen, whose rest lengths barely depend on the molecule, over all.
    Only bonds between nonmetals count: metals are softer, by amounts that differ widely.

    Returns:
        None when fewer than 8 structures show the same bond at different lengths.
    """
    lengths: dict[tuple[object, ...], list[float]] = defaultdict(list)
    pulls: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for item in _evenly([s for s in structures if s.forces is not None and len(s.atoms) > 1], _MAX_STRUCTURES):
        assert item.forces is not None
        z = item.atoms.numbers
        kind = z.tobytes()
        pairs = neighbours(item.atoms, 2.5)
        first, second, d, vector = pairs.first, pairs.second, pairs.distances, pairs.vectors
        bonded = (first < second) & (d > 0) & np.isin(z[first], _NONMETALS) & np.isin(z[second], _NONMETALS)
        bonded &= d < 1.25 * (covalent_radii[z[first]] + covalent_radii[z[second]])
        first, second, d, vector = first[bonded], second[bonded], d[bonded], vector[bonded]
        pull = 0.5 * ((item.forces[second] - item.forces[first]) * vector).sum(axis=1) / d
        for i, j, length, f in zip(first, second, d, pull, strict=True):
            pair = tuple(sorted((int(z[i]), int(z[j]))))
            key: tuple[object, ...] = pair if pair[0] == 1 else (kind, int(i), int(j))
            lengths[key].append(length)
            pulls[key].append(f)
    stiffness = []
    for key, values in lengths.items():
        d, f = np.array(values), np.array(pulls[key])
        # Bonds held rigid, or the same structure many times, show no stiffness.
        if len(d) >= 8 and d.std() > 0.005:
            stiffness.append(-np.cov(f, d, bias=True)[0, 1] / d.var())
    # Placeholder zeros have no stiffness, and no unit either.
    return float(np.median(stiffness)) if stiffness and np.any(stiffness) else None


def force_warning(structures: Sequence[Labelled]) -> str | None:
    """Are the forces in another unit, or of the wrong sign?

    A stretched bond pulls back, with 34 eV/A^2 give or take a factor of 2 in any molecule (`bond_stiffness`); in
    Hartree/Bohr the number is 51 times smaller, in kcal/mol/A 23 times larger, and for gradients it is negative. The
    size of forces alone says less (a relaxed structure has small ones in any unit); where no bond can be compared, only
    an improbably large size is reported.
    """
    if (k := bond_stiffness(structures)) is not None:
        likely = min(_FORCE_UNITS, key=lambda name: abs(np.log(abs(k) * _FORCE_UNITS[name] / _BOND_STIFFNESS + 1e-12)))
        if k < 0:
            return (
                f"forces have the wrong sign: stretched bonds push apart (stiffness {k:.3g} per A, in size like "
                f"{likely}); give forces -dE/dx, not gradients, in eV/A"
            )
        if likely == "eV/A" or 10.0 < k < 120.0:
            return None
        return (
            f"forces look like {likely}: bonds have a stiffness of {k:.3g} (force per A), covalent bonds have "
            f"about {_BOND_STIFFNESS:.0f} eV/A^2; convert forces to eV/A"
        )
    forces = [s.forces for s in structures if s.forces is not None]
    rms = float(np.sqrt(np.mean(np.concatenate(forces) ** 2))) if forces else 0.0
    if rms > 10.0:
        # 0.3-1.5 eV/A per component is usual at 300-1000 K, that is 7-35 kcal/mol/A.
        return f"forces are large ({rms:.3g} eV/A rms per component): are they in kcal/mol/A? expected eV/A"
    return None


# Energies against forces --------------------------------------------------------------------------------------------


def consistency_warning(structures: Sequence[Labelled]) -> str | None:
    """Do energy differences agree with the work of the forces?

    Between two similar structures dE = -(F_1 + F_2) . dx / 2 up to third order. Pairs of neighbouring structures of the
    same atoms are compared; only a clear correlation counts (structures far apart show none), and only a slope
    that differs from 1 by more than a factor of 2.5.
    """
    pairs = _neighbour_pairs(structures)
    if pairs is None:
        return None
    work, difference = pairs
    norm = float(np.sqrt((work @ work) * (difference @ difference)))
    if norm == 0.0 or abs(correlation := float(work @ difference) / norm) < 0.8:
        return None
    slope = float(np.sqrt((difference @ difference) / (work @ work)) * np.sign(correlation))
    if 0.4 < slope < 2.5:
        return None
    if -2.5 < slope < -0.4:
        return (
            f"energies and forces disagree: energy differences are {slope:.3g} times the work of the forces, expected "
            "1: give forces -dE/dx, not gradients"
        )
    ratios = {(e, f): fu / eu for e, eu in _ENERGY_UNITS.items() for f, fu in _FORCE_UNITS.items()}
    fits = sorted(ratios, key=lambda pair: abs(np.log(abs(slope) / ratios[pair])))[:2]
    likely = " or ".join(f"energies in {e} with forces in {f}" for e, f in fits)
    reversed_sign = "; the sign says gradients, not forces" if slope < 0 else ""
    return (
        f"energies and forces disagree: energy differences are {slope:.3g} times the work of the forces, expected 1 "
        f"(closest: {likely}{reversed_sign}); convert to eV and eV/A"
    )


def _neighbour_pairs(structures: Sequence[Labelled]) -> tuple[FloatArray, FloatArray] | None:
    """Work of the forces and energy difference for pairs of similar structures, or None where there are too few."""
    groups: dict[bytes, list[Labelled]] = defaultdict(list)
    for s in structures:
        if s.energy is not None and s.forces is not None and len(s.atoms) > 1:
            groups[s.atoms.numbers.tobytes() + s.atoms.pbc.tobytes() + s.atoms.cell.array.tobytes()].append(s)
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 8:
        return None
    # Consecutive structures, since neighbours in a trajectory are similar; 48 of them keep this below 0.1 s.
    items = largest[:48]
    x = np.array([s.atoms.positions for s in items])
    f = np.array([s.forces for s in items], dtype=np.float64)
    energy = np.array([s.energy for s in items], dtype=np.float64)
    x = x - x.mean(axis=1, keepdims=True)
    i, j = np.triu_indices(len(items), 1)
    # Best rotation of the second structure onto the first (Kabsch); for a crystal it comes out as the identity
    # but for a vanishing angle.
    u, _, vt = np.linalg.svd(np.einsum("pna,pnb->pab", x[j], x[i]))
    u[:, :, -1] *= np.sign(np.linalg.det(u @ vt))[:, None]
    rotation = u @ vt
    step = x[j] @ rotation - x[i]
    work = -0.5 * ((f[i] + f[j] @ rotation) * step).sum(axis=(1, 2))
    distance = (step**2).sum(axis=(1, 2))
    near = np.zeros(len(i), dtype=bool)
    for k in range(len(items)):
        mine = np.flatnonzero(((i == k) | (j == k)) & (distance > 1e-8))
        near[mine[np.argsort(distance[mine])[:3]]] = True
    return work[near], (energy[j] - energy[i])[near]
