"""The command line: exit codes, one-line errors, help without torch, and where a setting's value comes from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from ase.build import molecule
from ase.io import write
from commands import mmea
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from conftest import ROOT
from mmea_calc.adapter_file import read_adapter, write_adapter
from mmea_calc.config import DEFAULT_BACKBONE, AdapterConfig, TrainConfig
from mmea_calc.errors import MMEAError
from mmea_calc.training.recipes import RECIPES
from mmea_calc.training.trainer import ProgressEvent
from mmea_cli.finetune import OTHER_OPTIONS
from mmea_cli.main import app
from mmea_cli.progress import TrainingDisplay, duration, plain_line
from mmea_cli.settings import Settings, resolve

DATA = ROOT / "examples" / "data" / "aspirin"
HEAVY = ("torch", "ase", "mace", "e3nn", "matplotlib", "h5py", "numpy", "scipy")


def settings(config: Path | None = None, **flags: Any) -> Settings:
    return resolve(flags, config, OTHER_OPTIONS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the smallest kind, trained for one epoch on a few structures by the command itself."""
    folder = tmp_path_factory.mktemp("run")
    frames = (DATA / "train.xyz").read_text().splitlines(keepends=True)
    (folder / "train.xyz").write_text("".join(frames[: 6 * 23]))
    (folder / "config.yaml").write_text("method: gates\ngate-rank: 2\nlr: 1e-3\nepochs: 50\nbatch_size: 1\n")
    path = folder / "tiny.adapter"
    result = mmea("finetune", folder / "train.xyz", DATA / "isolated_atoms.xyz", "-o", path, "--epochs", 2,
                  "--valid-fraction", 0.4, "--config", folder / "config.yaml")  # fmt: skip
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.output)
    return path


