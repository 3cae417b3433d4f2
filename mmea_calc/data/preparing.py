"""`prepare`: files of labelled structures -> prepared data (`prepared` tells the layout), in little memory.

Every structure is read twice: once to see which labels there are, once to write it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import DataError
from ..files import replacing
from ..graph import build_graph, charge_of, check_elements, shifts_as_given, spin_of
from .dataset import LABELS, ContentHash, Label, Labelled
from .duplicates import FirstOfEach
from .preflight import shortest_distance
from .prepared import FORMAT, HAS, VERSION, PreparedDataset, element_mask, is_prepared, open_prepared
from .reading import (
    LABEL_KEYS,
    existing_keys,
    is_isolated,
    is_isolated_atom,
    isolated_energies,
    iterate_frames,
    labelled_structure,
    lookup_label,
    mixed_key_notes,
)

# Structures that are written at once.
_TOGETHER = 1000
_CHUNK_BYTES = 65536
_LARGEST = np.iinfo(np.uint16).max
_FARTHEST = np.iinfo(np.int16).max
_COLUMNS: Mapping[str, tuple[tuple[int, ...], str]] = {
    "structures/atoms_end": ((), "<i8"),
    "structures/edges_end": ((), "<i8"),
    "structures/shifts_end": ((), "<i8"),
    "structures/has": ((), "|u1"),
    "structures/elements": ((2,), "<u8"),
    "structures/energy": ((), "<f8"),
    "structures/stress": ((3, 3), "<f8"),
    "structures/cell": ((3, 3), "<f8"),
    "structures/pbc": ((3,), "|u1"),
    "structures/config_type": ((), "<u4"),
    "structures/source": ((), "<u2"),
    "structures/index": ((), "<i8"),
    "structures/first": ((), "<i8"),
    "structures/charge": ((), "<f8"),
    "structures/spin": ((), "<f8"),
    "atoms/numbers": ((), "|u1"),
    "atoms/positions": ((3,), "<f8"),
    "atoms/forces": ((3,), "<f8"),
    "edges/atoms": ((2,), "<u2"),
    "shifts/cells": ((3,), "<i2"),
}
_UNITS = {
    "structures/energy": "eV",
    "structures/stress": "eV Angstrom-3",
    "structures/cell": "Angstrom",
    "atoms/positions": "Angstrom",
    "atoms/forces": "eV Angstrom-1",
}


def prepare(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    r_max: float,
    elements: Sequence[int] | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> PreparedDataset:
    """Write structures, labels and neighbour lists into a file for `finetune`.

    Args:
        paths: extended xyz, ASE databases, .traj: all that ASE reads; joined in order.
        output: the file, whose name ends in .h5 or .hdf5.
        r_max: the backbone's cutoff, A.
        elements: those that the backbone knows; None: any.
        energy_key, forces_key, stress_key: as of `read_dataset`.
        progress: called with the number of structures written and their total, None while they are counted.

    Raises:
        DataError: as of `read_dataset`; elements the backbone lacks; atoms closer than 0.3 A. No file is written then.
    """
    files = [Path(p) for p in paths]
    if not files:
        raise DataError("no data file was given: expected at least one")
    if prepared := [p for p in files if is_prepared(p)]:
        raise DataError(f"{prepared[0]} is prepared data already: give the files that it was made of")
    named: dict[Label, str | None] = {"energy": energy_key, "forces": forces_key, "stress": stress_key}
    surveys = [_survey(path, named, progress) for path in files]
    keys = _choose(files, surveys, named)
    total = sum(s.n for s in surveys)
    joined = {str(name): " | ".join(dict.fromkeys(k for c in keys if (k := c[name]))) or None for name in LABELS}
    with writing(output, r_max=r_max, elements=elements) as writer:
        done = 0
        for path, own in zip(files, keys, strict=True):
            for index, atoms in enumerate(iterate_frames(path)):
                writer.add(labelled_structure(atoms, own, named, index, str(path)))
                if (done := done + 1) % _TOGETHER == 0:
                    progress(done, total)
        progress(done, total)
        notes = [note for path, s in zip(files, surveys, strict=True) for note in s.notes(path)]
        notes += mixed_key_notes(joined)
        writer.describe(name=", ".join(p.name for p in files), keys=joined, notes=notes)
    return open_prepared(output)


@contextmanager
def writing(output: str | Path, *, r_max: float, elements: Sequence[int] | None = None) -> Iterator[PreparedWriter]:
    """A writer of prepared data; the file has its name once the context ends well.

    Raises:
        DataError: the name does not end in .h5 or .hdf5, the folder is missing, or nothing was added.
    """
    output = Path(output)
    if not is_prepared(output):
        raise DataError(f"{output}: expected a name that ends in .h5, by which mmea finetune knows prepared data")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise DataError(f"{output.parent} is no folder that can be written to: choose another place with --output")
    with replacing(output) as temporary, h5py.File(temporary, "w") as file:
        writer = PreparedWriter(file, r_max, elements)
        yield writer
        writer.finish(output.name)


class PreparedWriter:
    """Adds structures to an HDF5 file; made by `writing`."""

    def __init__(self, file: h5py.File, r_max: float, elements: Sequence[int] | None) -> None:
        self._file, self._r_max, self._elements = file, r_max, elements
        self._waiting: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._ends = {"atoms": 0, "edges": 0, "shifts": 0}
        self._hash, self._alone = ContentHash(), list[Labelled]()
        self._counts: Counter[str] = Counter()
        self._mask = np.zeros(2, dtype=np.uint64)
        self._first = FirstOfEach()
        self._lists: dict[str, dict[str, int]] = {"config_types": {}, "sources": {}}
        self._info: dict[str, Any] = {"name": None, "keys": dict.fromkeys(LABELS), "notes": []}
        for name, (shape, kind) in _COLUMNS.items():
            # Chunks are what a file grows by; they are not compressed, since training reads single structures.
            rows = _CHUNK_BYTES // (np.dtype(kind).itemsize * int(np.prod(shape)))
            column = file.create_dataset(name, (0, *shape), kind, maxshape=(None, *shape), chunks=(rows, *shape))
            if name in _UNITS:
                column.attrs["unit"] = _UNITS[name]
        file.attrs["r_max_unit"] = "Angstrom"

    def add(self, item: Labelled) -> None:
        """One structure; an isolated atom becomes a reference energy. Raises DataError, naming the structure."""
        if is_isolated(item):
            self._alone.append(item)
            return
        atoms = item.atoms
        if len(atoms) > _LARGEST:
            raise DataError(
                f"{item.where} has {len(atoms)} atoms; prepared data hold at most {_LARGEST} in a structure"
            )
        if self._elements is not None:
            check_elements(np.unique(atoms.numbers), self._elements, item.where)
        shortest_distance(item)
        graph = build_graph(atoms, self._r_max)
        has = sum(bit for name, bit in HAS.items() if getattr(item, name, None) is not None)
        shifts = np.zeros((0, 3))
        if atoms.pbc.any() or atoms.cell.array.any():
            has += HAS["cell"]
        if atoms.pbc.any():
            shifts = shifts_as_given(atoms, graph)
            if np.abs(shifts).max(initial=0) > _FARTHEST:
                raise DataError(
                    f"{item.where} has atoms {np.abs(shifts).max():.0f} cells apart, expected at most {_FARTHEST}: "
                    "wrap its positions into the cell"
                )
        for name, grown in (("atoms", len(atoms)), ("edges", graph.edge_index.shape[1]), ("shifts", len(shifts))):
            self._ends[name] += grown
        mask = element_mask(atoms.numbers.tolist())
        nothing = np.full((3, 3), np.nan)
        row = {
            **{f"structures/{name}_end": [end] for name, end in self._ends.items()},
            "structures/has": [has],
            "structures/elements": [mask],
            "structures/energy": [np.nan if item.energy is None else item.energy],
            "structures/stress": [nothing if item.stress is None else item.stress],
            "structures/cell": [atoms.cell.array],
            "structures/pbc": [atoms.pbc],
            "structures/config_type": [self._number("config_types", item.config_type)],
            "structures/source": [self._number("sources", item.source)],
            "structures/index": [item.index],
            "structures/first": [self._first.of(item)],
            "structures/charge": [charge_of(atoms)],
            "structures/spin": [spin_of(atoms)],
            "atoms/numbers": atoms.numbers,
            "atoms/positions": atoms.positions,
            "atoms/forces": np.full((len(atoms), 3), np.nan) if item.forces is None else item.forces,
            "edges/atoms": graph.edge_index.T,
            "shifts/cells": shifts,
        }
        for name, values in row.items():
            self._waiting[name].append(values)
        self._hash.add(item)
        self._mask |= mask
        self._counts.update(name for name in LABELS if getattr(item, name) is not None)
        self._counts["structures"] += 1
        if len(self._waiting["structures/has"]) == _TOGETHER:
            self._flush()

    def describe(self, *, name: str, keys: Mapping[str, str | None], notes: Iterable[str] = ()) -> None:
        """What a data set says of itself: its name, the keys of its labels, notes for the user."""
        self._info.update(name=name, keys=dict(keys), notes=list(notes))

    def finish(self, name: str) -> None:
        """Write what is left, and what the whole is. Raises DataError if there is nothing to learn from."""
        if not self._counts["structures"]:
            raise DataError(f"{name}: there are no structures besides isolated atoms: expected at least one")
        if not any(self._counts[label] for label in LABELS):
            raise DataError(f"{name}: no structure has an energy, forces or a stress: there is nothing to learn")
        self._flush()
        isolated = isolated_energies(self._alone)
        info = {
            **self._info,
            "name": self._info["name"] or name,
            "isolated_atoms": {str(z): e for z, e in isolated.items()},
            **{key: list(values) for key, values in self._lists.items()},
        }
        self._file.attrs.update(
            format=FORMAT, version=VERSION, r_max=self._r_max, hash=self._hash.finish(isolated), info=json.dumps(info)
        )

    def _number(self, name: str, text: str) -> int:
        known = self._lists[name]
        return known.setdefault(text, len(known))

    def _flush(self) -> None:
        for name, parts in self._waiting.items():
            if not parts:
                continue
            shape, kind = _COLUMNS[name]
            values = np.concatenate([np.asarray(p).reshape(-1, *shape) for p in parts]).astype(kind)
            column = self._file[name]
            start = len(column)
            column.resize(start + len(values), axis=0)
            column[start:] = values
            parts.clear()


# Which labels there are ---------------------------------------------------------------------------------------------


@dataclass
class _Survey:
    """What a file holds: structures, and how many have each label under each key."""

    n: int = 0
    counts: Counter[tuple[Label, str]] = field(default_factory=Counter)
    only_plain: Counter[Label] = field(default_factory=Counter)
    first: list[Any] = field(default_factory=list)  # frames, for messages
    isolated: bool = True  # atoms, and nothing else

    def key_of(self, name: Label, wanted: str | None) -> str | None:
        """As `read_dataset` chooses the key of a label in one file."""
        detected = next((k for k in LABEL_KEYS[name] if self.counts[name, k]), None)
        if wanted is None:
            return detected
        return (detected or wanted) if self.isolated and not self.counts[name, wanted] else wanted

    def notes(self, path: Path) -> list[str]:
        return [
            f"{path.name}: {n} structures have {LABEL_KEYS[name][1]!r} but no {LABEL_KEYS[name][0]!r}; "
            f"their {name} is not used"
            for name, n in self.only_plain.items()
            if n and self.counts[name, LABEL_KEYS[name][0]]
        ]


def _survey(path: Path, named: Mapping[Label, str | None], progress: Callable[[int, int | None], None]) -> _Survey:
    survey = _Survey()
    for atoms in iterate_frames(path):
        survey.n += 1
        survey.isolated = survey.isolated and is_isolated_atom(atoms)
        if len(survey.first) < 10:
            survey.first.append(atoms)
        for name in LABELS:
            wanted = named[name]
            candidates = dict.fromkeys(LABEL_KEYS[name] if wanted is None else (wanted, *LABEL_KEYS[name]))
            found = [k for k in candidates if lookup_label(atoms, name, k) is not None]
            survey.counts.update((name, key) for key in found)
            if wanted is None and found == [LABEL_KEYS[name][1]]:
                survey.only_plain[name] += 1
        if survey.n % _TOGETHER == 0:
            progress(survey.n, None)
    return survey


def _choose(
    files: Sequence[Path], surveys: Sequence[_Survey], named: Mapping[Label, str | None]
) -> list[dict[Label, str | None]]:
    """The key of each label in each file, as `read_dataset` chooses them. Raises DataError."""
    exist = existing_keys([(path, s.first) for path, s in zip(files, surveys, strict=True)])
    names = ", ".join(path.name for path in files)
    for name, key in named.items():
        if key is not None and not any(s.counts[name, key] for s in surveys):
            raise DataError(f"{name}_key {key!r} is in no structure of {names}; {exist}")
    chosen = [{name: s.key_of(name, named[name]) for name in LABELS} for s in surveys]
    if not any(key for own in chosen for key in own.values()):
        known = ", ".join(k for keys in LABEL_KEYS.values() for k in keys)
        raise DataError(
            f"{names}: no structure has an energy, forces or a stress under a known key ({known}); {exist}: name the "
            "right ones with the options energy_key, forces_key, stress_key"
        )
    return chosen


__all__ = ["PreparedWriter", "prepare", "writing"]
