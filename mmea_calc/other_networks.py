"""What is known of networks that are not MACE: NequIP's dense layers, and what no adapter can sit on.

Networks made of e3nn's own layers need nothing from here. The classes of other packages are told by name, so that none
of them is ever imported: where a package is not imported, nothing can be of its classes.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._e3nn import FullyConnectedNet, o3
from .layer_shape import is_cue_linear


def dense_weights(name: str, module: Any) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Matrices of NequIP's MLPs of scalars, which take the place of `e3nn.nn.FullyConnectedNet` there.

    Args:
        name: path of `module` in its network.
        module: any module.

    Yields:
        Path of the owner, the owner, the attribute that is the matrix, the matrix: (n_in, n_out).
    """
    if _is_instance(module, "nequip.nn.mlp", "ScalarLinearLayer"):
        yield name, module, "weight", module.weight
    elif _is_instance(module, "nequip.nn.mlp", "DeepLinearMLP"):  # several such layers without nonlinearity
        for key, weight in module.weights.named_parameters():
            yield f"{name}.weights", module.weights, key, weight


def compiled_modules(network: nn.Module) -> dict[str, str]:
    """Modules whose forward pass is fixed already, so that a hook or a changed weight might go unseen.

    Returns:
        Name of the module (empty for the network itself) -> why it cannot be adapted and what to do.
    """
    found: dict[str, str] = {}
    for name, module in network.named_modules():
        # e3nn compiles parts of its eager layers; those hold no weights.
        if isinstance(module, torch.jit.ScriptModule):
            if any(True for _ in module.parameters()):
                found[name] = "it is scripted (TorchScript): load the eager network instead"
        elif hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            found[name] = "it went through torch.compile: attach to the eager network"
        elif _is_instance(module, "nequip.nn.compile", "CompileGraphModel"):
            found[name] = "NequIP compiles it: build the model with compile_mode: eager"
    return found


def foreign_layers(network: nn.Module, *, updated: Collection[str]) -> dict[str, str]:
    """Layers that do what e3nn's do and are not of the classes of the e3nn that is installed.

    cuEquivariance's are among them where their weights would be updated; gates sit on its linear layers.

    Args:
        network: the network.
        updated: kinds of tensors that are updated (`methods.Kind`).

    Returns:
        Name of the module (empty for the network itself) -> what it is and what to do.
    """
    found = {}
    for name, module in network.named_modules():
        reason = _reason_foreign(module)
        touched = "linear" in updated if is_cue_linear(module) else bool(updated)
        if reason is not None and (touched or not _is_of_cue(module)):
            found[name] = reason
    return found


def listed(reasons: Mapping[str, str]) -> str:
    """The modules and their reasons, after what came before; not all of very many."""
    shown = [f"; {name or 'the network itself'}: {reason}" for name, reason in list(reasons.items())[:5]]
    return "".join(shown) + (f"; ... ({len(reasons)} in all)" if len(reasons) > len(shown) else "")


def _reason_foreign(module: Any) -> str | None:
    kind = type(module)
    if isinstance(module, o3.Linear | o3.TensorProduct | FullyConnectedNet):
        return None
    weight = getattr(module, "weight", None)
    has_weight = isinstance(weight, Tensor) and weight.numel() > 0
    has_irreps = hasattr(module, "irreps_out") and (hasattr(module, "irreps_in") or hasattr(module, "irreps_in1"))
    if kind.__name__ != "FullyConnectedNet" and not (has_weight and has_irreps):
        return None
    if _is_of_cue(module):
        if is_cue_linear(module):
            return "a linear layer of cuEquivariance, whose weights this method would change: choose gates or mmea"
        return "a layer of cuEquivariance with weights: choose method gates, or convert the network to e3nn's layers"
    return (
        f"a layer of class {kind.__module__}.{kind.__qualname__}, which is none of the installed e3nn's: load the "
        "network in an environment whose e3nn it was made with"
    )


def _is_of_cue(module: object) -> bool:
    return type(module).__module__.startswith("cuequivariance_torch")


def _is_instance(module: object, where: str, class_name: str) -> bool:
    known = getattr(sys.modules.get(where), class_name, None)
    return known is not None and isinstance(module, known)
