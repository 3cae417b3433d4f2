"""Replicas, and what changes of them in a step. Inside of `md` units are ASE's: eV, A, u, and A sqrt(u/eV) for time.

Centre of mass and rotation. Initial velocities are drawn from the Maxwell-Boltzmann distribution of the temperature;
then every replica's total momentum is taken away, and from a replica without periodic directions its angular momentum
too. Nothing is removed later:

* "nve" keeps both at zero (rotation: as well as the network's rounding and the time step allow). Temperatures refer
  to the 3N - 6 degrees of freedom that are left (3N - 5 for a linear molecule, 3N - 3 with a periodic direction).
* "nvt" acts on all 3N degrees of freedom, so within some 1 / friction a replica begins to diffuse and to tumble as it
  would in its heat bath. Temperatures refer to all 3N. Positions are stored unwrapped; analyses that need it take the
  motion out.

The temperature is that of the velocities at the end of a step. There BAOAB's configurations are those of the exact
distribution up to fourth order in the time step, but a vibration of angular frequency w has a kinetic temperature of
T (1 - (w dt)^2 / 4): 2 % too little for a C-H stretch at 0.5 fs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from ase import Atoms, units
from numpy.typing import NDArray
from torch import Tensor

from ..config import MDConfig
from .random import VELOCITIES, Noise

FloatArray = NDArray[np.float64]
BOLTZMANN = float(units.kB)  # eV/K


@dataclass(frozen=True)
class Replica:
    """One member of the batch.

    Attributes:
        start: number of its start structure.
        temperature_K: K.
        number: among those with the same start and temperature.
        atoms: its start structure.
    """

    start: int
    temperature_K: float
    number: int
    atoms: Atoms

    @property
    def name(self) -> str:
        """What it is called in files; its random numbers follow from this name and the seed."""
        return f"start{self.start}-{self.temperature_K:g}K-{self.number}"


def replicas_of(starts: Sequence[Atoms], config: MDConfig) -> list[Replica]:
    """All replicas of a run, in the order of the batch: by start, temperature, number."""
    return [
        Replica(start, temperature, number, atoms)
        for start, atoms in enumerate(starts)
        for temperature in config.temperatures_K
        for number in range(config.replicas)
    ]


@dataclass(frozen=True)
class State:
    """What changes in a step; float64.

    Attributes:
        positions, velocities, forces: (n_atoms, 3) over all replicas.
        potential_energy: (n_replicas,).
        heat: energy that the thermostat has put into each replica since step 0, (n_replicas,).
        step: steps done.
    """

    positions: Tensor
    velocities: Tensor
    forces: Tensor
    potential_energy: Tensor
    heat: Tensor
    step: int


class Layout:
    """What stays: which atom belongs to which replica, masses, temperatures.

    Attributes:
        replicas: the replicas.
        owner: replica of every atom, (n_atoms,).
        masses: u, (n_atoms, 1), float64.
        kT: eV, (n_atoms, 1), float64.
        degrees_of_freedom: that temperatures refer to, (n_replicas,), float64.
    """

    def __init__(self, replicas: Sequence[Replica], ensemble: str = "nvt", device: torch.device | str = "cpu") -> None:
        self.replicas = list(replicas)
        self.device = torch.device(device)
        self.atoms_per_replica = [len(r.atoms) for r in replicas]
        counts = torch.tensor(self.atoms_per_replica)
        self.owner = torch.arange(len(replicas)).repeat_interleave(counts).to(device)
        masses = np.concatenate([r.atoms.get_masses() for r in replicas])
        self.masses = torch.as_tensor(masses, dtype=torch.float64).to(device)[:, None]
        self.temperatures_K = torch.tensor([r.temperature_K for r in replicas], dtype=torch.float64, device=device)
        self.kT = (BOLTZMANN * self.temperatures_K)[self.owner][:, None]
        free = [degrees_of_freedom(r.atoms, ensemble) for r in replicas]
        self.degrees_of_freedom = torch.tensor(free, dtype=torch.float64, device=device)

    @property
    def n_replicas(self) -> int:
        return len(self.replicas)

    @property
    def names(self) -> list[str]:
        return [r.name for r in self.replicas]

    def sum(self, per_atom: Tensor) -> Tensor:
        """(n_atoms, ...) -> (n_replicas, ...)."""
        zeros = torch.zeros(self.n_replicas, *per_atom.shape[1:], dtype=per_atom.dtype, device=per_atom.device)
        return zeros.index_add_(0, self.owner, per_atom)

    def largest(self, values: Tensor, owner: Tensor | None = None) -> Tensor:
        """Per replica, of values that are not negative: (n,) -> (n_replicas,); `owner` unless they are of atoms."""
        zeros = torch.zeros(self.n_replicas, dtype=values.dtype, device=values.device)
        return zeros.scatter_reduce_(0, self.owner if owner is None else owner, values, "amax")

    def kinetic_energy(self, velocities: Tensor) -> Tensor:
        """(n_replicas,), eV."""
        return self.sum(0.5 * (self.masses * velocities * velocities).sum(1))

    def temperature(self, kinetic_energy: Tensor) -> Tensor:
        """(n_replicas,), K."""
        return 2 * kinetic_energy / (BOLTZMANN * self.degrees_of_freedom)

    def split(self, per_atom: Tensor) -> list[Tensor]:
        """One tensor per replica."""
        return list(per_atom.split(self.atoms_per_replica))

    def start_positions(self) -> Tensor:
        """(n_atoms, 3), float64."""
        return torch.as_tensor(np.concatenate([r.atoms.positions for r in self.replicas])).double().to(self.device)

    def initial_velocities(self, noise: Noise) -> Tensor:
        """Maxwell-Boltzmann, without total momentum and, in vacuum, without angular momentum; (n_atoms, 3)."""
        drawn = torch.sqrt(self.kT / self.masses) * noise.normals(0, VELOCITIES)
        parts = []
        for replica, velocities in zip(self.replicas, self.split(drawn.cpu()), strict=True):
            parts.append(torch.as_tensor(_without_drift(replica.atoms, velocities.numpy())))
        return torch.cat(parts).to(self.device)


def degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """See the top of this file; at least 1."""
    if ensemble == "nvt":
        return 3 * len(atoms)
    rotations = 0 if any(atoms.pbc) else int(np.linalg.matrix_rank(_inertia(atoms), tol=1e-6))
    return max(3 * len(atoms) - 3 - rotations, 1)


def _inertia(atoms: Atoms) -> FloatArray:
    masses, r = atoms.get_masses()[:, None], atoms.positions - atoms.get_center_of_mass()
    return np.asarray((masses * r * r).sum() * np.eye(3) - (masses * r).T @ r)


def _without_drift(atoms: Atoms, velocities: FloatArray) -> FloatArray:
    masses, r = atoms.get_masses()[:, None], atoms.positions - atoms.get_center_of_mass()
    velocities = velocities - (masses * velocities).sum(0) / masses.sum()
    if any(atoms.pbc):
        return velocities
    angular_momentum = np.cross(r, masses * velocities).sum(0)
    # (the pseudo-inverse: a linear molecule does not turn about its axis)
    rotation = np.linalg.pinv(_inertia(atoms), rcond=1e-8) @ angular_momentum
    return np.asarray(velocities - np.cross(rotation, r))


def where(alive: Tensor, owner: Tensor, new: State, old: State) -> State:
    """`new` for the replicas of the mask `alive`, (n_replicas,), `old` for the others."""
    of_atoms = alive[owner][:, None]
    values = {}
    for name in (f.name for f in fields(State) if f.name != "step"):
        one: Tensor = getattr(new, name)
        values[name] = torch.where(of_atoms if one.dim() == 2 else alive, one, getattr(old, name))
    return State(**values, step=new.step)
