"""`mmea md`: molecular dynamics of many replicas as one batch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import OwnBackbone, OwnDevice, OwnDtype, OwnHead, OwnKernels
from .progress import duration
from .units import femtoseconds, per_femtosecond

if TYPE_CHECKING:
    from mmea_calc.config import MDConfig
    from mmea_calc.md.run import MDProgress
    from mmea_calc.md.summary import ReplicaSummary, Summary

RUN, OUTPUT, WATCH = "Dynamics", "Output", "Watching"


def md(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An .adapter file, or name or path of a backbone.", show_default=False),
    ],
    start: Annotated[
        Path, typer.Argument(metavar="START", help="Start structures, any file ASE reads.", show_default=False)
    ],
    temperature: Annotated[
        list[float] | None,
        typer.Option(metavar="K...", help="One or more, K: --temperature 300 600 1200.", rich_help_panel=RUN),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Runs per structure and temperature.", rich_help_panel=RUN)
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Total length: 20ps. With --resume, earlier parts included.", rich_help_panel=RUN)
    ] = None,
    timestep: Annotated[str | None, typer.Option(help="Such as 0.5fs.", rich_help_panel=RUN)] = None,
    friction: Annotated[
        str | None, typer.Option(help="Of the Langevin thermostat: 0.01/fs.", rich_help_panel=RUN)
    ] = None,
    ensemble: Annotated[
        Literal["nvt", "nve"] | None, typer.Option(help="Langevin or velocity Verlet.", rich_help_panel=RUN)
    ] = None,
    minimize: Annotated[
        bool | None, typer.Option("--minimize", help="Relax the start structures first.", rich_help_panel=RUN)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all random numbers.", rich_help_panel=RUN)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; START's name with .md if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the run folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run an adapter that is not equivariant.")] = False,
    traj_every: Annotated[int | None, typer.Option(help="Steps between frames.", rich_help_panel=OUTPUT)] = None,
    stats_every: Annotated[int | None, typer.Option(help="Steps between energies.", rich_help_panel=OUTPUT)] = None,
    restart_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", rich_help_panel=OUTPUT)
    ] = None,
    positions_dtype: Annotated[
        Literal["float32", "float64"] | None, typer.Option(help="Of stored positions.", rich_help_panel=OUTPUT)
    ] = None,
    velocities: Annotated[
        bool | None, typer.Option("--velocities/--no-velocities", help="Store velocities.", rich_help_panel=OUTPUT)
    ] = None,
    drift_every: Annotated[
        int | None,
        typer.Option(help="Steps between comparisons with the bare backbone; 0: never.", rich_help_panel=WATCH),
    ] = None,
    max_temperature: Annotated[
        float | None, typer.Option("--max-temperature", help="Bound in K.", rich_help_panel=WATCH)
    ] = None,
    max_force: Annotated[
        float | None, typer.Option("--max-force", help="Bound in eV/A.", rich_help_panel=WATCH)
    ] = None,
    backbone: OwnBackbone = None,
    head: OwnHead = None,
    device: OwnDevice = None,
    dtype: OwnDtype = None,
    kernels: OwnKernels = "own",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run molecular dynamics: every structure at every temperature, all replicas as one batch."""
    flags: dict[str, Any] = {
        "temperatures_K": tuple(temperature) if temperature else None,
        "time_ps": None if time is None else femtoseconds(time, "'--time'") / 1000,
        "timestep_fs": None if timestep is None else femtoseconds(timestep, "'--timestep'"),
        "friction_per_fs": None if friction is None else per_femtosecond(friction, "'--friction'"),
        "max_temperature_K": max_temperature,
        "max_force_eV_per_A": max_force,
    }
    same = "replicas ensemble minimize seed traj_every stats_every restart_every positions_dtype velocities"
    given = locals()
    flags |= {name: given[name] for name in [*same.split(), "drift_every", "device", "dtype"]}
    from mmea_calc.config import MDConfig

    config = MDConfig(**{k: v for k, v in flags.items() if v is not None})
    folder = output or start.with_suffix(".md")
    summary = _run(
        adapter,
        start,
        folder,
        config,
        dict(backbone=backbone, head=head, kernels=kernels),
        dict(resume=resume, overwrite=overwrite, force=force),
    )
    _print(summary, folder, as_json)
    if summary.steps < config.n_steps and len(summary.failed) < len(summary.replicas):
        raise KeyboardInterrupt(f"at step {summary.steps} of {config.n_steps}; go on with --resume")
    if summary.failed:
        raise typer.Exit(1)


