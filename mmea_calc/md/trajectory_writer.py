"""Writing `trajectory.h5` so that it is complete at every moment; `mmea_calc.md.trajectory` says what is in it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import TrajectoryError
from ..files import replacing
from .trajectory import OBSERVABLES, Member

_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Settings:
    """How frames are stored.

    Attributes:
        precision: "float32" or "float64".
        velocities: whether they are stored.
        frames_per_checkpoint, samples_per_checkpoint: for the size of chunks.
        config: settings of the run, kept in the file.
    """

    precision: str
    velocities: bool
    frames_per_checkpoint: int
    samples_per_checkpoint: int
    config: Mapping[str, Any]


@dataclass
class _Buffer:
    """What is not in a file yet: steps and, for each, values and who had not failed."""

    frames: list[tuple[int, float, NDArray[Any], NDArray[Any] | None, NDArray[np.bool_]]]
    samples: list[tuple[int, float, NDArray[np.float64], NDArray[np.bool_]]]

    def __add__(self, other: _Buffer) -> _Buffer:
        return _Buffer(self.frames + other.frames, self.samples + other.samples)


class TrajectoryWriter:
    """Writes `trajectory.h5` of a run folder.

    Args:
        folder: the run folder; it must exist.
        members: the replicas, in the order of the batch.
        settings: how to store.
        resume_at: None makes a new file; a step goes on with the existing one, of which later frames are cut off.

    Raises:
        TrajectoryError: the file cannot be read or written, or is of other replicas.
    """

    def __init__(
        self, folder: Path, members: Sequence[Member], settings: Settings, *, resume_at: int | None = None
    ) -> None:
        self.path = folder / "trajectory.h5"
        self._twin = folder / ".trajectory.twin.h5"
        self._before = folder / ".trajectory.before.h5"
        self.members, self.settings = list(members), settings
        self._split = np.cumsum([len(m.numbers) for m in members])[:-1]
        self._new, self._lag = _Buffer([], []), _Buffer([], [])
        self._last_frame = self._last_sample = -1
        with _explained(self.path):
            self._before.unlink(missing_ok=True)
            if resume_at is None:
                _create(self._twin, members, settings)
                _write_views(folder, members)
            else:
                _copy(self.path, self._twin)
                self._last_frame, self._last_sample = _cut(self._twin, [m.name for m in members], resume_at)
                _set_config(self._twin, settings)
            os.replace(self._twin, self.path)
            _copy(self.path, self._twin)

    def frame(
        self,
        step: int,
        time_ps: float,
        positions: NDArray[np.float64],
        velocities: NDArray[np.float64],
        alive: NDArray[np.bool_],
    ) -> None:
        """Keep a frame until the next `flush`.

        Args:
            step: larger than that of the frame before.
            time_ps: of the step.
            positions: of all replicas, (n_atoms, 3), A.
            velocities: A/fs.
            alive: which replicas have not failed, (n_replicas,).

        Raises:
            TrajectoryError: the step does not increase.
        """
        self._last_frame = self._increase("frame", self._last_frame, step)
        kept = velocities.astype(self.settings.precision) if self.settings.velocities else None
        self._new.frames.append((step, time_ps, positions.astype(self.settings.precision), kept, alive.copy()))

    def sample(self, step: int, time_ps: float, values: NDArray[np.float64], alive: NDArray[np.bool_]) -> None:
        """Keep observables, (n_observables, n_replicas), until the next `flush`. Raises TrajectoryError."""
        self._last_sample = self._increase("sample", self._last_sample, step)
        self._new.samples.append((step, time_ps, values.copy(), alive.copy()))

    def _increase(self, what: str, last: int, step: int) -> int:
        if step <= last:
            raise TrajectoryError(f"{self.path}: steps must increase, got a {what} of step {step} after step {last}")
        return step

    def flush(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Make everything so far part of the file, which is on the disk afterwards.

        Args:
            events: all since step 0, as plain values.

        Raises:
            TrajectoryError: it cannot be written. The file is what it was after the flush before.
        """
        with _explained(self.path):
            try:
                everything, told = self._lag + self._new, json.dumps(list(events))
                _reserve(self._twin, _room(everything, self.members, self.settings) + 2 * len(told))
                _append(self._twin, self.members, everything, self._split, told)
                _to_disk(self._twin)
            except BaseException:
                self.close()  # a torn twin is of no use, and the disk may be full
                raise
            # The visible file keeps its content under a second name while the longer one takes its place.
            self._before.unlink(missing_ok=True)
            os.link(self.path, self._before)
            os.replace(self._twin, self.path)
            os.replace(self._before, self._twin)
            _to_disk(self.path.parent)
        self._lag, self._new = self._new, _Buffer([], [])

    def close(self) -> None:
        """Remove the twin. What has not been flushed is lost."""
        self._twin.unlink(missing_ok=True)
        self._before.unlink(missing_ok=True)


