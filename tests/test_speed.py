"""The benchmark of speed measures what it says; its figures are nobody's promise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmea_calc.backbone import Backbone
from mmea_calc.benchmark import speed, speed_finetune
from mmea_calc.benchmark.speed import BATCH, Measured, Timed, measure_speed, training_step
from mmea_calc.benchmark.speed_memory import free_memory, peak_memory
from mmea_calc.benchmark.speed_setup import SpeedConfig, aspirin, mace_calculator, open_backbone
from mmea_calc.calculator import MMEACalculator
from mmea_calc.config import TrainConfig
from mmea_calc.data.dataset import Dataset
from mmea_calc.training.finetuning import FinetuneResult, finetune
from mmea_cli.main import app


def test_both_sides_compute_the_same_network() -> None:
    config = SpeedConfig(device="cpu", dtype="float64")
    ours, theirs = MMEACalculator(backbone=open_backbone(config)), mace_calculator(config)
    atoms = aspirin()
    torch.testing.assert_close(
        torch.tensor(ours.get_forces(atoms)), torch.tensor(theirs.get_forces(atoms)), rtol=0, atol=1e-9
    )


def test_the_papers_shape_is_that_of_the_medium_network() -> None:
    backbone = open_backbone(SpeedConfig(backbone="paper-shape", device="cpu"))
    network: Any = backbone.network
    assert str(network.products[0].linear.irreps_out) == "128x0e+128x1o"
    assert str(network.spherical_harmonics.irreps_out) == "1x0e+1x1o+1x2e+1x3o"
    assert (len(network.interactions), backbone.r_max) == (2, 5.0)
    assert network.products[0].symmetric_contractions.contractions[0].correlation == 3


def test_a_training_step_gives_gradients_of_all_that_trains() -> None:
    step, _ = training_step(SpeedConfig(device="cpu", compile=False), True)
    found = step()
    assert isinstance(found, tuple)
    _, gradients = found
    assert sum(g is not None and bool(g.any()) for g in gradients) > len(gradients) / 3
    assert BATCH == 5


def test_a_ratio_above_one_is_better_in_every_unit() -> None:
    assert Timed("", 2.0, 10.0, "ms").ratio == 5
    assert Timed("", 10.0, 2.0, "steps/s").ratio == 5
    assert Timed("", None, 2.0, "ms").ratio is None


def _allocated(megabytes: int) -> tuple[Callable[[], object], torch.device]:
    return lambda: torch.ones(megabytes * 1_000_000, dtype=torch.uint8), torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much memory a process needed")
def test_the_memory_of_a_call_is_what_it_allocates_and_less_than_there_is() -> None:
    needed = peak_memory(_allocated, 300)
    assert needed is not None
    assert needed == pytest.approx(300, rel=0.05)  # the kernel counts pages by the batch
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert free > needed


def test_a_side_whose_call_needs_more_memory_than_there_is_is_left_out_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "_PLENTY", 60)
    monkeypatch.setattr(speed, "free_memory", lambda device: 1000.0)
    # MB for 512 atoms: for 64 an eighth of it, 0.88 and 1.1 GB
    monkeypatch.setattr(speed, "peak_memory", lambda make, config, ours: 7000.0 if ours else 9000.0)
    config = SpeedConfig(device="cpu", compile=False, atoms=(8, 64), replicas=(), calls=1, training=False)
    told: list[str] = []
    small, small_dynamics, large, large_dynamics = measure_speed(config, told.append).rows[-4:]
    assert small_dynamics.what == "dynamics of 8 atoms, periodic"
    assert (small_dynamics.unit, small_dynamics.series, small_dynamics.size) == ("steps/s", "dynamics", 8)
    assert small_dynamics.ours
    assert small_dynamics.theirs
    assert large_dynamics.ours
    assert large_dynamics.theirs is None
    assert large_dynamics.note.endswith("calls; mmea needs about 0.88 GB; mace-torch would need about 1.1 GB")
    assert small.ours
    assert small.theirs
    assert small.note.endswith("us per atom")
    assert large.ours
    assert large.theirs is None
    assert large.ratio is None
    assert large.note.endswith("us per atom; mmea needs about 0.88 GB; mace-torch would need about 1.1 GB")
    assert "mace-torch not measured" in told[-1]


def test_a_crystal_too_large_for_both_sides_leaves_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_PLENTY", 6)
    monkeypatch.setattr(speed, "free_memory", lambda device: 1.0)
    monkeypatch.setattr(speed, "peak_memory", lambda *_: 7000.0)
    config = SpeedConfig(device="cpu", compile=False, atoms=(8,), replicas=(), calls=1, training=False)
    for row in measure_speed(config).rows[-2:]:
        assert (row.ours, row.theirs, row.size) == (None, None, 8)
        assert "mmea would need about 0.11 GB; mace-torch would need about 0.11 GB" in row.note


def test_what_was_measured_is_kept_line_by_line() -> None:
    kept: list[Measured] = []
    config = SpeedConfig(device="cpu", compile=False, atoms=(), replicas=(), calls=1, training=False)
    measured = measure_speed(config, keep=kept.append)
    assert [len(one.rows) for one in kept] == [2, 3]
    assert kept[-1].rows == measured.rows
    assert [one.to_dict()["complete"] for one in (*kept, measured)] == [False, False, True]
    assert {one.settings for one in kept} == {measured.settings}


def test_a_run_that_is_stopped_leaves_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "_dynamics", stop)
    words = ["benchmark", "speed", "--no-compile", "--no-training", "--atoms", "0", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "speed.json")])
    assert result.exit_code != 0
    left = json.loads((tmp_path / "speed.json").read_text())
    assert left["complete"] is False
    assert [row["what"] for row in left["rows"]] == ["one call, aspirin", "the same without an adapter"]
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_a_fine_tuning_is_one_by_the_default_recipe_to_another_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, Dataset, TrainConfig]] = []

    def shorter(train: Dataset, output: Path, *, backbone: Backbone, training: TrainConfig) -> FinetuneResult:
        asked.append((output, train, training))
        return finetune(train, output, backbone=backbone, training=replace(training, epochs=2))

    monkeypatch.setattr(speed_finetune, "finetune", shorter)
    monkeypatch.setattr(speed_finetune, "STRUCTURES", 6)
    config = SpeedConfig(backbone="mmea-organic-s", device="cpu")
    row = speed._finetuning(config)
    ((output, train, training),) = asked
    assert (len(train), training) == (6, TrainConfig(device="cpu"))
    assert not output.parent.exists()
    assert (row.what, row.unit, row.theirs) == (
        "fine-tuning on 50 aspirins, default recipe, end to end",
        "s",
        None,
    )
    assert row.ours
    assert row.ours > 0
    assert row.note.startswith("forces of mmea-organic-s2: ")
    before, after = (float(word) for word in row.note.split()[3:6:2])
    assert after != before
    teacher = MMEACalculator(backbone="mmea-organic-s2", device="cpu", dtype="float64")
    for item in train.structures:
        assert item.forces is not None
        torch.testing.assert_close(
            torch.tensor(teacher.get_forces(item.atoms)), torch.tensor(item.forces), rtol=0, atol=1e-5
        )


def test_the_aspirins_are_the_same_every_time_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_finetune, "STRUCTURES", 2)
    config = SpeedConfig(device="cpu")
    one, other = (speed_finetune.labelled_aspirins(config, "mmea-organic-s") for _ in range(2))
    assert all((a.positions == b.positions).all() for a, b in zip(one, other, strict=True))
    assert (one[0].positions != one[1].positions).all()


@pytest.mark.parametrize(
    ("words", "training", "finetune"),
    [([], True, False), (["--no-training", "--finetune"], False, True)],
)
def test_the_command_asks_for_what_it_is_told_to(
    words: list[str], training: bool, finetune: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SpeedConfig] = []

    def measure(config: SpeedConfig, **_: object) -> Measured:
        asked.append(config)
        return Measured("nothing", [])

    monkeypatch.setattr(speed, "measure_speed", measure)
    result = CliRunner().invoke(app, ["benchmark", "speed", *words])
    assert result.exit_code == 0, result.output
    assert [(config.training, config.finetune) for config in asked] == [(training, finetune)]


def test_a_row_of_a_fine_tuning_is_there_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    took = speed_finetune.FinetuneTime(12.0, "mmea-organic-s", 50.0, 20.0)
    monkeypatch.setattr(speed, "time_finetuning", lambda config: took)
    config = SpeedConfig(device="cpu", compile=False, atoms=(), replicas=(), calls=1, training=False)
    without, with_it = (measure_speed(replace(config, finetune=asked)).rows for asked in (False, True))
    assert [row.what for row in with_it[:-1]] == [row.what for row in without]
    assert with_it[-1].to_dict()["times better"] is None
    assert (with_it[-1].ours, with_it[-1].note) == (
        12.0,
        "forces of mmea-organic-s: 50.0 -> 20.0 meV/A in validation",
    )


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    words = ["benchmark", "speed", "--no-compile", "--replicas", "2", "--atoms", "8", "--device", "cpu"]
    result = CliRunner().invoke(
        app, [*words, "-o", str(tmp_path / "speed.json"), "--plot", str(tmp_path / "speed.svg")]
    )
    assert result.exit_code == 0, result.output
    calls = (
        "one call, aspirin",
        "dynamics of 1 aspirin",
        "dynamics of 2 aspirins",
        "2 replicas of aspirin",
        "dynamics of 8 atoms, periodic",
    )
    for line in (*calls, "training step", "memory of that step", "adapter costs"):
        assert line in result.output
    assert "atoms, periodic" in (tmp_path / "speed.svg").read_text()
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content["complete"] is True
    rows = content["rows"]
    sizes = [(row["series"], row["size"]) for row in rows if row["series"]]
    assert sizes == [("replicas", 2), ("atoms", 8), ("dynamics", 8)]
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["benchmark", "speed", "--data", "somewhere"], "No such option: --data"),
        (["benchmark", "rmd17"], "Missing option '--data'"),
        (["benchmark", "rmd17", "--data", "x", "-o", "y", "--threads", "2"], "No such option: --threads"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(words: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert problem in result.output