def _run(
    adapter: str,
    start: Path,
    folder: Path,
    config: MDConfig,
    model: dict[str, Any],
    switches: dict[str, bool],
) -> Summary:
    from ase.io import read
    from rich.console import Console

    from mmea_calc.adapter_file import is_adapter, read_adapter
    from mmea_calc.errors import DataError
    from mmea_calc.md import open_potential, run_md

    from .machine import warn_if_busy

    if not start.is_file():
        raise DataError(f"{start}: no such file with start structures")
    try:
        starts = read(start, index=":")
    except Exception as problem:  # whatever a reader of ASE raises for a file that it does not understand
        raise DataError(f"{start} cannot be read as structures: {problem}") from problem
    warn_if_busy(config.device)
    numbers = {int(z) for atoms in starts for z in atoms.numbers}
    if is_adapter(adapter) and (unseen := read_adapter(adapter).unseen(numbers)):
        typer.echo(f"warning: {adapter} has seen no {', '.join(unseen)} in training: there it extrapolates", err=True)
    potential = open_potential(adapter, device=config.device, dtype=config.dtype, **model)
    with _Display(Console(stderr=True), config.timestep_fs) as display, _until_signal() as go_on:
        return run_md(potential, starts, folder, config, **switches, progress=display, go_on=go_on)


@contextmanager
def _until_signal() -> Iterator[Callable[[int], bool]]:
    """True until Ctrl-C is pressed within this context, or a queue asks the process to end; the second time it ends."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        _echo("mmea: stopping after this sample; once more to stop at once")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell has its background processes ignore Ctrl-C.
    listened = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in listened:
        signal.signal(number, note)
    try:
        yield lambda step: not asked
    finally:
        for number in listened:
            signal.signal(number, before[number] or signal.SIG_DFL)


def _echo(text: str) -> None:
    """A line on standard error; whoever reads it may be gone (`2>&1 | tee log` and Ctrl-C), and the run goes on."""
    with suppress(OSError):
        typer.echo(text, err=True)


class _Display:
    """A bar on a terminal; in a file or pipe a line at every tenth of the run. On standard error."""

    def __init__(self, console: Any, timestep_fs: float) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._timestep_fs, self._last_tenth = timestep_fs, -1
        columns = (TextColumn("{task.fields[time]}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._live = console.is_terminal
        self._task = self._bar.add_task("", total=None, time="", text="")

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, event: MDProgress) -> None:
        if event.message:
            if self._live:
                self._bar.console.print(event.message, markup=False, highlight=False, soft_wrap=True)
            else:
                _echo(event.message)
            return
        ps, total = (n * self._timestep_fs / 1000 for n in (event.step, event.n_steps))
        failed = event.n_replicas - event.n_alive
        text = f"{event.replica_steps_per_s:.0f} replica-steps/s, {duration(event.seconds_left)} left"
        text += f", {failed} of {event.n_replicas} failed" if failed else ""
        times = f"{ps:.3f} of {total:g} ps"
        if self._live:
            self._bar.update(self._task, completed=event.step, total=event.n_steps, time=times, text=text)
        elif (tenth := 10 * event.step // event.n_steps) > self._last_tenth:
            self._last_tenth = tenth
            _echo(f"{times}, {text}")


def _print(summary: Summary, folder: Path, as_json: bool) -> None:
    from .console import out, print_json, say, table

    if as_json:
        print_json(summary.to_dict())
        return
    names = ["replica", "asked\nK", "reached\nK", "±", "drift\nmeV/atom/ps", "±", "run\nps", "stable\nps"]
    watched = ["gate\nexcess", "adapted - bare\neV/Å"]
    rows = [_row(r) for r in summary.replicas]
    out().print(table([*names, *watched], rows))
    for replica in summary.replicas:
        for event in replica.events:
            say(str(event))
    rate = summary.replica_steps_per_s
    speed = f", {rate:.0f} replica-steps per second" if rate else ""
    say(f"{folder}: {len(rows)} replicas, {len(summary.failed)} failed, {summary.steps} steps{speed}")


def _row(r: ReplicaSummary) -> tuple[Any, ...]:
    temperatures = (r.target_K, r.temperature_K, r.temperature_error_K)
    drift = (r.drift_meV_per_atom_ps, r.drift_error_meV_per_atom_ps)
    return (r.replica, *temperatures, *drift, r.length_ps, r.stable_ps, r.largest_gate_excess,
            r.adapted_minus_bare_eV_per_A)  # fmt: skip
