"""`mmea export`: files for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Dtype, OwnHead

app = typer.Typer(help="Write an adapter for another program.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Write an adapter for another program."""


@app.command()
def lammps(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help="An .adapter file, or name or path of a backbone.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="NAME.pt, which needs mmea where it is used.", show_default=False)
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Name or path of the adapter's backbone, if not found by itself.")
    ] = None,
    head: OwnHead = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the network.")] = "float32",
) -> None:
    """Write adapter and backbone for `pair_style mliap unified` of LAMMPS: many GPUs by domain decomposition."""
    from mmea_calc.files import check_place
    from mmea_calc.lammps import export_mliap

    from .console import say

    check_place(output)
    made = export_mliap(adapter, output, backbone=backbone, head=head, dtype=dtype)
    what = f"{made.backbone} with an adapter of method {made.method}" if made.method else f"{made.backbone} alone"
    say(f"{output} written: {what}, {dtype}, cutoff {made.cutoff:g} Å, {made.exchanges} exchange(s) per step and way")
    if made.trained_elements:
        say(f"The adapter was trained on {' '.join(made.trained_elements)}.")
    say("In the input of LAMMPS, with one element for each atom type:")
    quoted = f'"{output}"' if " " in str(output) else output
    say(f"  units metal\n  pair_style mliap unified {quoted} 0")
    say(f"  pair_coeff * * {' '.join(made.trained_elements or made.elements)}")
