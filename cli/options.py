"""Options that several commands share, word for word."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

MODEL, TRAINING = "Backbone and device", "Training"
Dtype = Literal["float32", "float64"]

# Of commands that take an adapter or a backbone: md, check.
OwnBackbone = Annotated[
    str | None,
    typer.Option(help="Name or path of the adapter's backbone, if not found by itself.", rich_help_panel=MODEL),
]
OwnHead = Annotated[str | None, typer.Option(help="Head of a backbone with several.", rich_help_panel=MODEL)]
OwnDevice = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=MODEL)]
OwnDtype = Annotated[Dtype | None, typer.Option(help="Of the network.", rich_help_panel=MODEL)]
OwnKernels = Annotated[
    Literal["own", "cuequivariance"],
    typer.Option(
        help="cuequivariance: layers of that package, for GPUs (pip install 'mmea\\[cue]').", rich_help_panel=MODEL
    ),
]

# Of commands that train one method after the other: benchmark, compare. --compile also of pretrain.
Methods = Annotated[
    list[str] | None, typer.Option(metavar="METHOD...", help="Such as mmea elora full mmea:gate_rank=32.")
]
Seeds = Annotated[list[int] | None, typer.Option(metavar="N...", help="One training with each.", min=0)]
Backbone = Annotated[str | None, typer.Option(help="Name (see mmea backbone list) or path.")]
Head = Annotated[str | None, typer.Option(help="Head of a backbone with several.")]
Recipe = Annotated[
    str | None, typer.Option(help="paper, default; each method's own if not given.", rich_help_panel=TRAINING)
]
Epochs = Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1, rich_help_panel=TRAINING)]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=TRAINING)]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the training steps first: minutes for each form, once.",
        rich_help_panel=TRAINING,
    ),
]
TrainingDtype = Annotated[
    Dtype | None, typer.Option(help="Precision, instead of the recipe's.", rich_help_panel=TRAINING)
]
