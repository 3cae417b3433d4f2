"""`mmea benchmark`: the published comparisons of methods, with one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cells import conclude, list_cells, settings, show_table, train_cells
from .options import SPEED, TRAINING, Backbone, Device, Dtype, Epochs, Head, Methods, Recipe, Seeds, TrainingDtype


def benchmark(
    name: Annotated[
        Literal["rmd17", "acac", "3bpa", "speed"],
        typer.Argument(
            metavar="rmd17|acac|3bpa|speed", help="The data set, or speed: no training at all.", show_default=False
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of its files; see docs/benchmarks.md.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RESULTS",
            help="Folder of the results; of speed, a json file.",
            show_default=False,
        ),
    ] = None,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, train nothing.")] = False,
    adapter: Annotated[
        str | None, typer.Option(help="Measured instead of a random one.", rich_help_panel=SPEED, show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of the CPU; torch's choice if not given.", min=1, rich_help_panel=SPEED)
    ] = None,
    replicas: Annotated[
        list[int] | None, typer.Option(metavar="N...", help="Of aspirin in a batch.", min=1, rich_help_panel=SPEED)
    ] = None,
    atoms: Annotated[
        list[int] | None, typer.Option(metavar="N...", help="Of a periodic system.", min=0, rich_help_panel=SPEED)
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure compiled networks.", rich_help_panel=SPEED)
    ] = True,
) -> None:
    """Train every method on every molecule with every seed, and print the published table with one's own figures.

    `mmea benchmark speed` measures calls, dynamics and training steps against mace-torch's on the same backbone.

    What is finished is kept in RESULTS: the same command goes on where it was interrupted, and methods, molecules and
    seeds may be added.
    """
    from mmea_calc.benchmark import PICTURE, describe, draw, published_task, write_tables

    from .console import say

    if name == "speed":
        if given := [key for key, value in (("--data", data), ("--methods", methods), ("--recipe", recipe)) if value]:
            raise typer.BadParameter(f"{', '.join(given)} belong to data sets; speed needs none")
        _speed(output, backbone, adapter, device, dtype, threads, replicas, atoms, compile)
        return
    if missing := [key for key, value in (("--data", data), ("--output", output)) if value is None]:
        raise typer.BadParameter(f"{name} needs {' and '.join(missing)}")
    assert data is not None
    assert output is not None
    config = settings(
        methods=methods, seeds=seeds, backbone=backbone, head=head, recipe=recipe, epochs=epochs, E0s=E0s,
        device=device, dtype=dtype,
    )  # fmt: skip
    task = published_task(name, data, molecules)
    for note in task.notes:
        say(f"note: {note}", style="yellow")
    if dry_run:
        list_cells(task, output, config)
        return
    results = train_cells(task, output, config, whole_report=False)
    table = write_tables(task, output, config)
    draw(table, output / PICTURE)
    show_table(table, describe(task, config, results))
    say(f"the table, all figures and a plot are in {output}, the adapters in {output / 'cells'}")
    conclude(results)


def _speed(
    output: Path | None,
    backbone: str | None,
    adapter: str | None,
    device: str | None,
    dtype: Dtype | None,
    threads: int | None,
    replicas: list[int] | None,
    atoms: list[int] | None,
    compile: bool,
) -> None:
    import json

    import torch

    from mmea_calc.benchmark.speed import SpeedConfig, measure_speed
    from mmea_calc.files import write_text

    from .console import out, say, table

    if threads is not None:
        torch.set_num_threads(threads)
    config = SpeedConfig(
        backbone=backbone,
        adapter=adapter,
        device=device or "auto",
        dtype=dtype or "float32",
        compile=compile,
        replicas=tuple(replicas) if replicas is not None else SpeedConfig.replicas,
        atoms=tuple(n for n in atoms if n) if atoms is not None else SpeedConfig.atoms,
    )
    rows = measure_speed(config, tell=lambda message: say(message, style="dim"))
    columns = ("what", "mmea, adapter on", "mace-torch, none", "unit", "times better", "")
    lines = [(r.what, r.ours, r.theirs, r.unit, r.ratio, r.note) for r in rows]
    where = torch.cuda.get_device_name() if config.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    title = f"{config.backbone or 'mmea-organic-s'}, {config.dtype}, {where}"
    out().print(table(columns, lines, title=title))
    if output is not None:
        write_text(output, json.dumps({"settings": title, "rows": [r.to_dict() for r in rows]}, indent=1) + "\n")
        say(f"{output} written")
