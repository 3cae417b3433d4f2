"""`mmea md` and `mmea convert`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from commands import mmea

from mmea_calc.md.run import MDProgress
from mmea_calc.md.trajectory import read_settings, replica_names
from mmea_cli.md import _until_signal
from mmea_cli.units import femtoseconds, per_femtosecond


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def water(tmp_path: Path) -> Path:
    write(path := tmp_path / "water.xyz", molecule("H2O"))
    return path


def test_times_and_rates_are_read_with_their_units() -> None:
    assert femtoseconds("20ps", "") == 20_000
    assert femtoseconds("0.5 fs", "") == 0.5
    assert femtoseconds("1e-3ns", "") == 1000
    assert per_femtosecond("0.01/fs", "") == 0.01
    assert per_femtosecond("10/ps", "") == 0.01
    for wrong in ("20", "ps", "20 m", "nanps", "xfs"):
        with pytest.raises(typer.BadParameter, match="such as 20ps"):
            femtoseconds(wrong, "'--time'")
    for wrong in ("0.01", "0.01fs", "0.01/s", "x/fs"):
        with pytest.raises(typer.BadParameter, match=r"such as 0\.01/fs"):
            per_femtosecond(wrong, "'--friction'")


def test_a_run_its_continuation_and_its_conversion(tmp_path: Path, water: Path) -> None:
    folder = tmp_path / "RUN"
    options = ["-o", folder, "--replicas", "2", "--stats-every", "2", "--traj-every", "2", "--timestep", "1fs"]
    backbone = ["mmea-organic-s", water, "--temperature", "300", "600"]
    first = mmea("md", *backbone, *options, "--time", "8fs")
    assert first.exit_code == 0, first.output
    assert "start0-600K-1" in first.stdout
    assert "4 replicas, 0 failed, 8 steps" in first.stdout
    assert read_settings(folder)["temperatures_K"] == [300.0, 600.0]

    refused = mmea("md", *backbone, *options, "--time", "12fs")
    assert refused.exit_code == 1
    assert "--resume" in refused.stderr
    more = mmea("md", *backbone, *options, "--time", "12fs", "--resume", "--json")
    assert more.exit_code == 0, more.output
    assert json.loads(more.stdout)["steps"] == 12
    assert len(replica_names(folder)) == 4

    converted = mmea("convert", folder / "trajectory.h5", tmp_path / "out.xyz", "--replica", "start0-300K-1")
    assert converted.exit_code == 0, converted.output
    assert len(read(tmp_path / "out.xyz", index=":")) == 7


def test_temperatures_may_stand_before_the_arguments_and_repeat(tmp_path: Path, water: Path) -> None:
    folder = tmp_path / "RUN"
    options = ["--time", "1fs", "-o", folder, "--temperature", "100", "200", "--temperature", "3e2"]
    result = mmea("md", *options, "mmea-organic-s", water)
    assert result.exit_code == 0, result.output
    assert read_settings(folder)["temperatures_K"] == [100.0, 200.0, 300.0]


def test_a_failed_replica_is_told_by_the_exit_code(tmp_path: Path, water: Path) -> None:
    result = mmea("md", "mmea-organic-s", water, "--time", "4fs", "--max-temperature", "1e-3", "-o", tmp_path / "RUN")
    assert result.exit_code == 1
    assert "failed at 0 ps" in result.stdout


@pytest.fixture
def _as_in_a_terminal() -> Iterator[None]:
    """Signals are heard; tests in a background process of a shell would have Ctrl-C ignored."""
    own: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_run_where_it_can_be_gone_on_with(
    tmp_path: Path, water: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def press(self: object, event: MDProgress) -> None:
        if event.step == 4 and event.message is None:
            os.kill(os.getpid(), number)

    every = ["--stats-every", "2", "--traj-every", "2", "--timestep", "1fs", "--time", "8fs"]
    command = ["md", "mmea-organic-s", water, "-o", tmp_path / "RUN", "--temperature", "300", *every]
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("mmea_cli.md._Display.__call__", press)
        stopped = mmea(*command)
    assert stopped.exit_code == 130
    assert stopped.stderr.splitlines()[-1] == "mmea: interrupted: at step 4 of 8; go on with --resume"
    assert signal.getsignal(number) is before
    finished = mmea(*command, "--resume", "--json")
    assert finished.exit_code == 0, finished.output
    assert json.loads(finished.stdout)["steps"] == 8


@pytest.mark.usefixtures("_as_in_a_terminal")
def test_a_signal_is_heard_when_nobody_reads_the_terminal_and_not_when_it_is_to_be_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(typer, "echo", gone)
    with _until_signal() as go_on:
        assert go_on(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not go_on(0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _until_signal() as go_on:
        os.kill(os.getpid(), signal.SIGINT)
        assert go_on(0)


def test_wrong_input_is_one_line_and_writes_nothing(tmp_path: Path, water: Path) -> None:
    write(gold := tmp_path / "gold.xyz", Atoms("Au"))
    (tmp_path / "broken.xyz").write_text("three\n")
    out = ["-o", tmp_path / "RUN"]
    for arguments, words in (
        (["no-such-backbone", water], "no backbone"),
        (["mmea-organic-s", gold], "Au"),
        (["mmea-organic-s", tmp_path / "broken.xyz"], "cannot be read"),
        (["mmea-organic-s", tmp_path / "nothing.xyz"], "no such file"),
        (["mmea-organic-s", water, "--stats-every", "3"], "must divide"),
        (["mmea-organic-s", water, "--resume"], "no run to resume"),
        ([tmp_path / "nothing.adapter", water], "no such adapter"),
    ):
        result = mmea("md", *arguments, *out)
        assert result.exit_code == 1, result.output
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert mmea("md", "mmea-organic-s", water, "--time", "20", *out).exit_code == 2
    assert not (tmp_path / "RUN").exists()
