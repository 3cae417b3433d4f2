"""Files of labelled structures -> `Dataset`.

Units: eV, A, eV/A, eV/A^3. Stress has ASE's sign, sigma = (1/V) dE/dstrain (positive under tension), and ASE's Voigt
order xx, yy, zz, yz, xz, xy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from ..errors import DataError
from ..graph import SMALLEST_VOLUME
from ..neighbours import neighbours
from .dataset import LABELS, Dataset, FloatArray, Label, Labelled, check_finite, composition, split

__all__ = [
    "LABELS",
    "LABEL_KEYS",
    "Dataset",
    "Label",
    "Labelled",
    "check_finite",
    "composition",
    "read_dataset",
    "split",
]

# Searched in this order; any other name has to be given by option, since e.g. `dft_energy` and `xtb_energy` in one
# file are labels of different methods, and only the user knows which one is meant.
LABEL_KEYS: dict[Label, tuple[str, ...]] = {name: (f"REF_{name}", name) for name in LABELS}
_DATABASE_SUFFIXES = {".db", ".json", ".aselmdb"}
_ISOLATED = "isolatedatom"
_APART_A = 6.0  # an atom without an image within it is isolated
_NO_FORCES = ("positions", "momenta", "velocities", "magmoms", "initial_magmoms", "dipoles")
# Two files may give an isolated atom twice, rounded differently; more than that is a contradiction.
_SAME_ISOLATED_EV = 1e-3


def read_dataset(
    path: str | Path | Sequence[str | Path],
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
) -> Dataset:
    """Read labelled structures from one file or several: extended xyz, an ASE database, .traj, all that ASE reads.

    A label is looked for under `REF_energy` (`REF_forces`, `REF_stress`), then under the plain name, where ASE keeps
    results of a calculator; a key that is named is the only one that counts. Structures with one atom that are not
    periodic, or have `config_type=IsolatedAtom`, become `Dataset.isolated_atoms`.

    Args:
        path: file or files; several are joined in order.
        energy_key, forces_key, stress_key: keys to use instead of the detected ones. A file of nothing but isolated
            atoms that lacks them is read as if none were named: it often comes from elsewhere.

    Raises:
        DataError: a file is missing, empty or unreadable; a named key does not exist; there is no label at all; a
            label, position or cell is not finite or has the wrong shape; isolated atoms contradict each other.
    """
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
    if not paths:
        raise DataError("no data file was given: expected at least one")
    files = [(p, read_frames(p)) for p in paths]
    named: dict[Label, str | None] = {"energy": energy_key, "forces": forces_key, "stress": stress_key}
    _check_named_keys(named, files)
    # Keys are detected per file: isolated atoms often come from another program than the training set.
    chosen = [{name: _key_of(frames, name, named[name]) for name in LABELS} for _, frames in files]
    joined = {name: " | ".join(dict.fromkeys(k for c in chosen if (k := c[name]))) or None for name in LABELS}
    if not any(joined.values()):
        raise DataError(
            f"{_names(paths)}: no structure has an energy, forces or a stress under a known key "
            f"({', '.join(k for keys in LABEL_KEYS.values() for k in keys)}); {existing_keys(files)}: name the right "
            "ones with the options energy_key, forces_key, stress_key"
        )
    labelled = [
        labelled_structure(atoms, keys, named, index, str(file))
        for (file, frames), keys in zip(files, chosen, strict=True)
        for index, atoms in enumerate(frames)
    ]
    alone = [item for item in labelled if is_isolated(item)]
    structures = tuple(item for item in labelled if not is_isolated(item))
    if not any(getattr(s, name) is not None for s in (structures or labelled) for name in LABELS):
        raise DataError(
            f"{_names(paths)}: only isolated atoms carry labels, none of the {len(structures)} structures does; "
            f"{existing_keys(files)}: name the right ones with the options energy_key, forces_key, stress_key"
        )
    notes = _key_notes(files, chosen, joined)
    keys_found: dict[str, str | None] = {str(name): key for name, key in joined.items()}
    return Dataset(structures, _names(paths), keys_found, isolated_energies(alone), tuple(notes))


# Reading ------------------------------------------------------------------------------------------------------------


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(p.name for p in paths)


def read_frames(path: Path) -> list[Atoms]:
    """All structures of a file that ASE reads, with or without labels; raises DataError."""
    return list(iterate_frames(path))


def iterate_frames(path: Path) -> Iterator[Atoms]:
    """The same one after the other, without holding them."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected structures")
    found = False
    try:
        for atoms in _read_database(path) if path.suffix in _DATABASE_SUFFIXES else ase.io.iread(path, ":"):
            found = True
            yield atoms
    except Exception as error:  # ASE's readers raise whatever their parser meets: KeyError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read ({reason}); expected extended xyz, an ASE database, .traj or another format of ASE"
        ) from error
    if not found:
        raise DataError(f"{path}: the file holds no structure; expected structures")


