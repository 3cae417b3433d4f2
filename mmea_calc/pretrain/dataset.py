"""Packed sets of molecules, wholly on one device, and batches of them with all pairs within the cutoff.

A set is a folder: train-*.npz and valid.npz with `numbers` (atoms), `n_atoms` (structures), `positions` (atoms, 3; A),
`forces` (atoms, 3; eV/A), `energy` (structures; eV, total); e0.json, energies of isolated atoms (eV); level.txt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import replacing, write_text
from ..graph import Batch
from ..loss import Labels

_KEYS = ("numbers", "n_atoms", "positions", "forces", "energy")


class PackedSet:
    """Structures of one or more packed files on one device, in float32; energies in float64.

    Args:
        files: .npz files.
        e0: energies of isolated atoms by atomic number, eV; energies become interaction energies with them.
        elements: atomic numbers in the order of the network's one-hot encoding.
        device: where everything is kept.
        limit: take so many structures only.

    Raises:
        DataError: a file is missing or lacks a key, sizes do not match, or an element is not in `elements` or `e0`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        e0: dict[int, float],
        elements: Sequence[int],
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        arrays = read_arrays(files)
        n_atoms = arrays["n_atoms"].astype(np.int64)[:limit]
        last = int(n_atoms.sum())
        numbers = arrays["numbers"].astype(np.int64)[:last]
        if unknown := sorted(set(numbers.tolist()) - (set(elements) & set(e0))):
            raise DataError(f"{files[0].parent} has elements {unknown} that the network or e0.json lacks")
        starts = np.concatenate([[0], np.cumsum(n_atoms)])
        atom_energy = np.array([e0.get(z, 0.0) for z in range(120)])[numbers]
        interaction = arrays["energy"].astype(np.float64)[:limit] - np.add.reduceat(atom_energy, starts[:-1])
        position_in = {z: k for k, z in enumerate(elements)}
        self.device = device
        self.n_elements = len(elements)
        self.numbers = self._tensor(numbers, torch.long)
        self.elements = self._tensor(np.array([position_in[z] for z in numbers.tolist()]), torch.long)
        self.n_atoms = self._tensor(n_atoms, torch.long)
        self.starts = self._tensor(starts, torch.long)
        self.positions = self._tensor(arrays["positions"][:last], torch.float32)
        self.forces = self._tensor(arrays["forces"][:last], torch.float32)
        self.energy = self._tensor(interaction, torch.float64)

    def _tensor(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values).to(self.device, dtype)

    def __len__(self) -> int:
        return len(self.n_atoms)

    def batch(self, chosen: Tensor, r_max: float) -> tuple[Batch, Labels]:
        """Structures `chosen` (their numbers, on the device) with every pair of atoms within `r_max` (A).

        The energies among the labels are interaction energies: the reference energies are taken off.
        """
        n = self.n_atoms[chosen]
        n_graphs, widest = len(chosen), int(n.max())
        slot = torch.arange(widest, device=self.device)
        filled = slot < n[:, None]
        atoms = (self.starts[chosen][:, None] + slot)[filled]
        padded = self.positions.new_zeros(n_graphs, widest, 3)
        padded[filled] = self.positions[atoms]
        distance2 = (padded[:, :, None] - padded[:, None]).square().sum(-1)
        pair = (distance2 < r_max**2) & filled[:, :, None] & filled[:, None] & (slot[:, None] != slot)
        graph, sender, receiver = pair.nonzero(as_tuple=True)
        ptr = torch.cat([n.new_zeros(1), n.cumsum(0)])
        edges = torch.stack([ptr[graph] + sender, ptr[graph] + receiver])
        zeros = self.positions.new_zeros(edges.shape[1], 3)
        tensors = {
            "positions": self.positions[atoms].clone(),
            "node_attrs": torch.nn.functional.one_hot(self.elements[atoms], self.n_elements).to(self.positions.dtype),
            "edge_index": edges,
            "shifts": zeros,
            "unit_shifts": zeros,
            "cell": self.positions.new_zeros(3 * n_graphs, 3),
            "ptr": ptr,
            "head": torch.zeros(n_graphs, dtype=torch.long, device=self.device),
            "batch": torch.repeat_interleave(torch.arange(n_graphs, device=self.device), n),
        }
        one = self.positions.new_ones
        labels = Labels(
            energy=self.energy[chosen],
            energy_mask=one(n_graphs),
            forces=self.forces[atoms],
            forces_mask=one(len(atoms), 1),
            stress=self.positions.new_zeros(n_graphs, 3, 3),
            stress_mask=self.positions.new_zeros(n_graphs, 1, 1),
            atoms_per_graph=n.to(self.positions),
        )
        return Batch(tensors, self.numbers[atoms], n), labels

    def mean_neighbours(self, r_max: float, n_structures: int = 500) -> float:
        """Average number of neighbours within `r_max` over evenly chosen structures."""
        count = min(n_structures, len(self))
        chosen = torch.linspace(0, len(self) - 1, count, device=self.device).long()
        batches = [self.batch(part, r_max)[0] for part in chosen.split(100)]
        return sum(b.tensors["edge_index"].shape[1] for b in batches) / sum(b.n_atoms for b in batches)


