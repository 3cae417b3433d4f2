"""Integrators: a state and a force field in, the state one time step later out.

BAOAB (Leimkuhler, Matthews, Appl. Math. Res. eXpress 2013, 34, doi:10.1093/amrx/abs010) splits Langevin dynamics,

    dx = v dt,   m dv = F dt - gamma m v dt + sqrt(2 gamma m kT) dW,

into drift (A), kick (B) and the exact solution of friction and noise (O):

| step | equation | in the code |
|---|---|---|
| B | v <- v + (dt/2) F/m | `v + half * f / m` |
| A | x <- x + (dt/2) v | `x + half * v` |
| O | v <- c v + sqrt((1 - c^2) kT/m) R, c = exp(-gamma dt) | `c * v + spread(step) * noise(step)` |
| A | x <- x + (dt/2) v | |
| B | v <- v + (dt/2) F(x)/m | |

R are independent standard normal numbers. What O adds to the kinetic energy is the heat taken from the bath, and

    H = U + K - heat

is conserved up to the error of the other steps, which are those of velocity Verlet: it measures the time step and the
forces' consistency, with the thermostat on. Without O, and with the two half drifts as one, it is velocity Verlet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .state import BOLTZMANN, Layout, State

# positions (n_atoms, 3) -> energy of every replica (n_replicas,), forces (n_atoms, 3); float64
ForceField = Callable[[Tensor], tuple[Tensor, Tensor]]


class Integrator(Protocol):
    def step(self, state: State, force_field: ForceField) -> State: ...


class BAOAB:
    """Langevin dynamics.

    Args:
        layout: masses and temperatures.
        timestep: in ASE's unit of time.
        friction: gamma, in its inverse.
        noise: step -> standard normal numbers, (n_atoms, 3), float64; of several steps as `Noise.normals` gives them.
        heating: rise of the bath's temperature in one step, K; in the equations T is that at the step's beginning.
    """

    def __init__(
        self,
        layout: Layout,
        timestep: float,
        friction: float,
        noise: Callable[[int | Tensor], Tensor],
        heating: float = 0.0,
    ) -> None:
        self.layout, self.timestep, self.noise = layout, timestep, noise
        self.c = math.exp(-friction * timestep)
        self.heating = heating
        # 1 - c^2 without cancellation
        self._lost = -math.expm1(-2 * friction * timestep)
        self._spread = torch.sqrt(self._lost * layout.kT / layout.masses)
        self.kick: Callable[[int | Tensor], Tensor] = self._kick  # recorded steps have theirs prepared (`blocks`)

    def spread(self, step: int | Tensor) -> Tensor:
        """Standard deviation of the velocity that O adds in the step after `step` steps, (n_atoms, 1).

        For n of them, (n,), int64: (n, n_atoms, 1), or (n_atoms, 1) where it is the same in all.
        """
        if not self.heating:
            return self._spread
        done = step.double()[:, None, None] if isinstance(step, Tensor) else step
        # A run goes on to the sample at or beyond its end, where a cooling bath would be below zero.
        kT = torch.clamp(self.layout.kT + BOLTZMANN * self.heating * done, min=0)
        return torch.sqrt(self._lost * kT / self.layout.masses)

    def _kick(self, step: int | Tensor) -> Tensor:
        """What O adds to the velocities in the step after `step` steps, (n_atoms, 3); (n, n_atoms, 3) for n of them."""
        return self.spread(step) * self.noise(step)

    def step(self, state: State, force_field: ForceField) -> State:
        half, m, kinetic_energy = 0.5 * self.timestep, self.layout.masses, self.layout.kinetic_energy
        x, v, f = state.positions, state.velocities, state.forces
        v = v + half * f / m  # B
        x = x + half * v  # A
        before = kinetic_energy(v)
        v = self.c * v + self.kick(state.step)  # O
        heat = state.heat + (kinetic_energy(v) - before)
        x = x + half * v  # A
        energy, f = force_field(x)
        v = v + half * f / m  # B
        return State(x, v, f, energy, heat, state.step + 1)


class VelocityVerlet:
    """Newton's equations (Swope et al., J. Chem. Phys. 76, 637, 1982). Arguments as for `BAOAB`."""

    def __init__(self, layout: Layout, timestep: float) -> None:
        self.layout, self.timestep = layout, timestep

    def step(self, state: State, force_field: ForceField) -> State:
        half, m = 0.5 * self.timestep, self.layout.masses
        v = state.velocities + half * state.forces / m  # B
        x = state.positions + self.timestep * v  # A
        energy, f = force_field(x)
        v = v + half * f / m  # B
        return State(x, v, f, energy, state.heat, state.step + 1)
