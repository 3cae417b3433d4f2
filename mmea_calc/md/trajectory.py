"""Trajectories: one HDF5 file per run in the H5MD layout, version 1.1 (de Buyl, Colberg, Höfling, 2014).

A replica is one start structure at one temperature, named `start0-300K-0` (start, temperature, number). In
`RUN/trajectory.h5`:

    h5md/                           attributes version [1, 1]; author/ and creator/ (name, version); modules/units
    parameters/                     attribute config: the settings of the run as JSON (`MDConfig`)
        events                      what happened to replicas, as a JSON list (`mmea_calc.md.monitor.Event`)
    particles/<replica>/            attributes start_index, temperature_K, replica_index
        box/                        attributes dimension 3, boundary ("periodic" or "none", three of them)
            edges/value             (n_frames, 3, 3), Angstrom, rows are lattice vectors; only with a periodic direction
        species                     (n_atoms,), atomic numbers
        mass                        (n_atoms,), u
        position/value              (n_frames, n_atoms, 3), Angstrom, never wrapped into the cell
        velocity/value              (n_frames, n_atoms, 3), Angstrom fs-1; unless the run was told not to store them
    observables/<replica>/<name>/
        value                       (n_samples,), with a unit attribute; the names are in `OBSERVABLES`

Beside every `value` lie `step` (n,) int64 and `time` (n,) float64, ps; those of one replica's frames are one object
under several names, and so are those of its observables. Frame 0 and sample 0 are step 0. Every frame's step also
has a sample (`stats_every` divides `traj_every`). A replica that failed has fewer of both than the others. A value
that was not measured at a sample (gates in four of five, adapted minus bare forces most of the time) is NaN there.

MDAnalysis' H5MD reader takes the first group of `particles`, and observables by the number of the frame whatever
their steps are. Therefore `RUN/replicas/<replica>.h5md` shows one replica alone, without observables, as
`particles/trajectory`: a few kB of links into `trajectory.h5`, to be opened by MDAnalysis as it is.

The file is complete at every moment. Frames since the last checkpoint are in memory. At a checkpoint they are
appended to a hidden twin, which then takes the visible file's place by a rename, and the file that was visible
becomes the twin (one checkpoint behind, which the next one makes up for). Every frame is therefore written twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

from ..errors import TrajectoryError

# name -> unit, of the observables of a replica
OBSERVABLES: dict[str, str] = {
    "temperature": "K",  # of the velocities at the end of a step; see `mmea_calc.md.state` for degrees of freedom
    "potential_energy": "eV",  # total, reference energies included
    "kinetic_energy": "eV",
    "heat": "eV",  # what the thermostat has put in since step 0
    "conserved_energy": "eV",  # potential + kinetic - heat
    "max_force": "eV Angstrom-1",  # largest force on an atom
    "min_distance_ratio": "1",  # smallest distance of two atoms over the sum of their covalent radii
    "broken_bonds": "1",  # bonds of the start that are open now
    "formed_bonds": "1",  # bonds that the start did not have
    "gate_excess": "1",  # how far a gate is outside the range seen in training, in widths of that range
    "adapted_minus_bare": "eV Angstrom-1",  # root mean square over components of the difference of forces
}


@dataclass(frozen=True)
class Member:
    """What a file says of a replica.

    Attributes:
        name: its group.
        start, temperature_K, number: which replica it is.
        numbers: atomic numbers, (n_atoms,).
        masses: u, (n_atoms,).
        cell: rows are lattice vectors, A; used with a periodic direction only.
        pbc: periodic directions.
    """

    name: str
    start: int
    temperature_K: float
    number: int
    numbers: NDArray[np.int64]
    masses: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: tuple[bool, bool, bool]


@dataclass(frozen=True)
class ReplicaTrajectory:
    """All that a file holds of one replica.

    Attributes:
        member: which replica, atoms, cell.
        steps: (n_frames,); times_ps: of the frames, ps.
        positions: (n_frames, n_atoms, 3), A, in the precision of the file.
        velocities: the same in A/fs, or None.
        sample_steps: (n_samples,); sample_times_ps: ps.
        observables: name -> (n_samples,); units in `OBSERVABLES`.
    """

    member: Member
    steps: NDArray[np.int64]
    times_ps: NDArray[np.float64]
    positions: NDArray[Any]
    velocities: NDArray[Any] | None
    sample_steps: NDArray[np.int64]
    sample_times_ps: NDArray[np.float64]
    observables: dict[str, NDArray[np.float64]]

    def frames(self, every: int = 1) -> Iterator[Atoms]:
        """The frames as structures, with velocities; `info` has replica, step, time_ps, temperature_K (target)."""
        for k in range(0, len(self.steps), every):
            member = self.member
            atoms = Atoms(member.numbers, self.positions[k], masses=member.masses, cell=member.cell, pbc=member.pbc)
            if self.velocities is not None:
                atoms.set_velocities(self.velocities[k] / units.fs)
            atoms.info.update(
                replica=member.name,
                step=int(self.steps[k]),
                time_ps=float(self.times_ps[k]),
                temperature_K=member.temperature_K,
            )
            yield atoms


def trajectory_file(path: str | Path) -> Path:
    """The file of a run folder, or the file itself. Raises TrajectoryError."""
    path = Path(path)
    path = path / "trajectory.h5" if path.is_dir() else path
    if not path.is_file():
        raise TrajectoryError(f"there is no trajectory {path}; expected a run folder or its trajectory.h5")
    return path


def replica_names(path: str | Path) -> list[str]:
    """Replicas of a file or run folder, by start, temperature and number. Raises TrajectoryError."""
    with _opened(trajectory_file(path)) as file:
        of = {name: dict(group.attrs) for name, group in file["particles"].items()}
    return sorted(of, key=lambda n: (of[n]["start_index"], of[n]["temperature_K"], of[n]["replica_index"]))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of the run that wrote a file (`MDConfig` as plain values). Raises TrajectoryError."""
    with _opened(trajectory_file(path)) as file:
        return dict(json.loads(file["parameters"].attrs["config"]))


