"""Trajectories in the formats of ASE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ase.io import write
from ase.io.formats import UnknownFileTypeError, filetype

from ..errors import TrajectoryError
from .trajectory import read_replica, replica_names


def convert_trajectory(
    source: str | Path, destination: str | Path, *, replicas: Sequence[str] | None = None, every: int = 1
) -> tuple[int, int]:
    """Write the frames of replicas, one replica after the other.

    Args:
        source: run folder or its trajectory.h5.
        destination: the format follows from its name; `.xyz` is extended xyz.
        replicas: names; None for all.
        every: take every n-th frame.

    Returns:
        numbers of frames and of replicas written.

    Raises:
        TrajectoryError: no such trajectory or replica, no such format; the file cannot be written.
    """
    destination = Path(destination)
    names = replica_names(source)
    if unknown := sorted(set(replicas or ()) - set(names)):
        raise TrajectoryError(f"{source} has no replica {unknown[0]!r}; it has {', '.join(names)}")
    names = list(replicas or names)
    if destination.is_dir():
        raise TrajectoryError(f"{destination} is a folder; give the name of a file, such as {destination.name}.xyz")
    temporary = destination.with_name(f".part-{destination.name}")  # its ending says some writers what to write
    style, count = "extxyz", 0
    try:
        if destination.suffix != ".xyz":
            style = filetype(str(destination), read=False)
        temporary.unlink(missing_ok=True)
        if style == "extxyz":  # piece by piece: a run may be larger than the memory
            for name in names:
                frames = list(read_replica(source, name).frames(every))
                write(temporary, frames, format=style, append=True)
                count += len(frames)
        else:
            everything = [frame for name in names for frame in read_replica(source, name).frames(every)]
            write(temporary, everything, format=style)
            count = len(everything)
        os.replace(temporary, destination)
    except UnknownFileTypeError as problem:
        raise TrajectoryError(f"{destination}: no format of ASE has this ending; try .xyz or .traj") from problem
    except (OSError, ValueError, NotImplementedError) as problem:
        raise TrajectoryError(f"{destination} cannot be written as {style}: {problem}") from problem
    finally:
        temporary.unlink(missing_ok=True)
    return count, len(names)
