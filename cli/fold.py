"""`mmea fold`: an adapter that is a change of weights, and its backbone, as one model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def fold(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .adapter file.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="NAME.model for mace-torch, or NAME.safetensors for mmea.", show_default=False
        ),
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Name or path of the adapter's backbone, if it is not found by itself.")
    ] = None,
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Precision of the file.")] = "float64",
) -> None:
    """Write an adapter of a foldable method (elora, full, readout, ...) and its backbone as one plain model."""
    from mmea_calc.folding import fold as write

    from .console import say

    model = write(file, output, backbone=backbone, dtype=dtype)
    say(f"{output} written: {model.backbone} with the adapter in its weights, reference energies included, {dtype}")
    if len(model.heads) > 1:
        say(f"It has the heads {', '.join(model.heads)}; the adapter was trained for {model.head}: open it with that.")
    if output.suffix == ".model":
        head = f", head={model.head!r}" if len(model.heads) > 1 else ""
        say(f'MACECalculator(model_paths="{output}", device="cpu", default_dtype="{dtype}"{head}) opens it.')
    else:
        say(f"`--backbone {output}` takes it.")
