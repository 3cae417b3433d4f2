"""A batch in parts of whole structures, each small enough for the cache of a processor.

One call for many structures saves the start of some hundred operations, about a millisecond in all. Beyond some dozens
of atoms it saves no more and begins to lose: what one operation has written is no longer in the cache when the next
one reads it. So a CPU takes a large batch in parts (docs/performance-history.md has the figures).

Where a batch is divided follows from the sizes of its structures, not from where their atoms are: a run that is resumed
divides it as the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..graph import Batch
from .arrangement import Arrangement, Incidence, arrange, arrange_elements


def divide(atoms_per_graph: Sequence[int], most: int) -> list[slice]:
    """Runs of neighbouring structures with at most `most` atoms together; a larger structure is alone."""
    found, first, atoms = [], 0, 0
    for i, n in enumerate(atoms_per_graph):
        if i > first and atoms + n > most:
            found.append(slice(first, i))
            first, atoms = i, 0
        atoms += n
    return [*found, slice(first, len(atoms_per_graph))]


@dataclass(frozen=True)
class Part:
    """Neighbouring structures of a batch as a batch of their own, arranged."""

    batch: Batch
    arrangement: Arrangement


@dataclass
class _Place:
    """Where a part is in the batch, and what is kept of it."""

    structures: slice
    atoms: slice
    elements: tuple[Incidence, Tensor, Tensor]
    arranged: tuple[Tensor, int, Arrangement] | None = None


class Parts:
    """Divides batches, and keeps what stays from one to the next: in dynamics positions change, and edges now and then.

    Args:
        most: atoms of a part, more only in one structure alone; None takes every batch whole.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._seen: tuple[Tensor, int, int | None] | None = None
        self._places: list[_Place] = []
        self._part_of_atom = torch.zeros(0, dtype=torch.int64)
        self._whole: _Place | None = None

    def of(self, batch: Batch) -> list[Part]:
        """The parts of a batch, in their order. Each has two atoms at least, and edges, if the batch has."""
        node_attrs = batch.tensors["node_attrs"]
        seen = self._seen
        if seen is None or seen[0] is not node_attrs or seen[1:] != (node_attrs._version, self.most):
            self._seen = node_attrs, node_attrs._version, self.most
            self._divide(batch)
        if len(self._places) > 1 and (ends := self._ends_of_edges(batch.tensors["edge_index"])) is not None:
            return [
                _part(_cut(batch, place, slice(*edges)), place)
                for place, edges in zip(self._places, pairwise([0, *ends]), strict=True)
            ]
        if self._whole is None:
            everything = slice(0, batch.n_graphs), slice(0, batch.n_atoms)
            self._whole = _Place(*everything, arrange_elements(node_attrs))
        return [_part(batch, self._whole)]

    def _divide(self, batch: Batch) -> None:
        self._whole, self._places = None, []
        if self.most is None or batch.n_graphs == 1 or batch.n_atoms <= self.most:
            return
        counts = batch.atoms_per_graph.tolist()
        at, first = [], 0
        for structures in divide(counts, self.most):
            n = sum(counts[structures])
            at.append((structures, slice(first, first + n)))
            first += n
        if min(atoms.stop - atoms.start for _, atoms in at) < 2:
            return
        node_attrs = batch.tensors["node_attrs"]
        self._places = [_Place(s, a, arrange_elements(node_attrs[a])) for s, a in at]
        sizes = torch.tensor([a.stop - a.start for _, a in at])
        self._part_of_atom = torch.arange(len(at)).repeat_interleave(sizes)

    def _ends_of_edges(self, edge_index: Tensor) -> list[int] | None:
        """Where the edges of each part end; None where they do not stand part by part, or a part has none."""
        part = self._part_of_atom[edge_index[0]]
        counts = torch.bincount(part, minlength=len(self._places))
        if bool((part.diff() < 0).any()) or not bool(counts.all()):
            return None
        ends: list[int] = counts.cumsum(0).tolist()
        return ends


def _cut(batch: Batch, place: _Place, edges: slice) -> Batch:
    """The structures of a part alone."""
    t, atoms, structures = batch.tensors, place.atoms, place.structures
    tensors = {
        **{key: t[key][atoms] for key in ("positions", "node_attrs")},
        "edge_index": t["edge_index"][:, edges] - atoms.start,
        **{key: t[key][edges] for key in ("shifts", "unit_shifts")},
        "cell": t["cell"][3 * structures.start : 3 * structures.stop],
        "batch": t["batch"][atoms] - structures.start,
        "ptr": t["ptr"][structures.start : structures.stop + 1] - atoms.start,
        "head": t["head"][structures],
    }
    return Batch(tensors, batch.numbers[atoms], batch.atoms_per_graph[structures])


def _part(batch: Batch, place: _Place) -> Part:
    """Arranged anew where its edges are others than last time."""
    edges, kept = batch.tensors["edge_index"], place.arranged
    if kept is None or not _same(*kept[:2], edges):
        place.arranged = kept = edges, edges._version, arrange(batch.tensors, place.elements)
    return Part(batch, kept[2])


def _same(known: Tensor, version: int, edges: Tensor) -> bool:
    """Whether these are the edges that were known at this version; on a GPU values are not waited for."""
    if known._version != version:
        return False
    return known is edges or (edges.device.type == "cpu" and torch.equal(known, edges))


__all__ = ["Part", "Parts", "divide"]
