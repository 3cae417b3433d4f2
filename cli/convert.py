"""`mmea convert`: a trajectory as extended xyz, or as anything else that ASE writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    trajectory: Annotated[
        Path, typer.Argument(metavar="TRAJECTORY", help="RUN/trajectory.h5, or the run folder.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="File to write: .xyz, .traj, ...", show_default=False)
    ],
    replica: Annotated[
        list[str] | None, typer.Option(help="Which one, such as start0-300K-0; may be repeated. All if not given.")
    ] = None,
    every: Annotated[int, typer.Option(help="Take every n-th frame.", min=1)] = 1,
) -> None:
    """Write the frames of a run with positions, velocities, cell; info says replica, step, time_ps, temperature_K."""
    from mmea_calc.md.convert import convert_trajectory

    frames, replicas = convert_trajectory(trajectory, output, replicas=replica, every=every)
    typer.echo(f"{output} written: {frames} frames of {replicas} replicas")
