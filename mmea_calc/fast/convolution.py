"""mace's convolution, summed over neighbours before the tensor products instead of after.

Stock (MACE, arXiv 2206.07697, eq. 8): every edge j -> i makes a message, for every path p = (l1, l2 -> l3) and
channel c

    m_ijpkc = R_ijpc sum_ab C^p_abk h_jca Y_ijb

of all components k of l3, and the messages of a node are added up. The sum over neighbours and the Clebsch-Gordan
coefficients C commute, so here

    B_ibpac = sum_j Y_ijb (R_ijpc h_jca)     one matrix product per node over its neighbours,
    m_ipkc  = sum_ab C^p_abk B_ibpac         per node, not per edge.

What is made per edge has 2 l1 + 1 components a path instead of 2 l3 + 1, and only once. Neighbours of a node are filled
up to the largest number of neighbours with copies whose Y is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .._e3nn import o3
from ..mace_bridge import interaction_blocks
from .arrangement import Arrangement, stage, total

# Edges that are worked on together: what is made for them stays in a processor's cache. A GPU would wait for the start
# of every operation on so few; there it is what a few hundred megabytes hold.
SLOTS, SLOTS_ON_GPU = 512, 2**15


def use_fast_convolution(network: nn.Module) -> dict[str, str]:
    """Let every interaction block of `network` that can use the convolution of this module. Parameters stay.

    Returns:
        Blocks that keep their own, with the reason.
    """
    kept = {}
    planner = _Planner()  # the blocks of a network see the same edges
    for name, block in interaction_blocks(network):
        if reason := _reason_not_covered(block.conv_tp):
            kept[name] = reason
        elif not isinstance(block.conv_tp.__dict__.get("forward"), FastConvolution):
            # mace calls `conv_tp(features, Y, weights, edge_index)` of a block with this attribute, and sums nothing.
            block.conv_fusion = True
            block.conv_tp.__dict__["forward"] = FastConvolution(block.conv_tp, planner)
    return kept


def remove_fast_convolution(network: nn.Module) -> None:
    """Back to mace's own."""
    for _, block in interaction_blocks(network):
        if isinstance(block.conv_tp.__dict__.get("forward"), FastConvolution):
            del block.conv_tp.__dict__["forward"], block.conv_fusion


def _reason_not_covered(product: Any) -> str | None:
    """Why a tensor product is left alone."""
    if not isinstance(product, o3.TensorProduct):
        return "it is not e3nn's"
    if len({mul for mul, _ in product.irreps_in1}) != 1 or any(mul != 1 for mul, _ in product.irreps_in2):
        return "its channels are not the same for all orders"
    if not all(i.connection_mode == "uvu" and i.has_weight for i in product.instructions):
        return "its paths are not channel by channel with a weight each"
    if len({i.i_out for i in product.instructions}) != len(product.irreps_out):
        return "its paths add up"
    return None


@dataclass(frozen=True)
class _Run:
    """Irreps of the output of one kind that stand side by side.

    Attributes:
        paths: how many.
        dim: their 2 l3 + 1.
        start: the first of their components among the K of all. The first components of all paths come first, then the
            second ones: with channels side by side, those of all paths are then side by side.
    """

    paths: int
    dim: int
    start: int


@dataclass(frozen=True)
class _Paths:
    """Paths from one irrep of the features."""

    number: int  # of that irrep
    dim: int  # 2 l1 + 1
    numbers: list[int]  # in the order of the weights
    coupling: Tensor  # (K, n_Y * n_paths * dim), float64


@dataclass(frozen=True)
class _Nodes:
    """Nodes that are computed together, and their edges, filled up to the largest number of neighbours."""

    n: int
    edges: Tensor  # (n * width,) number of the edge
    senders: Tensor  # (n * width,)
    filling: Tensor | None  # (n * width, 1) whether it is a copy; None where nothing is


@dataclass(frozen=True)
class _Plan:
    """How the nodes of a graph are computed: by number of neighbours, so that little has to be filled."""

    of: tuple[Tensor, int, int]  # edge_index, its version, number of nodes
    nodes: list[_Nodes]
    order: Tensor  # the nodes in that order, those without neighbours left out


