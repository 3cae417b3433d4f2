"""Energies and forces at PBE/def2-SVP for small structures of a packed set, and the packing of what was labelled.

The level of theory is rMD17's: with density fitting and grid level 3, PySCF agrees with its forces on ethanol to
0.4 meV/A. Most iterations are done on a coarse grid and the last few on the fine one, which takes about half the time
and changes forces by less than 1 meV/A. With grid level 1 a label takes half of that again, and its forces are off by
1 to 2 meV/A in the mean: little beside the tens of meV/A that a backbone misses them by.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from ase.data import chemical_symbols

from ..errors import DataError, MMEAError
from ..files import replacing, write_text
from .dataset import describe, read_arrays, read_e0, spans, write_arrays

# CODATA 2018, eV and A; the shipped reference energies were made with them
HARTREE, BOHR = 27.211386245988, 0.529177210903
LEVEL_OF_THEORY = "PBE/def2-SVP (PySCF, density fitting)"
# number of unpaired electrons of the free atom
UNPAIRED = {1: 1, 6: 2, 7: 3, 8: 2, 9: 1, 15: 3, 16: 2, 17: 1, 35: 1, 53: 1}
LARGEST_FORCE = 15.0  # eV/A; beyond it a structure is not one to learn from


def _pyscf() -> Any:
    try:
        import pyscf.dft
        import pyscf.gto
    except ImportError as problem:
        raise MMEAError("labels need PySCF, which is not installed: pip install 'mmea[label]'") from problem
    return pyscf


def mean_field(numbers: Sequence[int], positions: np.ndarray, *, unpaired: int = 0, grid: int = 3) -> Any:
    """PySCF's mean field of a molecule at this level of theory, not converged yet. Raises MMEAError."""
    pyscf = _pyscf()
    atoms = [(chemical_symbols[z], tuple(x)) for z, x in zip(numbers, positions, strict=True)]
    molecule = pyscf.gto.M(atom=atoms, basis="def2-svp", ecp={"I": "def2-svp"}, spin=unpaired, verbose=0)
    kind = pyscf.dft.UKS if unpaired else pyscf.dft.RKS
    field = kind(molecule).density_fit()
    field.xc, field.grids.level, field.conv_tol = "pbe", grid, 1e-9
    return field


def energy_and_forces(
    numbers: Sequence[int], positions: np.ndarray, *, grid: int = 3
) -> tuple[float, np.ndarray] | None:
    """Energy (eV) and forces (n_atoms, 3; eV/A) of a closed-shell molecule; None if it does not converge.

    Args:
        numbers: atomic numbers.
        positions: (n_atoms, 3), A.
        grid: PySCF's level of the last grid, 1 to 3; most iterations are done two levels below.

    Raises:
        MMEAError: PySCF is not installed.
    """
    pyscf = _pyscf()
    field = mean_field(numbers, positions, grid=max(grid - 2, 0))
    field.with_df.build()  # once for both grids
    field.conv_tol, field.conv_tol_grad = 1e-7, 1e-4
    field.kernel()
    if not field.converged:
        return None
    density = field.make_rdm1()
    field.grids = pyscf.dft.Grids(field.mol)
    field.grids.level = grid
    field.conv_tol, field.conv_tol_grad = (1e-8, 6e-5) if grid > 1 else (1e-6, 3e-4)
    energy = field.kernel(density)
    if not field.converged:
        return None
    return energy * HARTREE, -field.nuc_grad_method().kernel() * HARTREE / BOHR


def label_atoms(out: Path) -> Path:
    """Energies of isolated atoms, spin-polarised, at grid level 4: writes OUT/e0.json and returns its path.

    Raises:
        MMEAError: PySCF is not installed.
    """
    e0 = {z: mean_field([z], np.zeros((1, 3)), unpaired=s, grid=4).kernel() * HARTREE for z, s in UNPAIRED.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "e0.json", json.dumps({str(z): float(e) for z, e in e0.items()}, indent=1) + "\n")
    return out / "e0.json"


