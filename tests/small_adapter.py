"""A tiny backbone and an adapter for it, as files, that the tests of other engines share."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from ase import Atoms

from conftest import batch_of, ethanol, network_config, random_network, randomise, run
from mmea_calc import AdapterConfig, MMEACalculator, attach, load_backbone
from mmea_calc.adapter_file import AdapterFile, write_adapter
from mmea_calc.backbone import Backbone, save_backbone

ENERGIES = {1: -13.6, 6: -1029.123456789012, 8: -2041.75}


def trained(backbone: Backbone, method: str = "mmea", name: str = "") -> AdapterFile:
    """An adapter with random values that has seen a stretched molecule: gates level off, radial functions fade."""
    handle = attach(backbone.network, AdapterConfig(method=method, gate_rank=2, low_rank=2))
    randomise(handle, std=0.05)
    seen = ethanol()
    seen.positions *= 1.1
    with handle.recording():
        run(backbone.network, batch_of(seen, head=backbone.head_index))
    tensors = handle.state_dict()
    handle.detach()
    return AdapterFile(
        handle.config,
        tensors,
        name or backbone.name,
        backbone.fingerprint,
        head=backbone.head,
        elements=(1, 6, 8),
        reference_energies=ENERGIES,
    )


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="mmea-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def backbone_path() -> Path:
    path = folder() / "tiny.safetensors"
    save_backbone(path, network_config(), random_network().state_dict())
    return path


@cache
def adapter() -> Path:
    file = trained(load_backbone(backbone_path(), dtype="float64"), name=str(backbone_path()))
    return write_adapter(folder() / "tiny.adapter", file)


@cache
def calculator() -> MMEACalculator:
    return MMEACalculator(adapter(), device="cpu", dtype="float64")


def box() -> Atoms:
    """Two molecules in a sheared periodic cell, parts of them across its faces."""
    atoms = ethanol() + ethanol()
    atoms.positions[9:] += [0.3, 3.5, 0.2]
    atoms.set_cell([[7.0, 0, 0], [1.0, 7.5, 0], [0.5, -0.5, 6.5]])
    atoms.pbc = True
    return atoms
