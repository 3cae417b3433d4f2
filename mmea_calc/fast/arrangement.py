"""The edges and atoms of a batch in tables of one width, for a network that is compiled for batches of any size.

A compiled network can take no decision that depends on its input. Within `arranged(...)` the forms of the fast path
therefore do not ask how many neighbours an atom has or which elements are there: they read it from these tables, which
are filled up to one width, and gates leave out the questions that only save time. Results are the same.

What is filled up gathers zeros, and scatters nothing: `gather` and `scatter` are each other's derivative, so that no
derivative adds to one address from two places, and results repeat to the bit on any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Incidence:
    """Slots, each taking its value from one of n rows or from nowhere, and for each row the slots that take from it.

    Attributes:
        rows: (..., ...) of two dimensions: the row of each slot, 0 where it is empty.
        empty: of the same shape, bool; None where no slot is.
        slots: (width, n_rows), numbers in the flattened `rows`, 0 where there are no more.
        missing: (width, n_rows), bool; None where no row lacks any.
    """

    rows: Tensor
    empty: Tensor | None
    slots: Tensor
    missing: Tensor | None = None

    def gather(self, x: Tensor, *, blank: bool = True) -> Tensor:
        """x (n_rows, ...) -> (*rows.shape, ...), zero in empty slots.

        With `blank=False` anything may be in them: for what is multiplied by something that is zero there, which saves
        the time to make it zero. Derivatives do not see them in either case.
        """
        return _Gather.apply(x, self, blank)

    def scatter(self, x: Tensor) -> Tensor:
        """x (*rows.shape, ...) -> (n_rows, ...), the sum over the slots of each row."""
        return _Scatter.apply(x, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of: Incidence, blank: bool) -> Tensor:
        ctx.of = of
        taken = x.index_select(0, of.rows.flatten()).view(*of.rows.shape, *x.shape[1:])
        return taken.masked_fill(_like(of.empty, taken), 0) if blank and of.empty is not None else taken

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(grad, ctx.of), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of: Incidence) -> Tensor:
        ctx.of = of
        taken = x.flatten(0, 1).index_select(0, of.slots.flatten()).view(*of.slots.shape, *x.shape[2:])
        if of.missing is not None:
            taken = taken.masked_fill(_like(of.missing, taken), 0)
        return taken.sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.of, True), None


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (x.dim() - 2))


@dataclass(frozen=True)
class Arrangement:
    """Of one batch.

    Attributes:
        edges: slots (width, n_atoms) of the edges that end at each atom.
        senders: the same slots, of the atoms where these edges begin.
        atoms: slots (n_present, most) of the atoms of each element.
        present: positions, in the one-hot encoding, of the elements that are there, (n_present,), at least two of them:
            one may stand twice.
        element: position of each atom's element in the one-hot encoding, (n_atoms,).
        pairs: slots (1, n_edges) of the edges, of the pairs of atoms that they are between: one edge each way.
    """

    # For each of `tensors`, the dimensions that differ from batch to batch.
    DYNAMIC: ClassVar[tuple[set[int], ...]] = (
        *({0, 1}, {0, 1}, {1}),
        *({0, 1}, {0, 1}, {0, 1}),
        *({0, 1}, {0, 1}, {1}, {0}, {0}),
        *({1}, {1}, {1}),
    )

    edges: Incidence
    senders: Incidence
    atoms: Incidence
    present: Tensor
    element: Tensor
    pairs: Incidence

    def tensors(self) -> list[Tensor]:
        """All of it, for `from_tensors`."""
        found = [
            *(self.edges.rows, self.edges.empty, self.edges.slots),
            *(self.senders.rows, self.senders.slots, self.senders.missing),
            *(self.atoms.rows, self.atoms.empty, self.atoms.slots, self.present, self.element),
            *(self.pairs.rows, self.pairs.slots, self.pairs.missing),
        ]
        return [t for t in found if t is not None]  # none of these is None

    @classmethod
    def from_tensors(cls, tensors: list[Tensor]) -> Arrangement:
        edge_rows, empty, edge_slots, sender_rows, sender_slots, missing, *of_elements = tensors
        atom_rows, no_atom, place, present, element, pair, both, lacking = of_elements
        return cls(
            Incidence(edge_rows, empty, edge_slots),
            Incidence(sender_rows, empty, sender_slots, missing),
            Incidence(atom_rows, no_atom, place),
            present,
            element,
            Incidence(pair, None, both, lacking),
        )

    def first_edges(self) -> Incidence:
        """Slots (1, n_pairs) of the pairs, of the first edge of each."""
        pair, first = self.pairs.rows, self.pairs.slots[:1]
        others = first[0].index_select(0, pair[0]) != torch.arange(pair.shape[1], device=pair.device)
        return Incidence(first, None, pair, others.unsqueeze(0))


def arrange_elements(node_attrs: Tensor) -> tuple[Incidence, Tensor, Tensor]:
    """`atoms`, `present` and `element` of an `Arrangement`, from one-hot elements (n_atoms, n_elements)."""
    element = node_attrs.argmax(dim=1)
    counts = torch.bincount(element, minlength=node_attrs.shape[1])
    present = counts.nonzero().flatten()
    n = max(2, len(present))
    rows, empty, place = table(torch.searchsorted(present, element), n)
    if len(present) == 1:
        present = present.repeat(2)
    # Here the atoms of one element stand in a row.
    return Incidence(rows.T.contiguous(), empty.T.contiguous(), place % n * len(rows) + place // n), present, element


def arrange(tensors: dict[str, Tensor], elements: tuple[Incidence, Tensor, Tensor] | None = None) -> Arrangement:
    """The arrangement of the tensors of a `Batch`; `elements` if they are known from before."""
    atoms, present, element = elements or arrange_elements(tensors["node_attrs"])
    sender, receiver = tensors["edge_index"]
    n_atoms = len(element)
    rows, empty, slots = table(receiver, n_atoms)
    begins = torch.where(empty, 0, sender[rows])
    # The slots in which edges from each atom lie: first those edges, then where each of them lies.
    sent, missing, _ = table(sender, n_atoms)
    senders = Incidence(begins, empty, slots.flatten()[sent], missing)
    pairs = arrange_pairs(tensors["edge_index"], tensors["unit_shifts"], n_atoms)
    return Arrangement(Incidence(rows, empty, slots), senders, atoms, present, element, pairs)


def arrange_pairs(edge_index: Tensor, unit_shifts: Tensor, n_atoms: int) -> Incidence:
    """`pairs` of an `Arrangement`, of edges in any order; each is one of its own unless all have their opposite."""
    sender, receiver = edge_index
    # A number that both edges of a pair have: of its lower atom, its upper one and the lattice vectors between them.
    crossed = unit_shifts.to(torch.int64)
    base = 2 * int(crossed.abs().max()) + 1 if crossed.any() else 1
    code = (crossed[:, 0] * base + crossed[:, 1]) * base + crossed[:, 2]
    turned = (sender > receiver) | ((sender == receiver) & (code < 0))
    atoms = torch.minimum(sender, receiver) * n_atoms + torch.maximum(sender, receiver)
    number, order = (atoms * base**3 + torch.where(turned, -code, code)).sort(stable=True)
    if len(order) < 4 or len(order) % 2 or not torch.equal(number[::2], number[1::2]):
        return lone_edges(len(order), sender.device)
    pair = torch.empty_like(order)
    pair[order] = torch.arange(len(order), device=order.device) // 2
    both = order.view(-1, 2).T.contiguous()
    return Incidence(pair.unsqueeze(0), None, both, torch.zeros_like(both, dtype=torch.bool))


def lone_edges(n: int, device: torch.device) -> Incidence:
    """The same for n edges of which nothing is known: each is a pair of its own."""
    edge = torch.arange(n, device=device).unsqueeze(0)
    lacking = torch.zeros(2, n, dtype=torch.bool, device=device)
    lacking[1] = True
    return Incidence(edge, None, edge.repeat(2, 1), lacking)


def arrange_structures(owner: Tensor, n_structures: int) -> tuple[Tensor, Tensor]:
    """Atoms of each structure, (most, n_structures), from the structure of each atom; and where there are no more."""
    rows, empty, _ = table(owner, n_structures)
    return rows, empty


def table(group: Tensor, n_groups: int, width: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Members of groups as a table of at least `width` rows; a group is a column.

    Args:
        group: of each member, (n,).
        n_groups: how many there are.
        width: at least 2, since a compiled network takes a dimension of 1 for a special one.

    Returns:
        member in each place (width, n_groups), 0 where there is none; whether there is none; the place of each member
        in the flattened table, (1, n).
    """
    n = len(group)
    order = group.argsort(stable=True)
    counts = torch.bincount(group, minlength=n_groups)
    width = max(width, int(counts.max()))
    sorted_group = group[order]
    row = torch.arange(n, device=group.device) - (counts.cumsum(0) - counts)[sorted_group]
    at = row * n_groups + sorted_group
    rows = torch.zeros(n_groups * width, dtype=torch.int64, device=group.device)
    empty = torch.ones(n_groups * width, dtype=torch.bool, device=group.device)
    rows[at] = order
    empty[at] = False
    place = torch.empty_like(order)
    place[order] = at
    return rows.view(width, n_groups), empty.view(width, n_groups), place.unsqueeze(0)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


