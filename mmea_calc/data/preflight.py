"""What is in the data, and what is wrong with it, before any training.

Fatal findings are `DataError`s, doubtful ones are warnings in the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from ..errors import DataError
from ..graph import charge_of
from ..neighbours import neighbours
from .dataset import LABELS, Dataset, Labelled, check_finite, composition
from .duplicates import find_duplicates, fingerprints
from .unit_checks import unit_warnings

FloatArray = NDArray[np.float64]

SHORTEST_DISTANCE_A = 0.3
# No chemical bond but H2's (0.74 A) and its like is shorter, so looking this far finds every distance to worry about,
# and stays cheap for dense crystals.
_SEARCH_DISTANCE_A = 1.6
# In units of the robust standard deviation. Samples of 60 frames of single molecules at 300-1200 K
# reach 3 (energies) and 6 (forces); structures squeezed or displaced on purpose go beyond, and are named.
_ENERGY_OUTLIER = 10.0
_FORCE_OUTLIER = 15.0
_NET_FORCE_PER_ATOM = 0.01
_LONELY_SAMPLE = 300


@dataclass(frozen=True)
class PreflightReport:
    """The report on the data.

    Attributes:
        columns: names of the table's columns: "" and one per set.
        rows: cells of the table; the first of each row names the quantity.
        warnings: sentences on what is doubtful.
        notes: sentences on what was found and done.
        sets: the numbers behind the table, per set, JSON-ready.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    sets: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready values."""
        return {"sets": self.sets, "warnings": list(self.warnings), "notes": list(self.notes)}


def preflight(
    train: Dataset,
    valid: Dataset | None = None,
    test: Dataset | None = None,
    *,
    backbone_elements: Sequence[int],
    r_max: float | None = None,
) -> PreflightReport:
    """Check the data and describe them.

    Args:
        train, valid, test: what `read_dataset` and `split` return.
        backbone_elements: atomic numbers the backbone knows.
        r_max: the backbone's cutoff in A; with it, atoms without any neighbour are reported.

    Raises:
        DataError: no structures or no labels; a value that is not finite; an element the backbone lacks; atoms
            closer than 0.3 A, also through periodic images.
    """
    given = {"train": train, "valid": valid, "test": test}
    sets = {name: d.for_report(backbone_elements, r_max) for name, d in given.items() if d is not None}
    shortest = {name: check_structures(dataset, backbone_elements) for name, dataset in sets.items()}
    warnings: list[str] = []
    notes: list[str] = []
    summaries: dict[str, dict[str, Any]] = {}
    for name, dataset in sets.items():
        summaries[name] = _summary(dataset, shortest[name])
        if len(whole := given[name] or dataset) != len(dataset):
            summaries[name] |= {"structures": len(whole), "looked_at": len(dataset), "hash": whole.hash}
        found = _doubts(dataset, r_max)
        duplicates, contradictions = find_duplicates(dataset)
        summaries[name]["duplicates"] = duplicates
        if duplicates:
            found.append(f"{duplicates} structures repeat an earlier one of the same set")
        found += contradictions
        warnings += [f"{name}: {sentence}" for sentence in found]
        notes += [f"{name}: {sentence}" for sentence in dataset.notes]
    warnings += _overlaps(sets, summaries)
    for name in ("valid", "test"):
        if name in sets and (new := set(sets[name].elements) - set(train.elements)):
            warnings.append(f"{name}: has elements that the training set lacks: {_symbols(sorted(new))}")
    missing = sorted(set(train.elements) - set(train.isolated_atoms))
    if train.isolated_atoms and missing:
        warnings.append(f"train: isolated atoms are given, but not for {_symbols(missing)}")
    return PreflightReport(("", *sets), _rows(summaries), tuple(warnings), tuple(notes), summaries)


# Fatal --------------------------------------------------------------------------------------------------------------


def check_structures(dataset: Dataset, backbone_elements: Sequence[int]) -> FloatArray:
    """The fatal checks.

    Returns:
        The shortest distance in every structure, A; infinite beyond 1.6 A. (n_structures,)

    Raises:
        DataError: see `preflight`.
    """
    if not dataset.structures:
        raise DataError(f"{dataset.name}: there are no structures besides isolated atoms: expected at least one")
    if not any(dataset.counts.values()):
        raise DataError(f"{dataset.name}: no structure has an energy, forces or a stress: there is nothing to learn")
    known = set(backbone_elements)
    shortest = np.empty(len(dataset))
    for n, item in enumerate(dataset.structures):
        check_finite(item)
        if unknown := sorted(set(item.atoms.numbers.tolist()) - known):
            names = ", ".join(f"{chemical_symbols[z]} ({z})" for z in unknown)
            raise DataError(
                f"{item.where} has {names}; the backbone knows "
                f"{', '.join(chemical_symbols[z] for z in sorted(known))}: choose another backbone"
            )
        shortest[n] = shortest_distance(item)
    return shortest


def shortest_distance(item: Labelled) -> float:
    """The shortest distance of two atoms, A; infinite beyond 1.6 A. Raises DataError below 0.3 A."""
    atoms = item.atoms
    pairs = neighbours(atoms, _SEARCH_DISTANCE_A)
    first, second, d = pairs.first, pairs.second, pairs.distances
    if len(d) == 0:
        return float("inf")
    k = int(np.argmin(d))
    if d[k] < SHORTEST_DISTANCE_A:
        i, j = int(first[k]), int(second[k])
        who = f"atom {i} ({atoms.symbols[i]}) and " + ("its own image" if i == j else f"atom {j} ({atoms.symbols[j]})")
        raise DataError(
            f"{item.where}: {who} are {d[k]:.3f} A apart; expected at least {SHORTEST_DISTANCE_A} A: check positions "
            "and cell (in A), or remove the structure"
        )
    return float(d[k])


# Doubtful -----------------------------------------------------------------------------------------------------------


def _doubts(dataset: Dataset, r_max: float | None) -> list[str]:
    structures = dataset.structures
    found = unit_warnings(structures)
    if charged := sum(bool(charge_of(s.atoms)) for s in structures):
        found.append(f"{charged} structures have a total charge, which the backbone does not see")
    found += _energy_outliers([s for s in structures if s.energy is not None], dataset.elements)
    found += _force_doubts([s for s in structures if s.forces is not None])
    if (unlabelled := sum(all(getattr(s, name) is None for name in LABELS) for s in structures)) > 0:
        found.append(f"{unlabelled} structures carry no label at all")
    if r_max is not None:
        step = max(1, len(structures) // _LONELY_SAMPLE)
        sample = structures[::step]
        lonely = [s for s in sample if _has_lonely_atom(s, r_max)]
        if lonely:
            found.append(
                f"{len(lonely)} of {len(sample)} structures looked at have an atom without neighbours within the "
                f"backbone's cutoff of {r_max:g} A (first: {lonely[0].where}): nothing but its reference energy is seen"
            )
    return found


def _has_lonely_atom(item: Labelled, r_max: float) -> bool:
    return len(np.unique(neighbours(item.atoms, r_max).first)) < len(item.atoms)


def robust_scores(values: FloatArray) -> FloatArray:
    """Distances from the median in units of 1.4826 MAD, which is the standard deviation of a normal distribution.

    Outliers do not widen their own yardstick, as they would with a standard deviation. Zeros where the MAD is zero.
    """
    distance = np.abs(values - np.median(values))
    scale = 1.4826 * np.median(distance)
    return distance / scale if scale > 0 else np.zeros_like(distance)


def _energy_outliers(structures: Sequence[Labelled], elements: Sequence[int]) -> list[str]:
    """Energies far from what the composition explains, per atom."""
    if len(structures) < 5:
        return []
    counts = composition(structures, elements)
    n_atoms = counts.sum(axis=1)
    fractions = counts / n_atoms[:, None]
    per_atom = np.array([s.energy for s in structures], dtype=np.float64) / n_atoms
    residual = per_atom - np.median(per_atom)
    weights = np.ones(len(structures))
    for _ in range(10):
        # Reweighting by 1/|residual| turns least squares into least absolute deviations, which outliers cannot pull.
        root = np.sqrt(weights)
        fit = np.linalg.lstsq(fractions * root[:, None], per_atom * root, rcond=None)[0]
        residual = per_atom - fractions @ fit
        weights = 1.0 / np.maximum(np.abs(residual), 1e-6)
    far = np.flatnonzero(robust_scores(residual) > _ENERGY_OUTLIER)
    if len(far) == 0:
        return []
    worst = far[np.argmax(np.abs(residual[far]))]
    return [
        f"{len(far)} energies are outliers (first: {structures[far[0]].where}; largest: {structures[worst].where}, "
        f"{residual[worst]:+.3g} eV/atom from what its composition explains)"
    ]


def _force_doubts(structures: Sequence[Labelled]) -> list[str]:
    found: list[str] = []
    if not structures:
        return found
    norms = [np.linalg.norm(s.forces, axis=1) for s in structures if s.forces is not None]
    largest = np.array([n.max() for n in norms])
    pooled = np.concatenate(norms)
    median = float(np.median(pooled))
    scale = 1.4826 * float(np.median(np.abs(pooled - median)))
    far = np.flatnonzero(largest > median + _FORCE_OUTLIER * scale) if scale > 0 else np.array([], dtype=int)
    if len(far):
        worst = far[np.argmax(largest[far])]
        found.append(
            f"{len(far)} structures have outlying forces (first: {structures[far[0]].where}; largest: "
            f"{structures[worst].where}, {largest[worst]:.3g} eV/A where the median is {median:.3g})"
        )
    zero = np.flatnonzero(largest == 0.0)
    if len(zero) > 1 or (len(zero) and len(structures) == 1):
        found.append(f"all forces of {len(zero)} structures are exactly zero: are they placeholders?")
    net = np.array([np.linalg.norm(s.forces.sum(axis=0)) / len(s.atoms) for s in structures if s.forces is not None])
    pushed = np.flatnonzero(net > _NET_FORCE_PER_ATOM)
    if len(pushed):
        worst = int(np.argmax(net))
        found.append(
            f"{len(pushed)} structures have a net force (largest: {structures[worst].where}, {net[worst]:.3g} eV/A per "
            "atom); a potential has none, so that part cannot be learnt: loose convergence, or constraints applied?"
        )
    return found


def _overlaps(sets: dict[str, Dataset], summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Structures that two sets have in common: errors measured on them are not errors on new structures."""
    warnings = []
    prints = {name: fingerprints(dataset.structures) for name, dataset in sets.items()}
    names = list(sets)
    for k, one in enumerate(names):
        seen = {p for pair in prints[one] for p in pair}
        for other in names[k + 1 :]:
            common = [n for n, pair in enumerate(prints[other]) if seen.intersection(pair)]
            summaries[other][f"in_{one}"] = len(common)
            if common:
                first = sets[other].structures[common[0]].where
                warnings.append(f"{len(common)} structures of {other} are also in {one} (first: {first})")
    return warnings


