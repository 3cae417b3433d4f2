"""Edges of one number for every atom, so that all shapes follow from the number of atoms and one width.

An atom with fewer edges than the width gets edges to itself over twice the cutoff. Those weigh nothing, and so do pairs
beyond the cutoff that a list with a skin holds: the envelope of the radial functions (MACE, arXiv 2206.07697) and all
of its derivatives are exactly zero there. So the list need not be thinned out at every step, and a call has the same
shapes, and the same addresses, until the list is made anew and needs a larger width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .arrangement import Arrangement, Incidence, lone_edges, table

# Of edges that come and go: one shape then serves many of their sets.
WIDTHS = 8
# Beyond this many edges a device is busy with them, and those of a skin cost more than starting operations.
MOST_EDGES = 200_000


@dataclass(frozen=True)
class FullTable:
    """`width` edges to each of n atoms; edge k n + i is the k-th one to atom i.

    Attributes:
        index: sender and receiver, (2, width * n), int64.
        pair: which of the pairs given it is, (width * n,), int64; 0 for those that only fill up.
        filling: which only fill up, (width * n, 1), bool.
        sent: the edges that begin at each atom, (width, n), int64.
    """

    index: Tensor
    pair: Tensor
    filling: Tensor
    sent: Tensor

    @classmethod
    def of(cls, index: Tensor, n_atoms: int, width: int) -> FullTable:
        """From ordered pairs, every pair both ways.

        Args:
            index: sender and receiver, (2, n_pairs).
            n_atoms: n.
            width: at least `width_of(index, n_atoms)`.
        """
        sender, receiver = index
        pair, filling, _ = (t.flatten() for t in table(receiver, n_atoms, width))
        own = torch.arange(n_atoms, device=index.device).repeat(width)
        senders = own.clone()
        senders[~filling] = sender[pair[~filling]]
        # Pairs go both ways and the others begin where they end: as many edges begin at an atom as end there.
        sent = senders.argsort(stable=True).view(n_atoms, width).T.contiguous()
        return cls(torch.stack([senders, own]), pair, filling.unsqueeze(1), sent)

    @property
    def width(self) -> int:
        return int(self.sent.shape[0])

    def spread(self, values: Tensor) -> Tensor:
        """Values of the pairs (n_pairs, ...) -> of the edges, zero where they only fill up."""
        if len(values) == 0:
            return values.new_zeros(len(self.pair), *values.shape[1:])
        filling = self.filling.view(-1, *[1] * (values.dim() - 1))
        return values[self.pair].masked_fill(filling, 0)

    def shifts(self, shifts: Tensor, r_max: float) -> Tensor:
        """Shifts of the pairs (n_pairs, 3), A -> of the edges, those that only fill up out of reach."""
        return self.spread(shifts) + self.far(r_max).to(shifts)

    def take(self, other: FullTable) -> None:
        """Hold the edges of another table of the same shapes, in the tensors that this one has."""
        for name in (f.name for f in fields(self)):
            mine: Tensor = getattr(self, name)
            mine.copy_(getattr(other, name))

    def far(self, r_max: float) -> Tensor:
        """What takes the edges that only fill up out of reach: shifts to be added, (width * n, 3), float64, A."""
        along = 2.0 * r_max * self.filling.double()
        return torch.cat([along, torch.zeros_like(along).expand(-1, 2)], dim=1)

    def arrangement(self, elements: tuple[Incidence, Tensor, Tensor]) -> Arrangement:
        """For a network within `arranged`; `elements` are those of `arrange_elements`."""
        n = self.sent.shape[1]
        rows = torch.arange(self.width * n, device=self.sent.device)
        none = torch.zeros(self.width, n, dtype=torch.bool, device=self.sent.device)
        edges = Incidence(rows.view(self.width, n), none, rows.unsqueeze(0))
        senders = Incidence(self.index[0].view(self.width, n), none, self.sent, none)
        return Arrangement(edges, senders, *elements, lone_edges(len(rows), rows.device))


def width_of(index: Tensor, n_atoms: int, step: int = 1) -> int:
    """The largest number of pairs (2, n_pairs) to one atom, rounded up to a multiple of `step`.

    At least 2, as in all tables of a compiled network.
    """
    most = max(2, int(torch.bincount(index[1], minlength=n_atoms).max()))
    return -(-most // step) * step


__all__ = ["MOST_EDGES", "WIDTHS", "FullTable", "width_of"]
