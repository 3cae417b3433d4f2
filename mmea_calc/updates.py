"""Changes of a weight, W -> W + update, one small class each.

An update is a `torch.nn.utils.parametrize` parametrization: it sees the frozen tensor and returns the one to
use. All of them can be folded into the weight once training is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A run of a flattened weight, seen as a matrix with rows `rows` (any shape) and `columns` columns."""

    rows: tuple[int, ...]
    columns: int
    std: float = 1.0  # of A at the start


class Update(nn.Module):
    """W + change(); W itself, the same tensor, while switched off."""

    label: ClassVar[str]  # for lists of what trains

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    def change(self) -> Tensor:
        """The change, in the shape of the weight."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change() if self.active else weight


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
    """W + D, every entry free, D = 0 at the start: what training the tensor itself amounts to."""

    label = "dense"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros_like(weight, memory_format=torch.contiguous_format))

    def change(self) -> Tensor:
        return self.D
