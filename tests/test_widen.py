"""A wider network is the same function, and what was added can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from ase import Atoms
from commands import mmea

from conftest import crystal, ethanol, network_config, random_network
from mmea_calc.adapted import attach
from mmea_calc.backbone import load_backbone, save_backbone
from mmea_calc.config import AdapterConfig
from mmea_calc.errors import BackboneError
from mmea_calc.potential import Potential
from mmea_calc.pretrain.widen import widen


def saved(path: Path, **changes: Any) -> Path:
    """A backbone with random weights, in a file."""
    save_backbone(path, network_config(**changes), random_network(**changes).state_dict())
    return path


def predicted(path: Path, structures: list[Atoms]) -> list[np.ndarray]:
    """Energies, then forces of every structure, in float64."""
    potential = Potential(load_backbone(path, dtype="float64"))
    energies, forces = potential.predict_graphs([potential.graph(atoms) for atoms in structures])
    return [energies.numpy(), *(f.numpy() for f in forces)]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("heads", "nonlinear")])
def test_energies_and_forces_stay(name: str, tmp_path: Path) -> None:
    narrow, wide = saved(tmp_path / "narrow.safetensors", **ARCHITECTURES[name]), tmp_path / "wide.safetensors"
    widen(narrow, 7, wide)
    irreps = load_backbone(wide).config["hidden_irreps"].split("+")
    assert {term.strip().split("x")[0] for term in irreps} == {"7"}
    before, after = (predicted(path, [ethanol(), crystal()]) for path in (narrow, wide))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-10, atol=1e-10)


def test_every_readout_can_take_up_the_added_channels(tmp_path: Path) -> None:
    """The energy does not depend on them yet; its gradient with respect to the weights that read them is not zero."""
    wide = tmp_path / "wide.safetensors"
    widen(saved(tmp_path / "narrow.safetensors"), 7, wide)
    backbone = load_backbone(wide, dtype="float64")
    potential = Potential(backbone)
    potential.adapter = attach(backbone.network, AdapterConfig(method="full"))
    graph = potential.graph(ethanol())
    energy = potential.predict(potential.collate([graph]), forces=False, training=True).energy.sum()
    readouts = [p for p in potential.adapter.parameters() if p.shape[0] == 7]
    for gradient in torch.autograd.grad(energy, readouts):
        assert bool((gradient[4:].abs() > 0).all())


@pytest.mark.parametrize(
    ("changes", "channels", "words"),
    [
        ({}, 4, "has 4 channels; ask for more"),
        ({"hidden_irreps": "4x0e + 3x1o"}, 8, "as many channels are wanted for every order"),
        (ARCHITECTURES["heads"], 8, "several heads"),
        (ARCHITECTURES["nonlinear"], 8, "of no kind that is known"),  # channels stand in its radial networks' input
    ],
)
def test_what_cannot_be_widened_is_refused(changes: dict[str, Any], channels: int, words: str, tmp_path: Path) -> None:
    narrow = saved(tmp_path / "narrow.safetensors", **changes)
    with pytest.raises(BackboneError, match=words):
        widen(narrow, channels, tmp_path / "wide.safetensors")
    assert not (tmp_path / "wide.safetensors").exists()


def test_the_command_writes_a_backbone(tmp_path: Path) -> None:
    narrow, wide = saved(tmp_path / "narrow.safetensors"), tmp_path / "wide.safetensors"
    result = mmea("pretrain", "widen", narrow, "--channels", 6, "--out", wide, "--seed", 3)
    assert result.exit_code == 0, result.output
    backbone = load_backbone(wide)
    assert backbone.fingerprint == result.stdout.strip()
    assert backbone.config["start"]["fingerprint"] == load_backbone(narrow).fingerprint
    state = torch.get_rng_state()
    assert widen(narrow, 6, tmp_path / "again.safetensors", seed=3) == backbone.fingerprint
    assert widen(narrow, 6, tmp_path / "other.safetensors", seed=4) != backbone.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
