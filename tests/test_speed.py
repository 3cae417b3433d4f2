"""The benchmark of speed measures what it says; its figures are nobody's promise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmea_calc.benchmark import speed
from mmea_calc.benchmark.speed import BATCH, Timed, measure_speed, training_step
from mmea_calc.benchmark.speed_memory import free_memory, peak_memory
from mmea_calc.benchmark.speed_setup import SpeedConfig, aspirin, mace_calculator, open_backbone
from mmea_calc.calculator import MMEACalculator
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
    small, large = measure_speed(config, told.append).rows[-2:]
    assert small.ours
    assert small.theirs
    assert small.note.endswith("us per atom")
    assert large.ours
    assert large.theirs is None
    assert large.ratio is None
    assert large.note.endswith("us per atom; mmea needs about 0.88 GB; mace-torch would need about 1.1 GB")
    assert "mace-torch not measured" in told[-1]


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    words = ["benchmark", "speed", "--no-compile", "--replicas", "2", "--atoms", "8", "--device", "cpu"]
    result = CliRunner().invoke(
        app, [*words, "-o", str(tmp_path / "speed.json"), "--plot", str(tmp_path / "speed.svg")]
    )
    assert result.exit_code == 0, result.output
    calls = ("one call, aspirin", "dynamics of 1 aspirin", "dynamics of 2 aspirins", "2 replicas of aspirin")
    for line in (*calls, "training step", "memory of that step", "adapter costs"):
        assert line in result.output
    assert "atoms, periodic" in (tmp_path / "speed.svg").read_text()
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["series"], row["size"]) for row in rows if row["series"]] == [("replicas", 2), ("atoms", 8)]
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
