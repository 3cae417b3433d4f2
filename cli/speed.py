"""`mmea benchmark speed`: calls, dynamics and training steps against mace-torch's on the same backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, Backbone, OwnDevice, OwnDtype, OwnKernels


def speed(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A json file of it.", show_default=False)
    ] = None,
    backbone: Backbone = None,
    adapter: Annotated[
        str | None, typer.Option(help="Measured instead of a random one.", rich_help_panel=MODEL, show_default=False)
    ] = None,
    device: OwnDevice = None,
    dtype: OwnDtype = None,
    kernels: OwnKernels = "own",
    replicas: Annotated[
        list[int] | None, typer.Option(metavar="N...", help="Of aspirin in a batch; 12 if not given.", min=1)
    ] = None,
    atoms: Annotated[
        list[int] | None, typer.Option(metavar="N...", help="Of a periodic system; 1000 if not given, 0: none.", min=0)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture of time against size (.png, .pdf, .svg).")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile first what is not compiled yet.")
    ] = True,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Measure training steps and their memory.")
    ] = True,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Measure a whole fine-tuning on 50 aspirins too: minutes on a CPU.")
    ] = False,
) -> None:
    """Measure calls, replicas, periodic systems, training steps and memory against mace-torch, in one run.

    `--backbone paper-shape` is a network of the paper's shape with random weights. With --compile, networks that are
    not compiled yet are compiled first, some minutes each. The json file is written after every line of the table, so
    that a run that is stopped keeps its figures; "complete" in it is false until the end.
    """
    import json

    from mmea_calc.benchmark.speed import Measured, SpeedConfig, measure_speed
    from mmea_calc.files import check_place, write_text
    from mmea_calc.plots import check_picture

    from .console import out, say, table

    check_place(output)
    check_picture(plot)
    config = SpeedConfig(
        backbone=backbone,
        adapter=adapter,
        device=device or "auto",
        dtype=dtype or "float32",
        kernels=kernels,
        compile=compile,
        replicas=tuple(replicas) if replicas is not None else SpeedConfig.replicas,
        atoms=tuple(n for n in atoms if n) if atoms is not None else SpeedConfig.atoms,
        training=training,
        finetune=finetune,
    )

    def keep(measured: Measured) -> None:
        if output is not None:
            write_text(output, json.dumps(measured.to_dict(), indent=1) + "\n")

    measured = measure_speed(config, tell=lambda message: say(message, style="dim"), keep=keep)
    keep(measured)
    columns = ("what", "mmea, adapter on", "mace-torch, none", "unit", "times better", "")
    lines = [(r.what, r.ours, r.theirs, r.unit, r.ratio, r.note) for r in measured.rows]
    out().print(table(columns, lines, title=measured.settings))
    if output is not None:
        say(f"{output} written")
    if plot is not None:
        from mmea_calc.benchmark.speed_picture import draw_speed

        say(f"{draw_speed(measured, plot)} written")
