"""Linear layers piece by piece, in compiled networks: features stay apart where layers would join and split them.

e3nn keeps the features of an atom side by side, x = (x_1, x_2, ...), one piece for each irrep, and every layer takes
its pieces as slices of x. The gradient of a slice is as wide as x and zero for the most part; a compiled network adds
up one for every piece of every layer. `Stage.split` takes x apart once, for all who ask: the gradient is the pieces'
gradients side by side. And what `Stage.join` has put together is not taken apart again.

Within an irrep e3nn has the 2l+1 components of a channel side by side. In pieces it is the channels: that is how matrix
products take and leave them, and what a processor multiplies many of at once.

So a linear layer (e3nn's, within `arranged`) is one matrix product for each irrep: inputs of the same irrep that lie
side by side are one input with all of their channels,

    y_w = c sum_u W_uw x_u,   x (n_atoms, 2l+1, channels), y (n_atoms, 2l+1, outgoing channels).

Elsewhere the stock layer is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .._e3nn import o3
from ..layer_shape import blocks
from ..mace_bridge import reshapes
from .arrangement import stage


def use_pieces(network: nn.Module) -> None:
    """Let every layer of `network` that can use the forms of this module. Parameters stay."""
    for module in network.modules():
        if "forward" not in module.__dict__ and isinstance(module, o3.Linear) and (outputs := _outputs(module)):
            module.__dict__["forward"] = LinearByPiece(module, outputs)
    for module in reshapes(network):
        module.__dict__["forward"] = ReshapeByPiece(module)


def remove_pieces(network: nn.Module) -> None:
    """Back to e3nn's and mace's own."""
    for module in network.modules():
        if isinstance(module.__dict__.get("forward"), LinearByPiece | ReshapeByPiece):
            del module.__dict__["forward"]


@dataclass(frozen=True)
class _Output:
    """One irrep of a layer's output.

    Attributes:
        piece: of the input that it is made from.
        dim: 2 l + 1.
        weights: where they are.
        shape: channels, outgoing channels.
        factor: c.
    """

    piece: int
    dim: int
    weights: slice
    shape: tuple[int, int]
    factor: float


def _outputs(linear: Any) -> list[_Output] | None:
    """What a layer computes, output by output; None if it is not of the form above."""
    if not linear.internal_weights or linear.weight.dim() != 1 or linear.bias.numel():
        return None
    irreps_in, irreps_out = linear.irreps_in, linear.irreps_out
    if any(mul == 0 for mul, _ in (*irreps_in, *irreps_out)):
        return None
    piece_of = _piece_of(irreps_in)
    ends = list(accumulate(prod(path.path_shape) for path in linear.instructions))
    found = []
    for i_out, (mul, ir) in enumerate(irreps_out):
        mine = [i for i, path in enumerate(linear.instructions) if path.i_out == i_out]
        paths = [linear.instructions[i] for i in mine]
        if not mine or mine != list(range(mine[0], mine[-1] + 1)) or len({p.path_weight for p in paths}) > 1:
            return None
        pieces = {piece_of[p.i_in] for p in paths}
        piece = min(pieces)
        if len(pieces) > 1 or [p.i_in for p in paths] != [i for i, number in enumerate(piece_of) if number == piece]:
            return None
        channels = sum(p.path_shape[0] for p in paths)
        weights = slice(ends[mine[-1]] - channels * mul, ends[mine[-1]])
        found.append(_Output(piece, ir.dim, weights, (channels, mul), paths[0].path_weight))
    return found


def _piece_of(irreps: o3.Irreps) -> list[int]:
    """The piece (`blocks`) that each irrep belongs to."""
    numbers = [0]
    for (_, one), (_, other) in pairwise(irreps):
        numbers.append(numbers[-1] + (one != other))
    return numbers


class LinearByPiece:
    """The `forward` of one linear layer.

    Args:
        stock: the layer, whose weight is read at each call, so that updates and changes of it are seen.
        outputs: what it computes.
    """

    def __init__(self, stock: Any, outputs: list[_Output]) -> None:
        self.stock, self.outputs = stock, outputs
        self.blocks = blocks(stock.irreps_in)

    def __call__(self, x: Tensor, *others: Any, **options: Any) -> Tensor:
        """As `o3.Linear`: (n_atoms, irreps_in.dim) -> (n_atoms, irreps_out.dim)."""
        now = stage()
        if now is None or others or options or x.dim() != 2:
            return type(self.stock).forward(self.stock, x, *others, **options)
        pieces, own = now.split(x, self.blocks), self.stock.weight
        found = []
        for output in self.outputs:
            y = pieces[output.piece].flatten(0, 1) @ own[output.weights].view(output.shape) * output.factor
            found.append(y.unflatten(0, (-1, output.dim)))
        return now.join(found)


class ReshapeByPiece:
    """The `forward` of one of mace's reshapes: (n_atoms, irreps.dim) -> (n_atoms, channels, sum of 2l+1).

    Args:
        stock: its module.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.blocks = tuple((mul, ir.dim) for mul, ir in stock.irreps)

    def __call__(self, tensor: Tensor) -> Tensor:
        now = stage()
        if now is None:
            return type(self.stock).forward(self.stock, tensor)
        pieces = now.split(tensor, self.blocks)
        x = torch.cat([piece.transpose(1, 2) for piece in pieces], dim=-1)
        now.remember(x, pieces)
        return x


__all__ = ["LinearByPiece", "ReshapeByPiece", "remove_pieces", "use_pieces"]