# The table ----------------------------------------------------------------------------------------------------------


def _symbols(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in numbers)


def _range(values: FloatArray) -> list[float] | None:
    return [float(values.min()), float(values.max())] if len(values) else None


def _summary(dataset: Dataset, shortest: FloatArray) -> dict[str, Any]:
    structures = dataset.structures
    sizes = np.array([len(s.atoms) for s in structures])
    energies = np.array([s.energy for s in structures if s.energy is not None])
    with_energy = np.array([len(s.atoms) for s in structures if s.energy is not None])
    norms = [np.linalg.norm(s.forces, axis=1) for s in structures if s.forces is not None]
    flat = np.concatenate(norms) if norms else np.array([])
    near = shortest[np.isfinite(shortest)]
    return {
        "name": dataset.name,
        "structures": len(dataset),
        "atoms": int(sizes.sum()),
        "atoms_per_structure": [int(sizes.min()), int(sizes.max())],
        "elements": [chemical_symbols[z] for z in dataset.elements],
        "periodic": sum(bool(s.atoms.pbc.any()) for s in structures),
        "config_types": dict(Counter(s.config_type for s in structures)),
        "labels": {name: {"key": dataset.keys.get(name), "structures": n} for name, n in dataset.counts.items()},
        "energy_eV": _range(energies),
        "energy_per_atom_eV": _range(energies / with_energy) if len(energies) else None,
        "force_norm_eV_per_A": _range(flat),
        "force_rms_eV_per_A": float(np.sqrt(np.mean(flat**2) / 3.0)) if len(flat) else None,
        "shortest_distance_A": float(near.min()) if len(near) else None,
        "isolated_atoms_eV": {chemical_symbols[z]: e for z, e in dataset.isolated_atoms.items()},
        "hash": dataset.hash,
    }