# Help, version, exit codes


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["evaluate", "-h"], ["backbone", "--help"]])
def test_help_answers(arguments: list[str]) -> None:
    result = mmea(*arguments)
    assert result.exit_code == 0
    assert "Usage: mmea" in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mmea_cli.main import app; "
        "CliRunner().invoke(app, ['finetune', '--help']); "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "mmea_cli", "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["finetune"],
        ["finetune", "x.xyz", "--phi", "sin"],
        ["finetune", "x.xyz", "--epochs", "many"],
        ["finetune", "x.xyz", "--epochs", 0],
        ["finetune", "x.xyz", "--recipe", "pasta"],
        ["finetune", "x.xyz", "--no-such-option"],
        ["backbone", "no-such-command"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert mmea(*arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "nowhere.adapter"],
        ["evaluate", "nowhere.adapter", DATA / "test.xyz"],
        ["finetune", "nowhere.xyz"],
        ["finetune", "nowhere.xyz", "--config", "nowhere.yaml"],
        ["backbone", "show", "no-such-backbone"],
    ],
)
def test_failures_are_one_line_on_stderr_and_exit_with_1(arguments: list[object]) -> None:
    result = mmea(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("mmea: ")
    assert re.search(r"nowhere|no-such-backbone", result.stderr)
    assert result.stderr.count("\n") == 1


def test_a_training_that_did_not_end_is_not_lost(tmp_path: Path) -> None:
    (run := tmp_path / "a.run").mkdir()
    (run / "checkpoint.pt").write_bytes(b"500 epochs")
    result = mmea("finetune", DATA / "train.xyz", "-o", tmp_path / "a.adapter", "--epochs", 1, "--device", "cpu")
    assert result.exit_code == 1
    assert "a.run is of a training that did not end: go on with --resume" in result.stderr
    assert [p.read_bytes() for p in run.iterdir()] == [b"500 epochs"]


def test_a_training_that_did_not_end_is_not_lost_where_an_older_adapter_is(tmp_path: Path) -> None:
    output, run = tmp_path / "a.adapter", tmp_path / "a.run"
    command = ("finetune", DATA / "train.xyz", "-o", output, "--epochs", 1, "--device", "cpu", "--method", "readout")
    mmea(*command)
    assert output.exists()  # whether or not it helped
    checkpoint, adapter = (path.stat().st_mtime_ns for path in (run / "checkpoint.pt", output))
    assert adapter >= checkpoint
    os.utime(run / "checkpoint.pt", ns=(adapter + 1, adapter + 1))  # of a later training that was killed
    written = output.read_bytes()
    result = mmea(*command)
    assert result.exit_code == 1
    assert "a.run is of a training that did not end: go on with --resume" in result.stderr
    assert output.read_bytes() == written


@pytest.mark.parametrize("output", [".", "..", "a_folder"])
def test_a_folder_is_no_name_for_an_adapter(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    result = mmea("finetune", DATA / "train.xyz", "-o", output, "--epochs", 1, "--device", "cpu")
    assert (result.exit_code, result.stderr) == (1, f"mmea: {output}: is a directory\n")
    assert [p.name for p in tmp_path.iterdir()] == ["a_folder"]


def test_warnings_are_told_without_the_place_in_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubt(*_: object) -> None:
        warnings.warn("one thing is odd", stacklevel=2)
        raise MMEAError("another is wrong")

    monkeypatch.setattr("mmea_calc.adapter_file.read_adapter", doubt)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert mmea("info", "x.adapter").stderr == "warning: one thing is odd\nmmea: another is wrong\n"
    assert warnings.showwarning is before


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmea_calc.adapter_file.read_adapter", interrupt)
    result = mmea("info", "x.adapter")
    assert result.exit_code == 130
    assert result.stderr == "mmea: interrupted\n"


def test_a_bug_is_not_disguised_as_a_failure_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mmea_calc.adapter_file.read_adapter", fail)
    assert isinstance(mmea("info", "x.adapter").exception, ZeroDivisionError)


# Settings


def test_without_flags_the_defaults_of_the_library_apply() -> None:
    chosen = settings(epochs=None, method=None)
    assert (chosen.adapter, chosen.training) == (AdapterConfig(), TrainConfig())


def test_no_option_of_finetune_repeats_a_default() -> None:
    command = get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    options = [p for p in command.params if p.name not in ("train", "help")]
    assert len(options) > 25
    assert [p.name for p in options if p.default is not None] == []


def test_every_option_of_finetune_reaches_a_setting() -> None:
    fields = {*AdapterConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__, *OTHER_OPTIONS}
    command = get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    assert {p.name for p in command.params} - {"train", "config", "help"} <= fields


def test_a_flag_wins_over_the_file_which_wins_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: paper\nlr: 0.02\nepochs: 7\n")
    training = settings(file, epochs=3).training
    assert (training.epochs, training.lr) == (3, 0.02)
    assert training.forces_weight == RECIPES["paper"]["forces_weight"] != TrainConfig().forces_weight


def test_a_flag_equal_to_the_default_still_wins(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 5\nsaturate: false\n")
    chosen = settings(file, seed=0, saturate=True)
    assert (chosen.training.seed, chosen.adapter.seed, chosen.adapter.saturate) == (0, 0, True)


def test_keys_of_the_file_are_option_names_with_hyphens_or_underscores(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("gate-rank: 8\nenergy_weight: 2\nno-saturate: true\nE0s: {H: -13.6}\nvalid: v.xyz\n")
    chosen = settings(file)
    assert (chosen.adapter.gate_rank, chosen.training.energy_weight, chosen.adapter.saturate) == (8, 2.0, False)
    assert (chosen.options["E0s"], chosen.options["valid"]) == ({"H": -13.6}, Path("v.xyz"))


def test_ablations_of_the_gate_are_flags_and_keys_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("no-shift: true\nseparate-bottlenecks: true\nnonlinearity: true\n")
    chosen = settings(file, nonlinearity=False, gains="order").adapter
    assert chosen == AdapterConfig(nonlinearity=False, separate_bottlenecks=True, shift=False, gains="order")
    options = ["--no-nonlinearity", "--separate-bottlenecks", "--no-shift", "--gains", "order"]
    result = mmea("finetune", "nowhere.xyz", *options)
    assert (result.exit_code, "nowhere.xyz" in result.stderr) == (1, True)
    assert mmea("finetune", "nowhere.xyz", "--gains", "both").exit_code == 2


def test_a_method_with_a_recipe_of_its_name_uses_it_unless_another_is_named() -> None:
    assert settings(method="sparse").training == TrainConfig(**RECIPES["sparse"])
    assert settings(method="sparse", recipe="sparse-H").training.tau_weight_decay == 0.3
    assert settings(method="sparse", recipe="default").training == TrainConfig()


def test_the_file_can_set_what_has_no_flag_and_undo_what_a_recipe_set(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("recipe: paper\nclip_norm: 1e-1\nstage_two_start: null\n")
    training = settings(file).training
    assert (training.clip_norm, training.stage_two_start) == (0.1, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: .inf", "epochs must be"),
        ("epoch: 3", "unknown key 'epoch'; known: .*epochs"),
        ("epochs: 1.5", "epochs must be an integer, got 1.5"),
        ("epochs: true", "epochs must be an integer, got True"),
        ("lr: fast", "lr must be a number, got 'fast'"),
        ("lr: null", "lr must be a number, got None"),
        ("phi: sin", "phi must be one of 'exp', 'residual', got 'sin'"),
        ("saturate: 1", "saturate must be true or false, got 1"),
        ("recipe: pasta", "unknown recipe 'pasta'; known: default, paper"),
        ("- epochs", "must be a mapping"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(typer.BadParameter, match=message):
        settings(file)


# Progress


def event(**changes: Any) -> ProgressEvent:
    values: dict[str, Any] = dict(epoch=3, epochs=20, loss=0.5, energy_loss=0.1, forces_loss=0.4, seconds=6.0)
    return ProgressEvent(**{**values, "seconds_left": 34.0, **changes})


def test_a_log_line_has_epoch_losses_validation_errors_and_time_left() -> None:
    line = plain_line(event(valid_energy_mae_meV_per_atom=1.234, valid_forces_mae_meV_per_A=45.6))
    assert line == (
        "epoch  3/20  loss 0.5 (energy 0.1, forces 0.4)  valid 1.23 meV/atom, 45.6 meV/Å  0:06 gone, 0:34 left"
    )
    assert "(energy 0.1, forces 0.4, stress 0.02)" in plain_line(event(stress_loss=0.02))


def test_away_from_a_terminal_only_validations_and_messages_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(Console(force_terminal=False)) as display:
        display(event())
        display(event(epoch=4, valid_energy_mae_meV_per_atom=1.0))
        display(ProgressEvent(message="resuming after epoch 4"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch  4/20")
    assert lines[1] == "resuming after epoch 4"


def test_on_a_terminal_a_bar_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(Console(force_terminal=True, width=160)) as display:
        display(event(valid_energy_mae_meV_per_atom=1.234, valid_forces_mae_meV_per_A=45.6))
        display(event(epoch=4))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    for text in ("4/20", "loss 0.5 (E 0.1, F 0.4)", "valid 1.23 meV/atom, 45.6 meV/Å", "0:34 left"):
        assert text in shown


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (75.2, "1:15"), (3725, "1:02:05"), (None, "?")])
def test_durations_read_like_a_clock(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


# Whole commands


def test_finetune_reports_backbone_data_parameters_and_errors(adapter: Path) -> None:
    output = (adapter.parent / "output.txt").read_text()
    for text in (
        f"{DEFAULT_BACKBONE} (fingerprint",
        "6 (REF_energy)",
        "Method gates trains",
        "epoch 2/2",
        "fine-tuned",
    ):
        assert text in output
    assert "backbone alone" in output


def test_info_tells_what_the_header_holds(adapter: Path) -> None:
    header = json.loads(mmea("info", adapter, "--json").stdout)
    assert header["adapter"]["method"] == "gates"
    assert header["adapter"]["gate_rank"] == 2
    assert (header["training"]["epochs"], header["training"]["lr"]) == (2, 0.001)
    text = mmea("info", adapter).stdout
    assert f"{header['n_parameters']:,}" in text
    assert header["fingerprint"][:16] in text


def test_evaluate_shows_the_adapter_beside_its_backbone(adapter: Path) -> None:
    plot, test = adapter.parent / "parity.png", adapter.parent / "test.xyz"
    lines = (DATA / "test.xyz").read_text().splitlines(keepends=True)
    test.write_text("".join("".join(lines[23 * i : 23 * (i + 2)]) for i in (0, 10, 20)))
    printed = mmea("evaluate", adapter, test, "--json", "--plot", plot)
    assert printed.exit_code == 0, printed.output
    errors = json.loads(printed.stdout)
    assert set(errors["adapter"]["by_config_type"]) == {"300K", "600K", "1200K"}
    assert set(errors["backbone"]["forces_by_element"]) == {"H", "C", "O"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = mmea("evaluate", adapter, test, "--batch-size", 4).stdout
    error = errors["adapter"]["overall"]["forces"]["mae_meV_per_A"]
    for text in ("1200K", "backbone alone", "meV/atom", f"{error:.2f}"):
        assert text in table


def test_evaluate_measures_a_backbone_alone(adapter: Path, tmp_path: Path) -> None:
    plot, test = tmp_path / "parity.png", tmp_path / "test.xyz"
    test.write_text("".join((DATA / "test.xyz").read_text().splitlines(keepends=True)[:46]))
    printed = mmea("evaluate", DEFAULT_BACKBONE, test, "--json", "--plot", plot)
    assert printed.exit_code == 0, printed.output
    errors = json.loads(printed.stdout)
    assert errors["adapter_file"] is None
    assert "adapter" not in errors
    assert errors["backbone_name"] == DEFAULT_BACKBONE
    assert plot.read_bytes().startswith(b"\x89PNG")
    # the same as beside an adapter on that backbone, whose forces are measured there too
    beside = json.loads(mmea("evaluate", adapter, test, "--json").stdout)
    mae = errors["backbone"]["overall"]["forces"]["mae_meV_per_A"]
    assert mae == pytest.approx(beside["backbone"]["overall"]["forces"]["mae_meV_per_A"], rel=1e-5)
    table = mmea("evaluate", DEFAULT_BACKBONE, test).stdout
    assert f"{mae:.2f}" in table
    assert "the backbone's own reference energies" in table
    refused = mmea("evaluate", DEFAULT_BACKBONE, test, "--backbone", "mmea-organic-s")
    assert refused.exit_code == 1
    assert "not an adapter" in refused.stderr


def test_finetune_refuses_an_element_that_the_backbone_lacks_and_writes_nothing(tmp_path: Path) -> None:
    text = (DATA / "train.xyz").read_text().splitlines(keepends=True)[:23]
    text[2] = text[2].replace("C", "Fe", 1)
    (tmp_path / "t.xyz").write_text("".join(text))
    result = mmea("finetune", tmp_path / "t.xyz", "-o", tmp_path / "a.adapter")
    assert result.exit_code == 1
    assert "Fe" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.xyz"]


def test_backbone_list_and_show_name_the_embedded_one() -> None:
    rows = json.loads(mmea("backbone", "list", "--json").stdout)
    assert {DEFAULT_BACKBONE, "mmea-organic-s", "mace-off23-medium"} <= {r["name"] for r in rows}
    shown = json.loads(mmea("backbone", "show", "mmea-organic-s", "--json").stdout)
    assert shown["n_parameters"] == 325328
    assert shown["fingerprint"][:16] in mmea("backbone", "show", "mmea-organic-s").stdout


def test_check_md_runs_dynamics_and_keeps_the_verdict_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmea_calc.adapter_file import read_adapter
    from mmea_calc.md import stability

    monkeypatch.setattr("mmea_calc.md.quick_check", partial(stability.quick_check, time_ps=0.008), raising=False)
    frames = (DATA / "train.xyz").read_text().splitlines(keepends=True)
    (tmp_path / "train.xyz").write_text("".join(frames[: 6 * 23]))
    path = tmp_path / "tiny.adapter"
    result = mmea("finetune", tmp_path / "train.xyz", DATA / "isolated_atoms.xyz", "-o", path, "--epochs", 2,
                  "--method", "gates", "--gate-rank", 2, "--lr", 1e-3, "--batch-size", 1,
                  "--valid-fraction", 0.4, "--check-md")  # fmt: skip
    assert result.exit_code == 0, result.output
    verdict = read_adapter(path).checks["dynamics"]
    assert verdict["passed"] is True
    assert [row["target_K"] for row in verdict["replicas"]] == [300.0, 600.0, 1200.0]
    assert "passed" in result.output


@pytest.mark.parametrize(
    ("busy", "threads", "says"), [(1.2, 2, True), (0.1, 2, False), (1.2, 1, False), (3.9, 4, True)]
)
def test_a_busy_machine_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], busy: float, threads: int, says: bool
) -> None:
    from mmea_cli import machine

    monkeypatch.setattr(machine, "n_cores", lambda: 2 if threads < 4 else 4)
    monkeypatch.setattr(machine, "load", lambda: busy)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    machine.warn_if_busy("cpu")
    said = capsys.readouterr().err
    assert ("mmea --threads 1" in said) == says
    assert (f"{busy} of" in said) == says
    machine.warn_if_busy("cuda:1")
    assert capsys.readouterr().err == ""


def test_the_load_is_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmea_cli import machine

    # user, nice, system, idle, iowait, ...: of 100 ticks of four cores, 50 were idle
    ticks = iter([[0, 0, 0, 0, 0, 0, 0, 0], [30, 10, 10, 45, 5, 0, 0, 0]])
    monkeypatch.setattr(machine, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(machine, "n_cores", lambda: 4)
    assert machine.load() == pytest.approx(2.0)

    def no_such_file() -> list[int]:
        raise FileNotFoundError

    monkeypatch.setattr(machine, "_ticks", no_such_file)
    assert machine.load() == 0


def test_threads_are_those_asked_for() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        assert CliRunner().invoke(app, ["--threads", "2", "backbone", "list"]).exit_code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert CliRunner().invoke(app, ["--threads", "0", "backbone", "list"]).exit_code == 2


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_computed(adapter: Path, tmp_path: Path) -> None:
    absent = tmp_path / "nowhere"
    wrong = mmea("evaluate", adapter, adapter.parent / "train.xyz", "--plot", tmp_path / "p.txt")
    assert wrong.exit_code == 1
    assert "p.txt is no name for a picture: expected one that ends in .png" in wrong.stderr
    result = mmea("evaluate", adapter, adapter.parent / "train.xyz", "--plot", absent / "p.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{absent}: no such file or directory" in result.stderr


def test_an_adapter_of_another_name_is_one_everywhere(adapter: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "mine"
    renamed.write_bytes(adapter.read_bytes())
    write(tmp_path / "start.xyz", molecule("H2O"))
    result = mmea("md", renamed, tmp_path / "start.xyz", "--time", "4fs", "-o", tmp_path / "RUN")
    assert result.exit_code == 0, result.output


def test_training_goes_on_on_the_backbone_of_the_adapter_that_it_starts_from(adapter: Path, tmp_path: Path) -> None:
    data = [adapter.parent / "train.xyz", DATA / "isolated_atoms.xyz", "--config", adapter.parent / "config.yaml"]
    options = ["--epochs", 1, "--valid-fraction", 0.4, "-o"]
    other = tmp_path / "other.adapter"
    mmea("finetune", *data, "--backbone", "mmea-organic-s3", *options, other)
    again = mmea("finetune", *data, "--init", other, *options, tmp_path / "again.adapter")
    assert "mmea-organic-s3 (fingerprint" in again.output
    assert json.loads(mmea("info", tmp_path / "again.adapter", "--json").stdout)["backbone"] == "mmea-organic-s3"


def test_starting_from_an_adapter_whose_backbone_is_a_file_says_so(adapter: Path, tmp_path: Path) -> None:
    file = read_adapter(adapter)
    write_adapter(stray := tmp_path / "stray.adapter", replace(file, backbone="my-own"))
    data = [adapter.parent / "train.xyz", DATA / "isolated_atoms.xyz"]
    result = mmea("finetune", *data, "--init", stray, "-o", tmp_path / "again.adapter")
    assert result.exit_code == 1
    assert "was made for backbone 'my-own', which is not found by that name" in result.stderr
    assert "--backbone" in result.stderr