def _read_database(path: Path) -> Iterator[Atoms]:
    """Rows of an ASE database; labels may sit among the key-value pairs or in `data`, which ASE's reader leaves out."""
    import ase.db

    with ase.db.connect(path) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info = {**row.get("data", {}), **row.key_value_pairs}
            yield atoms


# Keys ---------------------------------------------------------------------------------------------------------------


def _results(atoms: Atoms) -> dict[str, Any]:
    # The stored results as they are: asking the calculator would apply constraints to the forces.
    return {k: v for k, v in getattr(atoms.calc, "results", {}).items() if v is not None}


def lookup_label(atoms: Atoms, name: Label, key: str) -> Any:
    """The raw value of a label, or None where the structure has none."""
    places = (atoms.arrays,) if name == "forces" else ()
    for place in (*places, atoms.info, _results(atoms)):
        if key in place:
            return place[key]
    return None


def _detect_key(frames: Sequence[Atoms], name: Label) -> str | None:
    return next((k for k in LABEL_KEYS[name] if any(lookup_label(a, name, k) is not None for a in frames)), None)


def _key_of(frames: Sequence[Atoms], name: Label, wanted: str | None) -> str | None:
    """The key of a label in one file: the one that is wanted, if any is, except among isolated atoms that lack it."""
    if wanted is None:
        return _detect_key(frames, name)
    lacking = all(is_isolated_atom(a) and lookup_label(a, name, wanted) is None for a in frames)
    return (_detect_key(frames, name) or wanted) if lacking else wanted


def existing_keys(files: Sequence[tuple[Path, list[Atoms]]]) -> str:
    """A sentence that lists the keys in the files."""
    per_structure: Counter[str] = Counter()
    per_atom: Counter[str] = Counter()
    for _, frames in files:
        for atoms in frames:
            results = _results(atoms)
            per_atom_results = {k for k, v in results.items() if np.ndim(v) and len(v) == len(atoms)}
            per_atom.update({k for k in atoms.arrays if k not in ("numbers", "positions")} | per_atom_results)
            per_structure.update(set(atoms.info) | (set(results) - per_atom_results))
    lists = [", ".join(sorted(map(str, c))) or "none" for c in (per_structure, per_atom)]
    return f"the keys that exist are, per structure: {lists[0]}; per atom: {lists[1]}"


def _check_named_keys(named: dict[Label, str | None], files: Sequence[tuple[Path, list[Atoms]]]) -> None:
    for name, key in named.items():
        if key is not None and not any(lookup_label(a, name, key) is not None for _, frames in files for a in frames):
            raise DataError(
                f"{name}_key {key!r} is in no structure of {_names([p for p, _ in files])}; {existing_keys(files)}"
            )


def _key_notes(
    files: Sequence[tuple[Path, list[Atoms]]],
    chosen: Sequence[dict[Label, str | None]],
    joined: dict[Label, str | None],
) -> list[str]:
    """What could be mistaken in the choice of keys."""
    notes = []
    for (path, frames), keys in zip(files, chosen, strict=True):
        for name, key in keys.items():
            other = LABEL_KEYS[name][1]
            if key != LABEL_KEYS[name][0]:
                continue
            n_other = sum(
                lookup_label(a, name, key) is None and lookup_label(a, name, other) is not None for a in frames
            )
            if n_other:
                notes.append(
                    f"{path.name}: {n_other} structures have {other!r} but no {key!r}; their {name} is not used"
                )
    if joined["energy"] and not joined["forces"] and (others := _like_forces(files)):
        notes.append(
            f"no forces found, energies alone are used; {', '.join(others)} would fit: is one of them the forces "
            "(forces_key)?"
        )
    notes += mixed_key_notes(joined)
    prefixes = {str(k).replace(str(name), "", 1) for name, k in joined.items() if k and " | " not in k}
    if len(prefixes) > 1:
        pairs = ", ".join(f"{name} from {k!r}" for name, k in joined.items() if k)
        notes.append(f"labels come from keys of different kinds ({pairs}): are they from the same calculation?")
    return notes


def mixed_key_notes(joined: Mapping[Any, str | None]) -> list[str]:
    """Of labels whose keys, joined by " | ", are not the same in all files."""
    return [
        f"{name} comes from different keys in different files ({key}): is it the same level of theory?"
        for name, key in joined.items()
        if key and " | " in key
    ]