class _Planner:
    """Makes plans, and keeps that of the edges seen last: a network's blocks ask one after the other."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def __call__(self, edge_index: Tensor, n_nodes: int) -> _Plan:
        version = -1 if edge_index.is_inference() or torch.is_inference_mode_enabled() else edge_index._version
        kept = self._plan
        if kept is not None and version >= 0 and kept.of[0] is edge_index and kept.of[1:] == (version, n_nodes):
            return kept
        sender, receiver = edge_index
        counts = torch.bincount(receiver, minlength=n_nodes)
        by_receiver = receiver.argsort(stable=True)
        first = counts.cumsum(0) - counts
        by_count = counts.argsort(descending=True, stable=True)
        widths = [width for width in counts[by_count].tolist() if width]
        order = by_count[: len(widths)]
        slots = SLOTS_ON_GPU if edge_index.device.type == "cuda" else SLOTS
        nodes, start = [], 0
        while start < len(order):
            width = widths[start]
            end = min(len(order), start + max(1, slots // width))
            mine = order[start:end]
            column = torch.arange(width, device=receiver.device)
            filling = column >= counts[mine].unsqueeze(1)
            # Copies are of the node's own edges, so that a value that is not finite stays where it is.
            edges = by_receiver[(torch.where(filling, 0, column) + first[mine].unsqueeze(1)).flatten()]
            any_filling = widths[end - 1] < width
            nodes.append(_Nodes(end - start, edges, sender[edges], filling.reshape(-1, 1) if any_filling else None))
            start = end
        self._plan = _Plan((edge_index, version, n_nodes), nodes, order)
        return self._plan

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: without what is made again."""
        return {"_plan": None}


