"""What networks of mace-torch 0.3 need before they are used here: tensors of another shape, marks, missing inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._e3nn import o3
from .errors import BackboneError
from .fast.arrangement import stage
from .fast.harmonics import by_products, can_be_written_out, written_out
from .mace_bridge import is_contraction, is_untrained, mace_modules


def mark_untrained(network: nn.Module) -> None:
    """Make `is_untrained` true again of what mace flagged: unpickling and moving to a GPU forget it."""
    from mace.modules.symmetric_contraction import EmptyParam

    for part in filter(is_contraction, network.modules()):
        for name, flag in part.named_buffers(recurse=False):
            if name.endswith("_zeroed") and bool(flag):
                owner, key = (part, "weights_max") if "max" in name else (part.weights, name.split("_")[1])
                if not is_untrained(getattr(owner, key)):
                    setattr(owner, key, EmptyParam(getattr(owner, key).detach()))


def resize_contractions(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give symmetric contractions the coupling tensors' and weights' shapes that `tensors` has under their names.

    A network trained with the reduced coupling tensors of cuequivariance has fewer paths; where that package is
    absent, mace-torch builds the full ones. Its contraction works with either.
    """
    for prefix, part in network.named_modules():
        if not is_contraction(part):
            continue
        for owner, path in ((part, prefix), (part.weights, f"{prefix}.weights")):
            for store in (owner._buffers, owner._parameters):
                for key, value in store.items():
                    stored = tensors.get(f"{path}.{key}")
                    if value is not None and stored is not None and stored.dim() == value.dim():
                        fresh = value.detach().new_zeros(stored.shape)
                        store[key] = nn.Parameter(fresh) if isinstance(value, nn.Parameter) else fresh


def accept_neutral_graphs(network: nn.Module) -> None:
    """Let a network with embeddings of total charge and spin take graphs that do not name them: 0 and singlet."""
    specs = getattr(network, "embedding_specs", None) or {}
    defaults = {"total_charge": 0.0, "total_spin": 1.0}
    known = {name: defaults[name] for name in specs if name in defaults}
    if unknown := sorted(set(specs) - set(defaults)):
        raise BackboneError(f"the network embeds {', '.join(unknown)}; only total_charge and total_spin are supported")
    if not known:
        return

    network.register_forward_pre_hook(_Fill(known))


class _Fill:
    """Puts values that every graph has into the input of a network, where they are absent."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = values

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        data = dict(arguments[0])
        for name, value in self.values.items():
            if name not in data:
                data[name] = data["positions"].new_full((len(data["ptr"]) - 1,), value)
        return (data, *arguments[1:])


def repeat_to_the_bit(network: nn.Module) -> None:
    """Let a network's spherical harmonics give the same bits at every call.

    e3nn 0.4.4 has them as a TorchScript function, which is compiled anew after its first call in a process and then
    rounds differently: a resumed training would leave its track. Only modules of this network are touched.
    """
    for module in network.modules():
        if isinstance(module, o3.SphericalHarmonics):
            module.__dict__["forward"] = partial(_spherical_harmonics_forward, module)


def restore_plain(network: nn.Module) -> None:
    """Undo `accept_neutral_graphs` and `repeat_to_the_bit`, so that the network can go where this package is not."""
    for key, hook in list(network._forward_pre_hooks.items()):
        if isinstance(hook, _Fill):
            del network._forward_pre_hooks[key]
    for module in network.modules():
        if isinstance(module, o3.SphericalHarmonics):
            module.__dict__.pop("forward", None)


def reason_no_domains(network: nn.Module) -> str | None:
    """Why the atoms of this network cannot be spread over domains; None if they can."""
    if not isinstance(network, mace_modules().MACE):
        return f"a network of class {type(network).__name__} is not mace's"
    if hasattr(network, "joint_embedding"):
        return "it embeds total charge or spin, and mace-torch 0.3 does not do that for the atoms of other domains"
    return None


def domain_energies(
    network: nn.Module,
    vectors: Tensor,
    node_attrs: Tensor,
    edge_index: Tensor,
    *,
    n_local: int,
    head_index: int,
    exchange: Any,
) -> Tensor:
    """Energies of the atoms that one domain owns, with the features of other domains' atoms fetched between layers.

    Args:
        network: a MACE network (see `reason_no_domains`).
        vectors: from sender to receiver, (n_edges, 3), A; gradients are switched on for it.
        node_attrs: one-hot elements of the domain's own atoms, then of the ghosts, (n_atoms, n_elements).
        edge_index: senders and receivers, (2, n_edges); receivers are own atoms.
        n_local: number of own atoms.
        head_index: head of the network.
        exchange: `forward_exchange(source, target, width)` and `reverse_exchange(...)`, called once per layer but the
            first: see `mmea_calc.lammps.mliap`.

    Returns:
        what the network adds to its E0 buffer, (n_local,), eV.
    """
    batch = torch.zeros(n_local, dtype=torch.int64, device=vectors.device)
    data = {
        "vectors": vectors,
        "node_attrs": node_attrs,
        "edge_index": edge_index,
        "batch": batch,
        "head": batch.new_full((1,), head_index),
        "natoms": (n_local, len(node_attrs) - n_local),
        "lammps_class": exchange,
    }
    return network(data, compute_force=False, lammps_mliap=True)["node_energy"]


def _spherical_harmonics_forward(self: Any, x: Tensor) -> Tensor:
    if (now := stage()) and can_be_written_out(self):
        return (written_out if now.compiled else by_products)(x, int(self._lmax))
    with torch.jit.optimized_execution(False):
        return type(self).forward(self, x)
