"""Radial functions once for a pair of atoms, not for the edges each way, in compiled networks.

The radial MLP of a convolution (MACE, arXiv 2206.07697, eq. 8) sees the distance of two atoms, and of their elements at
most what is the same for both: the edges j -> i and i -> j of a pair have the same weights. Its matrix products are the
largest of a call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..mace_bridge import radial_networks
from .arrangement import stage


def use_pair_radial(network: nn.Module) -> None:
    """Let every radial MLP of `network` use the form of this module where it can. Parameters stay."""
    for module, width in radial_networks(network):
        module.__dict__["forward"] = PairRadial(module, width)


def remove_pair_radial(network: nn.Module) -> None:
    """Back to mace's own."""
    for module, _ in radial_networks(network):
        if isinstance(module.__dict__.get("forward"), PairRadial):
            del module.__dict__["forward"]


class PairRadial:
    """The `forward` of one radial MLP.

    Args:
        stock: the MLP, whose layers are called as it calls them.
        width: of what is the same for both edges of a pair; elsewhere the stock MLP is called.
    """

    def __init__(self, stock: Any, width: int) -> None:
        self.stock, self.width = stock, width

    def __call__(self, x: Tensor) -> Tensor:
        """As mace's: radial features of the edges (n_edges, width) -> weights of paths (n_edges, paths * channels)."""
        now = stage()
        if now is None or not now.compiled or x.shape[1] != self.width:
            return type(self.stock).forward(self.stock, x)
        of_pairs = now.arrangement.first_edges().gather(x).squeeze(0)
        weights = type(self.stock).forward(self.stock, of_pairs)
        return now.arrangement.pairs.gather(weights).squeeze(0)


__all__ = ["PairRadial", "remove_pair_radial", "use_pair_radial"]
