"""Changes of a weight, W -> W + update, one small class each.

An update is a `torch.nn.utils.parametrize` parametrization: it sees the frozen tensor and returns the one to
use. All of them can be folded into the weight once training is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Shapes = tuple[tuple[int, ...], ...]  # of the matrices that a tensor consists of, in memory order


@dataclass(frozen=True)
class Block:
    """A run of a flattened weight, seen as a matrix with rows `rows` (any shape) and `columns` columns.

    Attributes:
        std: of A at the start.
        path: which irreps it connects, such as "1o -> 1o"; empty where it is not of one path.
        order: order l of the path's output; None where it is not of one order.
        row_axes: what the rows are a product of, such as channels and elements; not given: `rows`.
    """

    rows: tuple[int, ...]
    columns: int
    std: float = 1.0
    path: str = ""
    order: int | None = None
    row_axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are optimised alike.

    Attributes:
        parameters: which.
        rates: "weights" have the learning rate `lr` and the weight decay `weight_decay` of `TrainConfig`, "thresholds"
            have `tau_lr` and `tau_weight_decay`.
        decaying: for every parameter a function that gives the entries which weight decay acts on at present (a mask
            of the parameter's shape); None: on all.
        shapes: for every parameter those of the matrices that it consists of, in memory order, for optimisers that know
            matrices (`soap`); None: each is one.
    """

    parameters: list[nn.Parameter]
    rates: Literal["weights", "thresholds"] = "weights"
    decaying: tuple[Callable[[], Tensor], ...] | None = None
    shapes: tuple[Shapes, ...] | None = None

    def all_shapes(self) -> tuple[Shapes, ...]:
        """`shapes`, also where they are not given."""
        return self.shapes or tuple((tuple(p.shape),) for p in self.parameters)


class Update(nn.Module):
    """W + change(); W itself, the same tensor, while switched off."""

    label: ClassVar[str]  # for lists of what trains

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    def change(self) -> Tensor:
        """The change, in the shape of the weight."""
        raise NotImplementedError

    def applied(self, weight: Tensor) -> Tensor:
        """The weight to be used in the place of `weight`, switched on or not."""
        return weight + self.change()

    def difference(self, weight: Tensor) -> Tensor:
        """What the update adds to `weight` in effect, told more exactly than by subtracting."""
        return self.change()

    def groups(self) -> list[ParameterGroup]:
        """How the parameters are optimised; the same for all of them unless an update says otherwise."""
        return [ParameterGroup(list(self.parameters()))]

    def forward(self, weight: Tensor) -> Tensor:
        return self.applied(weight) if self.active else weight


class LowRank(Update):
    """W + (alpha / r) A B, block by block (method of ELoRA, ICML 2025); A is normal, B starts at zero.

    Args:
        weight: the frozen tensor; read for shape, precision and device.
        blocks: the matrices it consists of, in memory order.
        rank: r.
        alpha: scale.
        generator: source of the initial values.
    """

    label = "low rank"

    def __init__(
        self,
        weight: Tensor,
        blocks: Sequence[Block],
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.scale = weight.shape, alpha / rank
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for block in blocks:
            a = torch.randn(*block.rows, rank, generator=generator, dtype=torch.float64) * block.std
            self.A.append(nn.Parameter(a.to(weight)))
            self.B.append(nn.Parameter(torch.zeros(rank, block.columns).to(weight)))

    def change(self) -> Tensor:
        parts = [(a @ b).flatten() for a, b in zip(self.A, self.B, strict=True)]
        return (self.scale * (parts[0] if len(parts) == 1 else torch.cat(parts))).view(self.shape)


class Dense(Update):
    """W + D, every entry free, D = 0 at the start: what training the tensor itself amounts to.

    Args:
        weight: the frozen tensor; read for shape, precision and device.
        blocks: the matrices it consists of, in memory order, if it does.
    """

    label = "dense"

    def __init__(self, weight: Tensor, blocks: Sequence[Block] = ()) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.D = nn.Parameter(torch.zeros_like(weight, memory_format=torch.contiguous_format))

    def change(self) -> Tensor:
        return self.D

    def groups(self) -> list[ParameterGroup]:
        shapes = tuple((*(block.row_axes or block.rows), block.columns) for block in self.blocks)
        return [ParameterGroup([self.D], shapes=(shapes,) if shapes else None)]


class Replacement(Update):
    """V instead of W: a value of its own, whatever the backbone's is. Zero until `start` is called or V is loaded."""

    label = "replacement"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.V = nn.Parameter(torch.zeros_like(weight, memory_format=torch.contiguous_format))

    def start(self, value: Tensor) -> None:
        """Take `value`, in the shape of the weight."""
        with torch.no_grad():
            self.V.copy_(value)

    def applied(self, weight: Tensor) -> Tensor:
        return self.V

    def difference(self, weight: Tensor) -> Tensor:
        return self.V - weight


class SoftThreshold(Update):
    """W + S(D, tau), S(D, tau) = sign(D) relu(|D| - sigmoid(tau)): most entries end up unchanged (arXiv 2606.18691).

    The threshold tau is one number for the tensor. D starts normal, not zero: at zero the threshold would let no
    gradient through. So the start is near the backbone, not equal to it. Entries below the threshold have no gradient
    and no weight decay; they stay where they are, and tau alone can bring them back.

    Args:
        weight: the frozen tensor; read for shape, precision and device.
        std: of D at the start.
        threshold: sigmoid(tau) at the start.
        generator: source of the initial values.
    """

    label = "sparse"

    def __init__(
        self,
        weight: Tensor,
        *,
        std: float = 0.01,
        threshold: float = 0.001,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * std
        self.D = nn.Parameter(d.to(weight))
        tau = torch.tensor(math.log(threshold / (1 - threshold)), dtype=torch.float64)
        self.tau = nn.Parameter(tau.to(weight))

    def change(self) -> Tensor:
        return torch.sign(self.D) * torch.relu(self.D.abs() - torch.sigmoid(self.tau))

    @torch.no_grad()
    def survivors(self) -> Tensor:
        """Which entries of the weight change: a mask of its shape."""
        return self.D.abs() > torch.sigmoid(self.tau)

    def groups(self) -> list[ParameterGroup]:
        """D and tau are optimised apart: rates and decays of their own, and only surviving entries of D decay."""
        return [ParameterGroup([self.D], decaying=(self.survivors,)), ParameterGroup([self.tau], "thresholds")]
