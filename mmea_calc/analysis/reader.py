"""The folder of a run -> arrays. The layout of the files is described in `mmea_calc.md.trajectory`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mmea_calc.errors import DataError

FloatArray = NDArray[np.float64]

TRAJECTORY = "trajectory.h5"
# Units that arrays are converted from, to those of this package (A, A/fs, fs, eV, K). Others are refused.
_UNITS = {
    "Angstrom": 1.0,
    "nm": 10.0,
    "Angstrom fs-1": 1.0,
    "Angstrom ps-1": 1e-3,
    "nm ps-1": 1e-2,
    "fs": 1.0,
    "ps": 1e3,
}


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
        cell_A: (3, 3), rows are lattice vectors, of the first frame; zeros without a periodic direction.
        pbc: (3,).
        time_fs: of the observables, (n_samples,).
        observables: name -> (n_samples,), in the units of `mmea_calc.md.trajectory.OBSERVABLES`.
        n_frames: number of frames.
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
    n_frames: int


@dataclass(frozen=True)
class Run:
    """A run of dynamics.

    Attributes:
        path: its trajectory file.
        config: its settings, as JSON values; empty if the file has none.
        replicas: in order of start structure, temperature and number.
        summary: of `summary.json`, if the run has ended; else empty.
    """

    path: Path
    config: dict[str, Any]
    replicas: tuple[Replica, ...]
    summary: dict[str, Any] = field(default_factory=dict)

    def frames(self, replica: Replica, skip_fs: float = 0.0) -> Frames:
        """The frames of a replica from `skip_fs` on; a frame that is not finite, and all after it, are left out."""
        with _opened(self.path) as file:
            group = file[f"particles/{replica.name}"]
            times = _values(group["position"], "time")
            first = int(np.searchsorted(times, times[0] + skip_fs - 1e-6)) if times.size else 0
            positions = _values(group["position"], "value", first)
            velocities = _values(group["velocity"], "value", first) if "velocity" in group else None
        finite = np.isfinite(positions).all(axis=(1, 2))
        if velocities is not None:
            finite &= np.isfinite(velocities).all(axis=(1, 2))
        end = len(finite) if finite.all() else int(np.argmin(finite))
        return Frames(times[first:][:end], positions[:end], None if velocities is None else velocities[:end])


def read_run(folder: str | Path) -> Run:
    """Everything of a run but its frames.

    Args:
        folder: of the run, or its trajectory file.

    Raises:
        DataError: no trajectory, a file that is not HDF5, or one without particles or with unknown units.
    """
    path = Path(folder)
    path = path / TRAJECTORY if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{folder} holds no {TRAJECTORY}: give the folder that `mmea md` wrote")
    with _opened(path) as file:
        if "particles" not in file or not len(file["particles"]):
            raise DataError(f"{path} has no group 'particles': it is not a trajectory in the H5MD layout")
        replicas = [_replica(file, name) for name in file["particles"]]
        text = file["parameters"].attrs.get("config", "{}") if "parameters" in file else "{}"
    config = json.loads(text)
    summary = path.with_name("summary.json")
    return Run(
        path=path,
        config=config if isinstance(config, dict) else {},
        replicas=tuple(sorted(replicas, key=lambda r: (r.start_index, r.target_K, len(r.name), r.name))),
        summary=json.loads(summary.read_text()) if summary.is_file() else {},
    )


def _replica(file: h5py.File, name: str) -> Replica:
    group = file[f"particles/{name}"]
    box = group["box"]
    boundary = [b.decode() if isinstance(b, bytes) else str(b) for b in box.attrs["boundary"]]
    observables: dict[str, FloatArray] = {}
    times = np.zeros(0)
    if f"observables/{name}" in file:
        for key, element in file[f"observables/{name}"].items():
            observables[key] = np.asarray(element["value"][()], dtype=np.float64)
            times = _values(element, "time")
    return Replica(
        name=name,
        start_index=int(group.attrs["start_index"]),
        target_K=float(group.attrs["temperature_K"]),
        numbers=group["species"][()].astype(np.int64),
        masses_amu=group["mass"][()].astype(np.float64),
        cell_A=_values(box["edges"], "value", 0, 1)[0] if "edges" in box else np.zeros((3, 3)),
        pbc=np.array([b == "periodic" for b in boundary]),
        time_fs=times,
        observables=observables,
        n_frames=len(group["position/value"]),
    )


def _values(element: h5py.Group, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
    """An array of an H5MD element in this package's units, float64."""
    data = element[name]
    unit = data.attrs.get("unit", "")
    unit = unit.decode() if isinstance(unit, bytes) else str(unit)
    if unit not in _UNITS:
        known = ", ".join(_UNITS)
        raise DataError(f"{data.file.filename}: {data.name} has the unit '{unit}'; expected one of {known}")
    values = data[start:stop].astype(np.float64)
    return values if _UNITS[unit] == 1.0 else values * _UNITS[unit]


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be opened as HDF5 ({error}): is it a trajectory?") from error
    with file:
        yield file
