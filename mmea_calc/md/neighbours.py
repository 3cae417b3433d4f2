"""Pairs of atoms that may be within the cutoff, kept from step to step; each step picks those that are.

A small molecule's candidates are all its pairs, for ever. Otherwise they are the pairs within cutoff + skin, found
anew when an atom of the replica has moved half the skin: no pair can have come inside unseen.

Positions are never wrapped, so a pair's lattice shift stays what it is. Candidates are sorted by sender, receiver and
shift: the edges of a step depend on its positions only, not on when the list was made, and a resumed run repeats an
uninterrupted one to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from ase import Atoms
from ase.data import covalent_radii
from torch import Tensor

from ..fast.pairs_on_device import pairs_within
from ..graph import FloatArray, IntArray, build_graph
from ..neighbours import periodic_cell
from .state import Layout

# Up to this many atoms all pairs are cheaper than a list.
ALL_PAIRS = 64
SKIN = 1.0  # A


@dataclass(frozen=True)
class Pairs:
    """Ordered pairs (every pair both ways).

    Attributes:
        index: sender and receiver, (2, n_pairs), int64.
        unit_shifts: lattice vectors crossed, (n_pairs, 3), float64.
        shifts: the same in A.
        radii: sum of the covalent radii, A, (n_pairs,).
        owner: replica, (n_pairs,).
    """

    index: Tensor
    unit_shifts: Tensor
    shifts: Tensor
    radii: Tensor
    owner: Tensor

    def distances2(self, positions: Tensor) -> Tensor:
        """Squared distances, A^2, (n_pairs,)."""
        sender, receiver = self.index
        vectors = positions[receiver] - positions[sender] + self.shifts
        return (vectors * vectors).sum(1)

    def closest(self, distances2: Tensor, n_replicas: int) -> Tensor:
        """Smallest distance over the sum of the radii, per replica, from `distances2`; infinity without any pair."""
        ratios = torch.sqrt(distances2) / self.radii
        start = torch.full((n_replicas,), torch.inf, dtype=torch.float64, device=ratios.device)
        return start.scatter_reduce_(0, self.owner, ratios, "amin")

    def __getitem__(self, which: Tensor) -> Pairs:
        """Those of a mask or of indices."""
        if which.dtype == torch.bool:
            which = which.nonzero().squeeze(1)
        rest = (t[which] for t in (self.unit_shifts, self.shifts, self.radii, self.owner))
        return Pairs(self.index[:, which], *rest)


class Neighbours:
    """Candidates of all replicas.

    Args:
        layout: the replicas; their cells and periodic directions are those of their start structures.
        r_max: cutoff, A.
        skin: A.
        on_device: make lists where the positions are (`pairs_on_device`); None: on a GPU. They are the same ones.
    """

    def __init__(self, layout: Layout, r_max: float, skin: float = SKIN, *, on_device: bool | None = None) -> None:
        self.layout, self.r_max, self.skin = layout, r_max, skin
        self._on_device = layout.device.type == "cuda" if on_device is None else on_device
        self._listed = [bool(any(r.atoms.pbc)) or len(r.atoms) > ALL_PAIRS for r in layout.replicas]
        # What stays is made once: with many replicas one of them has its list renewed in nearly every step.
        self._first = [0, *accumulate(layout.atoms_per_replica)][:-1]
        numbers = np.concatenate([r.atoms.numbers for r in layout.replicas])
        self._radii = torch.as_tensor(covalent_radii[numbers]).to(layout.device)
        self._parts: list[_Part] = [
            _all_pairs(0 if listed else len(r.atoms), first, layout.device)
            for r, listed, first in zip(layout.replicas, self._listed, self._first, strict=True)
        ]
        self._made_at: Tensor | None = None
        self._pairs: Pairs | None = None
        self.n_builds = 0

    @property
    def listed(self) -> Tensor:
        """The replicas whose candidates are a list within the cutoff and the skin, not all pairs, (n_replicas,)."""
        return torch.tensor(self._listed, device=self.layout.device)

    @property
    def made_at(self) -> Tensor | None:
        """Where the atoms were when the lists were made, (n_atoms, 3), A; None where there are only all pairs."""
        return self._made_at

    def candidates(self, positions: Tensor, share: float = 0.5) -> Pairs:
        """Every pair within the cutoff at these positions, and some beyond: the same object while no list is renewed.

        Args:
            positions: (n_atoms, 3), A.
            share: of the skin, that an atom may have moved since its list was made; at most a half.
        """
        if not any(self._listed):
            if self._pairs is None:
                self._pairs = self._join()
            return self._pairs
        if self._made_at is None:
            self._renew(positions, [i for i, listed in enumerate(self._listed) if listed])
            self._made_at = positions.clone()
        else:
            moved = self.layout.largest(((positions - self._made_at) ** 2).sum(1)) > (share * self.skin) ** 2
            stale = [i for i in moved.nonzero().squeeze(1).tolist() if self._listed[i]]
            if stale:
                self._renew(positions, stale)
                self._made_at = torch.where(moved[self.layout.owner][:, None], positions, self._made_at)
        assert self._pairs is not None
        return self._pairs

    def _renew(self, positions: Tensor, which: list[int]) -> None:
        parts = self.layout.split(positions if self._on_device else positions.cpu())
        make = _pairs_there if self._on_device else _pairs_here
        for i in which:
            atoms, cutoff = self.layout.replicas[i].atoms, self.r_max + self.skin
            index, unit_shifts, shifts = make(atoms, parts[i], cutoff, self.layout.device)
            self._parts[i] = index + self._first[i], unit_shifts, shifts
            self.n_builds += 1
        self._pairs = self._join()

    def _join(self) -> Pairs:
        index = torch.cat([p[0] for p in self._parts], dim=1)
        return Pairs(
            index,
            torch.cat([p[1] for p in self._parts]),
            torch.cat([p[2] for p in self._parts]),
            self._radii[index[0]] + self._radii[index[1]],
            self.layout.owner[index[0]],
        )


# Of one replica: sender and receiver, by their numbers among all atoms, unit shifts, shifts.
_Part = tuple[Tensor, Tensor, Tensor]


def _all_pairs(n_atoms: int, first: int, device: torch.device) -> _Part:
    index = (~torch.eye(n_atoms, dtype=torch.bool)).nonzero().T.contiguous().to(device)
    zeros = torch.zeros(index.shape[1], 3, dtype=torch.float64, device=device)
    return index + first, zeros, zeros


def _pairs_there(start: Atoms, positions: Tensor, cutoff: float, device: torch.device) -> _Part:
    cell = torch.as_tensor(periodic_cell(np.array(start.cell.array, dtype=np.float64), start.pbc)).to(device)
    index, unit_shifts = pairs_within(positions, cell, start.pbc.tolist(), cutoff)
    return index, unit_shifts, _shifts(unit_shifts, cell)


def _pairs_here(start: Atoms, positions: Tensor, cutoff: float, device: torch.device) -> _Part:
    found = _pairs_within(start, positions.numpy(), cutoff)
    return tuple(torch.as_tensor(a).to(device) for a in found)  # type: ignore[return-value]


def _shifts(unit_shifts: Tensor, cell: Tensor) -> Tensor:
    """(n_pairs, 3), A: summed in this order whatever the number of pairs, which a matrix product would not promise."""
    return unit_shifts[:, 0:1] * cell[0] + unit_shifts[:, 1:2] * cell[1] + unit_shifts[:, 2:3] * cell[2]


def _pairs_within(start: Atoms, positions: FloatArray, cutoff: float) -> tuple[IntArray, FloatArray, FloatArray]:
    """Pairs, unit shifts and shifts for positions as they are, outside of the cell or not."""
    graph = build_graph(Atoms(start.numbers, positions, cell=start.cell, pbc=start.pbc), cutoff)
    # The graph's positions are wrapped: take back the lattice vectors by which each atom was moved.
    # By the cell that they are of: a slab's own third vector may lean, and would bring parts of the others along.
    cell = periodic_cell(np.array(start.cell.array, dtype=np.float64), graph.pbc)
    cells = np.round((positions - graph.positions) @ np.linalg.inv(cell)) * graph.pbc
    sender, receiver = graph.edge_index
    unit_shifts = graph.unit_shifts - cells[receiver] + cells[sender]
    order = np.lexsort((*unit_shifts.T[::-1], receiver, sender))
    unit_shifts = unit_shifts[order] + 0.0  # no minus zero
    # summed in this order whatever the number of pairs, which a matrix product would not promise
    shifts = sum(unit_shifts[:, i : i + 1] * graph.cell[i] for i in range(3))
    return graph.edge_index[:, order], unit_shifts, np.asarray(shifts)
