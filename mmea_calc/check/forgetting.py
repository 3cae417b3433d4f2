"""What an adapter does to molecules that it was not trained on.

Two measures. The difference of adapted and bare forces on other molecules, as a ratio to that on the structure under
check: it tells how far the adaptation reaches, and is no fault by itself. An adapter that takes the backbone from one
level of theory to another ought to change all molecules. And, where there are labels at the level that the adapter
was trained for, the error of the forces beside the bare backbone's: that tells what was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from ase import Atoms

from ..data.dataset import Dataset, Labelled
from ..errors import DataError
from ..graph import check_elements
from ..potential import Potential
from .dynamics import Tick
from .scans import FloatArray, evaluate

MOLECULES = "molecules.npz"


@dataclass(frozen=True)
class OtherMolecules:
    """One set of labelled structures, adapted beside bare.

    Attributes:
        name: of the set.
        level_of_theory: of its labels; None for a set whose labels are at the adapter's level by the user's word.
        n_structures: how many of it were used.
        difference_meV_per_A: root mean square of adapted minus bare force components.
        ratio: that over the same on the structure under check; None if that is zero.
        adapted_mae_meV_per_A, bare_mae_meV_per_A: errors against the labels.
        judged: whether the labels are at the level that the adapter was trained for.
        per_structure_meV_per_A: root mean square difference of every structure, (n_structures,).
        adapted_errors_meV_per_A, bare_errors_meV_per_A: mean absolute error of every structure, (n_structures,).
    """

    name: str
    level_of_theory: str | None
    n_structures: int
    difference_meV_per_A: float
    ratio: float | None
    adapted_mae_meV_per_A: float
    bare_mae_meV_per_A: float
    judged: bool
    per_structure_meV_per_A: FloatArray = field(repr=False)
    adapted_errors_meV_per_A: FloatArray = field(repr=False)
    bare_errors_meV_per_A: FloatArray = field(repr=False)


@dataclass(frozen=True)
class Forgetting:
    """All sets, and the structure under check itself.

    Attributes:
        own_difference_meV_per_A: root mean square of adapted minus bare force components over thermal frames of the
            structure under check.
        own_per_structure_meV_per_A: of every frame, (n_frames,).
        others: the sets.
    """

    own_difference_meV_per_A: float
    own_per_structure_meV_per_A: FloatArray = field(repr=False)
    others: tuple[OtherMolecules, ...]

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """As plain, JSON-ready values; the arrays are left out without `curves`."""

        def plain(values: dict[str, Any]) -> dict[str, Any]:
            arrays = {k: v.tolist() for k, v in values.items() if isinstance(v, np.ndarray)}
            return {k: v for k, v in values.items() if k not in arrays} | (arrays if curves else {})

        return plain({**asdict(self), "others": [plain(asdict(s)) for s in self.others]})


def other_molecules() -> dict[str, tuple[Labelled, ...]]:
    """The molecules that come with the package, by the level of theory of their forces (README.md beside them)."""
    with (files("mmea_calc.check") / MOLECULES).open("rb") as file, np.load(file) as data:
        arrays = {name: data[name] for name in data.files}
    ends = np.cumsum(arrays["n_atoms"], dtype=np.int64)
    found: dict[str, list[Labelled]] = {str(level): [] for level in arrays["levels"]}
    for i, end in enumerate(ends):
        these = slice(int(end) - int(arrays["n_atoms"][i]), int(end))
        atoms = Atoms(arrays["numbers"][these], arrays["positions"][these].astype(np.float64))
        labelled = Labelled(atoms, forces=arrays["forces"][these].astype(np.float64), index=i, source=MOLECULES)
        found[str(arrays["levels"][arrays["level"][i]])].append(labelled)
    return {level: tuple(structures) for level, structures in found.items()}


def forgetting(
    potential: Potential,
    own: Sequence[Atoms],
    *,
    labels: Dataset | None = None,
    level_of_theory: str | None = None,
    tick: Tick = lambda done: None,
) -> Forgetting:
    """Compare adapted with bare forces.

    Args:
        potential: a backbone with an adapter.
        own: frames of the structure under check.
        labels: structures with forces at the level that the adapter was trained for.
        level_of_theory: that level.

    Raises:
        DataError: `labels` has no forces or an element that the backbone lacks.
    """
    sets = _shipped(potential, own[0], level_of_theory)
    if labels is not None:
        sets.append((labels.name, None, True, labelled_forces(labels, potential)))
    structures = [*own, *(s.atoms for _, _, _, items in sets for s in items)]
    adapted = evaluate(potential, structures, lambda done: tick(0.5 * done))[1]
    with potential.adapter_disabled():
        bare = evaluate(potential, structures, lambda done: tick(0.5 + 0.5 * done))[1]
    pairs = list(zip(adapted, bare, strict=True))
    own_rms = _rms([a - b for a, b in pairs[: len(own)]])
    results, start = [], len(own)
    for name, level, judged, items in sets:
        some = pairs[start : start + len(items)]
        start += len(items)
        results.append(_compare(name, level, judged, items, some, own_rms))
    each = np.array([_rms([a - b]) for a, b in pairs[: len(own)]])
    return Forgetting(own_rms, each, tuple(results))


def same_level(one: str | None, other: str | None) -> bool:
    """Whether two descriptions name the same level of theory; what stands in brackets is about programs."""
    if one is None or other is None:
        return False
    a, b = (text.split("(")[0].strip().casefold() for text in (one, other))
    return a == b


def labelled_forces(labels: Dataset, potential: Potential) -> tuple[Labelled, ...]:
    """The structures with forces. Raises DataError."""
    chosen = tuple(s for s in labels.structures if s.forces is not None)
    if not chosen:
        raise DataError(f"{labels.name}: expected structures with forces to compare with, found none")
    for item in chosen:
        check_elements(np.unique(item.atoms.numbers), potential.backbone.elements, item.where)
    return chosen


def _shipped(
    potential: Potential, own: Atoms, level: str | None
) -> list[tuple[str, str | None, bool, tuple[Labelled, ...]]]:
    """Of the package's molecules those of other composition whose elements the backbone knows."""
    known, formula = set(potential.backbone.elements), own.get_chemical_formula()
    sets: list[tuple[str, str | None, bool, tuple[Labelled, ...]]] = []
    for theory, items in other_molecules().items():
        usable = tuple(s for s in items if set(s.atoms.numbers) <= known and s.atoms.get_chemical_formula() != formula)
        if usable:
            sets.append((f"{theory} molecules", theory, same_level(theory, level), usable))
    return sets


