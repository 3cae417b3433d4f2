"""`mmea evaluate`: errors of an adapter on labelled structures, beside its bare backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An .adapter file.", show_default=False)],
    test: Annotated[Path, typer.Argument(metavar="TEST", help="Labelled structures.", show_default=False)],
    backbone: Annotated[
        str | None, typer.Option(help="Name or path of the adapter's backbone, if it is not found by itself.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Parity plot to write (.png, .pdf, .svg).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Structures per call of the network.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[Literal["float32", "float64"] | None, typer.Option(help="Precision.")] = None,
    energy_key: Annotated[str | None, typer.Option(help="Name of the energies; detected if not given.")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Name of the forces.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Errors of energies and forces: overall, per config_type and per element, adapter beside bare backbone."""
    raise NotImplementedError
