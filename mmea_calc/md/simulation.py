"""Dynamics of a batch of replicas in memory: what `run_md` writes to files, and what a check looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from ase import Atoms, units
from torch import Tensor

from ..config import MDConfig
from ..errors import DataError, DynamicsError
from ..potential import Potential
from .blocks import LONGEST, Blocks, pays_off
from .forces import ReplicaForces
from .integrators import BAOAB, Integrator, VelocityVerlet
from .monitor import Monitor
from .neighbours import SKIN
from .random import Noise
from .state import Layout, State, replicas_of, where

# Samples from one look at the gates to the next: on a CPU a look takes as long as three steps of a small molecule.
GATES_EVERY = 5


class Simulation:
    """All replicas of a run.

    Args:
        potential: backbone, with or without an adapter.
        starts: start structures; their velocities, if they have any, are not used.
        config: the settings. Times, devices and what concerns files are the caller's business.
        skin: of the neighbour lists, A.
        blocks: take several steps in a row where that is possible; None: on a GPU, unless the backbone was loaded
            with `fast=False`.

    Attributes:
        layout: which replicas there are.
        state: of the dynamics, after the latest step.
        monitor: which replicas have failed, and all events.

    Raises:
        DynamicsError: settings that make no sense.
        DataError: a structure that cannot be used.
    """

    def __init__(
        self,
        potential: Potential,
        starts: Sequence[Atoms],
        config: MDConfig,
        *,
        skin: float = SKIN,
        blocks: bool | None = None,
    ) -> None:
        check_settings(config)
        check_starts(starts)
        self.config = config
        self.layout = Layout(replicas_of(starts, config), "nvt" if config.thermostat else "nve", potential.device)
        self.forces = ReplicaForces(potential, self.layout, skin)
        self.noise = Noise(config.seed, self.layout.names, self.layout.atoms_per_replica, potential.device)
        self.monitor = Monitor(config, self.layout, self.forces)
        self._excesses: list[Tensor] = []  # of the gates, where they were watched at the latest sample
        timestep = config.timestep_fs * units.fs
        self.integrator: Integrator = (
            BAOAB(
                self.layout,
                timestep,
                config.friction_per_fs / units.fs,
                self.noise.normals,
                heating=config.heating_K_per_ps * config.timestep_fs / 1000,
            )
            if config.ensemble == "nvt"
            else VelocityVerlet(self.layout, timestep)
        )
        self.state: State
        self.blocks = Blocks(self) if (pays_off(potential) if blocks is None else blocks) else None

    def start(self) -> None:
        """Step 0: initial velocities and forces."""
        positions = self.layout.start_positions()
        energy, forces = self.forces(positions)
        with self.forces.watching_gates() as self._excesses:
            self.forces.look()
        velocities = self.layout.initial_velocities(self.noise)
        self.state = State(positions, velocities, forces, energy, torch.zeros_like(energy), 0)
        self.monitor.remember_bonds()
        self.monitor.check(self.state)

    def step(self) -> None:
        """One step of all replicas that have not failed; the others stay as they are."""
        new = self.integrator.step(self.state, self.forces)
        if self._looks(new.step):
            with self.forces.watching_gates() as self._excesses:
                self.forces.look()
        elif new.step % self.config.stats_every == 0:
            self._excesses = []
        alive = self.monitor.check(new)
        # The step in which a replica fails is not taken.
        self.state = where(alive, self.layout.owner, new, self.state)

    def advance(self, n: int) -> None:
        """n steps, several in a row where that is possible."""
        every, end = self.config.stats_every, self.state.step + n
        while self.state.step < end:
            size = min(end - self.state.step, every - self.state.step % every, LONGEST)
            sample, looks = (self.state.step + size) % every == 0, self._looks(self.state.step + size)
            excesses = None if self.blocks is None else self.blocks.take(size, look=looks)
            if excesses is None:
                for _ in range(size):
                    self.step()
            elif sample:
                self._excesses = excesses

    def sample(self) -> Tensor:
        """What is recorded of this step, (n_observables, n_replicas); see `mmea_calc.md.trajectory.OBSERVABLES`."""
        every = self.config.drift_every
        compare = self.forces.potential.adapter is not None and every > 0 and self.state.step % every == 0
        return self.monitor.sample(self.state, self._excesses, compare=compare)

    def _looks(self, step: int) -> bool:
        """Whether gates are watched in this step: in some of the samples, since it takes a call of its own."""
        return step % (GATES_EVERY * self.config.stats_every) == 0

    def any_alive(self) -> bool:
        return bool(self.monitor.alive.any())

    def close(self) -> None:
        """Give back what was recorded: it stands in circles of references, which would keep it for long."""
        if self.blocks is not None:
            self.blocks.close()


def check_settings(config: MDConfig) -> None:
    """Raise a DynamicsError for settings that make no sense."""

    def expect(condition: bool, text: str) -> None:
        if not condition:
            raise DynamicsError(text)

    t = config.temperatures_K
    expect(bool(t) and all(math.isfinite(x) and x >= 0 for x in t), f"temperatures must be >= 0 K, got {list(t)}")
    expect(
        len({f"{x:g}" for x in t}) == len(t), f"the temperatures {list(t)} repeat: use replicas for more runs of one"
    )
    expect(config.replicas >= 1, f"replicas must be at least 1, got {config.replicas}")
    expect(config.ensemble in ("nvt", "nve"), f"ensemble must be 'nvt' or 'nve', got {config.ensemble!r}")
    for name in ("time_ps", "timestep_fs", "max_force_eV_per_A"):
        value = getattr(config, name)
        expect(math.isfinite(value) and value > 0, f"{name} must be positive, got {value}")
    expect(config.n_steps >= 1, f"{config.time_ps} ps are less than one step of {config.timestep_fs} fs")
    friction = config.friction_per_fs
    expect(math.isfinite(friction) and friction >= 0, f"friction_per_fs must be >= 0, got {friction}")
    end = min(t) + config.heating_K_per_ps * config.time_ps
    expect(
        math.isfinite(end) and end >= 0,
        f"the temperature at the end must be >= 0 K, got {end:g} K with {config.heating_K_per_ps:g} K/ps",
    )
    expect(
        config.ensemble == "nvt" or not config.heating_K_per_ps,
        "heating needs a thermostat: the ensemble must be 'nvt'",
    )
    for name in ("traj_every", "stats_every", "restart_every"):
        expect(getattr(config, name) >= 1, f"{name} must be at least 1 step, got {getattr(config, name)}")
    expect(
        config.traj_every % config.stats_every == 0,
        f"stats_every ({config.stats_every}) must divide traj_every ({config.traj_every}), so that every frame has "
        "its energies",
    )
    expect(
        config.drift_every >= 0 and config.drift_every % config.stats_every == 0,
        f"drift_every must be a multiple of stats_every ({config.stats_every}) or 0, got {config.drift_every}",
    )


def check_equivariant(potential: Potential, force: bool = False) -> None:
    """Raise a DynamicsError for an adapter whose energies change when a structure is turned, unless forced."""
    adapter = potential.adapter
    if adapter is not None and adapter.enabled and not adapter.equivariant and not force:
        raise DynamicsError(
            f"method {adapter.config.method!r} of this adapter is not equivariant: energies change when a structure is "
            "turned, and angular momentum is not conserved. Dynamics expects an equivariant method, such as 'mmea'; "
            "to run it all the same: --force, or force=True in Python"
        )


def check_starts(starts: Sequence[Atoms]) -> None:
    """Raise a DataError for start structures that dynamics cannot take."""
    if not starts:
        raise DataError("expected at least one start structure, got none")
    for i, atoms in enumerate(starts):
        if atoms.constraints:
            raise DataError(f"start structure {i} has constraints, which are not supported: remove them")
        if len(atoms) == 0:
            raise DataError(f"start structure {i} has no atoms")
        if not (atoms.get_masses() > 0).all():
            raise DataError(f"start structure {i} has an atom without a mass")