def _like_forces(files: Sequence[tuple[Path, list[Atoms]]]) -> list[str]:
    """Names of per-atom vectors that are in most structures, and are no positions or velocities."""
    found: Counter[str] = Counter()
    n = 0
    for _, frames in files:
        for atoms in frames:
            n += 1
            for name, values in {**atoms.arrays, **_results(atoms)}.items():
                array = np.asarray(values)
                if name not in _NO_FORCES and array.shape == (len(atoms), 3) and array.dtype.kind == "f":
                    found[str(name)] += 1
    return sorted(name for name, count in found.items() if 2 * count > n)


# Labels -------------------------------------------------------------------------------------------------------------


def labelled_structure(
    atoms: Atoms, keys: dict[Label, str | None], named: dict[Label, str | None], index: int, source: str
) -> Labelled:
    """A frame with the labels under `keys`, checked; `named` are keys of labels that a user gave. Raises DataError."""
    where = Labelled(atoms, index=index, source=source).where
    convert: dict[Label, Callable[[Any, str, int], Any]] = {"energy": _energy, "forces": _forces, "stress": _stress}
    labels: dict[str, Any] = {}
    for name in LABELS:
        key = keys[name]
        raw = None if key is None else lookup_label(atoms, name, key)
        labels[name] = None if raw is None else convert[name](raw, f"{where}: {name} ({key})", len(atoms))
    clean = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    drop = {key for name in LABELS for key in (*LABEL_KEYS[name], named[name])}
    clean.info = {k: v for k, v in atoms.info.items() if k not in drop and isinstance(v, (str, int, float, np.generic))}
    if not clean.pbc.any() or clean.cell.volume < SMALLEST_VOLUME:
        # Programs write zeros here for molecules and sheets; without a volume there is no stress to learn.
        labels["stress"] = None
    item = Labelled(
        clean, config_type=str(atoms.info.get("config_type", "Default")), index=index, source=source, **labels
    )
    check_finite(item)
    return item


def _floats(value: Any, what: str, expected: str) -> FloatArray:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf":
            raise ValueError("not numbers")
        return np.array(array, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} is {value!r}: expected {expected}") from error


def _energy(value: Any, what: str, n_atoms: int) -> float:
    array = _floats(value, what, "a number in eV")
    if array.size != 1:
        raise DataError(f"{what} has shape {array.shape}: expected one total energy in eV")
    return float(array.reshape(()))


def _forces(value: Any, what: str, n_atoms: int) -> FloatArray:
    array = _floats(value, what, f"({n_atoms}, 3) numbers in eV/A")
    if array.shape != (n_atoms, 3):
        raise DataError(f"{what} has shape {array.shape}: expected ({n_atoms}, 3), one force in eV/A per atom")
    return array


def _stress(value: Any, what: str, n_atoms: int) -> FloatArray:
    array = _floats(value, what, "6 or 9 numbers in eV/A^3")
    if array.size == 6:
        full = np.asarray(voigt_6_to_full_3x3_stress(array.reshape(6)), dtype=np.float64)
    elif array.size == 9:
        full = array.reshape(3, 3)
    else:
        raise DataError(f"{what} has shape {array.shape}: expected (6,) in Voigt order, (9,) or (3, 3), in eV/A^3")
    # Rounding makes tensors slightly lopsided; 1 % is beyond that, and means another order of the components.
    if np.abs(full - full.T).max() > 0.01 * np.abs(full).max() + 1e-6:
        raise DataError(f"{what} is not symmetric: {full.tolist()}; expected xx, yy, zz, yz, xz, xy or a 3x3 tensor")
    return 0.5 * (full + full.T)


def is_isolated(item: Labelled) -> bool:
    """Whether it is an isolated atom, also in a large box. Raises DataError for one marked so that has several."""
    marked = item.config_type.replace("_", "").lower() == _ISOLATED
    if marked and len(item.atoms) != 1:
        raise DataError(
            f"{item.where} is marked as an isolated atom ({item.config_type}) but has {len(item.atoms)} atoms"
        )
    return marked or (len(item.atoms) == 1 and not len(neighbours(item.atoms, _APART_A).distances))


def is_isolated_atom(atoms: Atoms) -> bool:
    """`is_isolated`, of a frame whose labels have not been read."""
    return len(atoms) == 1 and is_isolated(Labelled(atoms, config_type=str(atoms.info.get("config_type", "Default"))))


def isolated_energies(alone: Sequence[Labelled]) -> dict[int, float]:
    """Atomic number -> eV. Raises DataError where two contradict each other."""
    energies: dict[int, float] = {}
    for item in alone:
        if item.energy is None:
            continue
        z = int(item.atoms.numbers[0])
        if abs(energies.setdefault(z, item.energy) - item.energy) > _SAME_ISOLATED_EV:
            raise DataError(
                f"{item.where}: the isolated {item.atoms.symbols[0]} has {item.energy} eV, an earlier one has "
                f"{energies[z]} eV: expected one energy per element; keep the right one"
            )
    return dict(sorted(energies.items()))
