"""Several processes train what one would: gradients, weights, files, and ends."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.io import write
from test_finetuning import QUICK, SMALL, labelled, log_without_times, tiny_backbone

from conftest import randomise
from mmea_calc.adapted import attach
from mmea_calc.adapter_file import read_adapter
from mmea_calc.config import TrainConfig
from mmea_calc.data.dataset import Dataset
from mmea_calc.data.preparing import prepare
from mmea_calc.data.reading import read_dataset
from mmea_calc.errors import TrainingError
from mmea_calc.potential import Potential
from mmea_calc.training.finetuning import finetune
from mmea_calc.training.parallel import check_agreement
from mmea_calc.training.samples import Samples
from mmea_calc.training.team import SOLO, Team, own_device
from mmea_calc.training.trainer import ProgressEvent, Trainer

SCRIPT = Path(__file__).parent / "two_processes.py"
# Shares of unlike sizes, with unlike labels (structures 0 to 2 lack energies, 3 and 4 forces), and of none at all.
BATCHES = ([0, 3, 5], [1, 2, 6, 7, 3], [4], [3, 1], [0, 5, 1, 6])
# Not SOAP: its eigenbases are arbitrary where gradients have been zero, so that rounding decides where it goes.
SHORT = replace(QUICK, epochs=4, optimizer="adamw")
STEADY = {
    "mse": replace(QUICK, energy_weight=1000.0),
    "huber": replace(QUICK, energy_weight=1000.0, loss="huber", huber_delta=0.02),
}


def trainer(data: Dataset, valid: Dataset, config: TrainConfig, team: Team = SOLO) -> Trainer:
    potential = Potential(tiny_backbone())
    adapter = potential.adapter = attach(potential.backbone.network, SMALL)
    randomise(adapter)
    return Trainer(potential, adapter, Samples(data, potential), Samples(valid, potential), config, team=team)


def start(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = f"""
import sys, typer
from mmea_cli.launch import start
try:
    start({processes}, {[str(SCRIPT), *map(str, arguments)]})
