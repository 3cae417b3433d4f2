"""`mmea compile`: the machine code that makes calls several times faster."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import OwnBackbone, OwnDevice, OwnDtype, OwnHead


def compile(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER|BACKBONE", help="An .adapter file, or a backbone.", show_default=False)
    ],
    backbone: OwnBackbone = None,
    head: OwnHead = None,
    device: OwnDevice = None,
    dtype: OwnDtype = None,
    stress: Annotated[
        bool, typer.Option("--stress/--no-stress", help="Also the calls that compute stresses (periodic structures).")
    ] = True,
) -> None:
    """Compile backbone and adapter to machine code, once: from then on all calls with them are faster.

    What is made serves every adapter of the same method and settings on this backbone, on this machine, and is found
    by itself. It takes a few minutes and needs a C++ compiler.
    """
    import time

    from mmea_calc.md import open_potential

    from .console import say

    potential = open_potential(source, backbone=backbone, head=head, device=device or "auto", dtype=dtype or "float32")
    for wanted in (False, True) if stress else (False,):
        began = time.monotonic()
        path = potential.compile(stress=wanted)
        what = "energies, forces and stresses" if wanted else "energies and forces"
        seconds = time.monotonic() - began
        say(f"{what}: {path.with_suffix('.pt2')}" + (f", {seconds:.0f} s" if seconds > 1 else ", was there"))
