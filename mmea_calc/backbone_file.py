"""Backbones as files: the safe `.safetensors` format, mace-torch's pickled `.model`, and the fingerprint of both.

NAME.safetensors holds tensors under mace-torch's names; the header's metadata (or NAME.json beside it) holds the
config that `mace_bridge.build_network` reads. Every parameter is stored; of the constants (coupling tensors, radial
functions, ...) only those that a rebuilt network does not have to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import BackboneError
from .files import replacing
from .mace_bridge import build_network, config_of, mace_modules, quiet
from .mace_networks import resize_contractions

FORMAT = "mmea-backbone"
FORMAT_VERSION = 1
# config values that change what the network computes and are no parameters; part of the fingerprint, in this order
_IDENTITY = (
    "atomic_numbers",
    "atomic_energies",
    "atomic_inter_scale",
    "atomic_inter_shift",
    "avg_num_neighbors",
    "r_max",
)
# More of them, part of it where they are not these, which is what fingerprints without them stood for. Pair repulsion
# is not among them: mmea-organic-s4, which has it, got its fingerprint before.
_USUAL: Mapping[str, Any] = {
    "num_polynomial_cutoff": 5,
    "gate": "silu",
    "radial_type": "bessel",
    "distance_transform": "None",
    "apply_cutoff": True,
}


def fingerprint(config: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of a backbone, the same for a `.model` and the `.safetensors` converted from it.

    Over every parameter by mace-torch's name, in the order of the names: name, shape, type and bytes as stored,
    before any cast; then over E0, scale, shift, elements, neighbour number and cutoff as float64, and over what is
    unusual in the radial functions and the activation.
    """
    digest = hashlib.sha256()

    def add(name: str, value: np.ndarray) -> None:
        digest.update(f"{name} {value.dtype.name} {list(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes())

    for name in sorted(parameters):
        add(name, parameters[name].detach().cpu().numpy())
    for key in _IDENTITY:
        if config.get(key) is not None:
            add(f"config.{key}", np.asarray(config[key], dtype=np.float64))
    for key, usual in _USUAL.items():
        if (value := config.get(key, usual)) not in (usual, None):
            digest.update(f"config.{key} {value}\n".encode())
    return digest.hexdigest()


def identifying(config: Mapping[str, Any], network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `tensors` that a fingerprint covers: all parameters, and frequencies of radial functions that are
    buffers in the network and were trained in spite of that.
    """
    found = {name: tensors[name] for name, _ in network.named_parameters()}
    for name, value in tensors.items():
        if name.endswith("bessel_fn.bessel_weights") and name not in found:
            as_built = math.pi / float(config["r_max"]) * torch.arange(1, value.numel() + 1, dtype=torch.float64)
            if not torch.allclose(value.detach().cpu().double(), as_built, rtol=1e-5):  # as far as precisions differ
                found[name] = value
    return found


# --- reading --------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """What a `.safetensors` file holds; `fingerprint` is the one recorded in its header, where there is one."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    fingerprint: str | None


def read_safetensors(path: Path) -> Stored:
    """Config and tensors of a backbone file, nothing executed.

    Raises:
        BackboneError: not a whole safetensors file, no config, or a newer format.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise BackboneError(f"{path} is not a whole safetensors file ({problem}); fetch or convert it again") from None
    text, beside = metadata.get("config"), path.with_suffix(".json")
    if metadata.get("format") == FORMAT and int(metadata.get("format_version", 1)) > FORMAT_VERSION:
        raise BackboneError(
            f"{path} has format version {metadata['format_version']}, this program reads up to {FORMAT_VERSION}; "
            "upgrade mmea"
        )
    if text is None and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    if text is None:
        raise BackboneError(
            f"{path} has no network config: neither in its header nor in {beside.name} beside it; is it a backbone?"
        )
    try:
        config = json.loads(text)
    except json.JSONDecodeError as problem:
        raise BackboneError(f"the network config of {path} is not JSON ({problem})") from None
    if not isinstance(config, dict):
        raise BackboneError(f"the network config of {path} is a {type(config).__name__}; expected names and values")
    return Stored(config, tensors, metadata.get("fingerprint"))


def restore(config: dict[str, Any], tensors: Mapping[str, Tensor], source: object) -> nn.Module:
    """The network of a config with these tensors, in float64 on the CPU.

    Raises:
        BackboneError: a parameter is missing, a tensor is unexpected or has the wrong shape.
    """
    network = build_network(config)
    resize_contractions(network, tensors)
    state = network.state_dict()
    missing = sorted({name for name, _ in network.named_parameters()} - set(tensors))
    unexpected = sorted(set(tensors) - set(state))
    if missing or unexpected:
        raise BackboneError(
            f"{source} does not fit its config: "
            + "; ".join(f"{len(k)} {w} ({', '.join(k[:3])}{', ...' if len(k) > 3 else ''})"
                        for k, w in ((missing, "tensors missing"), (unexpected, "unexpected tensors")) if k)
        )  # fmt: skip
    for name, value in tensors.items():
        if value.shape != state[name].shape:
            raise BackboneError(
                f"{source}: {name} has shape {tuple(value.shape)}; its config asks for {tuple(state[name].shape)}"
            )
        state[name].copy_(value)
    return network


def read_model(path: Path) -> nn.Module:
    """mace-torch's pickled network. This executes what the file says: only for files that the user trusts.

    Raises:
        BackboneError: not a whole torch file, or not a pickled network.
    """
    from .adapter_file import is_adapter

    mace_modules()
    if is_adapter(path):
        raise BackboneError(f"{path} is an adapter, not a backbone: give it as the adapter, or name its backbone")
    damaged = f"{path} is not a whole torch file: damaged, or cut short; fetch it again"
    if not zipfile.is_zipfile(path):
        raise BackboneError(damaged)
    try:
        with quiet():
            network = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as problem:  # unpickling raises whatever the classes named in the file raise
        if "PytorchStreamReader" in str(problem):  # e3nn's code lies in archives of its own within the archive
            raise BackboneError(damaged) from problem
        raise BackboneError(f"{path} cannot be unpickled ({type(problem).__name__}: {problem})") from problem
    if isinstance(network, torch.jit.ScriptModule):
        raise BackboneError(f"{path} is a TorchScript export; give the .model file that it was made from")
    if not isinstance(network, nn.Module):
        raise BackboneError(f"{path} holds a {type(network).__name__}; expected a network as mace-torch writes it")
    return network


def rebuilt(pickled: nn.Module, config: dict[str, Any], state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The network of `config` with these tensors, if it computes what the unpickled one does.

    Raises:
        BackboneError: it does not. (The unpickled network is in float64 afterwards; the tensors are as they were.)
    """
    network = restore(config, state, path)
    graph = _test_graph(config)
    try:
        outputs = [module(dict(graph), compute_force=True) for module in (network, pickled.double())]
    except (AttributeError, KeyError, RuntimeError, TypeError) as problem:
        raise BackboneError(f"{path}: the network cannot be checked against one rebuilt from its settings") from problem
    for key in ("energy", "forces"):
        one, other = outputs[0][key].detach(), outputs[1][key].detach()
        if not torch.allclose(one, other, rtol=0, atol=1e-9 * max(1.0, float(other.abs().max()))):
            raise BackboneError(f"{path}: the network rebuilt from its settings gives other {key}")
    return network


def _test_graph(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Six atoms within the cutoff, each bound to all others, as the network takes them; float64."""
    generator = torch.Generator().manual_seed(0)
    n_atoms, n_elements = 6, len(config["atomic_numbers"])
    pairs = (~torch.eye(n_atoms, dtype=torch.bool)).nonzero().T.contiguous()
    corners = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]], dtype=torch.float64)
    noise = torch.rand(n_atoms, 3, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(pairs.shape[1], 3, dtype=torch.float64)
    return {
        "positions": (corners + 0.3 * noise) * (0.4 * float(config["r_max"])),
        "node_attrs": torch.eye(n_elements, dtype=torch.float64)[torch.arange(n_atoms) % n_elements],
        "edge_index": pairs,
        "shifts": zeros,
        "unit_shifts": zeros,
        "cell": torch.zeros(3, 3, dtype=torch.float64),
        "batch": torch.zeros(n_atoms, dtype=torch.long),
        "ptr": torch.tensor([0, n_atoms]),
        "head": torch.zeros(1, dtype=torch.long),
        "total_charge": torch.zeros(1, dtype=torch.float64),
        "total_spin": torch.ones(1, dtype=torch.float64),
    }


def minimal_config(network: Any, path: Path) -> dict[str, Any]:
    """What must be known of a network that is used as unpickled."""
    try:
        config: dict[str, Any] = {
            "model": type(network).__name__,
            "r_max": float(network.r_max),
            "atomic_numbers": network.atomic_numbers.tolist(),
            "atomic_energies": network.atomic_energies_fn.atomic_energies.double().tolist(),
            "heads": list(getattr(network, "heads", None) or ["Default"]),
        }
    except (AttributeError, TypeError, ValueError) as problem:
        raise BackboneError(f"{path} is no network that mace-torch 0.3 could run ({problem})") from problem
    return config


# --- writing --------------------------------------------------------------------------------------------------------


def stored_tensors(config: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file needs of a state dict: all parameters, and the constants that `build_network` does not reproduce."""
    built = build_network(config)
    parameters, constants = {name for name, _ in built.named_parameters()}, dict(built.named_buffers())
    # these are read from the config, where they are in float64
    constants = {k: v for k, v in constants.items() if not k.startswith(("atomic_energies_fn.", "scale_shift."))}
    kept = {name: state[name] for name in parameters if name in state}
    for name, value in constants.items():
        if name in state and not torch.equal(value, state[name].cpu().to(value.dtype)):
            kept[name] = state[name]
    return {name: value.detach().cpu().contiguous().clone() for name, value in kept.items()}


def write_safetensors(path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write a backbone beside its place, read it back, compare, and only then put it there.

    Args:
        config: for `build_network`; further plain values (level_of_theory, notes, training) are kept.
        tensors: as from `stored_tensors`.

    Returns:
        the fingerprint.

    Raises:
        BackboneError: the tensors do not fit the config, or the file cannot be written.
    """
    network = restore(config, tensors, "the new backbone")
    identity = fingerprint(config, identifying(config, network, tensors))
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fingerprint": identity,
        "config": json.dumps(config, sort_keys=True, allow_nan=False),
    }
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(save(dict(tensors), metadata=metadata))  # save_file makes it private to the owner
            again = read_safetensors(temporary)
            if fingerprint(again.config, identifying(again.config, network, again.tensors)) != identity:
                raise BackboneError(f"{path} did not read back as it was written; nothing was put there")
    except (OSError, SafetensorError) as problem:
        raise BackboneError(f"cannot write {path} ({problem})") from problem
    return identity


def config_of_model(network: nn.Module) -> dict[str, Any]:
    """`mace_bridge.config_of`, kept JSON-able by a round trip. Raises BackboneError."""
    config = config_of(network)
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as problem:
        raise BackboneError(f"the network's settings cannot be written down ({problem})") from problem