def draw(
    folder: Path, max_heavy: int, skip: set[int], order: Sequence[int] | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Geometries of a packed set, round robin over their compositions, so that few molecules do not fill the set.

    With `order`, those structures in that order instead (`choose`).

    Yields:
        number of the structure in the set, atomic numbers, positions (A).
    """
    arrays = read_arrays(sorted(folder.glob("train-[0-9]*.npz")))
    where = spans(arrays)

    def one(k: int) -> tuple[int, np.ndarray, np.ndarray]:
        span = where[k]
        return k, arrays["numbers"][span].astype(np.int64), arrays["positions"][span].astype(np.float64)

    if order is not None:
        if unknown := [int(k) for k in order if not 0 <= k < len(where)]:
            raise DataError(f"{folder} has {len(where)} structures, and the order asks for number {unknown[0]}")
        yield from (one(int(k)) for k in order if int(k) not in skip)
        return

    def fits(span: slice) -> bool:
        n_atoms, heavy = span.stop - span.start, int((arrays["numbers"][span] > 1).sum())
        small = 4 <= n_atoms <= 2.5 * max_heavy and heavy <= max_heavy
        return small and float(np.abs(arrays["forces"][span]).max()) < LARGEST_FORCE

    candidates = np.random.default_rng(0).permutation([k for k, span in enumerate(where) if fits(span)])
    seen: dict[tuple[int, ...], int] = {}
    turns = []
    for k in candidates:
        composition = tuple(sorted(arrays["numbers"][where[k]].tolist()))
        turns.append(seen.setdefault(composition, 0))
        seen[composition] += 1
    for k in candidates[np.argsort(turns, kind="stable")]:
        if int(k) not in skip:
            yield one(int(k))


def indices(files: Sequence[Path]) -> list[int]:
    """The structure numbers in packed sets, or in files of `choose`. Raises DataError."""
    found: list[int] = []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as content:
                found += content["index"].tolist()
        except (OSError, ValueError, KeyError, BadZipFile) as problem:
            raise DataError(f"{file} has no structure numbers, `index` ({problem})") from problem
    return found


def label(
    *,
    data: Path,
    out: Path,
    worker: int = 0,
    of: int = 1,
    minutes: float | None = None,
    limit: int | None = None,
    max_heavy: int = 7,
    skip: Sequence[Path] = (),
    order: Path | None = None,
    first_index: int = 0,
    grid: int = 3,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Label geometries, one file each, until time, number or geometries end; files that are there are left alone.

    Args:
        data: the packed set that geometries are taken from.
        out: folder for the labelled structures.
        worker, of: number of this process, and of all that share the work.
        minutes, limit: when to stop.
        max_heavy: largest number of heavy atoms, without `order`.
        skip: packed sets whose structures are left out.
        order: which structures, and in which order: a file of `choose` or `sample`.
        first_index: added to the numbers of the structures, so that those of several sets stay apart.
        grid: see `energy_and_forces`.
        progress: told of every structure.

    Returns:
        how many structures were labelled.

    Raises:
        MMEAError: PySCF is not installed. DataError: the set cannot be read.
    """
    _pyscf()
    out.mkdir(parents=True, exist_ok=True)
    known = {index - first_index for index in indices(skip)}
    wanted = None if order is None else indices([order])
    start, done = time.monotonic(), 0
    for turn, (own, numbers, positions) in enumerate(draw(data, max_heavy, known, wanted)):
        index = first_index + own
        file = out / f"{index}.npz"
        if turn % of != worker or file.exists():
            continue
        elapsed = time.monotonic() - start
        if (minutes is not None and elapsed > 60 * minutes) or (limit is not None and done >= limit):
            break
        try:
            result = energy_and_forces(numbers.tolist(), positions, grid=grid)
        except (ArithmeticError, RuntimeError, ValueError, np.linalg.LinAlgError) as problem:
            progress(f"{index}: left out ({problem})")  # one structure must not stop a night's work
            continue
        if result is None:
            progress(f"{index}: left out (not converged)")
            continue
        with replacing(file) as part, part.open("wb") as stream:
            np.savez(stream, index=index, numbers=numbers, positions=positions, energy=result[0], forces=result[1])
        done += 1
        progress(f"{index}: {len(numbers)} atoms, {time.monotonic() - start:.0f} s")
    return done


def pack(
    raw: Path, *, out: Path, e0: Path | None = None, valid_fraction: float = 0.1, number: int = 0, xtb: bool = False
) -> dict[str, int]:
    """Labelled structures -> train-0.npz, valid.npz, e0.json, level.txt in OUT; the split goes by composition.

    Args:
        raw: folder that `label` filled.
        out: folder to write into.
        e0: energies of isolated atoms; RAW/e0.json if not given.
        valid_fraction: share of the compositions set aside.
        number: 1 and more add train-1.npz and valid-1.npz to a set that is there. A training takes all of train-*.npz
            and validates on valid.npz, as before.
        xtb: keep energies and forces of GFN2-xTB beside them (`energy_xtb`, `forces_xtb`), which knows dispersion.

    Returns:
        number of structures per set.

    Raises:
        DataError: no labelled structures, none for one of the sets, no reference energies, or structures of another
            file of the set.
        MMEAError: tblite is not installed.
    """
    energies = read_e0(raw if e0 is None else e0)
    train, valid = f"train-{number}", f"valid-{number}" if number else "valid"
    sets: dict[str, list[dict[str, np.ndarray]]] = {train: [], valid: []}
    others = [f for kind in ("train", "valid") for f in sorted(out.glob(f"{kind}*.npz")) if f.stem not in sets]
    known, sides = set(indices(others)), _sides(others)
    for file in sorted(raw.glob("[0-9]*.npz")):
        with np.load(file, allow_pickle=False) as content:
            structure = dict(content)
        if int(structure["index"]) in known:
            raise DataError(f"{file} is in {out} already: give that set to `label --skip`, or move the file away")
        if np.abs(structure["forces"]).max() < LARGEST_FORCE:
            # a molecule's structures all go to the same side, in every later packing too
            composition = bytes(sorted(structure["numbers"].tolist()))
            aside = sides.get(composition, zlib.crc32(composition) % 1000 / 1000 < valid_fraction)
            sets[valid if aside else train].append(structure)
    if empty := [name for name, members in sets.items() if not members]:
        raise DataError(f"{raw} gives no structures for {' and '.join(empty)}; label more, or change valid_fraction")
    if xtb:
        for structure in (s for members in sets.values() for s in members):
            energy, structure["forces_xtb"] = xtb_energy_and_forces(structure["numbers"], structure["positions"])
            structure["energy_xtb"] = np.array(energy)
    out.mkdir(parents=True, exist_ok=True)
    for name, members in sets.items():
        per_atom = ["positions", "forces", *(["forces_xtb"] if xtb else [])]
        per_structure = ["energy", "index", *(["energy_xtb"] if xtb else [])]
        arrays: dict[str, Any] = {key: np.concatenate([s[key] for s in members]).astype("f4") for key in per_atom}
        arrays |= {key: np.array([s[key].item() for s in members]) for key in per_structure}
        arrays["numbers"] = np.concatenate([s["numbers"] for s in members]).astype(np.uint8)
        arrays["n_atoms"] = np.array([len(s["numbers"]) for s in members], np.uint8)
        write_arrays(out / f"{name}.npz", **arrays)
    describe(out, energies, LEVEL_OF_THEORY)
    return {name: len(members) for name, members in sets.items()}


def _sides(files: Sequence[Path]) -> dict[bytes, bool]:
    """Composition -> whether its structures in these files are set aside for validation."""
    found = {}
    for file in files:
        arrays = read_arrays([file])
        for span in spans(arrays):
            found[bytes(sorted(arrays["numbers"][span].tolist()))] = file.stem.startswith("valid")
    return found


def xtb_energy_and_forces(numbers: np.ndarray, positions: np.ndarray, *, unpaired: int = 0) -> tuple[float, np.ndarray]:
    """Total energy (eV) and forces (n_atoms, 3; eV/A) of a neutral molecule with GFN2-xTB.

    Args:
        numbers: atomic numbers.
        positions: (n_atoms, 3), A.
        unpaired: number of unpaired electrons.

    Raises:
        MMEAError: tblite is not installed.
    """
    try:
        from tblite.interface import Calculator
    except ImportError as problem:
        raise MMEAError("GFN2-xTB needs tblite, which is not installed: pip install 'mmea[label]'") from problem
    calculator = Calculator("GFN2-xTB", numbers, positions / BOHR, uhf=unpaired)
    calculator.set("verbosity", 0)
    found = calculator.singlepoint()
    return float(found["energy"]) * HARTREE, -np.array(found["gradient"]) * HARTREE / BOHR
