"""Prepared data: structures, labels and neighbour lists in an HDF5 file that is read structure by structure.

`mmea prepare` writes one; data sets that are larger than memory are trained on from it. The layout, version 2:

    /                       attributes format "mmea prepared data", version, r_max (A), name, keys, isolated_atoms
                            (atomic number -> eV), notes, elements, counts, config_types, sources (JSON), hash
    structures/atoms_end    (n,) int64, where the atoms of each structure end in `atoms/`
    structures/edges_end    (n,) int64, where its edges end in `edges/`
    structures/shifts_end   (n,) int64, where its shifts end in `shifts/`; only structures with a cell have any
    structures/has          (n,) uint8, bits of `HAS`
    structures/elements     (n, 2) uint64, bit z of the pair is set for atomic number z
    structures/energy       (n,) float64, total, eV; NaN where there is none
    structures/stress       (n, 3, 3) float64, eV/A^3; NaN where there is none
    structures/cell         (n, 3, 3) float64, A; structures/pbc (n, 3) bool
    structures/config_type, structures/source (n,) numbers in the lists above; structures/index (n,), place in the file
    structures/first        (n,) int64, the first structure with the same geometry; files of earlier versions lack this
    structures/charge, structures/spin (n,) float64, total charge (e) and multiplicity; they may lack these too
    atoms/numbers           (n_atoms,) uint8
    atoms/positions         (n_atoms, 3) float64, A; atoms/forces (n_atoms, 3) float64, eV/A, NaN where there are none
    edges/atoms             (n_edges, 2) uint16, sender and receiver within the structure
    shifts/cells            (n_shifts, 3) int16, lattice vectors crossed by its edges between atoms as they are given

What is kept in memory is 36 bytes per structure: where its parts are, and what it has.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import h5py
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from ..errors import DataError
from ..graph import Graph, graph_with_edges
from .dataset import LABELS, Dataset, LabelCounts, Labelled

FORMAT, VERSION = "mmea prepared data", 2
SUFFIXES = (".h5", ".hdf5")
HAS = {"energy": 1, "forces": 2, "stress": 4, "cell": 8}
# Reports and reference energies look at so many structures, and at so many more of every element.
SAMPLE, SAMPLE_PER_ELEMENT = 2000, 20
# Structures whose positions are kept for their labels to be read next.
_RECENT = 512


def is_prepared(path: str | Path) -> bool:
    """Whether the file's name is that of prepared data."""
    return Path(path).suffix.lower() in SUFFIXES


def open_dataset(paths: Sequence[str | Path], **keys: str | None) -> Dataset:
    """`read_dataset`, or `open_prepared` for the one file that is prepared.

    Raises:
        DataError: as either; also prepared data together with other files, or with keys, which were chosen before.
    """
    from .reading import read_dataset

    if not any(is_prepared(path) for path in paths):
        return read_dataset(list(paths), **keys)
    if len(paths) > 1:
        listed = ", ".join(str(path) for path in paths)
        raise DataError(f"prepared data are one file, got {listed}: prepare all of them together with mmea prepare")
    if given := [name for name, key in keys.items() if key is not None]:
        raise DataError(f"{paths[0]} is prepared, and its keys are chosen: give {', '.join(given)} to mmea prepare")
    return open_prepared(paths[0])


def open_prepared(path: str | Path) -> PreparedDataset:
    """The data of a prepared file, which stay in it. Raises DataError."""
    file = PreparedFile(Path(path))
    info = file.info
    return PreparedDataset(
        structures=_Structures(file, rows := np.arange(len(file))),
        name=info["name"],
        keys=info["keys"],
        isolated_atoms={int(z): float(e) for z, e in info["isolated_atoms"].items()},
        notes=tuple(info["notes"]),
        file=file,
        rows=rows,
    )