except typer.Exit as end:
    sys.exit(end.exit_code)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trained (one.adapter), what it left unfinished (parts.run), and what two made of both."""
    folder = tmp_path_factory.mktemp("two")
    frames = labelled(8)
    for k in range(3):
        del frames[k].info["REF_energy"]
    for k in (3, 4):
        del frames[k].arrays["REF_forces"]
    write(folder / "train.xyz", frames, format="extxyz")
    write(folder / "valid.xyz", labelled(5, seed=1), format="extxyz")
    prepare([folder / "train.xyz"], folder / "train.h5", r_max=4.0)
    data, valid = (read_dataset(folder / name) for name in ("train.xyz", "valid.xyz"))

    def stop(event: ProgressEvent) -> None:
        if event.epoch == 3:
            raise KeyboardInterrupt

    common: dict[str, Any] = dict(valid=valid, adapter=SMALL, training=SHORT)
    finetune(data, folder / "one.adapter", backbone=tiny_backbone(), **common)
    with pytest.raises(KeyboardInterrupt):
        finetune(data, folder / "parts.adapter", backbone=tiny_backbone(), progress=stop, **common)
    done = start(2, "train", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("loss", STEADY)
def test_gradients_of_two_processes_are_those_of_one_on_the_same_batch(folder: Path, loss: str) -> None:
    data, valid = (read_dataset(folder / name) for name in ("train.xyz", "valid.xyz"))
    alone = trainer(data, valid, STEADY[loss])
    found = torch.load(folder / "process0.pt")["gradients"][loss]
    for rows, theirs in zip(BATCHES, found, strict=True):
        expected = alone._of(list(rows), 1).plainly()[1]
        assert sum(float(g.abs().sum()) for g in expected if g is not None) > 1
        for mine, other in zip(expected, theirs, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(other, mine, rtol=1e-9, atol=1e-10)


def test_weights_averages_and_optimiser_are_the_same_in_all_processes_to_the_bit(folder: Path) -> None:
    one, two = (torch.load(folder / f"process{rank}.pt")["state"] for rank in (0, 1))
    assert one["optimiser"]["averages"]["updates"] == 6

    def same(a: Any, b: Any) -> int:
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
            return a.numel()
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            return sum(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            return sum(same(x, y) for x, y in zip(a, b, strict=True))
        assert a == b
        return 0

    n = sum(p.numel() for p in one["parameters"])
    assert same(one, two) >= 5 * n  # weights, averages, two moments and the largest second moment


@pytest.mark.parametrize("name", ["two", "parts", "lazy"])
def test_two_processes_end_where_one_does(folder: Path, name: str) -> None:
    """From the start, from the checkpoint of one process, and from prepared data."""
    one, other = read_adapter(folder / "one.adapter"), read_adapter(folder / f"{name}.adapter")
    assert one.tensors.keys() == other.tensors.keys()
    assert sum(key.startswith("ranges.") for key in one.tensors) > 2
    for key, value in one.tensors.items():
        torch.testing.assert_close(other.tensors[key], value, rtol=1e-7, atol=1e-9)
    mine, theirs = one.metrics["fine_tuned"]["valid"], other.metrics["fine_tuned"]["valid"]
    assert theirs["forces_mae_meV_per_A"] == pytest.approx(mine["forces_mae_meV_per_A"], rel=1e-7)
    assert one.reference_energies == pytest.approx(other.reference_energies, rel=1e-12)
    rows = zip(log_without_times(folder / "one.run"), log_without_times(folder / f"{name}.run"), strict=True)
    for row, again in rows:
        assert row.keys() == again.keys()
        assert [float(v or 0) for v in again.values()] == pytest.approx([float(v or 0) for v in row.values()], rel=1e-7)


def test_the_first_process_alone_writes(folder: Path) -> None:
    expected = {"checkpoint.pt", "config.json", "data.json", "learning_curve.png", "log.csv", "parity_valid.png"}
    assert {p.name for p in (folder / "two.run").iterdir()} == expected
    assert not [p.name for p in folder.rglob("*.part")]


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error in 0", "error in 1"])
def test_an_error_in_one_process_ends_all_with_one_line(kind: str) -> None:
    done = start(2, kind)
    assert done.returncode == 1
    assert done.stderr == "mmea: structure 17 is missing\n"
    assert done.stdout == "process 0 says this once\n"


def test_a_process_that_is_killed_ends_all_with_one_line() -> None:
    done = start(2, "killed 1")
    assert done.returncode == 1
    assert done.stderr.startswith("mmea: a process of this training was ended by SIGKILL")
    assert done.stderr.count("\n") == 1


def test_a_batch_smaller_than_the_team_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    class Four(Team):
        size = 4

    data = read_dataset(folder / "train.xyz")
    with pytest.raises(TrainingError, match="at least 4"):
        finetune(data, tmp_path / "a.adapter", backbone=tiny_backbone(), training=QUICK, team=Four())
    assert not list(tmp_path.iterdir())


def test_processes_that_were_given_different_data_say_so() -> None:
    class Two(Team):
        size = 2

        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "training data": "another"}]

    with pytest.raises(TrainingError, match=r"process 1 differs from process 0 in training data: use the same"):
        check_agreement(Two(), {"training data": "one", "lr": 0.1}, "use the same")
    check_agreement(SOLO, {"training data": "one"}, "")


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [own_device("auto", k, 2) for k in range(2)] == ["cuda:0", "cuda:1"]
    assert own_device("cpu", 3, 4) == "cpu"
    assert own_device("cuda:1", 0, 1) == "cuda:1"
    assert own_device("cuda", 0, 1) == "cuda:0"
    with pytest.raises(TrainingError, match="3 processes need as many GPUs on this machine, found 2"):
        own_device("cuda", 0, 3)
    with pytest.raises(TrainingError, match="cannot share the device 'cuda:1'"):
        own_device("cuda:1", 0, 2)