class _explained:  # noqa: N801 (used like a function)
    """A context: what goes wrong with the file becomes a TrajectoryError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, RuntimeError, KeyError)):
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise TrajectoryError(
                f"{self.path} cannot be written: {reason}; it holds everything up to the last checkpoint: when the "
                "cause is gone, go on with --resume"
            ) from error


def _create(path: Path, members: Sequence[Member], settings: Settings) -> None:
    """A file without frames."""
    with h5py.File(path, "w") as file:
        head = file.create_group("h5md")
        head.attrs["version"] = np.array([1, 1], dtype=np.int32)
        head.create_group("author").attrs["name"] = "mmea"
        head.create_group("creator").attrs.update({"name": "mmea", "version": _version()})
        head.create_group("modules/units").attrs["version"] = np.array([1, 0], dtype=np.int32)
        file.create_group("parameters").attrs["config"] = json.dumps(dict(settings.config))
        for member in members:
            _create_member(file, member, settings)


def _set_config(path: Path, settings: Settings) -> None:
    """A run that goes on may be asked to be longer than it was."""
    with _open(path) as file:
        file["parameters"].attrs["config"] = json.dumps(dict(settings.config))


def _set_events(parameters: h5py.Group, events: str) -> None:
    """In place of those that the file has; they are few, and most checkpoints bring none."""
    if "events" in parameters:
        if parameters["events"].asstr()[()] == events:
            return
        del parameters["events"]
    parameters["events"] = events


def _create_member(file: h5py.File, member: Member, settings: Settings) -> None:
    n_atoms = len(member.numbers)
    group = file.create_group(f"particles/{member.name}")
    group.attrs.update(
        {"start_index": member.start, "temperature_K": member.temperature_K, "replica_index": member.number}
    )
    group["species"] = member.numbers
    group["mass"] = member.masses
    group["mass"].attrs["unit"] = "u"
    box = group.create_group("box")
    box.attrs["dimension"] = 3
    box.attrs["boundary"] = ["periodic" if p else "none" for p in member.pbc]
    frames = settings.frames_per_checkpoint
    first = _element(group.create_group("position"), (n_atoms, 3), settings.precision, "Angstrom", frames)
    if settings.velocities:
        _element(group.create_group("velocity"), (n_atoms, 3), settings.precision, "Angstrom fs-1", frames, first)
    if any(member.pbc):
        _element(box.create_group("edges"), (3, 3), "float64", "Angstrom", frames, first)
    shared = None
    for name, unit in OBSERVABLES.items():
        observable = file.create_group(f"observables/{member.name}/{name}")
        shared = _element(observable, (), "float64", unit, settings.samples_per_checkpoint, shared) or shared


def _element(
    group: h5py.Group,
    shape: tuple[int, ...],
    dtype: str,
    unit: str,
    per_checkpoint: int,
    like: h5py.Group | None = None,
) -> h5py.Group:
    """A time-dependent element of H5MD; its steps and times are those of `like`, if that is given."""
    entry = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize

    def series(name: str, shape: tuple[int, ...], dtype: str, entry: int) -> h5py.Dataset:
        rows = max(1, min(per_checkpoint, _CHUNK_BYTES // entry))
        return group.create_dataset(
            name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(rows, *shape), compression="gzip", shuffle=True
        )

    series("value", shape, dtype, entry).attrs["unit"] = unit
    if like is None:
        series("step", (), "int64", 8)
        series("time", (), "float64", 8).attrs["unit"] = "ps"
    else:
        group["step"], group["time"] = like["step"], like["time"]
    return group


def _room(buffer: _Buffer, members: Sequence[Member], settings: Settings) -> int:
    """Bytes by which `_append` may lengthen the file at most."""
    raw = sum(x.nbytes + (0 if v is None else v.nbytes) for _, _, x, v, _ in buffer.frames)
    raw += sum(values.nbytes for _, _, values, _ in buffer.samples)
    datasets = len(members) * (len(OBSERVABLES) + 7)
    # Besides the data: one rewritten chunk and some nodes of the index for every dataset.
    n_atoms = sum(len(m.numbers) for m in members)
    chunks = 2 * 3 * 8 * n_atoms * settings.frames_per_checkpoint
    chunks += len(members) * (len(OBSERVABLES) + 2) * 8 * settings.samples_per_checkpoint
    return 2 * raw + min(chunks, 2 * datasets * _CHUNK_BYTES) + 8192 * datasets


def _reserve(path: Path, size: int) -> None:
    """Make sure that `size` more bytes can be written; HDF5 gives back what it does not need when it closes the file.

    HDF5 does not survive a write that fails (the process crashes while it closes its datasets), so a disk that is
    full is found here.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, size)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # others: a file system that cannot reserve
    finally:
        os.close(descriptor)


