"""`mmea check`: is a potential sound? Stability, walls, forgetting and drift, adapted beside bare backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .options import OwnBackbone, OwnDevice, OwnDtype, OwnHead
from .progress import duration
from .units import femtoseconds

if TYPE_CHECKING:
    from ase import Atoms

    from mmea_calc.check import CheckReport
    from mmea_calc.config import CheckConfig
    from mmea_calc.data.dataset import Dataset
    from mmea_calc.potential import Potential

DYNAMICS, BOUNDS = "Dynamics", "Bounds"
# The adapter's header keeps the verdict under this name among its checks.
CHECK = "soundness"


def check(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An .adapter file, or name or path of a backbone.", show_default=False),
    ],
    start: Annotated[
        Path, typer.Argument(metavar="START", help="The structure to begin from, relaxed.", show_default=False)
    ],
    labels: Annotated[
        Path | None, typer.Option(help="Structures with forces at the level the adapter was trained for.")
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="That level, such as PBE/def2-SVP; from the adapter's header if it is there.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Page of plots to write (.png, .pdf, .svg).")] = None,
    ramp_time: Annotated[str | None, typer.Option(help="Length of the ramp: 2ps.", rich_help_panel=DYNAMICS)] = None,
    ramp_to: Annotated[float | None, typer.Option(help="Its last temperature, K.", rich_help_panel=DYNAMICS)] = None,
    replicas: Annotated[int | None, typer.Option(help="Runs of the ramp.", rich_help_panel=DYNAMICS)] = None,
    nve_time: Annotated[
        str | None, typer.Option(help="Length of the runs at constant energy: 0.5ps.", rich_help_panel=DYNAMICS)
    ] = None,
    timestep: Annotated[str | None, typer.Option(help="Such as 0.5fs.", rich_help_panel=DYNAMICS)] = None,
    seed: Annotated[int | None, typer.Option(help="Of all random numbers.", rich_help_panel=DYNAMICS)] = None,
    max_forgetting: Annotated[
        float | None, typer.Option(help="Error on other molecules, times the backbone's.", rich_help_panel=BOUNDS)
    ] = None,
    max_hole_rim: Annotated[
        float | None, typer.Option(help="Holes behind a lower rim are faults, eV.", rich_help_panel=BOUNDS)
    ] = None,
    min_bond_change: Annotated[
        float | None, typer.Option(help="Bonds that change below this are a fault, K.", rich_help_panel=BOUNDS)
    ] = None,
    max_drift: Annotated[
        float | None, typer.Option(help="At constant energy, meV/atom/ps.", rich_help_panel=BOUNDS)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Check an adapter that is not equivariant.")] = False,
    backbone: OwnBackbone = None,
    head: OwnHead = None,
    device: OwnDevice = None,
    dtype: OwnDtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Check stability, short-range walls, forgetting and drift, adapted beside bare; the adapter keeps the verdict."""
    flags: dict[str, Any] = {
        "ramp_ps": None if ramp_time is None else femtoseconds(ramp_time, "'--ramp-time'") / 1000,
        "ramp_to_K": ramp_to,
        "ramp_replicas": replicas,
        "nve_ps": None if nve_time is None else femtoseconds(nve_time, "'--nve-time'") / 1000,
        "timestep_fs": None if timestep is None else femtoseconds(timestep, "'--timestep'"),
        "seed": seed,
        "max_forgetting": max_forgetting,
        "max_hole_rim_eV": max_hole_rim,
        "min_bond_change_K": min_bond_change,
        "max_drift_meV_per_atom_ps": max_drift,
    }
    from mmea_calc.config import CheckConfig
    from mmea_calc.data.reading import read_dataset
    from mmea_calc.md import open_potential
    from mmea_calc.plots import check_picture

    check_picture(plot)
    config = CheckConfig(**{k: v for k, v in flags.items() if v is not None})
    atoms = _first(start)
    labelled = None if labels is None else read_dataset(labels)
    # What was not asked for stays at the defaults of the library.
    model = {k: v for k, v in {"head": head, "device": device, "dtype": dtype}.items() if v is not None}
    potential = open_potential(adapter, backbone=backbone, **model)  # type: ignore[arg-type]
    report = _measure(potential, atoms, config, labelled, level or _level(adapter), force)
    if plot is not None:
        from mmea_calc.check.plots import page

        page(report, plot, title=f"{Path(adapter).name}, {report.formula}")
    _print(report, adapter, plot, as_json)
    _conclude(report, adapter, as_json)
    if not report.passed:
        raise typer.Exit(1)


def _first(path: Path) -> Atoms:
    """The first structure of a file. Raises DataError."""
    from ase.io import read

    from mmea_calc.errors import DataError

    if not path.is_file():
        raise DataError(f"{path}: no such file with a start structure")
    try:
        return cast("Atoms", read(path, index=0))
    except Exception as problem:  # whatever a reader of ASE raises for a file that it does not understand
        raise DataError(f"{path} cannot be read as a structure: {problem}") from problem


def _level(adapter: str) -> str | None:
    """Level of theory of the adapter's training data, if its header knows it."""
    from mmea_calc.adapter_file import is_adapter, read_adapter

    return read_adapter(adapter).level_of_theory if is_adapter(adapter) else None


def _measure(
    potential: Potential, atoms: Atoms, config: CheckConfig, labels: Dataset | None, level: str | None, force: bool
) -> CheckReport:
    """Under a bar on standard error, which leaves standard output to the results."""
    from rich.console import Console
    from rich.progress import Progress

    from mmea_calc.check import check as measure

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task, told = bar.add_task("checking", total=1.0), ""

        def progress(stage: str, done: float) -> None:
            nonlocal told
            if stage != told and not console.is_terminal:
                typer.echo(stage, err=True)
            told = stage
            bar.update(task, description=stage, completed=done)

        return measure(potential, atoms, config, labels=labels, level_of_theory=level, force=force, progress=progress)


def _conclude(report: CheckReport, adapter: str, as_json: bool) -> None:
    """Write the verdict into the adapter's header, beside the verdicts of other checks, and tell it."""
    from mmea_calc.adapter_file import is_adapter, read_adapter, update_adapter
    from mmea_calc.errors import AdapterFileError

    from .console import say

    kept = ""
    if is_adapter(adapter):
        try:
            checks = {**read_adapter(adapter).checks, CHECK: report.to_dict(curves=False)}
            update_adapter(adapter, checks=checks)
            kept = f"; the verdict is in {adapter}"
        except AdapterFileError as problem:  # a file of somebody else's: the check itself is done
            typer.echo(f"warning: the verdict is not kept in the adapter: {problem}", err=True)
    if not as_json:
        verdict = "sound" if report.passed else "not sound"
        say(f"{adapter} is {verdict} for {report.formula} (checked in {duration(report.seconds)}){kept}")


def _print(report: CheckReport, adapter: str, plot: Path | None, as_json: bool) -> None:
    from .console import out, print_json, say, table

    if as_json:
        print_json({"potential": adapter, **report.to_dict()})
        return
    columns = ["", "adapter" if report.bare is not None else "backbone", "bound", ""]
    if report.bare is not None:
        columns.insert(2, "backbone alone")
    lines = []
    for row in report.rows:
        verdict = "" if not row.judged else "FAILS" if row.failure else "ok"
        cells = [row.quantity, row.subject, row.bare, row.bound, verdict]
        lines.append(cells if report.bare is not None else [*cells[:2], *cells[3:]])
    out().print(table(columns, lines))
    for remark in report.remarks:
        say(remark)
    for failure in report.failures:
        say(failure, style="red")
    if plot is not None:
        say(f"{plot} written")
