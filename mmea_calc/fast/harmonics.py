"""Spherical harmonics with all sums written out, for a compiled network; or as few operations, for a recorded one.

e3nn 0.4.4 has them as a TorchScript function, which cannot be followed by symbols. Here each order follows from the one
before and the first,

    Y_(l+1),k = f_l sum_ab C^(l,1,l+1)_abk Y_l,a Y_1,b,

which is true of all of them up to the factor f_l; it, and Y_1, are read off e3nn's own values.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._e3nn import o3
from .arrangement import total


def can_be_written_out(module: Any) -> bool:
    """Whether `written_out` stands for this `o3.SphericalHarmonics`."""
    orders = list(module._ls_list)
    return orders == list(range(len(orders))) and module.normalize and module.normalization == "component"


def written_out(vectors: Tensor, l_max: int) -> Tensor:
    """Harmonics of orders 0 to `l_max` of the directions of vectors (n, 3), by component: (n, (l_max + 1)^2)."""
    x = F.normalize(vectors, dim=-1).unbind(-1)
    ones = torch.ones_like(x[0])
    orders: list[list[Tensor]] = [[ones]]
    for terms in _terms(l_max):
        before, one = orders[-1], orders[1] if len(orders) > 1 else list(x)
        orders.append([total(c * before[a] * one[b] for a, b, c in of_k) for of_k in terms])
    return torch.stack([y for order in orders for y in order], dim=-1)


def by_products(vectors: Tensor, l_max: int) -> Tensor:
    """The same as one matrix product for each order, for what is recorded as it is: few operations."""
    first = F.normalize(vectors, dim=-1)
    orders = [torch.ones_like(first[:, :1])]
    for coupling in _couplings(l_max, vectors.dtype, vectors.device):
        orders.append((orders[-1].unsqueeze(2) * first.unsqueeze(1)).flatten(1) @ coupling)
        first = orders[1]
    return torch.cat(orders, dim=-1)


@cache
def _couplings(l_max: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`_terms` as matrices, (a b, k) for each order from 1."""
    found = []
    for order, terms in enumerate(_terms(l_max), start=1):
        coupling = torch.zeros(2 * order - 1, 3, 2 * order + 1, dtype=torch.float64)
        for k, of_k in enumerate(terms):
            for a, b, c in of_k:
                coupling[a, b, k] = c
        with torch.inference_mode(False):  # what is made within it could not enter a later gradient
            found.append(coupling.flatten(0, 1).to(device=device, dtype=dtype, copy=True))
    return found


@cache
def _terms(l_max: int) -> list[list[list[tuple[int, int, float]]]]:
    """For each order from 1, for each component k: (a, b, factor) of the products of the order before and the first.

    Those of order 1 are of Y_0 = 1 and the direction itself.
    """
    direction = F.normalize(torch.tensor([[0.3, -0.5, 0.8]], dtype=torch.float64), dim=-1)

    def values(order: int, x: Tensor) -> Tensor:
        return o3.spherical_harmonics(order, x, normalize=True, normalization="component")

    found = []
    for order in range(1, l_max + 1):
        if order == 1:
            coupling = values(1, torch.eye(3, dtype=torch.float64))[None]  # (1, b, k)
        else:
            coupling = o3.wigner_3j(order - 1, 1, order, dtype=torch.float64)
            made = torch.einsum("abk,a,b->k", coupling, values(order - 1, direction)[0], values(1, direction)[0])
            exact = values(order, direction)[0]
            coupling = coupling * (exact @ made) / (made @ made)
        of_order: list[list[tuple[int, int, float]]] = [[] for _ in range(2 * order + 1)]
        for a, b, k in (coupling.abs() > 1e-12).nonzero().tolist():
            of_order[k].append((a, b, float(coupling[a, b, k])))
        found.append(of_order)
    return found
