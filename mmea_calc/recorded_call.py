"""Calls for one structure whose atoms move, on a GPU: at every step of a dynamics or relaxation that others drive.

`MMEACalculator` asks here. Positions go to the device, and all else is there: the neighbour list has a skin, and is
made anew, where the positions are, when an atom has moved half of it. A call is then one of two:

| edges | call |
|---|---|
| up to `MOST_EDGES` | of all pairs of the list (`FullTable`), recorded once and then started as one (`recorded`) |
| more, or what cannot be recorded | an ordinary one, of the pairs within the cutoff |

Another structure, cell, adapter or value of a weight is seen, and recorded anew; a new list only if it needs a larger
width. The first result of a recording is compared with the plain path.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from .errors import first_line
from .fast.compiled import Found, disagreement, stress_of
from .fast.fixed_network import FixedNetwork
from .fast.full_table import MOST_EDGES, WIDTHS, FullTable, width_of
from .fast.recorded import Recording
from .fast.tensor_state import State, same_state
from .graph import FloatArray
from .md.forces import ReplicaForces
from .md.neighbours import SKIN, Pairs
from .md.state import Layout, Replica
from .potential import Potential, Prediction


class RecordedCall:
    """Predictions for one structure at a time.

    Args:
        potential: backbone, with or without an adapter, whose weight updates are folded.
        skin: of the neighbour list, A.

    Attributes:
        usable: whether calls are recorded.
        n_calls, n_recorded, n_lists: how often a recording gave a prediction, one was made, a list was made.
    """

    def __init__(self, potential: Potential, skin: float = SKIN) -> None:
        self.potential, self.skin = potential, skin
        self.usable = potential.backbone.fast
        self.n_calls, self.n_recorded, self.n_lists = 0, 0, 0
        self._seen: Atoms | None = None
        self._values = State()
        self._moving: _Moving | None = None
        self._fixed: _Fixed | None = None
        self._proven = False

    def predict(self, atoms: Atoms, *, stress: bool) -> Prediction | None:
        """Energy, forces and, if asked for, stress; None if `Potential.predict` is to be asked instead.

        That is so where the call before was of another structure, or of other values of the network: they may be seen
        once only, and what is to be said of them is said there.
        """
        if not self.potential.backbone.fast or not self._was_seen(atoms):
            return None
        if len(atoms) < 2 or not np.isfinite(atoms.positions).all():
            return None
        moving, positions = self._moved(atoms)
        if self.usable and moving.width * len(atoms) <= MOST_EDGES:
            try:
                found = self._recorded(moving, positions, atoms, stress)
            except RuntimeError as problem:  # whatever torch says of what cannot be recorded
                self._give_up(f"it cannot be recorded: {first_line(problem)}")
                found = None
            if found is not None:
                self.n_calls += 1
                return self.potential.totalled(moving.forces.batch, found)
        return moving.forces.predict(positions, stress=stress)

    def _was_seen(self, atoms: Atoms) -> bool:
        """Whether all but positions is as it was in the call before."""
        values = self.potential.state()
        if self._seen is not None and _only_moved(self._seen, atoms) and same_state(values, self._values):
            return True
        self._seen, self._values, self._moving = atoms.copy(), values, None
        self._close()
        return False

    def _moved(self, atoms: Atoms) -> tuple[_Moving, Tensor]:
        """The structure with its atoms there, and where they are."""
        if self._moving is None:
            self._moving = _Moving(self.potential, atoms.copy(), self.skin)
        positions = torch.tensor(atoms.positions, dtype=torch.float64, device=self.potential.device)
        self.n_lists += self._moving.move(atoms.positions, positions)
        return self._moving, positions

    def _recorded(self, moving: _Moving, positions: Tensor, atoms: Atoms, stress: bool) -> Found | None:
        """None if an ordinary call is to be made."""
        # By that call a program is proven. What is recorded before would do without, and be kept.
        if self.potential.unproven(stress=stress):
            self._close()
            return None
        fixed = self._fixed
        if fixed is None or fixed.stress != stress or not fixed.take(moving):
            self._close()
            fixed = self._fixed = _Fixed(moving, positions, stress)
            self._proven, self.n_recorded = False, self.n_recorded + 1
        found = fixed(positions)
        if found is None or not (self._proven or self._agrees(found, atoms)):
            return None
        # Where atoms are as they were when it was recorded, something that does nothing at all agrees as well.
        self._proven = self._proven or not torch.equal(positions, fixed.recorded_at)
        return found

    def _agrees(self, found: Found, atoms: Atoms) -> bool:
        """With the plain path."""
        batch = self.potential.collate([self.potential.graph(atoms)])
        difference, allowed = disagreement(found, self.potential.found_plainly(batch, stress=found.stress is not None))
        agrees = difference <= allowed
        if not agrees:
            self._give_up(
                f"forces differ by {difference:.2g} eV/A from the plain path's, expected at most {allowed:.2g}; "
                "presumably this network does not end at its cutoff, or something in it was not recorded"
            )
        return agrees

    def _close(self) -> None:
        """Forget the recording, and with it its memory."""
        if self._fixed is not None:
            self._fixed.close()
        self._fixed = None

    def _give_up(self, why: str) -> None:
        self.usable = False
        self._close()
        warnings.warn(f"every call starts its operations one by one ({why})", stacklevel=5)


def _only_moved(one: Atoms, other: Atoms) -> bool:
    """Whether two structures differ in their positions alone."""
    arrays = ((one.numbers, other.numbers), (one.pbc, other.pbc), (one.cell.array, other.cell.array))
    return all(np.array_equal(a, b) for a, b in arrays)


class _Moving:
    """A structure whose atoms move, and the pairs that may be within the cutoff.

    Attributes:
        forces: its energies and forces by ordinary calls, as a batch of one replica.
        pairs: the list.
        width: of a table of them, see `width_of`.
    """

    pairs: Pairs
    width: int

    def __init__(self, potential: Potential, atoms: Atoms, skin: float) -> None:
        self.forces = ReplicaForces(potential, Layout([Replica(0, 0.0, 0, atoms)], device=potential.device), skin)
        self._made_at: FloatArray | None = None

    def move(self, here: FloatArray, positions: Tensor) -> bool:
        """Have a list for these positions (n_atoms, 3), A, given on the host and on the device; whether it is new."""
        neighbours, first = self.forces.neighbours, not hasattr(self, "pairs")
        if not first:
            if self._made_at is None:  # all pairs
                return False
            moved = here - self._made_at  # asked here, since the device would be waited for
            if float((moved * moved).sum(1).max()) <= (0.5 * neighbours.skin) ** 2:
                return False
        pairs = neighbours.candidates(positions)
        if not first and pairs is self.pairs:
            return False
        self.pairs, at = pairs, neighbours.made_at
        self._made_at = None if at is None else at.cpu().numpy()
        self.width = width_of(pairs.index, len(here), 1 if at is None else WIDTHS)
        return True


class _Fixed:
    """A recorded call, and the tensors that it reads and writes.

    Attributes:
        recorded_at: the positions that it was recorded with.
    """

    def __init__(self, moving: _Moving, positions: Tensor, stress: bool) -> None:
        self.forces, self.stress = moving.forces, stress
        self._pairs, n_atoms = moving.pairs, len(positions)
        self.table = FullTable.of(moving.pairs.index, n_atoms, moving.width)
        unit_shifts, shifts, radii = (
            self.table.spread(t) for t in (self._pairs.unit_shifts, self._pairs.shifts, self._pairs.radii)
        )
        self.edges = Pairs(self.table.index, unit_shifts, shifts, radii, torch.zeros_like(self.table.pair))
        self.positions, self.recorded_at = positions.clone(), positions.clone()
        self.network = FixedNetwork(self.forces.potential, self.forces.batch, self.table, stress=stress)
        self._recording = Recording(self._call, positions.device)

    def close(self) -> None:
        """Give the recording's memory back."""
        self._recording.close()

    def take(self, moving: _Moving) -> bool:
        """Go on with the list that the structure has now; False if that needs another width."""
        if moving.pairs is self._pairs:
            return True
        if moving.width > self.table.width:
            return False
        self._pairs = moving.pairs
        self.table.take(FullTable.of(self._pairs.index, len(self.positions), self.table.width))
        self.edges.unit_shifts.copy_(self.table.spread(self._pairs.unit_shifts))  # of the others nothing is read
        return True

    def _call(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        potential = self.forces.potential
        near, _, shifts = self.forces.placed(self.positions, self.edges)
        shifts = shifts + self.table.far(potential.backbone.r_max)
        return self.network(near.to(potential.dtype), shifts.to(potential.dtype))

    def __call__(self, positions: Tensor) -> Found | None:
        """Results with the atoms there, (n_atoms, 3), A; None if they do not hold."""
        self.positions.copy_(positions)
        node_energy, forces, strain, doubt = self._recording()
        if bool(doubt):
            return None
        stress = None if strain is None else stress_of(strain, self.forces.batch.tensors["cell"])
        return Found(node_energy.clone(), forces.clone(), stress)


__all__ = ["RecordedCall"]
