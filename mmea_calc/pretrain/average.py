"""The mean of the weights of several stages of one network.

Weights from the two ends of a stage lie in one basin, and so does their mean; it keeps a part of what the stage lost
(Wortsman et al., arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..backbone import save_backbone
from ..backbone_file import read_safetensors
from ..errors import BackboneError

# Of a network: its stages share them.
_SHARED = ("hidden_irreps", "max_ell", "r_max", "atomic_numbers", "atomic_energies", "level_of_theory")


def average(stages: Sequence[Path], out: Path) -> str:
    """Write OUT.safetensors, the mean of these files' weights with the settings of the last one.

    Args:
        stages: .safetensors files of one network, at least two.
        out: file to write.

    Returns:
        its fingerprint.

    Raises:
        BackboneError: fewer files, one that cannot be read, or files of different networks. Nothing is written then.
    """
    if len(stages) < 2:
        raise BackboneError(f"a mean is of two backbones or more, got {len(stages)}")
    if out.absolute() in [stage.absolute() for stage in stages]:
        raise BackboneError(f"{out} is one of the stages: give another name to write to")
    read = [read_safetensors(stage) for stage in stages]
    config, tensors, _ = read[-1]
    for stage, (other, weights, _) in zip(stages, read, strict=True):
        same = {k: t.shape for k, t in weights.items()} == {k: t.shape for k, t in tensors.items()}
        if not same or any(other.get(key) != config.get(key) for key in _SHARED):
            raise BackboneError(f"{stage} and {stages[-1]} are not stages of one network")
    mean = {}
    for name, last in tensors.items():
        mean[name] = last
        if last.is_floating_point():
            mean[name] = torch.stack([weights[name] for _, weights, _ in read]).mean(0)
    return save_backbone(out, {**config, "mean_of": [stage.name for stage in stages]}, mean)


__all__ = ["average"]
