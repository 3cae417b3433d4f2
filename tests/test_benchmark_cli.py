"""`mmea benchmark` and `mmea compare`: what they print and write, their exit codes, and several values of an option."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from ase import Atoms
from ase.io import write
from commands import mmea
from test_finetuning import labelled as make_labelled
from test_finetuning import tiny_backbone as make_backbone
from typer.testing import CliRunner, Result

from mmea_calc.backbone import Backbone
from mmea_calc.benchmark import BenchmarkEvent, runner, training
from mmea_calc.errors import TrainingError
from mmea_calc.training.trainer import ProgressEvent
from mmea_cli.several import any_word, is_number, several_values

QUICK = ["--epochs", "1", "--device", "cpu", "--E0s", "backbone"]


@cache
def labelled(n: int, seed: int = 0) -> list[Atoms]:
    return make_labelled(n, seed=seed)


@cache
def tiny_backbone() -> Backbone:
    return make_backbone()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny backbone, no pictures of single trainings, and a folder of its own to work in."""
    monkeypatch.setattr(runner, "load_backbone", lambda *args, **options: tiny_backbone())
    for name in ("learning_curve", "parity"):
        monkeypatch.setattr(f"mmea_calc.plots.{name}", lambda *args, **options: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Training and test structures, and the same in the layout of rMD17."""
    folder = tmp_path / "rmd17" / "ethanol"
    folder.mkdir(parents=True)
    for name, n, seed in (("train", 8, 0), ("test", 4, 1)):
        for file in (folder / f"{name}.xyz", tmp_path / f"{name}.xyz"):
            write(file, labelled(n, seed), format="extxyz")
    return tmp_path / "rmd17"


def benchmark(data: Path, *more: object) -> Result:
    return mmea("benchmark", "rmd17", "--data", data, "-o", "R", *QUICK, *more)


def test_a_benchmark_prints_the_table_and_writes_its_files(data: Path) -> None:
    result = benchmark(data, "--methods", "gates:gate_rank=2", "full", "--seeds", 1, 2)
    assert result.exit_code == 0, result.output
    assert "[4/4] ethanol, full, seed 2: validation MAE" in result.output
    lines = result.output.splitlines()
    order = [i for label in ("backbone alone", "gates:gate_rank=2  ", "full  ", "full, published") for i, line in
             enumerate(lines) if line.strip().startswith(label)]  # fmt: skip
    assert len(order) == 4
    assert order == sorted(order)
    assert " ± " in result.output
    assert "arXiv 2511.06696, fine-tuned from MACE-OFF23 medium" in result.output
    assert {p.name for p in Path("R").iterdir()} == {
        "cells", "cells.csv", "results.csv", "results.md", "results.png", "settings.json",
    }  # fmt: skip
    assert len(list(Path("R/cells").glob("*.adapter"))) == len(list(Path("R/cells").glob("*.json"))) == 4


def test_a_dry_run_lists_the_cells_and_writes_nothing(data: Path) -> None:
    result = benchmark(data, "--methods", "full", "mmea:gate_rank=32", "--seeds", 1, 2, 3, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "cells: 6 to do; nothing was trained" in result.output
    assert sum("mmea:gate_rank=32" in line for line in result.output.splitlines()) == 3
    assert not Path("R").exists()
    assert benchmark(data, "--methods", "readout", "--seeds", 1).exit_code == 0
    again = benchmark(data, "--methods", "readout", "--seeds", 1, 2, "--dry-run")
    assert "cells: 1 finished, 1 to do" in again.output


def test_what_is_missing_is_said(data: Path) -> None:
    (data / "ethanol" / "test.xyz").unlink()
    result = benchmark(data, "--methods", "readout", "--seeds", 1)
    assert result.exit_code == 0, result.output
    assert "test.xyz is missing: its column is left out" in result.output
    assert "validation" in Path("R/results.md").read_text()


def test_a_failed_cell_is_in_the_table_and_the_exit_code_is_1(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = training.finetune

    def fail(*args: Any, **options: Any) -> Any:
        if options["adapter"].method == "full":
            raise TrainingError("the loss is nan")
        return train(*args, **options)

    monkeypatch.setattr(training, "finetune", fail)
    result = benchmark(data, "--methods", "full", "readout", "--seeds", 1)
    assert result.exit_code == 1
    assert "[1/2] ethanol, full, seed 1: failed: the loss is nan" in result.output
    assert "0, 1 failed" in result.output
    assert "mmea: 1 of 2 cells failed" in result.stderr
    assert "- ethanol, full, seed 1: the loss is nan" in Path("R/results.md").read_text()
    assert "`readout`" in Path("R/results.md").read_text()


def test_an_interrupt_leaves_the_finished_cells_and_exits_with_130(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = training.finetune

    def interrupt(*args: Any, **options: Any) -> Any:
        if options["adapter"].method == "full":
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(training, "finetune", interrupt)
    result = benchmark(data, "--methods", "readout", "full", "--seeds", 1)
    assert result.exit_code == 130
    assert "1 of 2 cells are finished and kept in R" in result.output
    assert "readout" in Path("R/results.md").read_text()
    monkeypatch.setattr(training, "finetune", train)
    result = benchmark(data, "--methods", "readout", "full", "--seeds", 1)
    assert result.exit_code == 0, result.output
    assert "[1/2] ethanol, readout, seed 1: validation MAE" in result.output
    assert result.output.count(", kept\n") == 1


def test_other_settings_are_one_line_and_exit_with_1(data: Path) -> None:
    assert benchmark(data, "--methods", "readout", "--seeds", 1).exit_code == 0
    before = {p: p.read_bytes() for p in Path("R").rglob("*") if p.is_file()}
    result = benchmark(data, "--methods", "readout", "--seeds", 1, "--recipe", "paper", "--epochs", 1)
    assert result.exit_code == 1
    assert result.stderr.startswith("mmea: R was begun with other settings: recipe was not given, is paper")
    assert result.stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in Path("R").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["benchmark", "nonsense", "--data", ".", "-o", "R"],
        ["benchmark", "rmd17", "-o", "R"],
        ["benchmark", "rmd17", "--data", "."],
        ["benchmark", "rmd17", "--data", ".", "-o", "R", "--seeds", "-1"],
        ["compare", "train.xyz"],
        ["compare", "-o", "C", "--methods", "mmea", "train.xyz"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert mmea(*arguments).exit_code == 2


def test_a_comparison_ends_in_one_recommendation_with_its_figures(data: Path) -> None:
    arguments = ["compare", "train.xyz", "--test", "test.xyz", "--valid-fraction", 0.25, "-o", "C", *QUICK,
                 "--methods", "gates:gate_rank=2", "full", "--seeds", 1, 2]  # fmt: skip
    result = mmea(*arguments)
    assert result.exit_code == 0, result.output
    assert "also in train" in result.output
    assert "validation" in result.output
    recommended = [line for line in result.output.splitlines() if line.startswith("Recommended: ")]
    assert len(recommended) == 1
    assert "validation" in recommended[0]
    assert "meV/Å" in recommended[0]
    method = recommended[0].removeprefix("Recommended: ").split(". ")[0]
    assert method in ("gates:gate_rank=2", "full", "the backbone alone")
    assert recommended[0] in Path("C/results.md").read_text()
    if method != "the backbone alone":
        named = result.output.splitlines()[-1].rsplit(" ", 1)[1]
        assert Path(named).suffix == ".adapter"
        assert Path(named).is_file()
    again = mmea(*arguments)
    assert again.output.count(", kept\n") == 4
    assert recommended[0] in again.output
    # One of the methods alone, all of whose trainings are there: the folder's table is what is judged.
    alone = mmea(*arguments[: arguments.index("--methods")], "--methods", "full", "--seeds", 1, 2)
    assert recommended[0] in alone.output
    assert recommended[0] in Path("C/results.md").read_text()


def test_a_comparison_with_other_test_structures_measures_all_on_them(data: Path) -> None:
    def compare(method: str, *more: str) -> str:
        result = mmea("compare", "train.xyz", "-o", "C", *QUICK, "--methods", method, *more)
        assert result.exit_code == 0, result.output
        return result.output

    write("other.xyz", labelled(3, 2), format="extxyz")
    compare("readout", "--test", "test.xyz")
    output = compare("gates:gate_rank=2", "--test", "other.xyz")
    assert "train, readout, seed 1: measured on the test structures as they are now" in output
    with Path("C/cells.csv").open() as file:
        assert [line["structures"] for line in csv.DictReader(file) if line["set"] == "test"] == ["3", "3"]
    next(Path("C/cells").glob("train-gates*.adapter")).unlink()
    output = compare("readout", "--test", "test.xyz")
    assert "Left out of train → test, since measured on other test structures: gates:gate_rank=2 seed 1." in output


def test_where_no_method_can_be_recommended_the_table_comes_before_the_verdict(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", "train.xyz", *QUICK, "--seeds", 1, "--methods"]
    result = mmea(*arguments, "bottleneck:gate_rank=2", "-o", "C")
    verdict = "no method can be recommended: bottleneck:gate_rank=2 is not considered"
    assert result.exit_code == 1
    assert result.stderr.startswith(f"mmea: {verdict}")
    assert "bottleneck:gate_rank=2 (not equivariant)" in result.stdout
    assert {p.name for p in Path("C").iterdir()} >= {"cells.csv", "results.csv", "results.md", "results.png"}
    assert verdict in Path("C/results.md").read_text()

    def fail(*args: Any, **options: Any) -> Any:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(training, "finetune", fail)
    result = mmea(*arguments, "readout", "-o", "F")
    assert result.exit_code == 1
    assert [line.split(" (")[0] for line in result.stderr.splitlines()] == [
        "mmea: no method can be recommended: readout is not considered: 0 of 1 trainings finished",
        "mmea: 1 of 1 cells failed, for the reasons above; the same command tries them again",
    ]
    assert any(line.split() == ["readout", "-", "-", "-", "0,", "1", "failed"] for line in result.stdout.splitlines())
    assert "the loss is nan" in Path("F/results.md").read_text()


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from typer.testing import CliRunner; from mmea_cli.main import app; "
        "results = [CliRunner().invoke(app, [name, '--help']).exit_code for name in ('benchmark', 'compare')]; "
        "print(results, [m for m in ('torch', 'ase', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 0] []"


def test_an_option_takes_every_word_up_to_the_next_one() -> None:
    inner = typer.Typer()

    @inner.command(cls=several_values({"--words": any_word, "--numbers": is_number}))
    def command(
        name: str,
        words: Annotated[list[str] | None, typer.Option()] = None,
        numbers: Annotated[list[float] | None, typer.Option()] = None,
    ) -> None:
        typer.echo(f"{name} {words} {numbers}")

    def said(*arguments: str) -> str:
        return CliRunner().invoke(inner, arguments).output.strip()

    assert said("x", "--words", "a", "b:c=1", "--numbers", "1", "-2") == "x ['a', 'b:c=1'] [1.0, -2.0]"
    assert said("--numbers", "1", "2", "x") == "x None [1.0, 2.0]"
    assert said("x", "--words", "a", "--words", "b", "c") == "x ['a', 'b', 'c'] None"


def test_without_a_terminal_a_cell_reports_at_every_tenth_and_messages_once(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from mmea_cli.cells import CellsDisplay

    class Cell:
        title = "a cell"

    def event(what: Any, **more: Any) -> BenchmarkEvent:
        return BenchmarkEvent(what, Cell(), 1, 2, **more)  # type: ignore[arg-type]

    with CellsDisplay(Console(force_terminal=False), whole_report=False) as display:
        for _ in range(2):
            display(event("begin"))
            display(event("training", training=ProgressEvent(message="a note")))
            for epoch in range(1, 101):
                training = ProgressEvent(epoch, 100, 1.0, 0.5, 0.5, 3.0, 40.0, 1.0, 1.0)
                display(event("training", training=training))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 20
    assert lines.count("a note") == 1
    assert lines.count("[1/2] a cell") == 2