def _open(path: Path) -> h5py.File:
    # Somebody may be reading: what is the twin now was the visible file before.
    return h5py.File(path, "r+", locking=False)


def _append(path: Path, members: Sequence[Member], buffer: _Buffer, split: NDArray[np.int64], events: str) -> None:
    with _open(path) as file:
        _set_events(file["parameters"], events)
        if buffer.frames:
            steps, times, positions, velocities, alive = zip(*buffer.frames, strict=True)
            by_member = np.split(np.stack(positions), split, axis=1)
            moving = np.split(np.stack(velocities), split, axis=1) if velocities[0] is not None else None
            for i, member in enumerate(members):
                keep, group = np.stack(alive)[:, i], file[f"particles/{member.name}"]
                _extend(group["position/step"], np.array(steps)[keep])
                _extend(group["position/time"], np.array(times)[keep])
                _extend(group["position/value"], by_member[i][keep])
                if moving is not None:
                    _extend(group["velocity/value"], moving[i][keep])
                if any(member.pbc):
                    _extend(group["box/edges/value"], np.repeat(member.cell[None], keep.sum(), axis=0))
        if buffer.samples:
            steps, times, values, alive = zip(*buffer.samples, strict=True)
            stacked = np.stack(values)
            for i, member in enumerate(members):
                keep, group = np.stack(alive)[:, i], file[f"observables/{member.name}"]
                first = next(iter(OBSERVABLES))
                _extend(group[f"{first}/step"], np.array(steps)[keep])
                _extend(group[f"{first}/time"], np.array(times)[keep])
                for j, name in enumerate(OBSERVABLES):
                    _extend(group[f"{name}/value"], stacked[keep, j, i])


def _extend(dataset: h5py.Dataset, rows: NDArray[Any]) -> None:
    if len(rows):
        n = dataset.shape[0]
        dataset.resize(n + len(rows), axis=0)
        dataset[n:] = rows


def _cut(path: Path, names: Sequence[str], step: int) -> tuple[int, int]:
    """Cut off what is later than `step`; the last steps of frames and of samples that are left (-1: none)."""
    last = [-1, -1]
    with _open(path) as file:
        if (found := sorted(file["particles"])) != sorted(names):
            raise TrajectoryError(f"{path} holds the replicas {found}, expected {sorted(names)}")
        for name in names:
            groups = [
                file[f"particles/{name}/{part}"]
                for part in ("position", "velocity", "box/edges")
                if f"particles/{name}/{part}" in file
            ]
            observables = list(file[f"observables/{name}"].values())
            for which, elements in enumerate((groups, observables)):
                steps = elements[0]["step"][:]
                keep = int(np.searchsorted(steps, step, side="right"))
                for dataset in [elements[0]["step"], elements[0]["time"], *(e["value"] for e in elements)]:
                    dataset.resize(keep, axis=0)
                last[which] = max(last[which], int(steps[keep - 1]) if keep else -1)
    return last[0], last[1]


def _write_views(folder: Path, members: Sequence[Member]) -> None:
    """One small file of links per replica, for readers that know one group of particles only."""
    views = folder / "replicas"
    views.mkdir(exist_ok=True)
    for member in members:
        path = views / f"{member.name}.h5md"
        with replacing(path) as temporary, h5py.File(temporary, "w") as file:
            for name in ("h5md", "parameters"):
                file[name] = h5py.ExternalLink("../trajectory.h5", f"/{name}")
            file.create_group("particles")["trajectory"] = h5py.ExternalLink(
                "../trajectory.h5", f"/particles/{member.name}"
            )


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)
    _to_disk(destination)


def _to_disk(path: Path) -> None:
    """Wait until the operating system has written a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version() -> str:
    try:
        return version("mmea")
    except PackageNotFoundError:
        return "unknown"
