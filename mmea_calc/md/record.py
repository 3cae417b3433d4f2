"""A run kept in memory: all its samples, for a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray

from ..config import MDConfig
from ..potential import Potential
from .monitor import Event
from .simulation import Simulation
from .state import Replica
from .trajectory import OBSERVABLES

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """What a run leaves.

    Attributes:
        replicas: in the order of the arrays' last index.
        time_ps: of the samples, (n_samples,).
        values: one (n_samples, n_replicas) array per name in `OBSERVABLES`; NaN once a replica has failed.
        frames: positions at every `frames_every`-th sample, of the replicas alive then: (replica, (n_atoms, 3), A).
        final: positions of every replica at the end; of one that failed, its last good ones.
        events: what happened.
    """

    replicas: tuple[Replica, ...]
    time_ps: FloatArray
    values: dict[str, FloatArray]
    frames: tuple[tuple[int, FloatArray], ...]
    final: tuple[FloatArray, ...]
    events: tuple[Event, ...]

    @property
    def length_ps(self) -> float:
        return float(self.time_ps[-1])


def record(
    potential: Potential,
    starts: Sequence[Atoms],
    config: MDConfig,
    *,
    frames_every: int = 0,
    go_on: Callable[[int], bool] = lambda step: True,
) -> Record:
    """Run all replicas to the first sample at or beyond the end, or until none is left.

    Args:
        potential: backbone, with or without an adapter.
        starts: start structures.
        config: the settings; those about files have no meaning here.
        frames_every: samples between frames; 0 keeps none.
        go_on: asked after every sample with the number of steps done; False ends the run.

    Raises:
        DataError, DynamicsError: structures or settings that cannot be used.
    """
    with closing(Simulation(potential, starts, config)) as simulation, potential.folded():
        return _record(simulation, config, frames_every, go_on)


def _record(simulation: Simulation, config: MDConfig, frames_every: int, go_on: Callable[[int], bool]) -> Record:
    layout, steps = simulation.layout, [0]
    frames: list[tuple[int, FloatArray]] = []
    simulation.start()
    samples, alive = [simulation.sample()], [simulation.monitor.alive.cpu()]
    while simulation.state.step < config.n_steps and simulation.any_alive() and go_on(simulation.state.step):
        simulation.advance(config.stats_every)
        steps.append(simulation.state.step)
        samples.append(simulation.sample())
        alive.append(simulation.monitor.alive.cpu())
        if frames_every and (len(samples) - 1) % frames_every == 0:
            parts = layout.split(simulation.state.positions.cpu())
            frames += [(i, p.numpy().copy()) for i, p in enumerate(parts) if alive[-1][i]]
    values = torch.where(torch.stack(alive)[:, None], torch.stack(samples), torch.nan).numpy()
    return Record(
        tuple(layout.replicas),
        np.array(steps) * config.timestep_fs / 1000,
        {name: values[:, j] for j, name in enumerate(OBSERVABLES)},
        tuple(frames),
        tuple(p.numpy().copy() for p in layout.split(simulation.state.positions.cpu())),
        tuple(simulation.monitor.events),
    )