def read_arrays(files: Sequence[Path], *, more: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of several packed files, one after the other, those named in `more` among them. Raises DataError."""
    keys = (*_KEYS, *more)
    if not files:
        raise DataError("no packed set found; expected train-*.npz and valid.npz in the folder")
    parts: list[dict[str, np.ndarray]] = []
    for file in files:
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
                parts.append({key: content[key] for key in keys})
        except (OSError, ValueError, KeyError, BadZipFile) as problem:
            raise DataError(f"{file} is not a packed set with {', '.join(keys)} ({problem})") from problem
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    n_atoms = int(arrays["n_atoms"].astype(np.int64).sum())
    if {len(arrays[k]) for k in ("numbers", "positions", "forces")} != {n_atoms}:
        raise DataError(f"{files[0].parent}: n_atoms sums to {n_atoms}, but the arrays per atom have other lengths")
    if len(arrays["energy"]) != len(arrays["n_atoms"]):
        raise DataError(f"{files[0].parent}: {len(arrays['energy'])} energies for {len(arrays['n_atoms'])} structures")
    return arrays


def spans(arrays: Mapping[str, np.ndarray]) -> list[slice]:
    """Where the atoms of each structure are in the arrays per atom."""
    ends = np.concatenate([[0], np.cumsum(arrays["n_atoms"], dtype=np.int64)]).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def check_no_set(folder: Path) -> None:
    """Raise a DataError for a folder that holds a set already: labels are dear."""
    if there := sorted(folder.glob("train-*.npz")):
        raise DataError(f"{folder} holds {there[0].name} already, which is not replaced: give another folder")


def check_ending(file: Path) -> None:
    """Raise a DataError for the name of something else than arrays."""
    if file.suffix != ".npz":
        raise DataError(f"{file}: expected a name that ends in .npz")


def write_arrays(file: Path, **arrays: np.ndarray) -> None:
    """Write an .npz file, whole or not at all."""
    with replacing(file) as part, part.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def describe(folder: Path, e0: Mapping[int, float], level: str) -> None:
    """Write e0.json and level.txt of a set."""
    write_text(folder / "e0.json", json.dumps({str(z): e for z, e in sorted(e0.items())}, indent=1) + "\n")
    write_text(folder / "level.txt", level + "\n")


def read_level(folder: Path) -> str:
    """The level of theory of a set. Raises DataError."""
    try:
        return (folder / "level.txt").read_text(encoding="utf-8").strip()
    except OSError as problem:
        raise DataError(
            f"{folder / 'level.txt'} is missing; it says the level of theory of the set in one line"
        ) from problem


def read_e0(path: Path) -> dict[int, float]:
    """Energies of isolated atoms, eV, of a set: its folder, or a file. Raises DataError."""
    file = path / "e0.json" if path.is_dir() else path
    try:
        return {int(z): float(energy) for z, energy in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise DataError(f"{file} should map atomic numbers to energies in eV ({problem})") from problem
