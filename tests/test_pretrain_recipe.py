"""The recipe from end to end, in small: what it makes, how it resumes, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import mmea

from mmea_calc.backbone import load_backbone
from mmea_calc.errors import DataError, TrainingError
from mmea_calc.pretrain import recipe
from mmea_calc.pretrain.dataset import read_arrays
from mmea_calc.pretrain.recipe import RecipeConfig, make_backbone

PBE = Path(__file__).resolve().parents[1] / "data" / "pbe"
SHORT = RecipeConfig(start="mmea-organic-s", n_broad=5, n_mixed=3, steps=2, batch_size=2, device="cpu", compile=False)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight labelled structures, four for validation, and eight with the cheap labels alone."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("better", "cheap")}
    for name, count in (("train-0.npz", 8), ("valid.npz", 4)):
        with np.load(PBE / name) as whole:
            arrays = dict(whole)
        n_atoms = int(arrays["n_atoms"][:count].astype(int).sum())
        per_atom = ("numbers", "positions", "forces", "forces_xtb")
        few = {k: v[: n_atoms if k in per_atom else count] for k, v in arrays.items()}
        np.savez(folders["better"] / name, **few)
        lower = {k: few.pop(f"{k}_xtb") for k in ("energy", "forces")}
        np.savez(folders["cheap"] / name, **few | lower)
    for name in ("e0.json", "level.txt", "walls.npz"):
        (folders["better"] / name).write_bytes((PBE / name).read_bytes())
    (folders["cheap"] / "e0.json").write_bytes((PBE / "e0.json").read_bytes())
    return folders


@pytest.fixture(scope="module")
def made(sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(
        better=sets["better"], cheap=sets["cheap"], out=tmp_path_factory.mktemp("made"), name="mine", config=SHORT
    )


def test_the_backbone_is_the_mean_of_the_stages_before_and_after_the_last(made: Path) -> None:
    stages = [load_backbone(made.parent / name / f"{name}.safetensors") for name in ("broad", "last")]
    broad, last, mean = (dict(b.network.named_parameters()) for b in (*stages, load_backbone(made)))
    assert all(torch.equal(tensor, (broad[name] + last[name]) / 2) for name, tensor in mean.items())
    assert not all(torch.equal(tensor, broad[name]) for name, tensor in mean.items())
    assert load_backbone(made).level_of_theory == load_backbone("mmea-organic-s").level_of_theory
    assert stages[0].config["start"]["name"] == "mmea-organic-s"


def test_the_stages_see_different_structures_and_the_broad_one_all_walls(made: Path) -> None:
    broad, mixed = (read_arrays([made.parent / name / "train-0.npz"]) for name in ("relabelled", "mixed"))
    assert len(broad["n_atoms"]) <= 5
    assert len(mixed["n_atoms"]) <= 3
    assert broad["n_atoms"][:3].tolist() != mixed["n_atoms"].tolist()
    walls = read_arrays([made.parent / "relabelled" / "train-2.npz"])
    assert set(walls["n_atoms"].tolist()) == {2}
    assert not (made.parent / "mixed" / "train-2.npz").exists()


def test_a_wider_network_is_made_from_the_start(sets: dict[str, Path], tmp_path: Path) -> None:
    config = replace(SHORT, channels=65, lr=0.001)
    made = make_backbone(better=sets["better"], cheap=sets["cheap"], out=tmp_path, name="wide", config=config)
    of_it, broad, last = (
        load_backbone(p).config for p in (made, *(tmp_path / n / f"{n}.safetensors" for n in ("broad", "last")))
    )
    assert of_it["hidden_irreps"] == "65x0e + 65x1o"
    assert broad["start"]["fingerprint"] == load_backbone(tmp_path / "wide" / "wide.safetensors").fingerprint
    assert made == tmp_path / "wide.safetensors"  # of the same name as what was made on the way
    assert (broad["training"]["lr"], last["training"]["lr"]) == (0.001, pytest.approx(0.0008))


@pytest.mark.parametrize("at", ["relabel", "average"])
def test_an_interrupted_recipe_goes_on_to_the_same_bits(
    sets: dict[str, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, at, stop)
        with pytest.raises(KeyboardInterrupt):
            make_backbone(better=sets["better"], cheap=sets["cheap"], out=tmp_path, name="mine", config=SHORT)
    assert not (tmp_path / "mine.safetensors").exists()
    assert not (tmp_path / ("relabelled" if at == "relabel" else "no")).exists()
    again = make_backbone(better=sets["better"], cheap=sets["cheap"], out=tmp_path, name="mine", config=SHORT)
    assert load_backbone(again).fingerprint == load_backbone(made).fingerprint


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(sets: dict[str, Path], made: Path) -> None:
    before = made.read_bytes()
    lines: list[str] = []
    assert (
        make_backbone(
            better=sets["better"],
            cheap=sets["cheap"],
            out=made.parent,
            name="mine",
            config=SHORT,
            progress=lines.append,
        )
        == made
    )
    assert made.read_bytes() == before
    assert lines == []
    with pytest.raises(TrainingError, match=r"was begun with n_broad 5, not 6: ask for the same"):
        make_backbone(
            better=sets["better"], cheap=sets["cheap"], out=made.parent, name="mine", config=replace(SHORT, n_broad=6)
        )
    with pytest.raises(TrainingError, match="name 'mine', not 'other'"):
        make_backbone(better=sets["better"], cheap=sets["cheap"], out=made.parent, name="other", config=SHORT)
    assert made.read_bytes() == before


def test_the_command_takes_the_same_settings(sets: dict[str, Path], made: Path) -> None:
    words = ["pretrain", "recipe", "--data", sets["better"], "--cheap", sets["cheap"], "-o", made.parent]
    numbers = ["--n-broad", 5, "--n-mixed", 3, "--steps", 2, "--batch-size", 2, "--device", "cpu", "--no-compile"]
    result = mmea(*words, "--name", "mine", "--start", "mmea-organic-s", *numbers)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(made)
    refused = mmea(*words, "--name", "mine")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("mmea: ")


def test_settings_of_a_stage_are_named_or_set(sets: dict[str, Path], tmp_path: Path) -> None:
    words = ["pretrain", "train", "--data", sets["better"], "-o", tmp_path, "--name", "n", "--steps", 1]
    result = mmea(*words, "--device", "cpu", "--set", "channels=4", "max-ell=1", "batch_size=2")
    assert result.exit_code == 0, result.output
    config = load_backbone(tmp_path / "n.safetensors").config
    assert (config["hidden_irreps"], config["max_ell"]) == ("4x0e + 4x1o", 1)
    assert config["training"]["batch_size"] == 2
    for wrong, told in (("chanels=4", "known are"), ("channels=few", "must be an integer")):
        refused = mmea(*words, "--set", wrong)
        assert refused.exit_code == 2
        assert told in " ".join(refused.stderr.replace("│", " ").split())


def test_help_names_the_defaults_of_the_library() -> None:
    told = " ".join(mmea("pretrain", "recipe", "--help").stdout.replace("│", " ").split())
    config = RecipeConfig()
    minutes = (config.minutes_difference, config.minutes_broad, config.minutes_last)
    for number in (*minutes, config.n_broad, config.n_mixed, config.batch_size):
        assert f"; {number:,.0f} if not given." in told


def test_what_is_wrong_is_told_before_anything_is_made(sets: dict[str, Path], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {**sets, "out": tmp_path / "R", "name": "mine", "config": SHORT}
    (bare := tmp_path / "bare").mkdir()
    wrong: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"name": "sub/mine"}, TrainingError, "'sub/mine' is no name of a backbone"),
        ({"config": replace(SHORT, lr=float("nan"))}, TrainingError, "lr must be at least 1e-12 and finite, got nan"),
        ({"config": replace(SHORT, batch_size=0)}, TrainingError, "batch_size must be at least 1, got 0"),
        ({"better": bare}, DataError, r"there is no .*walls\.npz: make it with"),
    )
    for change, kind, message in wrong:
        with pytest.raises(kind, match=message):
            make_backbone(**arguments | change)
    assert not (tmp_path / "R").exists()
