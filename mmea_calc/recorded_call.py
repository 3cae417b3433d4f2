"""Calls for one structure whose atoms move, on a GPU: recorded once, and started as one from then on (`recorded`).

What `MMEACalculator` does at every step of a dynamics or relaxation that somebody else drives. The edges are those of a
list with a skin (`FullTable`), made anew when an atom has moved half the skin, and recorded anew only if the list needs
a larger width. Another structure, cell, adapter or value of a weight is seen, and recorded anew. The first result is
compared with the plain path.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from .compiled import Found, disagreement, stress_of
from .errors import first_line
from .fixed_network import FixedNetwork
from .full_table import MOST_EDGES, WIDTHS, FullTable, width_of
from .graph import Batch, FloatArray, Graph, build_graph
from .potential import Potential, Prediction
from .recorded import Recording
from .tensor_state import State, same_state

SKIN = 1.0  # A


@dataclass
class _List:
    """A neighbour list with a skin, and the structure that it is of."""

    atoms: Atoms
    graph: Graph
    batch: Batch


class RecordedCall:
    """Predictions for one structure at a time.

    Args:
        potential: backbone, with or without an adapter, whose weight updates are folded.
        skin: of the neighbour list, A.

    Attributes:
        n_calls, n_recorded, n_lists: how often it gave a prediction, was recorded, made a list.
    """

    def __init__(self, potential: Potential, skin: float = SKIN) -> None:
        self.potential, self.skin = potential, skin
        self.usable = potential.backbone.fast
        self.n_calls, self.n_recorded, self.n_lists = 0, 0, 0
        self._seen: Atoms | None = None
        self._list: _List | None = None
        self._tensors: _Fixed | None = None
        self._values = State()
        self._proven = False

    def predict(self, atoms: Atoms, *, stress: bool) -> Prediction | None:
        """Energy, forces and, if asked for, stress; None if `Potential.predict` is to be asked instead.

        That is so for a structure that is not the one before with other positions: it may be seen once only, and what
        is to be said of it is said there.
        """
        if not self.usable:
            return None
        if self._seen is None or not _only_moved(self._seen, atoms):
            self._seen, self._list = atoms.copy(), None
            self._close()
            return None
        if len(atoms) < 2 or not np.isfinite(atoms.positions).all():
            return None
        try:
            return self._predict(atoms, stress)
        except RuntimeError as problem:  # whatever torch says of what cannot be recorded
            self._give_up(f"it cannot be recorded: {first_line(problem)}")
            return None

    def _predict(self, atoms: Atoms, stress: bool) -> Prediction | None:
        now, fresh = self._list, False
        moved = None if now is None else atoms.positions - now.atoms.positions
        if now is None or moved is None or float((moved * moved).sum(1).max()) > (0.5 * self.skin) ** 2:
            now, fresh, moved = self._list_of(atoms), True, np.zeros((len(atoms), 3))
            self._list, self.n_lists = now, self.n_lists + 1
        fixed = self._fixed_for(now, stress, fresh)
        if fixed is None:
            return None
        found = fixed(moved)
        if found is None or not (self._proven or self._agrees(found, atoms, stress)):
            return None
        # Where atoms are as they were when it was recorded, something that does nothing at all agrees as well.
        self._proven = self._proven or bool(moved.any())
        self.n_calls += 1
        return self.potential.totalled(now.batch, found)

    def _list_of(self, atoms: Atoms) -> _List:
        graph = build_graph(atoms, self.potential.backbone.r_max + self.skin)
        return _List(atoms.copy(), graph, self.potential.collate([graph]))

    def _fixed_for(self, of: _List, stress: bool, fresh: bool) -> _Fixed | None:
        """The recording for this list; None if it would not pay."""
        values = self.potential.state()
        if not same_state(values, self._values):
            self._values = values
            self._close()
        kept = self._tensors
        if kept is not None and kept.stress == stress and (not fresh or kept.take(of)):
            return kept
        width = width_of(of.batch.tensors["edge_index"], of.batch.n_atoms, WIDTHS)
        if width * of.batch.n_atoms > MOST_EDGES:
            return None
        self._close()
        self._tensors, self._proven = _Fixed(self.potential, of, width, stress), False
        self.n_recorded += 1
        return self._tensors

    def _agrees(self, found: Found, atoms: Atoms, stress: bool) -> bool:
        """With the plain path."""
        batch = self.potential.collate([self.potential.graph(atoms)])
        difference, allowed = disagreement(found, self.potential.found_plainly(batch, stress=stress))
        agrees = difference <= allowed
        if not agrees:
            self._give_up(
                f"forces differ by {difference:.2g} eV/A from the plain path's, expected at most {allowed:.2g}; "
                "presumably this network does not end at its cutoff, or something in it was not recorded"
            )
        return agrees

    def _close(self) -> None:
        """Forget the recording, and with it its memory."""
        if self._tensors is not None:
            self._tensors.close()
        self._tensors = None

    def _give_up(self, why: str) -> None:
        self.usable, self._list = False, None
        self._close()
        warnings.warn(f"every call starts its operations one by one ({why})", stacklevel=5)


def _only_moved(one: Atoms, other: Atoms) -> bool:
    """Whether two structures differ in their positions alone."""
    arrays = ((one.numbers, other.numbers), (one.pbc, other.pbc), (one.cell.array, other.cell.array))
    return all(np.array_equal(a, b) for a, b in arrays)


class _Fixed:
    """A recorded call, and the tensors that it reads and writes."""

    def __init__(self, potential: Potential, of: _List, width: int, stress: bool) -> None:
        self.r_max, self.stress = potential.backbone.r_max, stress
        edges, n_atoms = of.batch.tensors["edge_index"], of.batch.n_atoms
        self.table = FullTable.of(edges, n_atoms, width)
        self.placed = of.batch.tensors["positions"].double()
        self.cell = of.batch.tensors["cell"]
        self.shifts = self.table.shifts(of.batch.tensors["shifts"], self.r_max)
        self.moved = torch.zeros_like(self.placed)
        self.network = FixedNetwork(potential, of.batch, self.table, stress=stress)
        self.set_positions(of)
        self._recording = Recording(self._call, potential.device)

    def close(self) -> None:
        """Give the recording's memory back."""
        self._recording.close()

    def set_positions(self, of: _List) -> None:
        """Where the atoms were when the list was made, in double precision."""
        self.placed.copy_(torch.as_tensor(of.graph.positions))

    def take(self, of: _List) -> bool:
        """Go on with a new list of the same structure; False if that needs another width."""
        edges, n_atoms = of.batch.tensors["edge_index"], of.batch.n_atoms
        if width_of(edges, n_atoms) > self.table.width:
            return False
        self.table.take(FullTable.of(edges, n_atoms, self.table.width))
        self.shifts.copy_(self.table.shifts(of.batch.tensors["shifts"], self.r_max))
        self.set_positions(of)
        return True

    def _call(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.network((self.placed + self.moved).to(self.shifts.dtype), self.shifts)

    def __call__(self, moved: FloatArray) -> Found | None:
        """Results with the atoms moved by this since the list was made, (n_atoms, 3), A; None if they do not hold."""
        self.moved.copy_(torch.as_tensor(moved))
        node_energy, forces, strain, doubt = self._recording()
        if bool(doubt):
            return None
        stress = None if strain is None else stress_of(strain, self.cell)
        return Found(node_energy.clone(), forces.clone(), stress)


__all__ = ["RecordedCall"]
