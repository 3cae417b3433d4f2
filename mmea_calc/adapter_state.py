"""The values of an adapter, by name, and what must hold of them before they are taken."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import AdapterError

SHORTEST = "ranges.radial_embedding.shortest"  # the distances of `short_range`


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise an AdapterError unless `state` has the names and shapes of `expected` and values that make sense."""
    if missing := sorted(set(expected) - set(state)):
        raise AdapterError(f"these tensors of the adapter are missing: {_some(missing)}")
    if unexpected := sorted(set(state) - set(expected)):
        raise AdapterError(f"these tensors do not belong to this adapter: {_some(unexpected)}")
    for name, tensor in expected.items():
        if tuple(state[name].shape) != tuple(tensor.shape):
            raise AdapterError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(state[name].shape)}")
    if bad := sorted(n for n in expected if not torch.isfinite(state[n]).all()):
        raise AdapterError(f"these tensors hold values that are not finite: {_some(bad)}")
    if SHORTEST in expected and not (state[SHORTEST] > 0).all():
        raise AdapterError(f"{SHORTEST} must hold positive distances")
    lows = [n for n in expected if n.startswith("ranges.") and n.endswith(".low")]
    if bad := sorted(n for n in lows if (state[n] > state[n.removesuffix("low") + "high"]).any()):
        raise AdapterError(f"these lower ends of a gate's range lie above the upper ones: {_some(bad)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
