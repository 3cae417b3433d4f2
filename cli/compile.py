"""`mmea compile`: the machine code that makes calls several times faster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Device


def compile(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER|BACKBONE", help="An .adapter file, or a backbone.", show_default=False)
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Name or path of the adapter's backbone, if it is not found by itself.")
    ] = None,
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="Precision of the network.")] = "float32",
    device: Device = None,
    stress: Annotated[
        bool, typer.Option("--stress/--no-stress", help="Also the calls that compute stresses (periodic structures).")
    ] = True,
) -> None:
    """Compile backbone and adapter to machine code, once: from then on all calls with them are faster.

    What is made serves every adapter of the same method and settings on this backbone, on this machine, and is found
    by itself. It takes a few minutes and needs a C++ compiler.
    """
    import time

    from mmea_calc.calculator import MMEACalculator

    from .console import say

    adapter = source if Path(source).suffix == ".adapter" else None
    calculator = MMEACalculator(adapter, source if adapter is None else backbone, device=device or "auto", dtype=dtype)
    for wanted in (False, True) if stress else (False,):
        began = time.monotonic()
        path = calculator.potential.compile(stress=wanted)
        what = "energies, forces and stresses" if wanted else "energies and forces"
        seconds = time.monotonic() - began
        say(f"{what}: {path.with_suffix('.pt2')}" + (f", {seconds:.0f} s" if seconds > 1 else ", was there"))