class FastConvolution:
    """The convolution of one interaction block.

    Args:
        stock: its tensor product, which holds no weights of its own.
        planner: shared by the blocks of a network.
    """

    def __init__(self, stock: Any, planner: _Planner) -> None:
        self.planner = planner
        self.channels = int(stock.irreps_in1[0].mul)
        self.n_paths = len(stock.instructions)
        self.blocks = tuple((mul, ir.dim) for mul, ir in stock.irreps_in1)
        self.runs = _runs(stock)
        self.paths = _paths(stock)
        self.terms = _terms(self.paths, n_y=int(stock.irreps_in2.dim))
        self._constants: dict[tuple[torch.dtype, torch.device], _Constants] = {}

    def __call__(self, features: Tensor, y: Tensor, weights: Tensor, edge_index: Tensor) -> Tensor:
        """Messages added up by receiver.

        Args:
            features: h, (n_nodes, irreps_in1.dim).
            y: spherical harmonics of the edges, (n_edges, irreps_in2.dim).
            weights: R, (n_edges, n_paths * channels).
            edge_index: senders and receivers, (2, n_edges).

        Returns:
            (n_nodes, irreps_out.dim).
        """
        now = stage()
        if now:
            pieces = now.split(features, self.blocks)
            by_irrep = [pieces[p.number] for p in self.paths]
            out = self._arranged(by_irrep, y, weights, now.arrangement, written_out=now.compiled)
        else:
            parts = features.split([mul * dim for mul, dim in self.blocks], dim=1)
            by_irrep = [parts[p.number].unflatten(1, (self.channels, p.dim)).transpose(1, 2) for p in self.paths]
            constants, plan = self._constants_like(features), self.planner(edge_index, features.shape[0])
            radial = weights.reshape(-1, self.channels)
            out = _Convolve.apply(constants, plan.nodes, y, radial, *(h.contiguous() for h in by_irrep))
            out = out.new_zeros(len(features), *out.shape[1:]).index_copy(0, plan.order, out)
        runs = out.split([run.paths * run.dim for run in self.runs], dim=1)
        # (n_nodes, 2l+1, paths * channels)
        found = [part.unflatten(1, (run.dim, run.paths)).flatten(2) for part, run in zip(runs, self.runs, strict=True)]
        return now.join(found) if now else torch.cat([part.transpose(1, 2).flatten(1) for part in found], dim=1)

    def _arranged(
        self, by_irrep: list[Tensor], y: Tensor, weights: Tensor, at: Arrangement, *, written_out: bool
    ) -> Tensor:
        """The module's equations for edges in tables, (n_nodes, K, channels): with all sums written out, for a
        compiled network; or as few operations, each of which is started.
        """
        filled_y = at.edges.gather(y)
        radial = at.edges.gather(weights, blank=False).unflatten(-1, (self.n_paths, self.channels))
        h = [at.senders.gather(x, blank=False) for x in by_irrep]
        if written_out:
            return _WrittenOut.apply(self.terms, filled_y, radial, *h)
        return self._by_products(filled_y, radial, h)

    def _by_products(self, y: Tensor, radial: Tensor, h: list[Tensor]) -> Tensor:
        """Matrix products over the slots of each node: y (width, n, n_Y), zero in empty slots; R (width, n, n_paths,
        c); h of each irrep (width, n, 2 l1 + 1, c).
        """
        constants, of_node = self._constants_like(y), y.permute(1, 2, 0)
        found = []
        for numbers, coupling, x in zip(constants.numbers, constants.couplings, h, strict=True):
            per_edge = radial.index_select(2, numbers).unsqueeze(3) * x.unsqueeze(2)  # (width, n, p, a, c)
            b = torch.bmm(of_node, per_edge.flatten(2).transpose(0, 1))  # (n, n_Y, p * a * c)
            b = b.view(len(b), -1, self.channels)
            found.append(torch.bmm(coupling.expand(len(b), -1, -1), b))
        return total(found)

    def _constants_like(self, x: Tensor) -> _Constants:
        """Kept for every precision and device."""
        key = (x.dtype, x.device)
        if key not in self._constants or self._constants[key].numbers[0].is_inference():
            self._constants[key] = _Constants(
                self.n_paths,
                [p.coupling.to(x) for p in self.paths],
                [torch.tensor(p.numbers, device=x.device) for p in self.paths],
            )
        return self._constants[key]

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: without what is made again."""
        return {**self.__dict__, "_constants": {}}


@dataclass(frozen=True)
class _Constants:
    """Of one precision and device: couplings (K, n_Y * n_paths * dim), numbers of the paths."""

    n_paths: int
    couplings: list[Tensor]
    numbers: list[Tensor]


class _Convolve(torch.autograd.Function):
    """Messages to all nodes in the order of the plan, (n_nodes, K, channels).

    What is made per edge is made again in the backward pass, not kept: it is large, and quick to make in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, constants: _Constants, plan: list[_Nodes], y: Tensor, radial: Tensor, *features: Tensor
    ) -> Tensor:
        ctx.constants, ctx.plan = constants, plan
        ctx.save_for_backward(y, radial, *features)
        found = []
        for nodes in plan:
            filled_y = _filled(y, nodes)
            out: Tensor | None = None
            for i, h in enumerate(features):
                _, r, h_edge = _per_edge(constants, nodes, radial, h, i)
                b = torch.bmm(filled_y, (r * h_edge).view(nodes.n, filled_y.shape[2], -1))  # (n, b, p * a * c)
                part = torch.matmul(constants.couplings[i], b.view(nodes.n, -1, h.shape[2]))
                out = part if out is None else out.add_(part)
            assert out is not None
            found.append(out)
        empty = y.new_zeros(0, constants.couplings[0].shape[0], radial.shape[1])
        return torch.cat(found) if found else empty

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Made of differentiable operations on the inputs, so that torch can differentiate it once more."""
        constants, c = ctx.constants, grad.shape[2]
        y, radial, *features = ctx.saved_tensors
        sums = [
            torch.zeros_like(t) if wanted else None
            for t, wanted in zip((y, radial, *features), ctx.needs_input_grad[2:], strict=True)
        ]
        of_y, of_radial, *of_features = sums
        for nodes, mine in zip(ctx.plan, grad.split([nodes.n for nodes in ctx.plan]), strict=True):
            filled_y = _filled(y, nodes)
            part_y: Tensor | None = None
            for i, h in enumerate(features):
                rows, r, h_edge = _per_edge(constants, nodes, radial, h, i)
                of_b = torch.matmul(constants.couplings[i].T, mine).view(nodes.n, filled_y.shape[1], -1)
                of_edge = torch.bmm(filled_y.transpose(1, 2), of_b).view(-1, r.shape[1], h.shape[1], c)
                if of_y is not None:
                    per_edge = (r * h_edge).view(nodes.n, filled_y.shape[2], -1)
                    part = torch.bmm(per_edge, of_b.transpose(1, 2))  # (n, width, b)
                    part_y = part if part_y is None else part_y + part
                if of_radial is not None:
                    of_radial.index_add_(0, rows, (of_edge * h_edge).sum(2).view(-1, c))
                if (of_h := of_features[i]) is not None:
                    of_h.index_add_(0, nodes.senders, (of_edge * r).sum(1))
            if of_y is not None and part_y is not None:
                part_y = part_y.reshape(-1, y.shape[1])
                if nodes.filling is not None:
                    part_y = part_y.masked_fill(nodes.filling, 0)
                of_y.index_add_(0, nodes.edges, part_y)
        return None, None, *sums


@dataclass(frozen=True)
class _Term:
    """One product C h_a Y_b R_p of the component k of a message; h is of the irrep number i."""

    i: int
    path: int
    a: int
    b: int
    k: int
    c: float


def _terms(paths: list[_Paths], *, n_y: int) -> list[_Term]:
    """All that are not zero."""
    found = []
    for i, some in enumerate(paths):
        coupling = some.coupling.view(len(some.coupling), n_y, len(some.numbers), some.dim)
        for k, b, number, a in coupling.nonzero().tolist():
            found.append(_Term(i, some.numbers[number], a, b, k, float(coupling[k, b, number, a])))
    return found


class _WrittenOut(torch.autograd.Function):
    """Messages added up over the slots of each node, term by term: (n_nodes, K, channels).

    Takes Y (width, n, n_Y), zero in empty slots; R (width, n, n_paths, c); h of each irrep (width, n, 2 l1 + 1, c).
    """

    @staticmethod
    def forward(ctx: Any, terms: list[_Term], y: Tensor, radial: Tensor, *h: Tensor) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(y, radial, *h)
        found = []
        for _, of_k in _grouped(terms, lambda t: t.k):
            by_path = [
                radial[:, :, path] * total(t.c * y[:, :, t.b, None] * h[t.i][:, :, t.a] for t in of_path)
                for path, of_path in _grouped(of_k, lambda t: t.path)
            ]
            found.append(total(by_path).sum(0))
        return torch.stack(found, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Made of differentiable operations, as everywhere here."""
        terms: list[_Term] = ctx.terms
        y, radial, *h = ctx.saved_tensors
        g = list(grad.unbind(1))  # (n, c) each
        of_h: list[dict[int, list[Tensor]]] = [{} for _ in h]
        of_radial = []
        for path, of_path in _grouped(terms, lambda t: t.path):
            parts = []
            for (i, a), of_a in _grouped(of_path, lambda t: (t.i, t.a)):
                u = total(t.c * y[:, :, t.b, None] * g[t.k] for t in of_a)
                parts.append(h[i][:, :, a] * u)
                of_h[i].setdefault(a, []).append(radial[:, :, path] * u)
            of_radial.append(total(parts))
        return (
            None,
            _of_y(terms, radial, h, grad),
            torch.stack(of_radial, dim=2),
            *(torch.stack([total(parts[a]) for a in sorted(parts)], dim=2) for parts in of_h),
        )


