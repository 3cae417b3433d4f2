"""Labelled structures in memory: `Labelled`, `Dataset`, and what is done with them.

Units: eV, A, eV/A, eV/A^3. Stress has ASE's sign, sigma = (1/V) dE/dstrain (positive under tension).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ..errors import DataError

Label = Literal["energy", "forces", "stress"]
FloatArray = NDArray[np.float64]

LABELS: tuple[Label, ...] = ("energy", "forces", "stress")


@dataclass(frozen=True, eq=False)
class Labelled:
    """One structure and what is known of it.

    Attributes:
        atoms: numbers, positions (A), cell and pbc; no calculator, constraints or label arrays.
        energy: total energy, eV.
        forces: (n_atoms, 3), eV/A.
        stress: (3, 3), symmetric, eV/A^3, ASE's sign.
        config_type: the structure's `config_type`, or "Default".
        index: place in its file, counted from 0.
        source: the file it came from.
    """

    atoms: Atoms
    energy: float | None = None
    forces: FloatArray | None = None
    stress: FloatArray | None = None
    config_type: str = "Default"
    index: int = 0
    source: str = ""

    @property
    def where(self) -> str:
        """The structure's name in messages."""
        return f"structure {self.index}" + (f" of {Path(self.source).name}" if self.source else "")


