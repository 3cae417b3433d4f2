"""`mmea compare`: which method is right for one's own data? One is recommended, with the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cells import conclude, list_cells, settings, show_table, train_cells
from .options import Backbone, Compile, Device, Epochs, Head, Methods, Recipe, Seeds, TrainingDtype

DATA = "Data"


def compare(
    train: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRAIN...",
            help="Labelled structures; several files are joined, such as one with isolated atoms.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the results.", show_default=False)
    ],
    test: Annotated[Path | None, typer.Option(help="Structures for the table; they have no say in the choice.")] = None,
    valid: Annotated[
        Path | None, typer.Option(help="Structures that choose weights and method.", rich_help_panel=DATA)
    ] = None,
    valid_fraction: Annotated[
        float | None,
        typer.Option(help="Part of TRAIN drawn by the seed when --valid is not given.", rich_help_panel=DATA),
    ] = None,
    methods: Methods = None,
    seeds: Seeds = None,
    energy_key: Annotated[
        str | None, typer.Option(help="Name of the energies; detected if not given.", rich_help_panel=DATA)
    ] = None,
    forces_key: Annotated[str | None, typer.Option(help="Name of the forces.", rich_help_panel=DATA)] = None,
    level_of_theory: Annotated[
        str | None, typer.Option(help="Of the labels, such as PBE/def2-SVP.", rich_help_panel=DATA)
    ] = None,
    E0s: Annotated[
        str | None, typer.Option("--E0s", help="Reference energies, as for mmea finetune.", rich_help_panel=DATA)
    ] = None,
    backbone: Backbone = None,
    head: Head = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    device: Device = None,
    dtype: TrainingDtype = None,
    compile: Compile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trainings, do none.")] = False,
) -> None:
    """Train several methods on the same data and recommend one, by validation errors and size.

    What is finished is kept in DIR: the same command goes on where it was interrupted, and methods and seeds may be
    added. Where no method can be recommended, the table is shown and written all the same, and the exit code is 1.
    """
    from mmea_calc.benchmark import PICTURE, Choice, describe, draw, own_task, recommend, write_tables
    from mmea_calc.benchmark.cells import read_results
    from mmea_calc.benchmark.results_folder import CELLS
    from mmea_calc.config import COMPARE_SEEDS, TrainConfig
    from mmea_calc.data.reading import read_dataset
    from mmea_calc.errors import TrainingError

    from .console import say

    keys = {"energy_key": energy_key, "forces_key": forces_key}
    task = own_task(
        read_dataset(train, **keys),
        valid=read_dataset(valid, **keys) if valid else None,
        test=read_dataset(test, **keys) if test else None,
        valid_fraction=TrainConfig().valid_fraction,
        level_of_theory=level_of_theory,
    )
    config = settings(
        methods=methods, seeds=seeds or COMPARE_SEEDS, backbone=backbone, head=head, recipe=recipe, epochs=epochs,
        valid_fraction=valid_fraction, E0s=E0s, device=device, dtype=dtype, compile=compile,
    )  # fmt: skip
    if dry_run:
        list_cells(task, output, config)
        return
    results = train_cells(task, output, config, whole_report=True)
    # Of all that the table shows: earlier calls, and other processes, have put their part into the folder.
    kept = read_results(output / CELLS)
    cells = {(r.system, r.method, r.seed): r for r in (*results, *kept)}
    choice: Choice | None = None
    try:
        choice = recommend(cells.values(), tolerance=config.tolerance)
        verdict = f"Recommended: {choice.method or 'the backbone alone'}. {choice.reason}"
    except TrainingError as problem:  # the figures were worth their trainings all the same
        verdict = str(problem)
    table = write_tables(task, output, config, remark=verdict)
    draw(table, output / PICTURE)
    show_table(table, describe(task, config, table.results))
    say(f"the table, all figures and a plot are in {output}, the adapters in {output / 'cells'}")
    if choice is None:
        typer.echo(f"mmea: {verdict}", err=True)
    else:
        say(verdict, style="bold")
        if choice.stem is not None:
            say(f"its adapter with the lowest validation error: {output / 'cells' / choice.stem}.adapter")
    conclude(results)
    if choice is None:
        raise typer.Exit(1)
