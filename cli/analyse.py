"""`mmea analyse`: pictures, csv files and one page from a run of dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .units import femtoseconds

if TYPE_CHECKING:
    from mmea_calc.analysis.report import Analysis


def analyse(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `mmea md` wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write to; RUN/analysis.")] = None,
    skip: Annotated[
        str | None, typer.Option(help="Beginning that averages leave out, e.g. 2ps; a fifth of the run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Analyse a run: energies, structure, spectra, with errors; one picture and one csv each, and one page with all."""
    from rich.console import Console
    from rich.progress import Progress

    from mmea_calc.analysis.report import analyse as analyse_run

    from .console import print_json

    skip_ps = None if skip is None else femtoseconds(skip, "'--skip'") / 1000
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("analysing", total=None)
        result = analyse_run(run, output, skip_ps=skip_ps, progress=lambda name: bar.update(task, description=name))
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)


def _print(result: Analysis) -> None:
    from mmea_calc.analysis.report import with_error

    from .console import out, say, table

    headings = ["replica", "length\nps", "temperature\nK", "potential energy\neV", "drift\nmeV/atom/ps", ""]
    lines = [
        (
            row.replica,
            f"{row.length_ps:g}",
            with_error(row.temperature_K, row.temperature_error_K),
            with_error(row.potential_eV, row.potential_error_eV),
            with_error(row.drift_meV_per_atom_ps, row.drift_error_meV_per_atom_ps),
            row.remark,
        )
        for row in result.rows
    ]
    out().print(table(headings, lines))
    say(f"Means leave out the first {result.skip_ps:g} ps.")
    for remark in result.remarks:
        say(remark)
    say(f"{result.page} written, with a picture and a csv file of each quantity beside it")