def read_events(path: str | Path) -> list[dict[str, Any]] | None:
    """What happened to replicas until the last checkpoint (`Event` as plain values). Raises TrajectoryError.

    None for a file of an early version, beside which summary.json has them.
    """
    with _opened(trajectory_file(path)) as file:
        parameters = file["parameters"]
        return list(json.loads(_text(parameters["events"][()]))) if "events" in parameters else None


def read_replica(path: str | Path, name: str, *, frames: bool = True) -> ReplicaTrajectory:
    """One replica of a file or run folder; without `frames` its observables only.

    Raises:
        TrajectoryError: no such file or replica, or a file that cannot be read.
    """
    path = trajectory_file(path)
    with _opened(path) as file:
        if name not in file["particles"]:
            raise TrajectoryError(f"{path} has no replica {name!r}; it has {', '.join(sorted(file['particles']))}")
        group, observables = file[f"particles/{name}"], file[f"observables/{name}"]
        some = slice(None) if frames else slice(0, 0)
        first = next(iter(observables.values()))
        periodic = "edges" in group["box"] and group["box/edges/value"].shape[0]
        return ReplicaTrajectory(
            member=Member(
                name=name,
                start=int(group.attrs["start_index"]),
                temperature_K=float(group.attrs["temperature_K"]),
                number=int(group.attrs["replica_index"]),
                numbers=group["species"][:],
                masses=group["mass"][:],
                cell=group["box/edges/value"][0] if periodic else np.zeros((3, 3)),
                pbc=tuple(_text(b) == "periodic" for b in group["box"].attrs["boundary"]),  # type: ignore[arg-type]
            ),
            steps=group["position/step"][some],
            times_ps=group["position/time"][some],
            positions=group["position/value"][some],
            velocities=group["velocity/value"][some] if "velocity" in group else None,
            sample_steps=first["step"][:],
            sample_times_ps=first["time"][:],
            observables={key: element["value"][:] for key, element in observables.items()},
        )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """What is read within this context and is damaged is a TrajectoryError too."""
    try:
        with h5py.File(path, "r") as file:
            if "particles" not in file or "observables" not in file:
                raise TrajectoryError(f"{path} is an HDF5 file, but not a trajectory of `mmea md`")
            yield file
    except OSError as problem:
        raise TrajectoryError(f"{path} is no HDF5 file that can be read: {problem}") from problem


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
