"""Dynamics of a check: a temperature ramp, and short runs at constant energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from ase import Atoms

from ..config import CheckConfig, MDConfig
from ..md.monitor import Event
from ..md.record import Record, record
from ..potential import Potential
from ..statistics import LEAST_SAMPLES, drift
from .scans import FloatArray

Tick = Callable[[float], None]

_CHANGES = ("bond broken", "bond formed")
# Energy is sampled often enough for the slope of a short run.
_SAMPLES = 200
_FRAMES = 10


@dataclass(frozen=True)
class RampReplica:
    """One replica in the ramp.

    Attributes:
        survived_ps: until it failed, or the length of the ramp.
        failed_K: the thermostat's temperature then; None if it did not fail.
        changed_K: the thermostat's temperature when a bond of the start first broke or formed; None if none did.
        events: in words.
    """

    survived_ps: float
    failed_K: float | None
    changed_K: float | None
    events: tuple[str, ...]


@dataclass(frozen=True)
class Ramp:
    """A linear temperature ramp.

    Attributes:
        length_ps, from_K, to_K: what was asked for.
        replicas: one after the other.
        time_ps: of the samples, (n_samples,).
        temperature_K: kinetic temperature, (n_samples, n_replicas); NaN after a failure.
    """

    length_ps: float
    from_K: float
    to_K: float
    replicas: tuple[RampReplica, ...]
    time_ps: FloatArray = field(repr=False)
    temperature_K: FloatArray = field(repr=False)

    @property
    def survived_ps(self) -> float:
        """Mean over the replicas."""
        return float(np.mean([r.survived_ps for r in self.replicas]))

    @property
    def n_failed(self) -> int:
        return sum(r.failed_K is not None for r in self.replicas)

    @property
    def changed_K(self) -> float | None:
        """The lowest temperature at which bonds changed in any replica."""
        return min((r.changed_K for r in self.replicas if r.changed_K is not None), default=None)

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """As plain, JSON-ready values; the arrays are left out without `curves`."""
        result = {
            "survived_ps": self.survived_ps,
            "length_ps": self.length_ps,
            "n_failed": self.n_failed,
            "bonds_first_changed_K": self.changed_K,
            "replicas": [asdict(r) for r in self.replicas],
        }
        arrays = {"time_ps": self.time_ps.tolist(), "temperature_K": self.temperature_K.tolist()}
        return result | (arrays if curves else {})


@dataclass(frozen=True)
class ConstantEnergy:
    """Runs by velocity Verlet.

    Attributes:
        temperature_K: mean over runs and time.
        drift_meV_per_atom_ps, drift_error_meV_per_atom_ps: slope of the total energy, mean over the runs, and its
            standard error; None if a run failed or was too short.
        events: failures, in words.
        time_ps: of the samples, (n_samples,).
        energy_meV_per_atom: total energy from the start, (n_samples, n_replicas); NaN after a failure.
        frames: structures along the runs.
    """

    temperature_K: float
    drift_meV_per_atom_ps: float | None
    drift_error_meV_per_atom_ps: float | None
    events: tuple[str, ...]
    time_ps: FloatArray = field(repr=False)
    energy_meV_per_atom: FloatArray = field(repr=False)
    frames: tuple[Atoms, ...] = field(repr=False)

    def to_dict(self, *, curves: bool = True) -> dict[str, Any]:
        """As plain, JSON-ready values; the arrays are left out without `curves`."""
        names = ("temperature_K", "drift_meV_per_atom_ps", "drift_error_meV_per_atom_ps")
        result: dict[str, Any] = {**{n: getattr(self, n) for n in names}, "events": list(self.events)}
        arrays = {"time_ps": self.time_ps.tolist(), "energy_meV_per_atom": self.energy_meV_per_atom.tolist()}
        return result | (arrays if curves else {})


def ramp(potential: Potential, atoms: Atoms, config: CheckConfig, tick: Tick = lambda done: None) -> Ramp:
    """Heat several replicas of a structure. A replica fails as `mmea_calc.md.monitor` says; a bond that breaks or
    forms is an event, not a failure: at 2000 K molecules do react.

    Raises:
        DataError, DynamicsError: a structure or settings that cannot be used.
    """
    settings = ramp_settings(config)
    run = record(potential, [atoms], settings, go_on=_ticking(tick, settings))
    tick(1.0)
    rate = settings.heating_K_per_ps
    replicas = []
    for replica in run.replicas:
        events = [e for e in run.events if e.replica == replica.name]
        failed = _first(events, ("failed",))
        changed = _first(events, _CHANGES)
        replicas.append(
            RampReplica(
                survived_ps=settings.time_ps if failed is None else failed,
                failed_K=None if failed is None else config.ramp_from_K + rate * failed,
                changed_K=None if changed is None else config.ramp_from_K + rate * changed,
                events=tuple(str(e) for e in events),
            )
        )
    temperature = run.values["temperature"]
    return Ramp(config.ramp_ps, config.ramp_from_K, config.ramp_to_K, tuple(replicas), run.time_ps, temperature)


def ramp_settings(config: CheckConfig) -> MDConfig:
    """The settings of the ramp."""
    return MDConfig(
        temperatures_K=(config.ramp_from_K,),
        replicas=config.ramp_replicas,
        time_ps=config.ramp_ps,
        timestep_fs=config.timestep_fs,
        friction_per_fs=config.friction_per_fs,
        heating_K_per_ps=(config.ramp_to_K - config.ramp_from_K) / config.ramp_ps,
        seed=config.seed,
        drift_every=0,
    )


def thermal_frames(
    potential: Potential, atoms: Atoms, config: CheckConfig, tick: Tick = lambda done: None
) -> list[Atoms]:
    """One frame per replica after a short run with a thermostat, where constant energy begins.

    A relaxed start with velocities of a temperature would end up at half of it.
    """
    settings = MDConfig(
        temperatures_K=(config.nve_K,),
        replicas=config.nve_replicas,
        time_ps=config.equilibration_ps,
        timestep_fs=config.timestep_fs,
        friction_per_fs=config.friction_per_fs,
        seed=config.seed,
        drift_every=0,
    )
    run = record(potential, [atoms], settings, go_on=_ticking(tick, settings))
    return [_moved(atoms, positions) for positions in run.final]


def constant_energy(
    potential: Potential, starts: Sequence[Atoms], config: CheckConfig, tick: Tick = lambda done: None
) -> ConstantEnergy:
    """Velocity Verlet from every structure, with velocities of `nve_K`. Raises DataError, DynamicsError."""
    settings = nve_settings(config)
    every = max(1, settings.n_steps // settings.stats_every // _FRAMES)
    run = record(potential, starts, settings, frames_every=every, go_on=_ticking(tick, settings))
    energy = run.values["conserved_energy"]
    energy = 1000 * (energy - energy[0]) / np.array([len(a) for a in starts])
    drift, error = _drift(run, energy)
    return ConstantEnergy(
        float(np.nanmean(run.values["temperature"])),
        drift,
        error,
        tuple(str(e) for e in run.events if e.kind == "failed"),
        run.time_ps,
        energy,
        tuple(_moved(starts[i], positions) for i, positions in run.frames),
    )


def nve_settings(config: CheckConfig) -> MDConfig:
    """The settings of the runs at constant energy."""
    steps = round(config.nve_ps * 1000 / config.timestep_fs)
    every = max(1, min(8, steps // _SAMPLES))
    return MDConfig(
        temperatures_K=(config.nve_K,),
        time_ps=config.nve_ps,
        timestep_fs=config.timestep_fs,
        ensemble="nve",
        seed=config.seed,
        stats_every=every,
        traj_every=every,
        drift_every=0,
    )


def _drift(run: Record, energy: FloatArray) -> tuple[float | None, float | None]:
    """Mean slope over the replicas and its standard error, meV/atom/ps."""
    if any(e.kind == "failed" for e in run.events):
        return None, None
    if len(run.time_ps) < LEAST_SAMPLES:
        return None, None
    lines = [drift(run.time_ps, column) for column in energy.T]
    error = float(np.sqrt(sum(line.error**2 for line in lines)) / len(lines))
    return float(np.mean([line.slope for line in lines])), error


def _first(events: Sequence[Event], kinds: Sequence[str]) -> float | None:
    return min((e.time_ps for e in events if e.kind in kinds), default=None)


def _ticking(tick: Tick, settings: MDConfig) -> Callable[[int], bool]:
    def go_on(step: int) -> bool:
        tick(step / settings.n_steps)
        return True

    return go_on


def _moved(atoms: Atoms, positions: FloatArray) -> Atoms:
    moved: Atoms = atoms.copy()
    moved.positions = positions
    return moved
