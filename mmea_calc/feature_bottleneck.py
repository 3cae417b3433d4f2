"""The conventional bottleneck adapter on the features of a layer: a baseline that breaks equivariance.

It sits on one equivariant linear layer y = Linear(x) and sees the output as a plain list of numbers, components of
vectors among them:

    y <- y + W_up SiLU(W_down y)

W_up is zero at the start. A nonlinear function that mixes components of different orders does not turn with the
structure, so energies depend on how a molecule is oriented. It is here to be compared with (arXiv 2511.06696).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gates import reason_not_adaptable


class FeatureBottleneck(nn.Module):
    """Bottleneck of one `o3.Linear`; the identity at the start.

    Args:
        linear: the layer; it is read for its irreps, never changed or kept.
        rank: width of the bottleneck.
        generator: source of the initial values of W_down, torch's default for a linear layer.
    """

    family: ClassVar[str] = "bottlenecks"  # first word of its tensors' names in an adapter file
    label: ClassVar[str] = "bottleneck"
    parts: ClassVar[dict[str, str]] = {"down": "all", "up": "all"}  # its tensors, and the order that each acts on

    def __init__(self, linear: Any, *, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if reason := reason_not_adaptable(linear):
            raise ValueError(f"this layer cannot have a bottleneck: {reason}")
        width = linear.irreps_out.dim
        bound = width**-0.5
        down = torch.rand(rank, width, generator=generator, dtype=torch.float64) * (2 * bound) - bound
        self.down = nn.Parameter(down.to(linear.weight))
        self.up = nn.Parameter(torch.zeros(width, rank).to(linear.weight))
        self.active = True  # read by whoever applies it

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Change the layer's output.

        Args:
            x: input of the linear layer; not looked at.
            y: output of the linear layer, (..., irreps_out.dim).
        """
        return y + F.linear(F.silu(F.linear(y, self.down)), self.up)
