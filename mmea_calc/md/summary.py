"""What is told of a run at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .monitor import Event, stable_ps
from .trajectory import read_replica, replica_names

_BLOCKS = 10


@dataclass(frozen=True)
class ReplicaSummary:
    """One line of the table.

    Attributes:
        replica: name.
        target_K: temperature asked for.
        temperature_K, temperature_error_K: mean over the second half of the run and its standard error, from the
            means of 10 blocks.
        drift_meV_per_atom_ps, drift_error_meV_per_atom_ps: slope of the conserved energy over the whole run and its
            standard error, from a straight line through the means of 10 blocks.
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
    rows = []
    for name in replica_names(folder):
        replica = read_replica(folder, name, frames=False)
        values, time = replica.observables, replica.sample_times_ps
        conserved = values["conserved_energy"] / len(replica.member.numbers) * 1000
        temperature, error = mean_and_error(values["temperature"][len(time) // 2 :])
        drift, drift_error = slope_and_error(time, conserved)
        length = float(time[-1]) if len(time) else 0.0
        rows.append(
            ReplicaSummary(
                replica=name,
                target_K=replica.member.temperature_K,
                temperature_K=temperature,
                temperature_error_K=error,
                drift_meV_per_atom_ps=drift,
                drift_error_meV_per_atom_ps=drift_error,
                length_ps=length,
                stable_ps=stable_ps(events, name, length),
                largest_gate_excess=_of(np.max, values["gate_excess"]),
                adapted_minus_bare_eV_per_A=_of(np.mean, values["adapted_minus_bare"]),
                events=tuple(e for e in events if e.replica == name),
            )
        )
    return Summary(tuple(rows), steps, seconds, rate)


def mean_and_error(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Mean of a series and its standard error from block means; None where there are too few values."""
    if not len(values):
        return None, None
    mean = float(values.mean())
    if len(values) < 2 * _BLOCKS:
        return mean, None
    means = np.array([b.mean() for b in np.array_split(values, _BLOCKS)])
    return mean, float(means.std(ddof=1) / math.sqrt(_BLOCKS))


def slope_and_error(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Slope of the straight line through block means and its standard error; None where there are too few values."""
    if len(x) < 2 * _BLOCKS:
        return None, None
    bx = np.array([b.mean() for b in np.array_split(x, _BLOCKS)])
    by = np.array([b.mean() for b in np.array_split(y, _BLOCKS)])
    dx = bx - bx.mean()
    slope = float((dx * (by - by.mean())).sum() / (dx * dx).sum())
    residual = by - by.mean() - slope * dx
    return slope, float(np.sqrt((residual**2).sum() / (_BLOCKS - 2) / (dx * dx).sum()))


def _of(function: Any, values: NDArray[np.float64]) -> float | None:
    measured = values[np.isfinite(values)]
    return float(function(measured)) if len(measured) else None
