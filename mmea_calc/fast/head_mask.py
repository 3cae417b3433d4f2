"""mace's readouts of networks with several heads, in recorded and compiled networks.

Stock, for the hidden channels x of an atom, which lie head by head, and its head h,

    x <- x where they are of h, 0 elsewhere,

by a mask into which ones are written at places that the heads tell (`mask_head`). The ones come from the host, which a
CUDA graph cannot hold. Here the mask is a comparison of each channel's head with h: the same numbers, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..mace_bridge import headed_readouts
from .arrangement import stage


def use_head_masks(network: nn.Module) -> None:
    """Let every readout of `network` that tells heads apart use the form of this module. Parameters stay."""
    for readout in headed_readouts(network):
        readout.__dict__["forward"] = HeadedReadout(readout)


def remove_head_masks(network: nn.Module) -> None:
    """Back to mace's own."""
    for readout in headed_readouts(network):
        if isinstance(readout.__dict__.get("forward"), HeadedReadout):
            del readout.__dict__["forward"]


class HeadedReadout:
    """The `forward` of one readout.

    Args:
        stock: the readout, whose layers are called as it calls them.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, x: Tensor, heads: Tensor | None = None) -> Tensor:
        """As mace's: features (n_atoms, irreps_in.dim) and heads (n_atoms,) -> (n_atoms, n_heads)."""
        stock = self.stock
        if stage() is None or heads is None:
            return type(stock).forward(stock, x, heads)
        x = stock.non_linearity(stock.linear_1(x))
        mask = _mask(x, heads, stock.num_heads)
        x = x * mask
        if hasattr(stock, "linear_mid"):
            x = stock.non_linearity(stock.linear_mid(x)) * mask
        return stock.linear_2(x)


def _mask(x: Tensor, heads: Tensor, n_heads: int) -> Tensor:
    """1 where a channel of x (n_atoms, n_heads * channels) is of the atom's head, else 0."""
    of_head = heads.unsqueeze(1) == torch.arange(n_heads, device=x.device)
    return of_head.to(x.dtype).unsqueeze(2).expand(-1, -1, x.shape[1] // n_heads).flatten(1)


__all__ = ["HeadedReadout", "remove_head_masks", "use_head_masks"]
