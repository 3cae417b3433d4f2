"""A `Potential` as the force field of a batch of replicas: tensors are made once, a step renews positions and edges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fast.parts import Parts
from ..graph import Batch
from ..potential import Potential, Prediction
from .neighbours import SKIN, Neighbours, Pairs
from .state import Layout

# On a CPU gates are watched in parts of so many atoms: without machine code all messages of a call are kept at once.
WATCHED_AT_ONCE = 1000


class ReplicaForces:
    """Energies and forces of all replicas in one call of the network.

    Args:
        potential: backbone, with or without an adapter.
        layout: the replicas.
        skin: of the neighbour lists, A.

    Attributes:
        pairs, distances2: candidates of the latest call, and their squared distances, A^2.

    Raises:
        DataError: a start structure that the backbone cannot take.
    """

    def __init__(self, potential: Potential, layout: Layout, skin: float = SKIN) -> None:
        self.potential, self.layout = potential, layout
        r_max = potential.backbone.r_max
        graphs = [potential.graph(r.atoms) for r in layout.replicas]
        self.batch = potential.collate(graphs)
        self.neighbours = Neighbours(layout, r_max, skin)
        self._parts = Parts(WATCHED_AT_ONCE if layout.device.type == "cpu" else None)
        self._looked_at = slice(0, len(layout.owner))  # the atoms of the call at hand
        self.pairs: Pairs
        self.distances2: Tensor
        device, owner = layout.device, layout.owner
        cells = torch.as_tensor(np.stack([g.cell for g in graphs])).to(device)
        self._cell, self._inverse = cells[owner], torch.linalg.inv(cells)[owner]
        self._pbc = torch.as_tensor(np.stack([g.pbc for g in graphs])).to(device)[owner]
        self._count = torch.tensor(layout.atoms_per_replica, dtype=torch.float64, device=device)[:, None]
        self._any_periodic = bool(self._pbc.any())
        self._all_periodic = bool(self._pbc.all())

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (n_atoms, 3), A -> total energies (n_replicas,), eV, forces (n_atoms, 3), eV/A; float64."""
        prediction = self.predict(positions)
        assert prediction.forces is not None
        return prediction.energy, prediction.forces.double()

    def predict(self, positions: Tensor, *, forces: bool = True, stress: bool = False) -> Prediction:
        """Positions (n_atoms, 3), A, float64 -> what `Potential.predict` gives, for all replicas."""
        self.move(positions)
        return self.potential.predict(self.batch, forces=forces, stress=stress)

    def look(self) -> None:
        """Call the network once more where the atoms are, without derivatives, if there are gates to watch.

        Hooks keep a call from being a program's, and a call without derivatives costs a third of one with them.
        """
        if self.potential.adapter is None or not self.potential.adapter.observed:
            return
        whole, first = self._looked_at, 0
        # Atoms that are all out of each other's reach make no tables to be divided.
        alone = self.batch.tensors["edge_index"].shape[1] == 0
        try:
            for batch in [self.batch] if alone else [part.batch for part in self._parts.of(self.batch)]:
                self._looked_at = slice(first, first + batch.n_atoms)
                self.potential.predict(batch, forces=False)
                first = self._looked_at.stop
        finally:
            self._looked_at = whole

    def bare(self) -> Tensor:
        """Forces of the backbone without its adapter at the positions of the latest call, (n_atoms, 3), eV/A."""
        with self.potential.adapter_disabled():
            prediction = self.potential.predict(self.batch)
        assert prediction.forces is not None
        return prediction.forces.double()

    def move(self, positions: Tensor) -> None:
        """Put the atoms there: renews `batch`, `pairs` and `distances2`, and computes nothing."""
        pairs = self.neighbours.candidates(positions)
        distances2 = pairs.distances2(positions)
        edges = pairs[distances2 < self.neighbours.r_max**2]
        self.pairs, self.distances2 = pairs, distances2
        near, unit_shifts, shifts = self.placed(positions, edges)
        old = self.batch.tensors
        tensors = {
            "positions": near.to(old["positions"].dtype),
            "edge_index": edges.index,
            "shifts": shifts.to(old["shifts"].dtype),
            "unit_shifts": unit_shifts.to(old["unit_shifts"].dtype),
        }
        # All other tensors stay the same objects: what the network keeps for them remains valid.
        self.batch = Batch({**old, **tensors}, self.batch.numbers, self.batch.atoms_per_graph)

    def placed(self, positions: Tensor, edges: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Positions where single precision serves them best, and the edges' lattice vectors and shifts, A, with them.

        A function of the positions alone, so that a resumed run sees the same bits.
        """
        near, unit_shifts = self._near_the_origin(positions, edges)
        shifts = _times(unit_shifts, self._cell[edges.index[0]]) if self._any_periodic else unit_shifts
        return near, unit_shifts, shifts

    def _near_the_origin(self, positions: Tensor, edges: Pairs) -> tuple[Tensor, Tensor]:
        if not self._any_periodic:
            middle = self.layout.sum(positions) / self._count
            return positions - middle[self.layout.owner], edges.unit_shifts
        fractional = _times(positions, self._inverse)
        lattice = torch.where(self._pbc, torch.floor(fractional), 0.0)
        moved = lattice
        if not self._all_periodic:
            middle = (self.layout.sum(fractional) / self._count)[self.layout.owner]
            moved = torch.where(self._pbc, lattice, middle)
        near = positions - _times(moved, self._cell)
        sender, receiver = edges.index
        return near, edges.unit_shifts + lattice[receiver] - lattice[sender]

    # -- for the monitor -----------------------------------------------------------------------------------------

    def closest(self) -> Tensor:
        """Smallest distance of two atoms over the sum of their covalent radii, per replica, at the latest call."""
        return self.pairs.closest(self.distances2, self.layout.n_replicas)

    def n_closer(self, ratio: float) -> Tensor:
        """Number of pairs, each counted once, closer than `ratio` times the sum of their radii, per replica."""
        close = (self.distances2 < (ratio * self.pairs.radii) ** 2).double()
        zeros = torch.zeros(self.layout.n_replicas, dtype=torch.float64, device=close.device)
        return zeros.index_add_(0, self.pairs.owner, close) / 2

    def bonds(self, ratio: float) -> Pairs:
        """The pairs within `ratio` times the sum of their radii at the latest call, each once."""
        close = self.distances2 < (ratio * self.pairs.radii) ** 2
        sender, receiver = self.pairs.index
        # An atom can be bound to its own image: of the two directions the one with the first positive shift stays.
        shift = self.pairs.unit_shifts
        sign = (torch.sign(shift) * shift.new_tensor([4.0, 2.0, 1.0])).sum(1)
        first = (sender < receiver) | ((sender == receiver) & (sign > 0))
        return self.pairs[close & first]

    @contextmanager
    def watching_gates(self) -> Iterator[list[Tensor]]:
        """Within this context a call leaves largest excesses of calibrated gates per replica in the list.

        A part of the replicas (`look`) leaves 0 for the others.
        """
        adapter = self.potential.adapter
        found: list[Tensor] = []

        def look(gate: Any, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                excess, atoms = gate.excess(inputs[0]), self._looked_at
                if excess.shape == (atoms.stop - atoms.start,):  # a layer of atoms; others are not the replicas'
                    everywhere = excess.new_zeros(self.layout.owner.shape, dtype=torch.float64)
                    everywhere[atoms] = excess.double()
                    found.append(self.layout.largest(everywhere))

        gates = [g for g in adapter.gates.values() if g.calibrated] if adapter is not None else []
        hooks = [gate.register_forward_pre_hook(look) for gate in gates]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


def _times(vectors: Tensor, matrices: Tensor) -> Tensor:
    """(n, 3) times (n, 3, 3); much faster than a batched product of so small matrices."""
    return (vectors[:, :, None] * matrices).sum(1)
