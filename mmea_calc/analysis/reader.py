"""The folder of a run -> arrays, by way of `mmea_calc.md.trajectory`, which knows the layout of the file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmea_calc.md.trajectory import read_events, read_replica, read_settings, replica_names, trajectory_file

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Frames:
    """Frames of one replica.

    Attributes:
        time_fs: (n_frames,).
        positions_A: unwrapped, (n_frames, n_atoms, 3).
        velocities_A_per_fs: (n_frames, n_atoms, 3), or None where the run did not store them.
    """

    time_fs: FloatArray
    positions_A: FloatArray
    velocities_A_per_fs: FloatArray | None


@dataclass(frozen=True)
class Replica:
    """One start structure at one temperature, without its frames (`Run.frames`).

    Attributes:
        name: in the file.
        start_index: which start structure.
        target_K: temperature of the thermostat, or of the initial velocities.
        numbers: atomic numbers, (n_atoms,).
        masses_amu: (n_atoms,).
        cell_A: (3, 3), rows are lattice vectors; zeros without a periodic direction.
        pbc: (3,).
        time_fs: of the observables, (n_samples,).
        observables: name -> (n_samples,), in the units of `mmea_calc.md.trajectory.OBSERVABLES`.
    """

    name: str
    start_index: int
    target_K: float
    numbers: NDArray[np.int64]
    masses_amu: FloatArray
    cell_A: FloatArray
    pbc: NDArray[np.bool_]
    time_fs: FloatArray
    observables: dict[str, FloatArray]


@dataclass(frozen=True)
class Run:
    """A run of dynamics.

    Attributes:
        path: its trajectory file.
        config: its settings, as JSON values (`mmea_calc.config.MDConfig`).
        replicas: in order of start structure, temperature and number.
        events: replica -> what happened to it until the last checkpoint, in words.
    """

    path: Path
    config: dict[str, Any]
    replicas: tuple[Replica, ...]
    events: dict[str, tuple[str, ...]]

    def frames(self, replica: Replica, skip_fs: float = 0.0) -> Frames:
        """The frames of a replica from `skip_fs` on."""
        stored = read_replica(self.path, replica.name)
        time_fs = 1000.0 * stored.times_ps
        # Times are products of steps and time steps: the tolerance is for their rounding.
        keep = time_fs >= skip_fs - 1e-6
        velocities = None if stored.velocities is None else stored.velocities[keep]
        return Frames(time_fs[keep], stored.positions[keep], velocities)


def read_run(folder: str | Path) -> Run:
    """Everything of a run but its frames.

    Args:
        folder: of the run, or its trajectory file.

    Raises:
        TrajectoryError: no trajectory, or one that cannot be read.
    """
    path = trajectory_file(folder)
    return Run(
        path=path,
        config=read_settings(path),
        replicas=tuple(_replica(path, name) for name in replica_names(path)),
        events=_events(path),
    )


def _replica(path: Path, name: str) -> Replica:
    stored = read_replica(path, name, frames=False)
    member = stored.member
    return Replica(
        name=name,
        start_index=member.start,
        target_K=member.temperature_K,
        numbers=member.numbers,
        masses_amu=member.masses,
        cell_A=member.cell,
        pbc=np.array(member.pbc),
        time_fs=1000.0 * stored.sample_times_ps,
        observables=dict(stored.observables),
    )


def _events(path: Path) -> dict[str, tuple[str, ...]]:
    events, summary = read_events(path), path.with_name("summary.json")
    if events is None and summary.is_file():
        rows = json.loads(summary.read_text(encoding="utf-8"))["replicas"]
        events = [event for row in rows for event in row["events"]]
    told: dict[str, tuple[str, ...]] = {}
    for e in events or ():
        told[e["replica"]] = (*told.get(e["replica"], ()), f"{e['kind']} at {e['time_ps']:g} ps: {e['detail']}")
    return told
