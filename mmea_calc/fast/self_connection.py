"""mace's self-connections by element: one weight matrix for the atoms of each element present.

Stock, for an atom with the one-hot encoding y of its element, every order l and outgoing channel w (MACE, arXiv
2206.07697, eqs. 11 and 12):

    out_w = c_l sum_uv W_uvw x_u y_v,

a product with all elements that the network knows, of which y keeps one. In tables (`arrangement`) the atoms of an
element stand in a row, and the same is one matrix product for each element present and order,

    out_w = c_l sum_u W_uew x_u.

This form is for compiled and recorded networks; elsewhere the stock one is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._e3nn import o3
from ..mace_bridge import interaction_blocks
from .arrangement import stage


def use_self_connections(network: nn.Module) -> None:
    """Let every self-connection of `network` that can use the form of this module. Parameters stay."""
    for _, block in interaction_blocks(network):
        product = getattr(block, "skip_tp", None)
        if _covered(product) and not isinstance(product.__dict__.get("forward"), SelfConnection):
            product.__dict__["forward"] = SelfConnection(product)


def remove_self_connections(network: nn.Module) -> None:
    """Back to mace's own."""
    for _, block in interaction_blocks(network):
        product = getattr(block, "skip_tp", None)
        if product is not None and isinstance(product.__dict__.get("forward"), SelfConnection):
            del product.__dict__["forward"]


def _covered(product: Any) -> bool:
    if not isinstance(product, o3.FullyConnectedTensorProduct):
        return False
    scalars = len(product.irreps_in2) == 1 and product.irreps_in2[0].ir == o3.Irrep("0e")
    incoming = [i.i_in1 for i in product.instructions]
    outgoing = [i.i_out for i in product.instructions]
    once = len(set(incoming)) == len(incoming) and len(set(outgoing)) == len(outgoing) == len(product.irreps_out)
    return scalars and once and all(i.connection_mode == "uvw" and i.has_weight for i in product.instructions)


@dataclass(frozen=True)
class _Order:
    """One order of the product."""

    incoming: int  # among the irreps of the features
    dim: int  # 2 l + 1
    weights: slice
    shape: tuple[int, int, int]  # channels, elements, outgoing channels
    factor: float
    place: int  # among those of the output


class SelfConnection:
    """The `forward` of one self-connection.

    Args:
        stock: its tensor product, whose weight is read at each call, so that updates and changes of it are seen.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.blocks = tuple((mul, ir.dim) for mul, ir in stock.irreps_in1)
        self.orders: list[_Order] = []
        start = 0
        for ins in stock.instructions:
            size = ins.path_shape[0] * ins.path_shape[1] * ins.path_shape[2]
            ir = stock.irreps_in1[ins.i_in1].ir
            coupling = float(o3.wigner_3j(ir.l, 0, ir.l, dtype=torch.float64)[0, 0, 0])
            self.orders.append(
                _Order(
                    incoming=ins.i_in1,
                    dim=ir.dim,
                    weights=slice(start, start + size),
                    shape=tuple(ins.path_shape),
                    factor=ins.path_weight * coupling,
                    place=ins.i_out,
                )
            )
            start += size

    def __call__(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """As `o3.FullyConnectedTensorProduct`: (n_atoms, irreps_in1.dim), one-hot (n_atoms, n_elements)."""
        now = stage()
        if now is None or weight is not None:
            return type(self.stock).forward(self.stock, x, y, weight)
        at, present = now.arrangement.atoms, now.arrangement.present
        own, found = self.stock.weight, {}
        pieces = now.split(x, self.blocks)
        for order in self.orders:
            matrices = order.factor * own[order.weights].view(order.shape).transpose(0, 1).index_select(0, present)
            rows = at.gather(pieces[order.incoming]).flatten(1, 2)  # (elements, atoms of each * (2 l + 1), channels)
            found[order.place] = at.scatter(torch.bmm(rows, matrices).unflatten(1, (-1, order.dim)))
        return now.join([found[place] for place in sorted(found)])


__all__ = ["SelfConnection", "remove_self_connections", "use_self_connections"]
