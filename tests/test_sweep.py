"""Committees and sweeps: which trainings there are, what is kept of them, where they run."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import mmea

from conftest import ROOT
from mmea_calc import MMEACalculator
from mmea_calc.adapter_file import read_adapter
from mmea_calc.config import DEFAULT_BACKBONE, AdapterConfig, TrainConfig
from mmea_calc.data.reading import read_dataset
from mmea_calc.errors import AdapterError, TrainingError
from mmea_calc.training.sweep import Outcome, Point, committee, grid, ranked, train_all, train_point

DATA = ROOT / "examples" / "data" / "aspirin"
TINY = AdapterConfig(method="gates", gate_rank=2)
ONCE = TrainConfig(epochs=1, batch_size=2, valid_fraction=0.4, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.xyz"
    lines = (DATA / "train.xyz").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 5 * 23]) + (DATA / "isolated_atoms.xyz").read_text())
    return path


def point(data: Path, output: Path) -> Point:
    return Point(output.stem, {}, TINY, ONCE, output, (data,))


def test_a_sweep_is_all_combinations_and_recipes_fill_in(tmp_path: Path) -> None:
    words = ["gate-rank=8,16,32", "lr=1e-2,0.003"]
    points = grid(words, {"epochs": 7}, folder=tmp_path, train=[Path("a.xyz")], options={})
    assert len(points) == 6
    assert {(p.adapter.gate_rank, p.training.lr) for p in points} == {
        (r, lr) for r in (8, 16, 32) for lr in (0.01, 0.003)
    }
    assert {p.training.epochs for p in points} == {7}
    assert points[1].name == "gate_rank=8_lr=0.003"
    full, mmea_point = grid(["method=full,mmea"], {}, folder=tmp_path, train=[], options={})
    assert (full.training.lr, mmea_point.training.lr) == (0.003, TrainConfig.lr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rank=8"], "cannot vary 'rank'; expected one of"),
        (["gate_rank"], "expected setting=value"),
        (["gate_rank=8,,16"], "expected setting=value"),
        (["gate_rank=8,small"], "gate_rank must be an integer, got 'small'"),
        (["lr=0.1", "lr=0.2"], "names lr more than once"),
        (["recipe=pasta"], "unknown recipe 'pasta'"),
        (["device=cpu,cuda"], "cannot vary 'device'"),
    ],
)
def test_wrong_sweeps_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        grid(words, {}, folder=tmp_path, train=[], options={})


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="pasta"):
        grid(["method=pasta"], {}, folder=tmp_path, train=[], options={})


def test_a_committee_differs_in_seeds_shares_its_split_and_opens_as_one(data: Path, tmp_path: Path) -> None:
    members = committee(2, point(data, tmp_path / "a.adapter"))
    assert [m.output.name for m in members] == ["a-1.adapter", "a-2.adapter"]
    outcomes = train_all(members, folder=tmp_path)
    assert all(o.reason == "" for o in outcomes)
    one, two = (read_adapter(m.output) for m in members)
    assert one.data["valid"]["sha256"] == two.data["valid"]["sha256"]
    assert (one.config.seed, two.config.seed) == (0, 1)
    trained = [k for k in one.tensors if not k.startswith("ranges.")]
    assert any(not torch.equal(one.tensors[k], two.tensors[k]) for k in trained)
    atoms = read_dataset(data).structures[0].atoms
    atoms.calc = MMEACalculator([m.output for m in members], device="cpu")
    atoms.get_potential_energy()
    assert atoms.calc.results["energy_comm"].shape == (2,)
    assert atoms.calc.results["energy_var"] > 0
    with pytest.raises(TrainingError, match="at least 2"):
        committee(1, members[0])


def test_what_is_trained_is_kept_until_settings_or_data_change(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "train.xyz"
    own.write_bytes(data.read_bytes())
    job = point(own, tmp_path / "a.adapter")
    first = train_point(job)
    assert first.forces_mae_meV_per_A is not None
    assert first.parameters is not None
    written = job.output.stat().st_mtime_ns
    assert train_point(job) == first
    assert job.output.stat().st_mtime_ns == written
    other = replace(job, training=replace(ONCE, lr=0.02))
    assert train_point(other).reason == ""
    assert job.output.stat().st_mtime_ns > written
    before = other.identity()
    own.write_text(own.read_text() + "\n")
    assert other.identity() != before


@pytest.mark.parametrize("left", ["of other settings", "damaged"])
def test_a_checkpoint_that_is_of_no_use_is_no_hindrance(left: str, data: Path, tmp_path: Path) -> None:
    """A sweep with other settings that was stopped before its first checkpoint, or one whose checkpoint is damaged."""
    job = point(data, tmp_path / "a.adapter")
    assert train_point(job).reason == ""
    checkpoint = tmp_path / "a.run" / "checkpoint.pt"
    other = replace(job, training=replace(ONCE, epochs=2))
    if left == "damaged":
        checkpoint.write_bytes(b"half a fi")
    assert checkpoint.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmea_calc.training.sweep._finetuning", _stopped)
        with pytest.raises(KeyboardInterrupt):
            train_point(other)
    if left == "damaged":
        checkpoint.write_bytes(b"half a fi")
    assert train_point(other).reason == ""
    assert read_adapter(other.output).training["epochs"] == 2


def _stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_seeds_of_a_sweep_share_their_split(data: Path, tmp_path: Path) -> None:
    points = grid(["seed=3,4"], {"epochs": 1, "method": "readout"}, folder=tmp_path, train=[data], options={})
    one, two = (replace(p, training=replace(p.training, device="cpu", valid_fraction=0.4)) for p in points)
    assert (train_point(one).reason, train_point(two).reason) == ("", "")
    first, second = (read_adapter(p.output) for p in (one, two))
    assert first.data["valid"]["sha256"] == second.data["valid"]["sha256"]
    assert (first.training["seed"], second.training["seed"]) == (3, 4)
    given = grid(["lr=0.1"], {"seed": 7}, folder=tmp_path, train=[data], options={})
    assert "split_seed" not in given[0].options


def test_a_training_that_fails_is_a_row_with_its_reason_and_the_others_go_on(data: Path, tmp_path: Path) -> None:
    jobs = [point(data, tmp_path / "a.adapter"), point(data, tmp_path / "b.adapter")]
    jobs[0] = replace(jobs[0], training=replace(ONCE, clip_norm=0.0))
    told: list[Outcome] = []
    outcomes = train_all(jobs, folder=tmp_path, told=told.append)
    assert told == outcomes
    assert "clip_norm must be at least" in outcomes[0].reason
    assert outcomes[1].reason == ""
    assert [o.name for o in ranked(outcomes)] == ["b", "a"]


def test_a_table_is_ordered_by_the_forces_then_by_energies_per_atom() -> None:
    def outcome(name: str, forces: float | None, energy: float | None, **more: Any) -> Outcome:
        return Outcome(name, {}, forces_mae_meV_per_A=forces, energy_mae_meV_per_atom=energy, **more)

    rows = [outcome("c", None, 5.0), outcome("f", 1.0, 1.0, reason="x"), outcome("b", 4.0, 1.0), outcome("a", 3.0, 9.0)]
    assert [o.name for o in ranked(rows)] == ["a", "b", "c", "f"]


def test_submitit_carries_trainings_out_where_it_is_told_to(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="submitit, which sweeps over a cluster need, is not installed")
    jobs = [point(data, tmp_path / "a.adapter"), replace(point(data, tmp_path / "b.adapter"), train=(tmp_path / "no",))]
    outcomes = train_all(jobs, cluster="local", folder=tmp_path, cluster_options={"timeout_min": 5})
    assert outcomes[0].reason == ""
    assert read_adapter(tmp_path / "a.adapter").config == TINY
    assert "there is no such file" in outcomes[1].reason
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(TrainingError, match=r"pip install 'mmea\[slurm\]'"):
        train_all(jobs, cluster="local", folder=tmp_path)
    monkeypatch.undo()
    with pytest.raises(TrainingError, match="submitit cannot submit to local"):
        train_all(jobs, cluster="local", folder=tmp_path, cluster_options={"timeout_min": "soon", "pasta": 1})


def test_the_command_trains_a_sweep_and_writes_one_table(data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("method: gates\nepochs: 20\nvalid-fraction: 0.4\ndevice: cpu\n")
    common = ("finetune", data, "--config", tmp_path / "c.yaml", "-o", tmp_path / "sweep")
    result = mmea(*common, "--sweep", "gate_rank=2,3", "lr=0.01")
    assert result.exit_code == 0, result.output
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["gate_rank"] for row in rows} == {"2", "3"}
    errors = [float(row["forces_mae_meV_per_A"]) for row in rows]
    assert errors == sorted(errors)
    for row in rows:
        assert read_adapter(Path(row["output"])).config.gate_rank == int(row["gate_rank"])
        assert json.loads(Path(row["output"]).with_suffix(".json").read_text())["outcome"]["name"] == row["name"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "lr=1,2", "--committee", "2"], "one of --sweep and --committee"),
        (["--committee", "2", "--devices", "2"], "--devices is for a single training"),
        (["--sweep", "lr=1,2", "--slurm", "slurm_partition=gpu"], "give --cluster slurm with it"),
        (["--jobs", "2"], "--jobs is for several trainings"),
        (["--sweep", "lr=1,2", "-o", "x.adapter"], "folder's name"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(data: Path, options: list[str], message: str) -> None:
    result = mmea("finetune", data, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_what_is_trained_is_kept_until_a_file_of_energies_or_the_start_changes(data: Path, tmp_path: Path) -> None:
    energies, start = tmp_path / "e0.json", tmp_path / "start.adapter"
    energies.write_text('{"H": -13.0}')
    start.write_bytes(b"one")
    job = replace(point(data, tmp_path / "a.adapter"), options={"E0s": str(energies), "init": start})
    before = job.identity()
    assert job.identity() == before
    energies.write_text('{"H": -14.0}')
    assert (second := job.identity()) != before
    start.write_bytes(b"another")
    assert job.identity() != second
    assert point(data, tmp_path / "a.adapter").identity()["options"] == {"backbone": DEFAULT_BACKBONE}


def test_members_and_results_of_names_with_a_dot_are_told_apart(data: Path, tmp_path: Path) -> None:
    jobs = [point(data, tmp_path / name) for name in ("m_lr0.01", "m_lr0.003")]
    assert [job.result_file.name for job in jobs] == ["m_lr0.01.json", "m_lr0.003.json"]
    assert [m.output.name for m in committee(2, jobs[0])] == ["m_lr0.01-1", "m_lr0.01-2"]


def test_a_sweep_from_an_adapter_has_its_form(data: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.adapter"
    assert train_point(point(data, start)).reason == ""
    result = mmea(
        "finetune", data, "--init", start, "-o", tmp_path / "S", "--sweep", "lr=0.01,0.003", "--epochs", 1,
        "--valid-fraction", 0.4, "--device", "cpu",
    )  # fmt: skip
    assert result.exception is None or "no better" in result.output, result.output
    assert {read_adapter(p).config.form()["method"] for p in (tmp_path / "S").glob("*.adapter")} == {"gates"}
    assert len(list((tmp_path / "S").glob("*.adapter"))) == 2
