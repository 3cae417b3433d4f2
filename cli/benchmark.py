"""`mmea benchmark`: the published comparisons of methods, and of speed, each with one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cells import conclude, list_cells, settings, show_table, train_cells
from .options import TRAINING, Backbone, Compile, Device, Epochs, Head, Methods, Recipe, Seeds, TrainingDtype
from .several import any_word, is_number, several_values
from .speed import speed

app = typer.Typer(
    help="The published comparisons of methods, and of speed, each with one command.", no_args_is_help=True
)


def benchmark(
    ctx: typer.Context,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of its files; see docs/benchmarks.md.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="RESULTS", help="Folder of the results.", show_default=False)
    ],
    molecules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...", help="Of rmd17, all that are there if not given; of the others, 300K or what else is."
        ),
    ] = None,
    methods: Methods = None,
    seeds: Seeds = None,
    backbone: Backbone = None,
    head: Head = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    E0s: Annotated[
        str | None, typer.Option("--E0s", help="Reference energies, as for mmea finetune.", rich_help_panel=TRAINING)
    ] = None,
    device: Device = None,
    dtype: TrainingDtype = None,
    compile: Compile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, train nothing.")] = False,
) -> None:
    """Train every method on every molecule with every seed, and print the published table with one's own figures.

    What is finished is kept in RESULTS: the same command goes on where it was interrupted, and methods, molecules and
    seeds may be added.
    """
    from mmea_calc.benchmark import PICTURE, describe, draw, published_task, write_tables

    from .console import say

    config = settings(
        methods=methods, seeds=seeds, backbone=backbone, head=head, recipe=recipe, epochs=epochs, E0s=E0s,
        device=device, dtype=dtype, compile=compile,
    )  # fmt: skip
    task = published_task(str(ctx.info_name), data, molecules)
    for note in task.notes:
        say(f"note: {note}", style="yellow")
    if dry_run:
        list_cells(task, output, config)
        return
    results = train_cells(task, output, config, whole_report=False)
    table = write_tables(task, output, config)
    draw(table, output / PICTURE)
    show_table(table, describe(task, config, table.results))
    say(f"the table, all figures and a plot are in {output}, the adapters in {output / 'cells'}")
    conclude(results)


_LISTS = several_values({"--methods": any_word, "--seeds": is_number, "--molecules": any_word})
for _name, _what in (("rmd17", "revised MD17"), ("acac", "acetylacetone"), ("3bpa", "3BPA")):
    app.command(_name, cls=_LISTS, short_help=f"Train methods on {_what} and print the published table.")(benchmark)
app.command(cls=several_values({"--replicas": is_number, "--atoms": is_number}))(speed)