class PreparedFile:
    """An open prepared file.

    Raises:
        DataError: the file is missing, is no prepared data, or was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        try:
            # Never written again once it has its name: locks, which some file systems of clusters refuse, are not
            # needed. Without a cache of chunks, HDF5 reads the bytes of one structure and no more.
            self._file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)
            attributes = dict(self._file.attrs)
        except OSError as problem:
            raise DataError(f"{path} cannot be read as HDF5 ({problem}); expected data from mmea prepare") from problem
        if attributes.get("format") != FORMAT:
            raise DataError(f"{path} is HDF5, but no prepared data: expected a file from mmea prepare")
        if attributes["version"] > VERSION:
            raise DataError(
                f"{path} has version {attributes['version']} of the format, this mmea knows {VERSION}: upgrade mmea"
            )
        if attributes["version"] < VERSION:
            raise DataError(
                f"{path} has version {attributes['version']} of the format, whose neighbours of crystals hold on the "
                "kind of processor alone that found them: make it again with mmea prepare"
            )
        self.r_max, self.hash = float(attributes["r_max"]), str(attributes["hash"])
        self.info: dict[str, Any] = json.loads(attributes["info"])
        self.has: NDArray[np.uint8] = self._file["structures/has"][:]
        self.ends = {name: self._file[f"structures/{name}_end"][:] for name in ("atoms", "edges", "shifts")}
        self._data = {name: self._file[name] for name in _READ}
        self.charges = self._charges()
        self._recent: OrderedDict[int, Atoms] = OrderedDict()

    def __len__(self) -> int:
        return len(self.has)

    def _charges(self) -> dict[int, tuple[float, float]]:
        """Total charge and spin multiplicity of the structures that are no neutral singlets."""
        if "structures/charge" not in self._file:
            return {}
        charge, spin = self.column("charge"), self.column("spin")
        return {int(row): (float(charge[row]), float(spin[row])) for row in np.flatnonzero((charge != 0) | (spin != 1))}

    def first(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first structure with the same geometry; of files that do not say so each itself."""
        return self.column("first", rows) if "structures/first" in self._file else rows

    def column(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """A number of every structure, or of the given ones."""
        values = self._file[f"structures/{name}"][:]
        return values if rows is None else values[rows]

    def n_atoms(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        ends = self.ends["atoms"]
        return np.asarray(ends[rows] - np.where(rows > 0, ends[rows - 1], 0))

    def structure(self, row: int) -> Labelled:
        has, span = int(self.has[row]), self._span("atoms", row)
        data = self._data
        return Labelled(
            atoms=self._atoms(row),
            energy=float(data["structures/energy"][row]) if has & HAS["energy"] else None,
            forces=data["atoms/forces"][span] if has & HAS["forces"] else None,
            stress=data["structures/stress"][row] if has & HAS["stress"] else None,
            config_type=self.info["config_types"][data["structures/config_type"][row]],
            index=int(data["structures/index"][row]),
            source=self.info["sources"][data["structures/source"][row]],
        )

    def graph(self, row: int) -> Graph:
        edges = np.ascontiguousarray(self._data["edges/atoms"][self._span("edges", row)].T, dtype=np.int64)
        shifts = np.zeros((edges.shape[1], 3))
        if (span := self._span("shifts", row)).stop > span.start:
            shifts = self._data["shifts/cells"][span].astype(np.float64)
        return graph_with_edges(self._atoms(row), edges, shifts)

    def _atoms(self, row: int) -> Atoms:
        """The structure itself; a graph and its labels are read one soon after the other."""
        if (known := self._recent.get(row)) is not None:
            return known
        span, cell, pbc = self._span("atoms", row), None, None
        if self.has[row] & HAS["cell"]:
            cell, pbc = self._data["structures/cell"][row], self._data["structures/pbc"][row]
        numbers = self._data["atoms/numbers"][span].astype(np.int64)
        atoms = Atoms(numbers, self._data["atoms/positions"][span], cell=cell, pbc=pbc)
        if row in self.charges:
            atoms.info["charge"], atoms.info["spin"] = self.charges[row]
        self._recent[row] = atoms
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return atoms

    def _span(self, name: str, row: int) -> slice:
        ends = self.ends[name]
        return slice(int(ends[row - 1]) if row else 0, int(ends[row]))


_READ = (
    "structures/energy",
    "structures/stress",
    "structures/cell",
    "structures/pbc",
    "structures/config_type",
    "structures/source",
    "structures/index",
    "atoms/numbers",
    "atoms/positions",
    "atoms/forces",
    "edges/atoms",
    "shifts/cells",
)


class _Rows(Sequence[Any]):
    """Rows of a file as a sequence that reads what it is asked for."""

    def __init__(self, file: PreparedFile, rows: NDArray[np.int64]) -> None:
        self._file, self._rows = file, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return [self._read(int(row)) for row in self._rows[key]]
        return self._read(int(self._rows[key]))

    def __iter__(self) -> Iterator[Any]:
        return (self._read(int(row)) for row in self._rows)

    def _read(self, row: int) -> Any:
        raise NotImplementedError


class _Structures(_Rows):
    @overload
    def __getitem__(self, key: int) -> Labelled: ...
    @overload
    def __getitem__(self, key: slice) -> list[Labelled]: ...
    def __getitem__(self, key: int | slice) -> Labelled | list[Labelled]:
        return super().__getitem__(key)

    def _read(self, row: int) -> Labelled:
        return self._file.structure(row)


class _Graphs(_Rows):
    def _read(self, row: int) -> Graph:
        return self._file.graph(row)


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedDataset(Dataset):
    """A data set whose structures are read when they are asked for.

    Attributes:
        file: where they are.
        rows: which of them, in their order.
    """

    file: PreparedFile
    rows: NDArray[np.int64]

    @cached_property
    def hash(self) -> str:
        """That of the data which were prepared; of a part of them, sha256 of that and of the rows."""
        if len(self.rows) == len(self.file):
            return self.file.hash
        return hashlib.sha256(self.file.hash.encode() + self.rows.astype("<i8").tobytes()).hexdigest()

    @cached_property
    def elements(self) -> tuple[int, ...]:
        return _elements(np.bitwise_or.reduce(self.file.column("elements", self.rows), axis=0))

    @property
    def counts(self) -> dict[str, int]:
        has = self.file.has[self.rows]
        return {name: int(np.count_nonzero(has & HAS[name])) for name in LABELS}

    @property
    def indices(self) -> dict[str, list[int]]:
        index, source = self.file.column("index", self.rows), self.file.column("source", self.rows)
        return {name: index[source == k].tolist() for k, name in enumerate(self.file.info["sources"])}

    def subset(self, indices: Iterable[int], name: str | None = None) -> PreparedDataset:
        rows = self.rows[np.fromiter(indices, dtype=np.int64)]
        return PreparedDataset(
            structures=_Structures(self.file, rows),
            name=name or self.name,
            keys=dict(self.keys),
            isolated_atoms=dict(self.isolated_atoms),
            notes=self.notes,
            file=self.file,
            rows=rows,
        )

    def graphs(self, r_max: float, check: Callable[[Atoms], None] = lambda atoms: None) -> Sequence[Graph]:
        """The stored neighbour lists; `check` is given the first structure that is no neutral singlet, if there is one.

        Raises:
            DataError: they are of another cutoff than `r_max` (A).
        """
        self.check_cutoff(r_max)
        if (row := next((row for row in self.rows.tolist() if row in self.file.charges), None)) is not None:
            check(self.file.structure(row).atoms)
        return _Graphs(self.file, self.rows)

    def label_counts(self, indices: Sequence[int]) -> LabelCounts:
        """How much is labelled in the structures at these places."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        has = self.file.has[rows]
        n_atoms = self.file.n_atoms(rows)[(has & HAS["forces"]) > 0]
        energies, stresses = (int(np.count_nonzero(has & HAS[name])) for name in ("energy", "stress"))
        return LabelCounts(energies, 3 * int(n_atoms.sum()), 9 * stresses)

    def sample(self) -> PreparedDataset:
        """Some of the structures, spread evenly, with some of every element."""
        n = len(self.rows)
        if n <= SAMPLE:
            return self
        chosen = {*np.linspace(0, n - 1, SAMPLE).astype(int).tolist()}
        masks = self.file.column("elements", self.rows)
        for z in self.elements:
            holding = np.flatnonzero(masks[:, z // 64] & np.uint64(1 << z % 64))
            few = np.linspace(0, len(holding) - 1, min(SAMPLE_PER_ELEMENT, len(holding))).astype(int)
            chosen |= set(holding[few].tolist())
        return self.subset(sorted(chosen))

    def first_of_its_geometry(self) -> Sequence[int]:
        """As `prepare` found it."""
        seen: dict[int, int] = {}
        return [seen.setdefault(first, i) for i, first in enumerate(self.file.first(self.rows).tolist())]

    def comparable(self) -> Sequence[bool]:
        has: list[bool] = (self.file.has[self.rows] & (HAS["energy"] | HAS["forces"]) > 0).tolist()
        return has

    def for_report(self, backbone_elements: Sequence[int], r_max: float | None) -> Dataset:
        """A sample in memory.

        Raises:
            DataError: elements that the backbone lacks, or another cutoff.
        """
        self.check_elements(backbone_elements)
        if r_max is not None:
            self.check_cutoff(r_max)
        some = self.sample()
        note = () if some is self else (f"this report looks at {len(some):,} of {len(self):,} prepared structures",)
        return Dataset(tuple(some.structures), self.name, self.keys, self.isolated_atoms, (*self.notes, *note))

    def check_elements(self, backbone_elements: Sequence[int]) -> None:
        """Raise a DataError for elements that the backbone lacks."""
        if unknown := sorted(set(self.elements) - set(backbone_elements)):
            names, known = (", ".join(chemical_symbols[z] for z in numbers) for numbers in (unknown, backbone_elements))
            raise DataError(f"{self.name} has {names}; the backbone knows {known}: choose another backbone")

    def check_cutoff(self, r_max: float) -> None:
        """Raise a DataError if the neighbour lists are of another cutoff than `r_max` (A)."""
        if abs(self.file.r_max - r_max) > 1e-9:
            raise DataError(
                f"{self.file.path} was prepared for a cutoff of {self.file.r_max:g} A, the backbone has {r_max:g} A: "
                "prepare the data again, with mmea prepare --backbone and the name of this one"
            )


def element_mask(numbers: Iterable[int]) -> NDArray[np.uint64]:
    """Two numbers with bit z of the pair set for every atomic number z."""
    mask = [0, 0]
    for z in set(numbers):
        mask[z // 64] |= 1 << z % 64
    return np.array(mask, dtype=np.uint64)


def _elements(mask: NDArray[np.uint64]) -> tuple[int, ...]:
    return tuple(z for z in range(128) if int(mask[z // 64]) >> z % 64 & 1)


__all__ = ["PreparedDataset", "PreparedFile", "is_prepared", "open_dataset", "open_prepared"]
