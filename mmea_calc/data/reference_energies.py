"""Energies of isolated atoms (E0s) that connect a backbone's interaction energies to the labels' total energies.

E_total = sum over atoms of E0[element] + E_interaction. Wrong E0s cannot be repaired by training: they shift every
energy, and make bonds break at the wrong cost. Units: eV; all arithmetic in float64, since a total of -17,000 eV has a
resolution of 1 meV in float32.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from ..errors import DataError
from .reading import Dataset, composition, lookup_label, read_dataset, read_frames

FloatArray = NDArray[np.float64]
Spec = str | Mapping[Any, Any] | Path | None

METHODS = ("isolated", "estimated", "average", "backbone")
MISMATCH_MEV_PER_ATOM = 500.0


class HasAtomicEnergies(Protocol):
    """What is needed of a backbone."""

    name: str
    atomic_energies: dict[int, float]


@dataclass(frozen=True)
class ReferenceEnergies:
    """The chosen reference energies.

    Attributes:
        energies: atomic number -> eV, for every element of the backbone.
        method: "isolated", "estimated", "given", "average" or "backbone".
        note: one plain sentence or two on where they come from.
        warnings: what is doubtful.
        residual_meV_per_atom: mean absolute error per atom of E0s + interaction energy against the labels before any
            training; NaN without energies.
    """

    energies: dict[int, float]
    method: str
    note: str
    warnings: list[str] = field(default_factory=list)
    residual_meV_per_atom: float = float("nan")


def resolve_reference_energies(
    spec: Spec, train: Dataset, backbone: HasAtomicEnergies, interaction_energies: NDArray[np.floating[Any]]
) -> ReferenceEnergies:
    """Choose the reference energies.

    Args:
        spec: None (isolated atoms if the data have them for all elements, else estimated); "isolated", "estimated",
            "average", "backbone"; a mapping from symbol or atomic number to eV; JSON text of one; a JSON or YAML file,
            or a file of labelled isolated atoms.
        train: structures without an energy are left out.
        backbone: its `atomic_energies` are the start of corrections, and stay for elements that are not in the data.
        interaction_energies: (n_structures,), eV, the bare backbone's, in the order of `train.structures`.

    Raises:
        DataError: an unknown method, a file that cannot be read, energies that are not numbers, or that lack an
            element of the data.
        ValueError: `interaction_energies` has another length than the data, or is not finite.
    """
    interaction = np.asarray(interaction_energies, dtype=np.float64)
    if interaction.shape != (len(train),):
        raise ValueError(f"interaction_energies must have shape ({len(train)},), got {interaction.shape}")
    if not np.isfinite(interaction).all():
        raise ValueError("interaction_energies must be finite: the backbone fails on a structure of the data")
    problem = _Problem.of(train, backbone, interaction)
    name = spec.strip() if isinstance(spec, str) else spec
    if name is None:
        name = "isolated" if set(train.elements) <= set(train.isolated_atoms) else "estimated"
    if name == "isolated":
        chosen = _isolated(train, backbone)
    elif name in ("estimated", "average", "backbone"):
        chosen = _backbone_own(backbone)
        if name != "backbone":
            chosen = {"estimated": _estimated, "average": _average}[name](train, backbone, problem)
        if spec is None and train.isolated_atoms:
            missing = sorted(set(train.elements) - set(train.isolated_atoms))
            chosen.warnings.append(f"isolated atoms are not used, since those of {_symbols(missing)} are missing")
    else:
        chosen = _given(_parse(name, train.keys.get("energy")), train, backbone)
    return _with_residual(chosen, problem, backbone)


def identity_of(spec: Spec) -> str | None:
    """Equal for two specifications that say the same: of a file the name and what is in it."""
    if spec is None or isinstance(spec, Mapping):
        return None if spec is None else repr(dict(spec))
    path = Path(spec)
    try:
        content = path.read_bytes()
    except (OSError, ValueError):  # the name of a method, or the energies themselves
        return str(spec)
    return f"{path} (sha256 {hashlib.sha256(content).hexdigest()})"


@dataclass(frozen=True)
class _Problem:
    """The structures with energies as numbers: what the E0s have to meet."""

    elements: tuple[int, ...]
    counts: FloatArray  # (n, n_elements)
    labels: FloatArray  # (n,) total energies, eV
    interaction: FloatArray  # (n,) eV

    @classmethod
    def of(cls, train: Dataset, backbone: HasAtomicEnergies, interaction: FloatArray) -> _Problem:
        if missing := sorted(set(train.elements) - set(backbone.atomic_energies)):
            raise DataError(
                f"{train.name} has {_symbols(missing)}; the backbone knows "
                f"{_symbols(sorted(backbone.atomic_energies))}: choose another backbone"
            )
        keep = [n for n, s in enumerate(train.structures) if s.energy is not None]
        structures = [train.structures[n] for n in keep]
        labels = np.array([s.energy for s in structures], dtype=np.float64)
        return cls(train.elements, composition(structures, train.elements), labels, interaction[keep])

    @property
    def n_atoms(self) -> FloatArray:
        return np.asarray(self.counts.sum(axis=1), dtype=np.float64)

    def residual(self, energies: Mapping[int, float]) -> FloatArray:
        """Label minus prediction per atom, eV/atom, (n,)."""
        e0 = np.array([energies[z] for z in self.elements])
        return (self.labels - self.counts @ e0 - self.interaction) / self.n_atoms

    def fit(self, targets_per_atom: FloatArray) -> tuple[FloatArray, int]:
        """Minimum-norm least squares of one number per element; also the rank.

        Rows are divided by the number of atoms: errors count per atom, as in training.
        """
        solution, _, rank, _ = np.linalg.lstsq(self.counts / self.n_atoms[:, None], targets_per_atom, rcond=1e-10)
        return np.asarray(solution, dtype=np.float64), int(rank)


# Methods ------------------------------------------------------------------------------------------------------------


def _symbols(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in numbers)


def _overlay(backbone: HasAtomicEnergies, energies: Mapping[int, float]) -> tuple[dict[int, float], str]:
    """The backbone's energies with those of the elements in use replaced, and a sentence on the others."""
    merged = {**backbone.atomic_energies, **{z: energies[z] for z in energies if z in backbone.atomic_energies}}
    rest = sorted(set(backbone.atomic_energies) - set(energies))
    note = f" Elements that are not in the data ({_symbols(rest)}) keep the backbone's." if rest else ""
    return {int(z): float(merged[z]) for z in sorted(merged)}, note