def _of_y(terms: list[_Term], radial: Tensor, h: list[Tensor], grad: Tensor) -> Tensor:
    """The gradient of Y, (width, n, n_Y): a sum over channels, added up where what is added is made."""
    g = grad.unbind(1)
    by_channel = [
        total(
            radial[:, :, path] * total(t.c * h[t.i][:, :, t.a] * g[t.k] for t in of_path)
            for path, of_path in _grouped(of_b, lambda t: t.path)
        )
        for _, of_b in _grouped(terms, lambda t: t.b)
    ]
    return torch.stack([one.sum(-1) for one in by_channel], dim=2)


def _grouped(terms: Iterable[_Term], key: Callable[[_Term], Any]) -> list[tuple[Any, list[_Term]]]:
    """In the order of the key: every k, path, b and (i, a) occurs."""
    ordered = sorted(terms, key=key)
    return [(value, list(some)) for value, some in groupby(ordered, key=key)]


def _filled(y: Tensor, nodes: _Nodes) -> Tensor:
    """Spherical harmonics by node, zero for copies: (n, b, width)."""
    filled = y.index_select(0, nodes.edges)
    if nodes.filling is not None:
        filled = filled.masked_fill(nodes.filling, 0)
    return filled.view(nodes.n, -1, y.shape[1]).transpose(1, 2)


def _per_edge(constants: _Constants, nodes: _Nodes, radial: Tensor, h: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `radial`, R as (slots, p, 1, c), and h of the senders as (slots, 1, a, c), of the i-th irrep."""
    numbers = constants.numbers[i]
    rows = (nodes.edges.unsqueeze(1) * constants.n_paths + numbers).flatten()
    r = radial.index_select(0, rows).view(-1, len(numbers), 1, radial.shape[1])
    return rows, r, h.index_select(0, nodes.senders).unsqueeze(1)


def _paths(product: Any) -> list[_Paths]:
    """Paths by irrep of the features."""
    n_y = int(product.irreps_in2.dim)
    n_components = sum(ir.dim for _, ir in product.irreps_out)
    rows = [
        run.start + run.paths * torch.arange(run.dim) + number for run in _runs(product) for number in range(run.paths)
    ]
    found = []
    for i, (_, ir) in enumerate(product.irreps_in1):
        mine = [(number, ins) for number, ins in enumerate(product.instructions) if ins.i_in1 == i]
        if not mine:
            continue
        coupling = torch.zeros(n_components, n_y, len(mine), ir.dim, dtype=torch.float64)
        for column, (_, ins) in enumerate(mine):
            l2, l3 = product.irreps_in2[ins.i_in2].ir.l, product.irreps_out[ins.i_out].ir.l
            w3j = o3.wigner_3j(ir.l, l2, l3, dtype=torch.float64)  # (a, b, k)
            b = product.irreps_in2.slices()[ins.i_in2]
            coupling[rows[ins.i_out], b, column] = ins.path_weight * w3j.permute(2, 1, 0)
        found.append(_Paths(i, ir.dim, [number for number, _ in mine], coupling.flatten(1)))
    return found


def _runs(product: Any) -> list[_Run]:
    """The output, kind by kind."""
    channels, start, found = int(product.irreps_in1[0].mul), 0, []
    for mul, ir in product.irreps_out.simplify():
        found.append(_Run(mul // channels, ir.dim, start))
        start += found[-1].paths * ir.dim
    return found
