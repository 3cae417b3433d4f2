"""The same function in a network of more channels, to be trained further (Chen et al., Net2Net, arXiv 1511.05641).

Channels that are added read all others with random weights and are read by none of the old ones and by no readout:
their weights there are zero, and have gradients. So the wider network starts at the energies of the narrow one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import load_backbone, save_backbone
from ..backbone_file import stored_tensors
from ..errors import BackboneError
from ..mace_bridge import build_network, convolution_paths


def widen(backbone: str | Path, channels: int, out: Path, *, seed: int = 0) -> str:
    """Write OUT.safetensors, in float64, a network of more channels with the energies and forces of a given one.

    Args:
        backbone: name or path of a network of one head, with as many channels for every order.
        channels: of every order in the wider network, more than there are.
        out: file to write.
        seed: of the random weights that the added channels start with.

    Returns:
        its fingerprint.

    Raises:
        BackboneError: the backbone cannot be loaded, has several heads, other numbers of channels for some order, as
            many channels as are asked for already, or weights of another kind than the embedded backbones. Nothing is
            written then.
    """
    start = load_backbone(backbone, dtype="float64", fast=False)
    hidden = start.config["hidden_irreps"]
    terms = [term.strip().split("x") for term in hidden.split("+")]  # "64x0e + 64x1o"
    before = int(terms[0][0])
    if any(int(multiplicity) != before for multiplicity, _ in terms):
        raise BackboneError(f"{backbone} cannot be widened: as many channels are wanted for every order, not {hidden}")
    if channels <= before:
        raise BackboneError(f"{backbone} has {before} channels; ask for more than that, not for {channels}")
    config: dict[str, Any] = start.config | {"hidden_irreps": " + ".join(f"{channels}x{ir}" for _, ir in terms)}
    for made_by in ("training", "mean_of", "notes"):
        config.pop(made_by, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = build_network(config)
    narrow, fresh = start.network, wide.state_dict()
    trained = stored_tensors(start.config, narrow.state_dict())
    tensors = {name: _widened(narrow, wide, name, old, fresh[name]) for name, old in trained.items()}
    config["start"] = {"name": start.name, "fingerprint": start.fingerprint}
    return save_backbone(out, config, tensors)


def _widened(narrow: nn.Module, wide: nn.Module, name: str, old: Tensor, fresh: Tensor) -> Tensor:
    """The old weights in their places among fresh random ones, and zeros where old channels read new ones."""
    if old.shape == fresh.shape:
        return old
    owner, _, kind = name.rpartition(".")
    one, other = narrow.get_submodule(owner), wide.get_submodule(owner)
    if kind == "weight" and hasattr(one, "instructions"):  # e3nn keeps one matrix per path, in a row
        return _of_paths(one, other, old, fresh)
    if runs := convolution_paths(narrow).get(name):  # one column per path and channel
        paths = len(runs)
        old, fresh = (t.reshape(len(t), paths, -1) for t in (old, fresh))
        return torch.cat([old, fresh[..., old.shape[-1] :]], -1).flatten(1)
    if old.dim() == 3:  # of a contraction: element, path, channel
        return torch.cat([old, fresh[..., old.shape[-1] :]], -1)
    raise BackboneError(f"{name} cannot be widened: {tuple(old.shape)} weights are of no kind that is known here")


def _of_paths(one: Any, other: Any, old: Tensor, fresh: Tensor) -> Tensor:
    """Matrices times a factor that depends on how many channels are read: the old ones make up for its change."""
    pieces, at_old, at_fresh = [], 0, 0
    for path, wider in zip(one.instructions, other.instructions, strict=True):
        rows, columns = path.path_shape[0], path.path_shape[-1]
        n_old, n_fresh = math.prod(path.path_shape), math.prod(wider.path_shape)
        piece = fresh[at_fresh : at_fresh + n_fresh].reshape(wider.path_shape).clone()
        piece[..., :columns] = 0
        piece[:rows, ..., :columns] = old[at_old : at_old + n_old].reshape(path.path_shape)
        piece[:rows, ..., :columns] *= path.path_weight / wider.path_weight
        pieces.append(piece.flatten())
        at_old, at_fresh = at_old + n_old, at_fresh + n_fresh
    return torch.cat(pieces)


__all__ = ["widen"]