def _backbone_own(backbone: HasAtomicEnergies) -> ReferenceEnergies:
    energies = {int(z): float(e) for z, e in sorted(backbone.atomic_energies.items())}
    return ReferenceEnergies(energies, "backbone", f"Reference energies are those of the backbone {backbone.name}.")


def _isolated(train: Dataset, backbone: HasAtomicEnergies) -> ReferenceEnergies:
    if missing := sorted(set(train.elements) - set(train.isolated_atoms)):
        raise DataError(
            f"reference energies 'isolated' need an isolated atom with an energy for every element; {train.name} has "
            f"none for {_symbols(missing)}: add single atoms with config_type=IsolatedAtom, or choose 'estimated'"
        )
    energies, rest = _overlay(backbone, train.isolated_atoms)
    return ReferenceEnergies(
        energies, "isolated", f"Reference energies are those of the isolated atoms in the data.{rest}"
    )


def _no_energies(backbone: HasAtomicEnergies, method: str) -> ReferenceEnergies:
    own = _backbone_own(backbone)
    note = f"The data have no energies, so nothing can be {method}: the reference energies of {backbone.name} are kept."
    return ReferenceEnergies(own.energies, "backbone", note)


def _undetermined(problem: _Problem, rank: int) -> str:
    compositions = len(np.unique(problem.counts / problem.n_atoms[:, None], axis=0))
    return (
        f"The {compositions} composition{'s' * (compositions != 1)} in the data fix only {rank} of "
        f"{len(problem.elements)} reference energies"
    )


def _estimated(train: Dataset, backbone: HasAtomicEnergies, problem: _Problem) -> ReferenceEnergies:
    """Corrections to the backbone's E0s by which its own predictions meet the labels."""
    if len(problem.labels) == 0:
        return _no_energies(backbone, "estimated")
    shift, rank = problem.fit(problem.residual(backbone.atomic_energies))
    fitted = {z: backbone.atomic_energies[z] + float(d) for z, d in zip(problem.elements, shift, strict=True)}
    energies, rest = _overlay(backbone, fitted)
    shifts = ", ".join(f"{chemical_symbols[z]} {d:+.4f}" for z, d in zip(problem.elements, shift, strict=True))
    note = f"Reference energies are the backbone's, shifted by least squares to meet the labels (eV: {shifts})."
    warnings = []
    if rank < len(problem.elements):
        note += (
            f" {_undetermined(problem, rank)}: of all shifts that fit, the smallest is taken; the sum for these "
            "molecules is right, the single elements are not determined."
        )
        warnings.append(
            "the fit of reference energies is rank-deficient: energies of other compositions (fragments, other "
            "molecules) are not to be trusted; isolated atoms in the data would settle it"
        )
    return ReferenceEnergies(energies, "estimated", note + rest, warnings)


