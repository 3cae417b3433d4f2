"""Adapters that come with the package: found by name, sound, and what their page says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import ROOT
from mmea_calc import MMEACalculator, read_dataset
from mmea_calc.adapter_file import embedded_adapters, read_adapter, write_adapter
from mmea_calc.backbone import EMBEDDED, load_backbone
from mmea_calc.config import TrainConfig
from mmea_calc.errors import AdapterFileError
from mmea_calc.potential import Potential
from mmea_calc.pretrain.unpack import unpack
from mmea_calc.training.finetuning import finetune
from mmea_cli.main import app

NAME = "gfn2-to-pbe.adapter"


def test_each_is_described_and_belongs_to_an_embedded_backbone() -> None:
    page = (ROOT / "mmea_calc" / "adapters" / "README.md").read_text()
    assert embedded_adapters()
    for name in embedded_adapters():
        file = read_adapter(name)
        assert f"`{name}`" in page
        assert file.backbone in EMBEDDED
        file.check_backbone(load_backbone(file.backbone))
        assert file.level_of_theory


def test_a_file_of_the_same_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = read_adapter(NAME)
    changed = {k: v + 1 if k.startswith("gates") else v for k, v in packaged.tensors.items()}
    write_adapter(NAME, type(packaged)(**{**vars(packaged), "tensors": changed}))
    own = read_adapter(NAME)
    key = next(k for k in changed if k.startswith("gates"))
    assert not np.allclose(own.tensors[key], packaged.tensors[key])


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(AdapterFileError, match=r"no such adapter file; adapters that come with mmea: .*gfn2-to-pbe"):
        read_adapter("gfn2.adapter")


def test_it_takes_the_backbone_to_the_level_of_aspirins_labels() -> None:
    data = read_dataset(ROOT / "examples" / "data" / "aspirin" / "test.xyz").subset(range(6))
    potential = Potential(load_backbone("mmea-organic-s-xtb"))
    errors = {}
    for name in (None, NAME):
        potential.use(read_adapter(name) if name else None)
        _, forces = potential.predict_graphs([potential.graph(s.atoms) for s in data.structures])
        errors[name] = np.mean(
            [np.abs(f.numpy() - s.forces).mean() for f, s in zip(forces, data.structures, strict=True)]
        )
    assert errors[NAME] < 0.4 * errors[None]


def test_training_may_start_from_it_by_name_and_takes_its_backbone(tmp_path: Path) -> None:
    data = read_dataset(ROOT / "examples" / "data" / "aspirin" / "train.xyz").subset(range(4))
    training = TrainConfig(epochs=1, batch_size=3, valid_fraction=0.25, device="cpu")
    result = finetune(data, tmp_path / "a.adapter", init=NAME, training=training)
    assert result.adapter.backbone == "mmea-organic-s-xtb"
    assert result.adapter.config.method == "gates"
    assert result.initial["valid"].forces_mae_meV_per_A < 0.5 * result.zero_shot["valid"].forces_mae_meV_per_A


def test_the_commands_take_it_by_name(tmp_path: Path) -> None:
    data = str(ROOT / "examples" / "data" / "aspirin" / "test.xyz")
    for command in (["info", NAME], ["evaluate", NAME, data, "--device", "cpu"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "mmea-organic-s-xtb" in result.output or "forces" in result.output


def test_the_calculator_takes_it_by_name() -> None:
    atoms = read_dataset(ROOT / "examples" / "data" / "aspirin" / "test.xyz").structures[0].atoms.copy()
    atoms.calc = MMEACalculator(NAME, device="cpu")
    assert np.isfinite(atoms.get_potential_energy())


def test_its_training_data_are_unpacked_as_they_are(tmp_path: Path) -> None:
    counts = unpack(ROOT / "data" / "pbe", out=tmp_path)
    train = read_dataset(tmp_path / "train.xyz")
    assert counts == {"train.xyz": len(train), "valid.xyz": len(read_dataset(tmp_path / "valid.xyz"))}
    assert len(train.isolated_atoms) == 10
    with np.load(ROOT / "data" / "pbe" / "train-0.npz") as packed:
        first = train.structures[0]
        n = int(packed["n_atoms"][0])
        assert first.energy == pytest.approx(float(packed["energy"][0]), abs=1e-7)
        np.testing.assert_allclose(first.forces, packed["forces"][:n], atol=1e-7)  # type: ignore[arg-type]
        np.testing.assert_allclose(first.atoms.positions, packed["positions"][:n], atol=1e-7)
