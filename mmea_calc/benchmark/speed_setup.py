"""What the benchmark of speed measures with: settings, backbones, adapters and structures of both sides."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.build import bulk
from ase.io import read

from ..adapted import attach
from ..adapter_file import AdapterFile, read_adapter
from ..backbone import Backbone, load_backbone, save_backbone
from ..config import DEFAULT_BACKBONE, AdapterConfig, Kernels, Precision
from ..mace_bridge import build_network, mace_calculators, quiet
from ..potential import Potential

ASPIRIN = Path(__file__).parent / "aspirin.xyz"
PAPER_SHAPE = "paper-shape"

# arXiv 2511.06696, section 4: the shape of MACE-OFF23-medium.
_PAPER_CONFIG: Mapping[str, Any] = dict(
    model="ScaleShiftMACE",
    r_max=5.0,
    num_bessel=8,
    num_polynomial_cutoff=5,
    max_ell=3,
    num_interactions=2,
    hidden_irreps="128x0e + 128x1o",
    MLP_irreps="16x0e",
    correlation=3,
    gate="silu",
    interaction_cls_first="RealAgnosticInteractionBlock",
    interaction_cls="RealAgnosticResidualInteractionBlock",
    atomic_inter_scale=1.0,
    atomic_inter_shift=0.0,
    avg_num_neighbors=15.0,
    atomic_numbers=[1, 6, 7, 8, 9, 15, 16, 17, 35, 53],
    atomic_energies=[0.0] * 10,
)


@dataclass(frozen=True)
class SpeedConfig:
    """What is measured.

    Attributes:
        backbone: name or path; "paper-shape" is a network of MACE-OFF23-medium's shape with random weights.
        adapter: a file; None makes one of the default method with small random values.
        device, dtype: where and how precisely.
        kernels: of our calls and dynamics, see `load_backbone`; training steps and mace-torch's side have their own.
        compile: make programs first where there are none, of training steps too; False: calls use those that are there.
        replicas: sizes of batches of aspirin.
        atoms: sizes of a periodic system (diamond).
        calls: how often the small ones are repeated.
        training: measure training steps and their memory too.
        finetune: measure a whole fine-tuning too, some minutes on a CPU.
    """

    backbone: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: Precision = "float32"
    kernels: Kernels = "own"
    compile: bool = True
    replicas: Sequence[int] = (12,)
    atoms: Sequence[int] = (1000,)
    calls: int = 40
    training: bool = True
    finetune: bool = False


def paper_shape(
    device: str = "auto", dtype: Precision = "float32", *, fast: bool = True, kernels: Kernels = "own"
) -> Backbone:
    """A backbone of MACE-OFF23-medium's shape with random weights: for measuring time, and nothing else."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        path = Path(folder) / f"{PAPER_SHAPE}.safetensors"
        save_backbone(path, _PAPER_CONFIG, build_network(dict(_PAPER_CONFIG)).state_dict())
        return load_backbone(path, device=device, dtype=dtype, fast=fast, kernels=kernels)


def open_backbone(config: SpeedConfig, *, fast: bool = True, kernels: Kernels = "own") -> Backbone:
    """The backbone to measure. Raises BackboneError."""
    if config.backbone == PAPER_SHAPE:
        return paper_shape(config.device, config.dtype, fast=fast, kernels=kernels)
    name = config.backbone or (read_adapter(config.adapter).backbone if config.adapter else DEFAULT_BACKBONE)
    return load_backbone(name, device=config.device, dtype=config.dtype, fast=fast, kernels=kernels)


def random_adapter(config: SpeedConfig) -> AdapterFile:
    """An adapter of the default method with small random values that has seen aspirin."""
    backbone = open_backbone(config)
    handle = attach(backbone.network, AdapterConfig(), start=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=generator).to(parameter))
    potential = Potential(backbone)
    batch = potential.collate([potential.graph(aspirin())])
    with handle.recording():
        potential.predict(batch)
    # Distances of the training data are those of one structure: half of them, so that moved atoms stay within.
    tensors = {k: t * 0.5 if k.endswith("shortest") else t for k, t in handle.state_dict().items()}
    return AdapterFile(
        handle.config, {k: t.cpu() for k, t in tensors.items()}, backbone.name, backbone.fingerprint, head=backbone.head
    )


def aspirin() -> Atoms:
    """The molecule that small calls are measured with."""
    atoms = read(ASPIRIN)
    assert isinstance(atoms, Atoms)
    return atoms


def mace_calculator(config: SpeedConfig) -> Any:
    """mace-torch's calculator with the backbone alone, in mace-torch's own form."""
    backbone = open_backbone(config, fast=False)
    with quiet():
        network = copy.deepcopy(backbone.network)  # e3nn's code in a copy is TorchScript, as where mace-torch loads one
        return mace_calculators().MACECalculator(
            models=[network], device=str(backbone.device), default_dtype=config.dtype
        )


def diamond(n: int) -> Atoms:
    """A crystal of about n atoms, at least a cell of eight."""
    return bulk("C", "diamond", a=3.8, cubic=True).repeat(max(1, round((n / 8) ** (1 / 3))))


__all__ = [
    "PAPER_SHAPE",
    "SpeedConfig",
    "aspirin",
    "diamond",
    "mace_calculator",
    "open_backbone",
    "paper_shape",
    "random_adapter",
]
