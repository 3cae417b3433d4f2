"""Numbers of a run, one row per replica: means with block-averaged errors, and the drift of the conserved quantity."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..md.summary import conserved_drift
from ..statistics import LEAST_SAMPLES, block_average
from .quantity import Selection, finite
from .reader import Replica


@dataclass(frozen=True)
class ReplicaRow:
    """A replica in numbers; NaN where the run is too short for one, or did not store what it needs.

    Attributes:
        replica: its name.
        target_K: temperature that was asked for.
        length_ps: of its trajectory; a replica that failed has a shorter one.
        temperature_K, temperature_error_K: mean kinetic temperature and its standard error.
        potential_eV, potential_error_eV: mean potential energy and its standard error.
        drift_meV_per_atom_ps, drift_error_meV_per_atom_ps: slope of the conserved quantity over the whole trajectory.
        converged: whether both errors reached their plateau; if not, they are lower bounds.
        events: what happened to the replica and when, or "".
    """

    replica: str
    target_K: float
    length_ps: float
    temperature_K: float
    temperature_error_K: float
    potential_eV: float
    potential_error_eV: float
    drift_meV_per_atom_ps: float
    drift_error_meV_per_atom_ps: float
    converged: bool
    events: str = ""

    @property
    def remark(self) -> str:
        """What a reader must know of the figures: events, and whether the errors are lower bounds."""
        return "; ".join(filter(None, [self.events, "" if self.converged else "too short: errors are lower bounds"]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; numbers that are not there are None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def rows(selection: Selection) -> list[ReplicaRow]:
    """One row per replica."""
    return [_row(selection, replica) for replica in selection.replicas]


def _row(selection: Selection, replica: Replica) -> ReplicaRow:
    temperature, temperature_error, first = _mean(selection, replica, "temperature")
    potential, potential_error, second = _mean(selection, replica, "potential_energy")
    time_fs, conserved = finite(replica, "conserved_energy")
    line = conserved_drift(time_fs / 1000.0, 1e3 * conserved / len(replica.numbers), selection.run.config)
    return ReplicaRow(
        replica=replica.name,
        target_K=replica.target_K,
        length_ps=float(replica.time_fs[-1]) / 1000.0 if replica.time_fs.size else 0.0,
        temperature_K=temperature,
        temperature_error_K=temperature_error,
        potential_eV=potential,
        potential_error_eV=potential_error,
        drift_meV_per_atom_ps=line.slope,
        drift_error_meV_per_atom_ps=line.error,
        converged=first and second,
        events="; ".join(selection.run.events.get(replica.name, ())),
    )


def _mean(selection: Selection, replica: Replica, name: str) -> tuple[float, float, bool]:
    """Mean, standard error, and whether that is converged."""
    _, values = selection.samples(replica, name)
    if values.size < LEAST_SAMPLES:
        return float(values.mean()) if values.size else math.nan, math.nan, False
    average = block_average(values)
    return average.mean, average.error, average.converged