# Channels, and the 2l+1 components of each, of neighbouring pieces of features.
Blocks = tuple[tuple[int, int], ...]


@dataclass
class Stage:
    """What the modules of a network share while it runs within `arranged`.

    Attributes:
        arrangement: of the batch.
        tables: form of a module -> its tables: of a symmetric contraction, for the elements present; of a radial MLP.
        compiled: whether all operations become a few by compiling them; else each is started, and fewer are better.
        doubts: (bool tensors without dimensions) where one is true, the result does not hold: see `ShortRange`.
        lengths: radial features of the edges (n_edges, width), and the distances that they are of (n_edges, 1), A.
    """

    arrangement: Arrangement
    tables: Mapping[Any, list[Tensor]]
    compiled: bool = True
    doubts: list[Tensor] = field(default_factory=list)
    lengths: tuple[Tensor, Tensor] | None = None
    _known: dict[int, tuple[Tensor, int, dict[Blocks, tuple[Tensor, ...]]]] = field(default_factory=dict)

    def split(self, x: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:
        """Features (..., sum of channels * dim) as pieces (..., dim, channels): those that `join` was given, or new
        ones, the same for all who ask.
        """
        known = self.pieces_of(x)
        if blocks not in known:
            parts = x.split([channels * dim for channels, dim in blocks], dim=-1)
            pieces = [part.unflatten(-1, block).transpose(-1, -2) for part, block in zip(parts, blocks, strict=True)]
            return self.remember(x, pieces)
        return known[blocks]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pieces (..., dim, channels) as features (..., sum of channels * dim)."""
        parts = [piece.transpose(-1, -2).flatten(-2) for piece in pieces]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        self.remember(x, pieces)
        return x

    def pieces_of(self, x: Tensor) -> dict[Blocks, tuple[Tensor, ...]]:
        """What is known of x; nothing after a change in place."""
        _, version, known = self._known.get(id(x), (x, 0, {}))
        return known if version == _version(x) else {}

    def remember(self, x: Tensor, pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """That x consists of these pieces (..., dim, channels), which are returned."""
        blocks = tuple((piece.shape[-1], piece.shape[-2]) for piece in pieces)
        found = {**self.pieces_of(x), blocks: tuple(pieces)}
        self._known[id(x)] = x, _version(x), found  # x is held, so that no other takes its id
        return found[blocks]

    def doubt(self) -> Tensor:
        """Whether any of them is true."""
        none = self.arrangement.present.new_zeros((), dtype=torch.bool)
        return torch.stack(self.doubts).any() if self.doubts else none


def total(tensors: Iterable[Tensor]) -> Tensor:
    """The sum, written out."""
    return reduce(torch.add, tensors)


_STAGE: ContextVar[Stage | None] = ContextVar("mmea_stage", default=None)


def stage() -> Stage | None:
    """What `arranged` was entered with; None outside of it."""
    return _STAGE.get()


@contextmanager
def arranged(now: Stage) -> Iterator[Stage]:
    """Within this context the forms of the fast path take everything from `now`."""
    token = _STAGE.set(now)
    try:
        with _ByPiece(now) if now.compiled else nullcontext():
            yield now
    finally:
        _STAGE.reset(token)


class _ByPiece(TorchFunctionMode):
    """Sums and products of features that are known in pieces are known in pieces.

    Between its layers mace adds and scales features as they lie side by side. Who asks for their pieces would get parts
    of what has just been put together, and a compiler would put it together; what nobody asks for it leaves out.
    """

    _BY_COMPONENT = frozenset(("add", "sub", "mul", "div"))

    def __init__(self, now: Stage) -> None:
        super().__init__()
        self.now = now

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self._BY_COMPONENT and len(args) == 2 and not kwargs:
            for blocks in {b: None for x in args if isinstance(x, Tensor) for b in self.now.pieces_of(x)}:
                parts = [self._parts(x, result, blocks) for x in args]
                if all(part is not None for part in parts):
                    self.now.remember(result, [func(*some) for some in zip(*parts, strict=True)])
        return result

    def _parts(self, x: Any, result: Tensor, blocks: Blocks) -> Sequence[Any] | None:
        """An operand, piece by piece; None if it has another shape."""
        if not isinstance(x, Tensor):
            return [x] * len(blocks)
        if x.shape == result.shape:
            return self.now.split(x, blocks) if sum(c * d for c, d in blocks) == x.shape[-1] else None
        if x.dim() == 0:
            return [x] * len(blocks)
        return [x.unsqueeze(-1)] * len(blocks) if x.dim() == result.dim() and x.shape[-1] == 1 else None
