"""Force fields of which everything is known, for tests of dynamics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor

from mmea_calc.config import MDConfig
from mmea_calc.graph import Batch, Graph, build_graph, collate
from mmea_calc.md.integrators import BAOAB, ForceField, Integrator, VelocityVerlet
from mmea_calc.md.random import Noise
from mmea_calc.md.state import Layout, State, replicas_of
from mmea_calc.potential import Prediction

ELEMENTS = (1, 6, 8)


class Morse:
    """Stands in for a `Potential`: a Morse function of every pair, times a switch that ends at the cutoff.

    phi(d) = D ((1 - exp(-a (d - d0)))^2 - 1) (1 - d^2 / r_max^2)^3
    """

    def __init__(self, r_max: float = 4.0, *, depth: float = 1.0, a: float = 2.0, d0: float = 1.4) -> None:
        self.backbone = SimpleNamespace(name="morse", r_max=r_max, fingerprint="0" * 64, head="Default")
        self.r_max, self.depth, self.a, self.d0 = r_max, depth, a, d0
        self.adapter = None
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.reference_energies = {1: -13.6, 6: -1027.3, 8: -2038.5}
        self.broken: tuple[int, int] | None = None  # (call, structure) whose forces become NaN
        self.calls = 0

    def graph(self, atoms: Atoms) -> Graph:
        return build_graph(atoms, self.r_max)

    def collate(self, graphs: Sequence[Graph]) -> Batch:
        return collate(graphs, ELEMENTS, dtype=self.dtype)

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        yield

    @contextmanager
    def folded(self) -> Iterator[None]:
        yield

    def predict(self, batch: Batch, **_: Any) -> Prediction:
        self.calls += 1
        tensors = batch.tensors
        x = tensors["positions"].detach().requires_grad_()
        sender, receiver = tensors["edge_index"]
        d2 = ((x[receiver] - x[sender] + tensors["shifts"]) ** 2).sum(1)
        well = (1 - torch.exp(-self.a * (torch.sqrt(d2) - self.d0))) ** 2 - 1
        phi = self.depth * well * torch.clamp(1 - d2 / self.r_max**2, min=0) ** 3
        owner = tensors["batch"]
        energy = torch.zeros(batch.n_graphs, dtype=x.dtype).index_add(0, owner[sender], 0.5 * phi)
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        if self.broken is not None and self.calls >= self.broken[0]:
            gradient = torch.where((owner == self.broken[1])[:, None], torch.nan, gradient)
        energy = energy.detach()
        return Prediction(energy, energy, torch.zeros(batch.n_atoms), -gradient, None)


def oscillator(k: float) -> ForceField:
    """Every atom bound to the origin by a spring of k eV/A^2; one replica."""

    def forces(x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * k * (x * x).sum().reshape(1), -k * x

    return forces


def run(force_field: ForceField, atoms: Atoms, config: MDConfig, n_steps: int, x: Tensor, v: Tensor) -> Iterator[State]:
    """The states after each step, of one structure as one replica."""
    layout = Layout(replicas_of([atoms], config), config.ensemble)
    noise = Noise(config.seed, layout.names, layout.atoms_per_replica)
    dt = config.timestep_fs * units.fs
    integrator: Integrator = VelocityVerlet(layout, dt)
    if config.ensemble == "nvt":
        integrator = BAOAB(layout, dt, config.friction_per_fs / units.fs, noise.normals)
    energy, forces = force_field(x)
    state = State(x, v, forces, energy, torch.zeros_like(energy), 0)
    for _ in range(n_steps):
        state = integrator.step(state, force_field)
        yield state


def triatomic(seed: int = 0) -> Atoms:
    """A bent O-C-H near the Morse function's minimum."""
    rng = np.random.default_rng(seed)
    positions = np.array([[1.38, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.7, 1.2, 0.0]])
    return Atoms("OCH", positions + rng.normal(0, 0.02, (3, 3)))
