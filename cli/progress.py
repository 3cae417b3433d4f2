"""What `mmea finetune` shows while it trains: a live bar on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from mmea_calc.training.trainer import ProgressEvent


class TrainingDisplay:
    """Call it with every ProgressEvent, inside `with`.

    On a terminal: one bar with the epoch, the losses, the latest validation errors and the time left.
    Elsewhere: one line for every validation and every message.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingDisplay:
        if self._live:
            self._progress = _bar(self._console)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, event: ProgressEvent) -> None:
        validated = event.valid_energy_mae_meV_per_atom is not None or event.valid_forces_mae_meV_per_A is not None
        if self._progress is None:
            if event.message:
                typer.echo(event.message)
            if validated:
                typer.echo(plain_line(event))
            return
        if event.message:
            self._progress.console.print(event.message, markup=False, highlight=False)
        if self._task is None:
            self._task = self._progress.add_task("", total=event.epochs, losses="", errors="", left="")
        fields: dict[str, Any] = {"left": duration(event.seconds_left)}
        fields["losses"] = (
            f"loss {_figure(event.loss)} (E {_figure(event.energy_loss)}, F {_figure(event.forces_loss)}"
            f"{_stress(event, ', S ')})"
        )
        if validated:
            fields["errors"] = _errors(event)
        self._progress.update(self._task, completed=event.epoch, **fields)


def plain_line(event: ProgressEvent) -> str:
    """One validation as a line of a log."""
    return (
        f"epoch {event.epoch:>{len(str(event.epochs))}}/{event.epochs}  loss {_figure(event.loss)} "
        f"(energy {_figure(event.energy_loss)}, forces {_figure(event.forces_loss)}{_stress(event, ', stress ')})  "
        f"{_errors(event)}  "
        f"{duration(event.seconds)} gone, {duration(event.seconds_left)} left"
    )


def duration(seconds: float | None) -> str:
    """75.2 -> "1:15"."""
    if seconds is None or seconds != seconds or seconds < 0:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def _stress(event: ProgressEvent, before: str) -> str:
    return "" if event.stress_loss is None else f"{before}{_figure(event.stress_loss)}"


def _errors(event: ProgressEvent) -> str:
    return (
        f"valid {_figure(event.valid_energy_mae_meV_per_atom)} meV/atom, "
        f"{_figure(event.valid_forces_mae_meV_per_A)} meV/Å"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Within this context: call it with what is done and the total, None while that is not known.

    On a terminal one bar; elsewhere nothing, since what follows says how many there were.
    """
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int | None) -> None:
            text = f"{done:,} {what} counted" if total is None else f"{done:,} of {total:,} {what}"
            bar.update(task, description=text, total=total, completed=done)

        yield show


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[losses]}"),
        TextColumn("[bold]{task.fields[errors]}"),
        TextColumn("{task.fields[left]} left"),
        console=console,
    )
