"""What `mmea benchmark` and `mmea compare` share: options, progress cell by cell, the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from .progress import TrainingDisplay, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from mmea_calc.benchmark import BenchmarkEvent, CellResult, ResultTable, Task
    from mmea_calc.benchmark.table import Column, Row
    from mmea_calc.config import BenchmarkConfig
    from mmea_calc.data.preflight import PreflightReport

# More columns than this do not fit beside each other.
WIDEST = 5
STATES = {"finished": "finished", "failed": "failed, is tried again", "interrupted": "goes on", "to do": "to do"}


def settings(**given: Any) -> BenchmarkConfig:
    """The library's defaults with what was given on the command line."""
    from mmea_calc.config import BenchmarkConfig

    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v not in (None, [])
    }
    return BenchmarkConfig(**values)


def list_cells(task: Task, folder: Path, config: BenchmarkConfig) -> None:
    """What would be done (--dry-run)."""
    from mmea_calc.benchmark import plan

    from .console import out, say, table

    cells = plan(task, folder, config)
    rows = [
        (
            c.system.name,
            c.method.label,
            str(c.seed),
            c.training.epochs or "open",
            c.training.dtype,
            STATES[c.state()],
        )
        for c in cells
    ]
    out().print(table(["trained on", "method", "seed", "epochs", "precision", ""], rows))
    counts = Counter(c.state() for c in cells)
    say(f"cells: {', '.join(f'{n} {state}' for state, n in counts.items())}; nothing was trained")


def train_cells(task: Task, folder: Path, config: BenchmarkConfig, *, whole_report: bool) -> list[CellResult]:
    """Train what is not finished; results of this call's cells."""
    from mmea_calc.benchmark import plan, run, write_tables

    from .console import out, say

    with CellsDisplay(out(), whole_report=whole_report) as display:
        try:
            return run(task, folder, config, progress=display, after_cell=lambda: write_tables(task, folder, config))
        except KeyboardInterrupt:
            display.stop()
            cells = plan(task, folder, config)
            finished = sum(c.state() == "finished" for c in cells)
            say(f"{finished} of {len(cells)} cells are finished and kept in {folder}; the same command goes on")
            raise


class CellsDisplay:
    """Call it with every BenchmarkEvent, inside `with`: a line when a cell begins and ends, its training between."""

    def __init__(self, console: Console, *, whole_report: bool) -> None:
        self._console, self._whole_report = console, whole_report
        self._training: TrainingDisplay | None = None
        self._told: set[str] = set()
        self._tenth = 0

    def __enter__(self) -> CellsDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._training is not None:
            self._training.__exit__(None, None, None)
            self._training = None

    def __call__(self, event: BenchmarkEvent) -> None:
        from .console import say

        if event.what == "training":
            self._train(event)
            return
        self.stop()
        if event.what == "report":
            assert event.system is not None
            assert event.report is not None
            _show_report(event.system.name, event.report, whole=self._whole_report)
            return
        assert event.cell is not None
        if event.what == "measured":
            say(f"{event.cell.title}: measured on the test structures as they are now")
            return
        place = f"[{event.number}/{event.total}] {event.cell.title}"
        if event.what == "begin":
            say(place)
            self._tenth = 0
            self._training = TrainingDisplay(self._console).__enter__()
        elif event.what == "elsewhere":
            say(f"{place}: another process is at it")
        elif event.result is not None:
            say(f"{place}: {_outcome(event.what, event.result)}", style="red" if event.what == "failed" else None)

    def _train(self, event: BenchmarkEvent) -> None:
        """Messages once in a benchmark, not once in a cell; without a terminal, a line at every tenth of a cell."""
        training = event.training
        if self._training is None or training is None:
            return
        if training.message:
            if training.message in self._told:
                return
            self._told.add(training.message)
        elif not self._console.is_terminal:
            if (tenth := 10 * training.epoch // max(training.epochs, 1)) == self._tenth:
                return
            self._tenth = tenth
        self._training(training)


def _outcome(what: str, result: CellResult) -> str:
    if not result.finished:
        return f"failed: {result.reason}"
    errors = result.errors["valid"].fine_tuned
    pairs = ((errors.energy_mae, "meV"), (errors.forces_mae, "meV/Å"))
    figures = " and ".join(f"{value:.1f} {unit}" for value, unit in pairs if value is not None)
    kept = ", kept" if what == "kept" else ""
    return f"validation MAE {figures}, trained in {duration(result.seconds)}{kept}"


def _show_report(name: str, report: PreflightReport, *, whole: bool) -> None:
    from .console import out, say, table

    if whole:
        out().print(table(["Data", *report.columns[1:]], report.rows))
        for note in report.notes:
            say(f"note: {note}")
    for warning in report.warnings:
        say(f"warning: {name}: {warning}", style="yellow")


def show_table(result: ResultTable, sentences: Sequence[str]) -> None:
    """Print the table, five columns at a time, and what explains it."""
    from mmea_calc.benchmark import published_sentence

    from .console import out, say

    for start in range(0, max(len(result.columns), 1), WIDEST):  # trainings that failed have no columns
        out().print(_part(result, slice(start, start + WIDEST), last=start + WIDEST >= len(result.columns)))
    for sentence in (*sentences, *result.notes):
        say(sentence)
    if result.published_backbone is not None:
        say(published_sentence(result))
    for failure in result.failures:
        say(f"failed: {failure}", style="red")


def _part(result: ResultTable, columns: slice, *, last: bool) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mmea_calc.benchmark.report import numbers

    title = f"{result.title}: {result.measure.upper()}, energy (meV) over forces (meV/Å)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in result.headings[columns]:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for heading in ("parameters", "file, kB", "min", "trainings") if last else ():
        table.add_column(heading, justify="right")
    for row in result.rows:
        cells = [_errors(result, row, column) for column in result.columns[columns]]
        more = [Text(n) for n in numbers(row)] if last else []
        style = "dim" if row.kind == "published" else ""
        table.add_row(Text(row.label), *cells, *more, style=style, end_section=_ends(result, row))
    return table


def _ends(result: ResultTable, row: Row) -> bool:
    """Whether a method's rows end here: its published figures belong to it."""
    i = result.rows.index(row)
    return i + 1 == len(result.rows) or result.rows[i + 1].kind != "published"


def _errors(result: ResultTable, row: Row, column: Column) -> Text:
    from rich.text import Text

    from mmea_calc.benchmark.table import QUANTITIES

    entry = row.entries.get(column)
    lines = Text()
    for quantity in QUANTITIES:
        value = None if entry is None else entry.of(quantity)
        best = (row.label, column, quantity) in result.best
        lines.append("\n" if len(lines) else "")
        lines.append("-" if value is None else str(value), style="bold" if best else "")
    return lines


def conclude(results: Sequence[CellResult]) -> None:
    """A failure if some cell has failed. Raises typer.Exit."""
    failed = sum(not r.finished for r in results)
    if failed:
        typer.echo(
            f"mmea: {failed} of {len(results)} cells failed, for the reasons above; the same command tries them again",
            err=True,
        )
        raise typer.Exit(1)
