"""A packed set as extended xyz, which everything else reads: isolated atoms first, then its structures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import write

from ..errors import DataError
from ..files import replacing
from .dataset import read_arrays, read_e0, spans


def unpack(data: Path, *, out: Path) -> dict[str, int]:
    """Write OUT/train.xyz, with the isolated atoms, and OUT/valid.xyz; `REF_energy` in eV, `REF_forces` in eV/A.

    Args:
        data: folder with train-*.npz, valid.npz and e0.json; extra-*.npz, labelled later, joins the training set.
        out: folder; made if it is not there.

    Returns:
        File -> number of structures, isolated atoms left out.

    Raises:
        DataError: a file is missing, damaged or lacks a key.
    """
    train = sorted(data.glob("train-*.npz"))
    if not train:
        raise DataError(f"{data}: expected files train-*.npz, found none")
    parts = {"train": train + sorted(data.glob("extra-*.npz")), "valid": [data / "valid.npz"]}
    isolated = [_labelled([z], np.zeros((1, 3)), energy, np.zeros((1, 3))) for z, energy in read_e0(data).items()]
    for atoms in isolated:
        atoms.info["config_type"] = "IsolatedAtom"
    found = {name: _structures(files) for name, files in parts.items()}
    out.mkdir(parents=True, exist_ok=True)
    for name, structures in found.items():
        with replacing(out / f"{name}.xyz") as temporary:
            write(temporary, [*(isolated if name == "train" else []), *structures], format="extxyz")
    return {f"{name}.xyz": len(structures) for name, structures in found.items()}


def _structures(files: list[Path]) -> list[Atoms]:
    arrays = read_arrays(files)
    return [
        _labelled(arrays["numbers"][span], arrays["positions"][span], energy, arrays["forces"][span])
        for span, energy in zip(spans(arrays), arrays["energy"], strict=True)
    ]


def _labelled(numbers: object, positions: np.ndarray, energy: float, forces: np.ndarray) -> Atoms:
    atoms = Atoms(numbers=numbers, positions=positions.astype(np.float64))
    atoms.info["REF_energy"] = float(energy)
    atoms.arrays["REF_forces"] = forces.astype(np.float64)
    return atoms
