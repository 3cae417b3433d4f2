"""What is told of a run at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..statistics import LEAST_SAMPLES, Drift, block_average, drift
from .monitor import Event, stable_ps
from .trajectory import read_replica, read_settings, replica_names


@dataclass(frozen=True)
class ReplicaSummary:
    """One line of the table.

    Attributes:
        replica: name.
        target_K: temperature asked for.
        temperature_K, temperature_error_K: mean over the second half of the run and its standard error
            (`mmea_calc.statistics.block_average`), of a short run a lower bound of it; None with fewer samples than
            `mmea_calc.statistics.LEAST_SAMPLES`.
        drift_meV_per_atom_ps, drift_error_meV_per_atom_ps: slope of the conserved energy over the whole run and its
            standard error (`conserved_drift`).
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
    rows, settings = [], read_settings(folder)
    for name in replica_names(folder):
        replica = read_replica(folder, name, frames=False)
        values, time = replica.observables, replica.sample_times_ps
        conserved = values["conserved_energy"] / len(replica.member.numbers) * 1000
        temperature, error = _mean(values["temperature"][len(time) // 2 :])
        line = conserved_drift(time, conserved, settings)
        length = float(time[-1]) if len(time) else 0.0
        rows.append(
            ReplicaSummary(
                replica=name,
                target_K=replica.member.temperature_K,
                temperature_K=temperature,
                temperature_error_K=error,
                drift_meV_per_atom_ps=_known(line.slope),
                drift_error_meV_per_atom_ps=_known(line.error),
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


def conserved_drift(
    time_ps: NDArray[np.floating[Any]], energy: NDArray[np.floating[Any]], settings: Mapping[str, Any]
) -> Drift:
    """Drift of the conserved energy of a run.

    Args:
        time_ps: of the samples, (n_samples,).
        energy: conserved, (n_samples,), in whatever unit.
        settings: of the run (`MDConfig` as plain values): random forces make this energy walk at random.

    Returns:
        per ps; NaN with fewer samples than `LEAST_SAMPLES`.
    """
    if len(time_ps) < LEAST_SAMPLES:
        return Drift(math.nan, math.nan)
    return drift(time_ps, energy, walks=settings["ensemble"] == "nvt" and settings["friction_per_fs"] > 0)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _of(function: Any, values: NDArray[np.float64]) -> float | None:
    measured = values[np.isfinite(values)]
    return float(function(measured)) if len(measured) else None
