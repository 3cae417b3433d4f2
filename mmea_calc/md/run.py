"""`run_md`: dynamics into a run folder.

    RUN/config.json             the settings, the potential, the start structures' hash
    RUN/trajectory.h5           frames, observables and events (`mmea_calc.md.trajectory`)
    RUN/replicas/*.h5md         one replica each, for MDAnalysis
    RUN/checkpoint.safetensors  what the run goes on from
    RUN/summary.json            the table at the end

At a checkpoint the trajectory is written first, the checkpoint after it: the trajectory is never behind, and what it
is ahead is cut off when the run goes on. On the CPU, with the same number of threads, a run that was interrupted
anywhere and resumed equals the uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from torch import Tensor

from ..config import MDConfig, to_dict
from ..errors import DynamicsError
from ..files import alone_in
from ..potential import Potential
from ..training.run_folder import is_training
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint, write_whole
from .minimise import minimise
from .simulation import Simulation, check_equivariant
from .summary import Summary, summarise
from .trajectory import Member
from .trajectory_writer import Settings, TrajectoryWriter

# Settings that a resumed run may have otherwise: how long it is.
_MAY_DIFFER = ("time_ps",)
_FILES = ("config.json", "trajectory.h5", "checkpoint.safetensors", "summary.json")


@dataclass(frozen=True)
class MDProgress:
    """Told after every sample.

    Attributes:
        step, n_steps: steps done and of the whole run.
        replica_steps_per_s: speed of this part of the run.
        seconds_left: at that speed.
        n_alive, n_replicas: replicas that have not failed, and all.
        temperatures_K: at present, of every replica.
        message: something to be read, such as an event.
    """

    step: int
    n_steps: int
    replica_steps_per_s: float
    seconds_left: float
    n_alive: int
    n_replicas: int
    temperatures_K: tuple[float, ...] = ()
    message: str | None = None


Progress = Callable[[MDProgress], None]


def run_md(
    potential: Potential,
    starts: Atoms | Sequence[Atoms],
    output: str | Path,
    config: MDConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    progress: Progress = lambda event: None,
    go_on: Callable[[int], bool] = lambda step: True,
) -> Summary:
    """Run every start structure at every temperature, all as one batch.

    Args:
        potential: backbone, with or without an adapter; `device` and `dtype` of the settings are taken from it.
        starts: start structures. Velocities they may have are not used.
        output: the run folder.
        config: the settings.
        resume: go on from the folder's checkpoint to `time_ps`, which is the total.
        overwrite: remove the run that is in the folder.
        force: run an adapter whose method is not equivariant.
        progress: told how far it is.
        go_on: asked with the number of steps done, before the first one and at every sample and checkpoint; False ends
            the run there, with a checkpoint to be resumed from.

    Returns:
        the table at the end; `steps` tells whether it is the end that was asked for.

    Raises:
        DynamicsError: an adapter that is not equivariant; settings that make no sense; the folder holds a run already,
            or none to resume, or one with other settings, or a training. Nothing has been written then.
        DataError: a structure that cannot be used.
        TrajectoryError: the trajectory cannot be written; what was there at the last checkpoint is.
    """
    check_equivariant(potential, force)
    folder = Path(output)
    structures = [starts] if isinstance(starts, Atoms) else list(starts)
    device, dtype = str(potential.device), str(potential.dtype).removeprefix("torch.")
    config = replace(config or MDConfig(), device=device, dtype=dtype)  # type: ignore[arg-type]
    simulation = Simulation(potential, structures, config)  # checks everything
    identity = _identity(potential, structures, config)
    with ExitStack() as held:
        if folder.is_dir():
            held.enter_context(alone_in(folder, DynamicsError))
        checkpoint = _found_checkpoint(folder, identity, config, resume=resume, overwrite=overwrite)
        if checkpoint is not None and config.minimize:
            # degrees of freedom are those of the relaxed structures
            simulation = Simulation(potential, _started_from(simulation, checkpoint.start_positions), config)
        held.enter_context(potential.folded())
        messages: list[str] = []
        if checkpoint is None:
            if config.minimize:
                relaxed, messages = minimise(potential, structures)
                simulation = Simulation(potential, relaxed, config)
            messages += [_velocities_ignored(i) for i, a in enumerate(structures) if a.has("momenta")]
            if _holds_run(folder) and overwrite:
                _remove(folder)
            if not folder.is_dir():
                folder.mkdir(parents=True)
                held.enter_context(alone_in(folder, DynamicsError))
        write_whole(folder / "config.json", json.dumps({**identity, "time_ps": config.time_ps}, indent=2) + "\n")
        held.callback(simulation.close)
        run = _Run(simulation, folder, identity, progress, checkpoint)
        for message in messages:
            run.tell(message)
        if checkpoint is None:
            run.begin()
        return run.finish(go_on)


class _Run:
    """A simulation with its files."""

    def __init__(
        self,
        simulation: Simulation,
        folder: Path,
        identity: dict[str, Any],
        progress: Progress,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.simulation, self.folder, self.identity, self.progress = simulation, folder, identity, progress
        self.config = simulation.config
        self.n_told = 0
        if checkpoint is not None:
            simulation.state = checkpoint.state
            simulation.monitor.load_state_dict(checkpoint.monitor, checkpoint.events)
            self.n_told = len(checkpoint.events)
        self.start_positions = simulation.layout.start_positions() if checkpoint is None else checkpoint.start_positions
        resume_at = None if checkpoint is None else checkpoint.state.step
        self.writer = TrajectoryWriter(folder, _members(simulation), _settings(self.config), resume_at=resume_at)
        if checkpoint is not None:
            self._flush()  # of events too the file may be ahead
        self.first_step = resume_at or 0
        self.began = time.monotonic()
        self.replica_steps = 0

    @property
    def step(self) -> int:
        return self.simulation.state.step

    def begin(self) -> None:
        """Step 0 with its frame, and a first checkpoint: from now on the run can be resumed."""
        self.simulation.start()
        self._record()
        self._checkpoint()

    def finish(self, go_on: Callable[[int], bool]) -> Summary:
        """All steps that are left, unless told to end, and the summary."""
        simulation, config = self.simulation, self.config
        saved = self.step
        alive = int(simulation.monitor.alive.sum())
        while self.step < config.n_steps and alive and go_on(self.step):
            ends = [every - self.step % every for every in (config.stats_every, config.restart_every)]
            n = min(*ends, config.n_steps - self.step)
            simulation.advance(n)
            self.replica_steps += n * alive
            if self.step % config.stats_every == 0:
                self._record()
            # Asked at checkpoints too, so that a run ends where it would if it were resumed from there.
            alive = int(simulation.monitor.alive.sum())
            if self.step % config.restart_every == 0:
                self._checkpoint()
                saved = self.step
        if self.step != saved:
            self._checkpoint()
        self.writer.close()
        seconds = time.monotonic() - self.began
        rate = self.replica_steps / seconds if self.replica_steps else None
        summary = summarise(self.folder, simulation.monitor.events, steps=self.step, seconds=seconds, rate=rate)
        write_whole(self.folder / "summary.json", json.dumps(_plain(summary.to_dict()), indent=2) + "\n")
        return summary

    def _record(self) -> None:
        """A sample, and a frame if it is its turn."""
        simulation, layout = self.simulation, self.simulation.layout
        time_ps = self.step * self.config.timestep_fs / 1000
        values = simulation.sample()
        alive = simulation.monitor.alive.cpu().numpy()
        self.writer.sample(self.step, time_ps, values.numpy(), alive)
        if self.step % self.config.traj_every == 0:
            state = simulation.state
            velocities = state.velocities.cpu().numpy() * units.fs
            self.writer.frame(self.step, time_ps, state.positions.cpu().numpy(), velocities, alive)
        self._tell_events()
        seconds = max(time.monotonic() - self.began, 1e-9)
        n_alive, left = int(alive.sum()), self.config.n_steps - self.step
        done = self.step - self.first_step
        self.progress(
            MDProgress(
                self.step,
                self.config.n_steps,
                self.replica_steps / seconds,
                seconds / done * left if done else float("nan"),
                n_alive,
                layout.n_replicas,
                tuple(values[0].tolist()),
            )
        )

    def _tell_events(self) -> None:
        """Those that are new."""
        events = self.simulation.monitor.events
        for event in events[self.n_told :]:
            self.tell(str(event))
        self.n_told = len(events)

    def tell(self, message: str) -> None:
        n = self.simulation.layout.n_replicas
        self.progress(MDProgress(0, self.config.n_steps, 0.0, float("nan"), n, n, message=message))

    def _flush(self) -> list[dict[str, Any]]:
        """Frames and samples so far, and all events, which are returned."""
        self.simulation.monitor.tell_failures()  # since the last sample
        self._tell_events()
        events = [e.to_dict() for e in self.simulation.monitor.events]
        self.writer.flush(events)
        return events

    def _checkpoint(self) -> None:
        events, monitor = self._flush(), self.simulation.monitor
        content = Checkpoint(self.simulation.state, monitor.state_dict(), self.start_positions, events, self.identity)
        write_checkpoint(self.folder / "checkpoint.safetensors", content)


def _started_from(simulation: Simulation, positions: Tensor) -> list[Atoms]:
    """The start structures at the positions of step 0, (n_atoms, 3), of all replicas."""
    structures: dict[int, Atoms] = {}
    for replica, own in zip(simulation.layout.replicas, simulation.layout.split(positions), strict=True):
        structures[replica.start] = (atoms := replica.atoms.copy())
        atoms.positions = own.cpu().numpy()
    return [structures[i] for i in sorted(structures)]


# --- what a run is ---------------------------------------------------------------------------------------------------


def _identity(potential: Potential, starts: Sequence[Atoms], config: MDConfig) -> dict[str, Any]:
    """All that a resumed run must share with the run that it goes on with."""
    adapter = potential.adapter
    settings = {k: v for k, v in to_dict(config).items() if k not in _MAY_DIFFER}
    digest = sha256()
    for atoms in starts:
        for array in (atoms.numbers.astype(np.int64), atoms.positions, atoms.get_masses(), atoms.cell.array, atoms.pbc):
            digest.update(np.ascontiguousarray(array).tobytes())
    weights = sha256()
    if adapter is not None:
        for name, tensor in sorted(adapter.state_dict().items()):
            weights.update(name.encode() + tensor.cpu().double().numpy().tobytes())
    energies = {str(z): potential.reference_energies[z] for z in sorted(potential.reference_energies)}
    return {
        "settings": settings,
        "backbone": potential.backbone.name,
        "backbone_fingerprint": potential.backbone.fingerprint,
        "head": potential.backbone.head,
        "adapter": None if adapter is None else {**to_dict(adapter.config), "sha256": weights.hexdigest()},
        "reference_energies": energies,
        "start_structures": {"count": len(starts), "sha256": digest.hexdigest()},
    }


def _holds_run(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "trajectory.h5").exists()


def _found_checkpoint(
    folder: Path, identity: dict[str, Any], config: MDConfig, *, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """The checkpoint to go on from; None for a new run. Raises DynamicsError."""
    if folder.exists() and not folder.is_dir():
        raise DynamicsError(f"{folder} is a file; expected a folder for the run")
    there = _holds_run(folder)
    if is_training(folder):
        raise DynamicsError(f"{folder} is the folder of a training; give another one (--output)")
    if resume and overwrite:
        raise DynamicsError("resume and overwrite exclude each other: choose one")
    if not resume:
        if there and not overwrite:
            raise DynamicsError(f"{folder} holds a run already: go on with it (--resume), replace it (--overwrite)")
        return None
    if not there:
        raise DynamicsError(f"{folder} holds no run to resume")
    path = folder / "checkpoint.safetensors"
    before = _read_config(folder) if not path.exists() else (content := read_checkpoint(path, config.device)).identity
    if different := _differences(before, identity):
        raise DynamicsError(
            f"{folder} was run otherwise: {'; '.join(different)}. A resumed run may differ in its --time only"
        )
    if not path.exists():  # interrupted before its first step
        return None
    if config.n_steps < content.state.step:
        raise DynamicsError(
            f"{folder} has {content.state.step} steps already, more than the {config.n_steps} that are asked for: "
            "give a longer --time"
        )
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as problem:
        raise DynamicsError(f"{folder / 'config.json'} cannot be read ({problem}); use --overwrite") from problem


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value, "" if key == "settings" else f"{key} ")
        elif json.loads(json.dumps(old)) != json.loads(json.dumps(value)):  # tuples are lists, 300 is 300.0
            found.append(f"{prefix}{key} was {old}, now {value}")
    return found


def _remove(folder: Path) -> None:
    """Only what a run has written."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in ("replicas", "analysis"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _members(simulation: Simulation) -> list[Member]:
    return [
        Member(
            r.name,
            r.start,
            r.temperature_K,
            r.number,
            r.atoms.numbers.astype(np.int64),
            r.atoms.get_masses(),
            np.array(r.atoms.cell.array),
            tuple(bool(p) for p in r.atoms.pbc),  # type: ignore[arg-type]
        )
        for r in simulation.layout.replicas
    ]


def _settings(config: MDConfig) -> Settings:
    return Settings(
        precision=config.positions_dtype,
        velocities=config.velocities,
        frames_per_checkpoint=max(1, config.restart_every // config.traj_every),
        samples_per_checkpoint=max(1, config.restart_every // config.stats_every),
        config=to_dict(config),
    )


def _velocities_ignored(i: int) -> str:
    return f"start structure {i} has velocities; they are not used: every replica draws its own at its temperature"


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