def _rows(summaries: dict[str, dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
    def span(values: Sequence[float] | None, digits: int) -> str:
        return "-" if values is None else f"{values[0]:,.{digits}f} to {values[1]:,.{digits}f}"

    def label(s: dict[str, Any], name: str) -> str:
        entry = s["labels"][name]
        return f"{entry['structures']:,} ({entry['key']})" if entry["structures"] else "-"

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    makers = {
        "structures": lambda s: f"{s['structures']:,}" + (f" ({s['periodic']:,} periodic)" if s["periodic"] else ""),
        "config types": lambda s: (
            ", ".join(f"{k}: {v:,}" for k, v in list(s["config_types"].items())[:5])
            + (", ..." if len(s["config_types"]) > 5 else "")
        ),
        "atoms": lambda s: f"{s['atoms']:,} ({'-'.join(map(str, dict.fromkeys(s['atoms_per_structure'])))} each)",
        "elements": lambda s: ", ".join(s["elements"]),
        "with energy (key)": lambda s: label(s, "energy"),
        "with forces (key)": lambda s: label(s, "forces"),
        "with stress (key)": lambda s: label(s, "stress"),
        "energy, eV": lambda s: span(s["energy_eV"], 3),
        "energy per atom, eV": lambda s: span(s["energy_per_atom_eV"], 4),
        "size of forces, eV/A": lambda s: span(s["force_norm_eV_per_A"], 3),
        "rms of force components, eV/A": lambda s: number(s["force_rms_eV_per_A"], 3),
        "shortest distance, A": lambda s: number(s["shortest_distance_A"], 3),
        "isolated atoms": lambda s: ", ".join(s["isolated_atoms_eV"]) or "-",
        "duplicates": lambda s: str(s["duplicates"]),
        "also in train": lambda s: str(s.get("in_train", "-")),
        "also in valid": lambda s: str(s.get("in_valid", "-")),
    }
    return tuple((name, *(make(s) for s in summaries.values())) for name, make in makers.items())
