"""What is told of a run at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..statistics import block_average, drift
from .monitor import Event, stable_ps
from .trajectory import read_replica, read_settings, replica_names

# Fewer samples than this say nothing of an error.
LEAST_SAMPLES = 20


@dataclass(frozen=True)
class ReplicaSummary:
    """One line of the table.

    Attributes:
        replica: name.
        target_K: temperature asked for.
        temperature_K, temperature_error_K: mean over the second half of the run and its standard error
            (`mmea_calc.statistics.block_average`); None with fewer samples than `LEAST_SAMPLES`.
        drift_meV_per_atom_ps, drift_error_meV_per_atom_ps: slope of the conserved energy over the whole run and its
            standard error (`mmea_calc.statistics.drift`).
        length_ps: how far it came.
        stable_ps: until it failed or its bonds changed.
        largest_gate_excess: None without gates.
        adapted_minus_bare_eV_per_A: mean over the run of the root mean square difference; None without an adapter.
        events: what happened to it.
    """

    replica: str
    target_K: float
    temperature_K: float | None
    temperature_error_K: float | None
    drift_meV_per_atom_ps: float | None
    drift_error_meV_per_atom_ps: float | None
    length_ps: float
    stable_ps: float
    largest_gate_excess: float | None
    adapted_minus_bare_eV_per_A: float | None
    events: tuple[Event, ...]

    @property
    def failed(self) -> bool:
        return any(e.kind == "failed" for e in self.events)


@dataclass(frozen=True)
class Summary:
    """All replicas, and the time that this part of the run took."""

    replicas: tuple[ReplicaSummary, ...]
    steps: int
    seconds: float
    replica_steps_per_s: float | None

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the replicas that failed."""
        return tuple(r.replica for r in self.replicas if r.failed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(folder: Path, events: Sequence[Event], *, steps: int, seconds: float, rate: float | None) -> Summary:
    """The summary of a run folder; earlier parts of a resumed run are in it. Raises TrajectoryError."""
    rows, walks = [], read_settings(folder)["ensemble"] == "nvt"
    for name in replica_names(folder):
        replica = read_replica(folder, name, frames=False)
        values, time = replica.observables, replica.sample_times_ps
        conserved = values["conserved_energy"] / len(replica.member.numbers) * 1000
        temperature, error = _mean(values["temperature"][len(time) // 2 :])
        slope, slope_error = _drift(time, conserved, walks=walks)
        length = float(time[-1]) if len(time) else 0.0
        rows.append(
            ReplicaSummary(
                replica=name,
                target_K=replica.member.temperature_K,
                temperature_K=temperature,
                temperature_error_K=error,
                drift_meV_per_atom_ps=slope,
                drift_error_meV_per_atom_ps=slope_error,
                length_ps=length,
                stable_ps=stable_ps(events, name, length),
                largest_gate_excess=_of(np.max, values["gate_excess"]),
                adapted_minus_bare_eV_per_A=_of(np.mean, values["adapted_minus_bare"]),
                events=tuple(e for e in events if e.replica == name),
            )
        )
    return Summary(tuple(rows), steps, seconds, rate)


def _mean(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    if len(values) < LEAST_SAMPLES:
        return _of(np.mean, values), None
    average = block_average(values)
    return average.mean, average.error


def _drift(
    time_ps: NDArray[np.float64], energy: NDArray[np.float64], *, walks: bool
) -> tuple[float | None, float | None]:
    if len(time_ps) < LEAST_SAMPLES:
        return None, None
    line = drift(time_ps, energy, walks=walks)
    return line.slope, line.error


def _of(function: Any, values: NDArray[np.float64]) -> float | None:
    measured = values[np.isfinite(values)]
    return float(function(measured)) if len(measured) else None