def _average(train: Dataset, backbone: HasAtomicEnergies, problem: _Problem) -> ReferenceEnergies:
    """Least squares of the labels on the composition alone."""
    if len(problem.labels) == 0:
        return _no_energies(backbone, "averaged")
    solution, rank = problem.fit(problem.labels / problem.n_atoms)
    fitted = dict(zip(problem.elements, map(float, solution), strict=True))
    energies, rest = _overlay(backbone, fitted)
    note = "Reference energies are averages: least squares of the labels on the composition."
    if rank < len(problem.elements):
        note += f" {_undetermined(problem, rank)}: the solution of smallest norm is taken."
    warning = (
        "average reference energies contain the bonds of the training set: energies of dissociation are unphysical, "
        "and dynamics may fail although validation errors look converged; prefer 'isolated' or 'estimated'"
    )
    return ReferenceEnergies(energies, "average", note + rest, [warning])


def _given(values: Mapping[int, float], train: Dataset, backbone: HasAtomicEnergies) -> ReferenceEnergies:
    if missing := sorted(set(train.elements) - set(values)):
        raise DataError(
            f"the reference energies given have {_symbols(sorted(values))}, but {train.name} also has "
            f"{_symbols(missing)}: add them"
        )
    energies, rest = _overlay(backbone, values)
    rest = rest.replace("that are not in the data", "that are not given")
    return ReferenceEnergies(energies, "given", f"Reference energies are as given.{rest}")


def _with_residual(chosen: ReferenceEnergies, problem: _Problem, backbone: HasAtomicEnergies) -> ReferenceEnergies:
    """The same with what remains before training, and a warning where it is too much."""
    if len(problem.labels) == 0:
        return chosen
    mev = 1000.0 * float(np.abs(problem.residual(chosen.energies)).mean())
    warnings = list(chosen.warnings)
    if mev > MISMATCH_MEV_PER_ATOM:
        start = problem.residual(backbone.atomic_energies)
        shift, _ = problem.fit(start)
        best = 1000.0 * float(np.abs(start - (problem.counts / problem.n_atoms[:, None]) @ shift).mean())
        # The best shift tells the two causes apart: it cures wrong reference energies, but not wrong units.
        cause = "no shift of reference energies mends it, so look at the units, and whether the backbone fits the data"
        if chosen.method == "average":
            cause = (
                "averages hold the energy of the bonds, which the backbone's interaction energies count a second time"
            )
        elif chosen.method != "estimated" and best < MISMATCH_MEV_PER_ATOM:
            cause = f"'estimated' would leave {best:.1f}, so the reference energies are of another level of theory"
        warnings.append(
            f"before training, energies are off by {mev:.0f} meV/atom (expected below {MISMATCH_MEV_PER_ATOM:.0f}): a "
            f"probable mismatch of reference energies or units; {cause}"
        )
    return ReferenceEnergies(chosen.energies, chosen.method, chosen.note, warnings, mev)


# Given energies -----------------------------------------------------------------------------------------------------


def _parse(spec: str | Mapping[Any, Any] | Path, energy_key: str | None) -> dict[int, float]:
    """Energies by atomic number; those of a file of structures under `energy_key`, where it has that."""
    if isinstance(spec, Mapping):
        return _checked(spec, "the dictionary")
    if isinstance(spec, str) and spec.startswith("{"):
        return _checked(_parse_text(spec), "the text")
    path = Path(spec)
    if not path.is_file():
        raise DataError(
            f"reference energies {str(spec)!r}: expected one of {', '.join(METHODS)}, a JSON or YAML file that "
            'exists, or JSON like {"H": -13.57, "C": -1027.26}'
        )
    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        try:
            # BaseLoader reads plain text only (YAML would turn the symbol No into false), and JSON along with YAML.
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{path}: cannot be read as JSON or YAML ({' '.join(str(error).split())})") from error
        return _checked(content, str(path))
    has_key = energy_key and any(lookup_label(atoms, "energy", energy_key) is not None for atoms in read_frames(path))
    if energies := read_dataset(path, energy_key=energy_key if has_key else None).isolated_atoms:
        return energies
    raise DataError(f"{path}: holds no isolated atoms with energies; expected single atoms, or a JSON or YAML file")


def _parse_text(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):  # literal_eval for {1: -13.57}, whose keys are no JSON
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    raise DataError(f'reference energies {text!r}: expected JSON like {{"H": -13.57, "C": -1027.26}}')


def _checked(values: Any, source: str) -> dict[int, float]:
    if not isinstance(values, Mapping) or not values:
        raise DataError(f"{source}: expected reference energies as a mapping from element to eV, got {values!r}")
    energies: dict[int, float] = {}
    for key, value in values.items():
        text = str(key).strip()
        z = int(text) if text.isdigit() else atomic_numbers.get(text, 0)
        if not 0 < z < len(chemical_symbols):
            raise DataError(f"{source}: {key!r} is no element; expected symbols or atomic numbers")
        if z in energies:
            raise DataError(f"{source}: {chemical_symbols[z]} is given twice")
        try:
            energies[z] = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            energies[z] = float("nan")
        if not np.isfinite(energies[z]):
            raise DataError(
                f"{source}: the reference energy of {chemical_symbols[z]} is {value!r}: expected a number in eV"
            )
    return energies