@dataclass(frozen=True)
class LabelCounts:
    """How many structures have an energy, and how many components of forces and stresses are labelled."""

    energies: int
    forces: int
    stresses: int

    @classmethod
    def of(cls, structures: Sequence[Labelled]) -> LabelCounts:
        return cls(
            sum(s.energy is not None for s in structures),
            sum(3 * len(s.atoms) for s in structures if s.forces is not None),
            sum(9 for s in structures if s.stress is not None),
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled structures, apart from isolated atoms.

    Attributes:
        structures: what is trained on or tested on.
        name: the file's name, for messages.
        keys: the key under which each label was found, None where it was not.
        isolated_atoms: atomic number -> energy of the isolated atom, eV.
        notes: what a user should know about how the labels were found.
    """

    structures: Sequence[Labelled]
    name: str
    keys: dict[str, str | None]
    isolated_atoms: dict[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.structures)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over numbers, positions, cells, periodicity and labels of all structures, in order."""
        content = ContentHash()
        for item in self.structures:
            content.add(item)
        return content.finish(self.isolated_atoms)

    @cached_property
    def elements(self) -> tuple[int, ...]:
        """Sorted atomic numbers of the structures (isolated atoms do not count)."""
        return tuple(sorted({int(z) for s in self.structures for z in np.unique(s.atoms.numbers)}))

    @property
    def counts(self) -> dict[str, int]:
        """How many structures carry each label."""
        return {name: sum(getattr(s, name) is not None for s in self.structures) for name in LABELS}

    @property
    def indices(self) -> dict[str, list[int]]:
        """Which structures of which file these are; with the file, all that is needed to repeat a split."""
        record: dict[str, list[int]] = {}
        for item in self.structures:
            record.setdefault(item.source, []).append(item.index)
        return record

    def first_of_its_geometry(self) -> Sequence[int]:
        """For every structure the number of the first one with its geometry; its own where that is not looked at."""
        from .duplicates import first_of_each

        return first_of_each(self.structures)

    def comparable(self) -> Sequence[bool]:
        """Whether each structure has an energy or forces, which predictions can be compared with."""
        return [s.energy is not None or s.forces is not None for s in self.structures]

    def for_report(self, backbone_elements: Sequence[int], r_max: float | None) -> Dataset:
        """The structures that a report on the data looks at: all of those in memory."""
        return self

    def subset(self, indices: Iterable[int], name: str | None = None) -> Dataset:
        """The structures at the given places, with the same isolated atoms."""
        chosen = tuple(self.structures[i] for i in indices)
        return Dataset(chosen, name or self.name, dict(self.keys), dict(self.isolated_atoms), self.notes)


def composition(structures: Sequence[Labelled], elements: Sequence[int]) -> FloatArray:
    """How many atoms of each element every structure has: (n_structures, n_elements), float64."""
    counts = np.zeros((len(structures), len(elements)))
    for row, item in zip(counts, structures, strict=True):
        present = np.bincount(item.atoms.numbers, minlength=max(elements, default=0) + 1)
        row[:] = present[list(elements)]
    return counts


def split(dataset: Dataset, valid_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Set structures aside for validation, drawn at random; which ones is in `Dataset.indices` of both parts.

    The same geometry several times stays on one side, and what has neither energy nor forces on that of training.

    Args:
        valid_fraction: between 0 and 1; at least one structure goes to either part.
        seed: of a generator of its own (PCG64); numpy's global one is not touched.

    Raises:
        DataError: the fraction is not between 0 and 1, or there are fewer than two structures, or none to validate on.
    """
    if not 0.0 < valid_fraction < 1.0:
        raise DataError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}")
    n = len(dataset)
    if n < 2:
        raise DataError(f"{dataset.name}: {n} structure(s) cannot be split into training and validation: give more")
    n_valid = min(max(round(valid_fraction * n), 1), n - 1)
    first = dataset.first_of_its_geometry()
    wholes: dict[int, list[int]] = {}
    for i in np.random.default_rng(seed).permutation(n).tolist():
        wholes.setdefault(first[i], []).append(i)
    if len(wholes) < 2:
        raise DataError(f"{dataset.name}: all {n} structures are one geometry: there is nothing to validate on")
    comparable = dataset.comparable()
    valid: list[int] = []
    for members in list(wholes.values())[:-1]:
        if len(valid) < n_valid and any(comparable[i] for i in members):
            valid += members
    if not valid:
        raise DataError(f"{dataset.name}: of {n} structures fewer than two have an energy or forces: give more")
    train = sorted(set(range(n)) - set(valid))
    return dataset.subset(train, f"{dataset.name} (train)"), dataset.subset(sorted(valid), f"{dataset.name} (valid)")


def check_finite(item: Labelled) -> None:
    """Positions, cell and labels are numbers.

    Raises:
        DataError: naming the structure, the quantity and the atom.
    """
    atoms = item.atoms
    if len(atoms) == 0:
        raise DataError(f"{item.where} has no atoms: remove it")
    values = {"positions": atoms.positions, "forces": item.forces, "cell": atoms.cell.array, "stress": item.stress}
    for name, value in values.items():
        if value is not None and not np.isfinite(value).all():
            row = int(np.flatnonzero(~np.isfinite(value).all(axis=1))[0])
            place = f" (atom {row})" if name in ("positions", "forces") else ""
            raise DataError(f"{item.where}: {name} has NaN or infinity{place}: expected numbers; remove the structure")
    if item.energy is not None and not np.isfinite(item.energy):
        raise DataError(f"{item.where}: energy is {item.energy}: expected a number in eV; remove the structure")
    for axis, vector in enumerate(atoms.cell.array):
        if atoms.pbc[axis] and not np.any(vector):
            raise DataError(f"{item.where} is periodic along axis {axis}, but its cell vector there is zero")
    if atoms.pbc.all() and abs(np.linalg.det(atoms.cell.array)) < 1e-9:
        raise DataError(f"{item.where} is periodic, but its cell has no volume: {atoms.cell.array.tolist()}")


class ContentHash:
    """sha256 over structures and isolated atoms, one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, item: Labelled) -> None:
        self._add(item.atoms.numbers, "<i8")
        self._add(item.atoms.positions, "<f8")
        self._add(item.atoms.cell.array, "<f8")
        self._add(item.atoms.pbc, "|u1")
        for value in (item.energy, item.forces, item.stress):
            self._digest.update(b"-") if value is None else self._add(value, "<f8")

    def finish(self, isolated_atoms: Mapping[int, float]) -> str:
        """The hash (hex) of all that was added, and of the isolated atoms."""
        for z, energy in sorted(isolated_atoms.items()):
            self._add([float(z), energy], "<f8")
        return self._digest.hexdigest()

    def _add(self, value: Any, dtype: str) -> None:
        # Little-endian with the shape in front: the same on every machine, and no two data sets run together.
        array = np.ascontiguousarray(value, dtype=dtype)
        self._digest.update(repr(array.shape).encode() + array.tobytes())
