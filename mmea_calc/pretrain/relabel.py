"""A broad, cheaply labelled set at a better level of theory: its labels plus what a network says the levels differ by.

The difference of two levels is smoother than either, so few structures labelled with both teach it well; what it adds
is an estimate, and a last stage on true labels follows (`mmea-organic-s3.md` has what each step brought).

    differences     data/pbe with labels of both levels -> a set of differences, which `train` takes
    relabel         a broad set + the backbone trained on that -> the broad set, nearly at the better level
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from ase import Atoms

from ..errors import DataError
from ..files import replacing, write_text
from ..potential import Potential
from .dataset import read_arrays, read_e0

LARGEST = 6.0  # eV/A: where levels seem to differ by more, the network is far from what it knows
_TIMES = 3  # how often true labels stand beside the estimated ones
_BATCH = 16
_PER_ATOM = ("numbers", "positions", "forces")


def differences(*, data: Path, cheap: Path, out: Path) -> dict[str, int]:
    """Write OUT, a packed set of the differences of the two levels that DATA is labelled with.

    Args:
        data: folder with `energy_xtb` and `forces_xtb` beside the labels (`pack --xtb`).
        cheap: folder with the energies of isolated atoms, e0.json, of the cheap level.
        out: folder; all valid*.npz become one.

    Returns:
        number of structures per file.

    Raises:
        DataError: a set lacks one of the levels.
    """
    better, lower = read_e0(data), read_e0(cheap)
    files = {"train-0": sorted(data.glob("train-*.npz")), "valid": sorted(data.glob("valid*.npz"))}
    sets = {name: [_with_both(file) for file in some] for name, some in files.items()}
    if missing := [name for name, some in sets.items() if not some]:
        raise DataError(f"{data} has no {' and no '.join(missing)}")
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, some in sets.items():
        whole = {key: np.concatenate([arrays[key] for arrays in some]) for key in some[0]}
        whole["energy"] = whole["energy"] - whole.pop("energy_xtb")
        whole["forces"] = whole["forces"] - whole.pop("forces_xtb")
        _write(out / f"{name}.npz", whole)
        counts[name] = len(whole["n_atoms"])
    _describe(out, {z: better[z] - lower[z] for z in better.keys() & lower.keys()}, "difference of two levels")
    return counts


def relabel(
    *,
    data: Path,
    by: Potential,
    beside: Path,
    out: Path,
    number: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Write OUT: structures of DATA with the labels there plus the difference, and the true ones of BESIDE three times.

    Args:
        data: folder of the broad set.
        by: backbone trained on `differences`.
        beside: folder of the set at the better level; gives validation set, energies of atoms and level of theory.
        out: folder to write.
        number: of structures, drawn at random.
        seed: of the draw.
        progress: told how many are done.

    Returns:
        number of structures that were relabelled: those where the levels seem to differ by more than `LARGEST` are
        left out.

    Raises:
        DataError: a set cannot be read, or nothing is left.
    """
    arrays = read_arrays(sorted(data.glob("train-*.npz")))
    ends = np.concatenate([[0], np.cumsum(arrays["n_atoms"].astype(np.int64))])
    spans = [slice(a, b) for a, b in pairwise(ends)]
    drawn = np.random.default_rng(seed).permutation(len(spans))[:number]
    kept: list[tuple[int, float, np.ndarray]] = []
    for start in range(0, len(drawn), _BATCH):
        some = drawn[start : start + _BATCH]
        graphs = [
            by.graph(Atoms(arrays["numbers"][spans[k]].astype(int), arrays["positions"][spans[k]].astype(float)))
            for k in some
        ]
        energies, forces = by.predict_graphs(graphs)
        for k, energy, force in zip(some, energies, forces, strict=True):
            if float(force.abs().max()) <= LARGEST:  # false for NaN
                kept.append((int(k), float(energy), force.numpy()))
        if start // _BATCH % 100 == 99:
            progress(f"{start + len(some)} of {len(drawn)}")
    if not kept:
        raise DataError(f"{data}: nothing is left where the levels differ by less than {LARGEST} eV/A")
    out.mkdir(parents=True, exist_ok=True)
    relabelled = {key: np.concatenate([arrays[key][spans[k]] for k, _, _ in kept]) for key in ("numbers", "positions")}
    relabelled["n_atoms"] = np.array([arrays["n_atoms"][k] for k, _, _ in kept])
    relabelled["energy"] = np.array([arrays["energy"][k] + energy for k, energy, _ in kept])
    relabelled["forces"] = np.concatenate([arrays["forces"][spans[k]] + f for k, _, f in kept]).astype("f4")
    _write(out / "train-0.npz", relabelled)
    for name, pattern, times in (("train-1", "train-*.npz", _TIMES), ("valid", "valid*.npz", 1)):
        true = [read_arrays([file]) for file in sorted(beside.glob(pattern))] * times
        _write(out / f"{name}.npz", {key: np.concatenate([one[key] for one in true]) for key in relabelled})
    _describe(out, read_e0(beside), (beside / "level.txt").read_text(encoding="utf-8").strip())
    return len(kept)


def _with_both(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as content:
        arrays = dict(content)
    if lacking := [key for key in ("energy_xtb", "forces_xtb") if key not in arrays]:
        raise DataError(f"{file} has no {' and no '.join(lacking)}: pack it with --xtb")
    keys = (*_PER_ATOM, "n_atoms", "energy", "energy_xtb", "forces_xtb")
    return {key: arrays[key] for key in keys}


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(file) as part, part.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _describe(out: Path, e0: dict[int, float], level: str) -> None:
    write_text(out / "e0.json", json.dumps({str(z): e for z, e in sorted(e0.items())}, indent=1) + "\n")
    write_text(out / "level.txt", level + "\n")


__all__ = ["LARGEST", "differences", "relabel"]
