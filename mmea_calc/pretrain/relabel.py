"""A broad, cheaply labelled set at a better level of theory: its labels plus what a network says the levels differ by.

The difference of two levels is smoother than either, so few structures labelled with both teach it well; what it adds
is an estimate, and a last stage on true labels follows (`mmea-organic-s3.md` has what each step brought).

    differences     data/pbe with labels of both levels -> a set of differences, which `train` takes
    relabel         a broad set + the backbone trained on that -> the broad set, nearly at the better level
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms

from ..errors import DataError
from ..potential import Potential
from .dataset import check_no_set, describe, read_arrays, read_e0, read_level, spans, write_arrays

LARGEST = 6.0  # eV/A: where levels seem to differ by more, the network is far from what it knows
_TIMES = 3  # how often true labels stand beside the estimated ones
_BATCH = 16


def differences(*, data: Path, cheap: Path, out: Path) -> dict[str, int]:
    """Write OUT, a packed set of the differences of the two levels that DATA is labelled with.

    Args:
        data: folder with `energy_xtb` and `forces_xtb` beside the labels (`pack --xtb`).
        cheap: folder with the energies of isolated atoms, e0.json, of the cheap level.
        out: folder; all valid*.npz become one.

    Returns:
        number of structures per file.

    Raises:
        DataError: a set lacks one of the levels, or OUT holds one already. Nothing is written then.
    """
    check_no_set(out)
    better, lower = read_e0(data), read_e0(cheap)
    sets = {
        name: read_arrays(sorted(data.glob(pattern)), more=("energy_xtb", "forces_xtb"))
        for name, pattern in (("train-0", "train-*.npz"), ("valid", "valid*.npz"))
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, arrays in sets.items():
        for key in ("energy", "forces"):
            arrays[key] = arrays[key] - arrays.pop(f"{key}_xtb")
        write_arrays(out / f"{name}.npz", **arrays)
    describe(out, {z: better[z] - lower[z] for z in better.keys() & lower.keys()}, "difference of two levels")
    return {name: len(arrays["n_atoms"]) for name, arrays in sets.items()}


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
        DataError: a set cannot be read, OUT holds one already, or nothing is left. Nothing is written then.
    """
    check_no_set(out)
    arrays = read_arrays(sorted(data.glob("train-*.npz")))
    true = read_arrays(sorted(beside.glob("train-*.npz")) * _TIMES)
    valid, e0, level = read_arrays(sorted(beside.glob("valid*.npz"))), read_e0(beside), read_level(beside)
    where = spans(arrays)
    drawn = np.random.default_rng(seed).permutation(len(where))[:number]
    kept: list[tuple[int, float, np.ndarray]] = []
    for start in range(0, len(drawn), _BATCH):
        some = drawn[start : start + _BATCH]
        graphs = [
            by.graph(Atoms(arrays["numbers"][where[k]].astype(int), arrays["positions"][where[k]].astype(float)))
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
    relabelled = {key: np.concatenate([arrays[key][where[k]] for k, _, _ in kept]) for key in ("numbers", "positions")}
    relabelled["n_atoms"] = np.array([arrays["n_atoms"][k] for k, _, _ in kept])
    relabelled["energy"] = np.array([arrays["energy"][k] + energy for k, energy, _ in kept])
    relabelled["forces"] = np.concatenate([arrays["forces"][where[k]] + f for k, _, f in kept]).astype("f4")
    write_arrays(out / "train-0.npz", **relabelled)
    write_arrays(out / "train-1.npz", **true)
    write_arrays(out / "valid.npz", **valid)
    describe(out, e0, level)
    return len(kept)


__all__ = ["LARGEST", "differences", "relabel"]
