"""Small networks of every shape that mace-torch's published backbones have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn

from conftest import random_network
from mmea_calc.adapted import attached
from mmea_calc.fast.switch import remove_fast_path

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "agnostic": {},
    "density": dict(
        interaction_cls_first="RealAgnosticDensityInteractionBlock",
        interaction_cls="RealAgnosticDensityResidualInteractionBlock",
    ),
    "agnesi": dict(distance_transform="Agnesi"),
    "zbl": dict(pair_repulsion=True, distance_transform="Agnesi"),
    "heads": dict(
        heads=["low", "high"],
        atomic_energies=[[0.0, 0.0, 0.0], [0.1, 0.2, 0.3]],
        atomic_inter_scale=[1.1, 0.9],
        atomic_inter_shift=[0.1, -0.1],
    ),
    "correlation-1": dict(correlation=1),
    "correlation-2": dict(correlation=2),
    "correlation-3-then-2": dict(correlation=[3, 2]),
    "L=0": dict(hidden_irreps="4x0e"),
    "L=2": dict(hidden_irreps="3x0e + 3x1o + 3x2e"),
    "agnostic-product": dict(use_agnostic_product=True),
    "one-interaction": dict(num_interactions=1),
    "last-readout-only": dict(use_last_readout_only=True),
    "nonlinear": dict(
        interaction_cls_first="RealAgnosticResidualNonLinearInteractionBlock",
        interaction_cls="RealAgnosticResidualNonLinearInteractionBlock",
    ),
}


@cache
def _built(name: str) -> nn.Module:
    return random_network(**ARCHITECTURES[name])


@contextmanager
def borrowed(name: str) -> Iterator[nn.Module]:
    """The network of this shape, in float64; what the test does to it is undone.

    It is built once, which takes most of a second. A copy would not do: e3nn compiles what is copied, and compiled code
    does not repeat itself to the bit.
    """
    network = _built(name)
    assert attached(network) is None
    state = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        yield network
    finally:
        if adapter := attached(network):
            adapter.detach()
        remove_fast_path(network)
        network.double().load_state_dict(state)