def _compare(
    name: str,
    level: str | None,
    judged: bool,
    items: Sequence[Labelled],
    pairs: Sequence[tuple[FloatArray, FloatArray]],
    own_rms: float,
) -> OtherMolecules:
    differences = [a - b for a, b in pairs]
    rms = _rms(differences)
    truth = [item.forces for item in items if item.forces is not None]
    adapted, bare = ([np.abs(p[i] - f) for p, f in zip(pairs, truth, strict=True)] for i in (0, 1))
    return OtherMolecules(
        name=name,
        level_of_theory=level,
        n_structures=len(items),
        difference_meV_per_A=rms,
        ratio=rms / own_rms if own_rms > 0 else None,
        adapted_mae_meV_per_A=1000 * float(np.concatenate(adapted).mean()),
        bare_mae_meV_per_A=1000 * float(np.concatenate(bare).mean()),
        judged=judged,
        per_structure_meV_per_A=np.array([_rms([d]) for d in differences]),
        adapted_errors_meV_per_A=1000 * np.array([e.mean() for e in adapted]),
        bare_errors_meV_per_A=1000 * np.array([e.mean() for e in bare]),
    )


def _rms(differences: Sequence[FloatArray]) -> float:
    """meV/A, over all components."""
    return 1000 * float(np.sqrt((np.concatenate(differences) ** 2).mean()))
