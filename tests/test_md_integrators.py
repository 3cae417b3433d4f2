"""Statistics have fixed seeds. Their bounds follow from the distribution: a right program would fail a test with a
probability of 1e-6 or less were the seed chosen anew."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.verlet import VelocityVerlet as AseVelocityVerlet
from md_potentials import Morse, oscillator, run, triatomic
from scipy.stats import chi2, norm

from mmea_calc.config import MDConfig
from mmea_calc.md.random import Noise, philox, replica_key
from mmea_calc.md.simulation import Simulation
from mmea_calc.md.state import BOLTZMANN, Layout, replicas_of

PROBABILITY = 1e-6
# Independent oscillators in one structure: they make the statistics.
N = 4000


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hydrogens(n: int) -> Atoms:
    """Non-interacting atoms of mass 1."""
    return Atoms(f"H{n}", np.zeros((n, 3)), masses=np.ones(n))


# --- random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # known answers of the Random123 library (kat_vectors, philox 4x32 10)
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: str) -> None:
    # in company, to see that every counter is treated alone
    tensors = [torch.tensor([7, word]) for word in counter]
    result = philox(tensors, [torch.tensor([9, word]) for word in key])
    assert " ".join(f"{int(w[1]):08x}" for w in result) == words


def test_normals_are_standard_normal() -> None:
    noise = Noise(3, ["one"], [1000])
    x = torch.stack([noise.normals(step) for step in range(100)]).flatten().numpy()
    bound = -norm.ppf(PROBABILITY / 2)
    n = len(x)
    # standard errors of the moments of a normal distribution
    assert abs(x.mean()) < bound / math.sqrt(n)
    assert abs((x**2).mean() - 1) < bound * math.sqrt(2 / n)
    assert abs((x**3).mean()) < bound * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < bound * math.sqrt(96 / n)
    counts, _ = np.histogram(norm.cdf(x), bins=200, range=(0, 1))
    assert ((counts - n / 200) ** 2 / (n / 200)).sum() < chi2.isf(PROBABILITY, 199)


def test_neighbouring_steps_atoms_and_components_are_uncorrelated() -> None:
    noise = Noise(3, ["one"], [2000])
    x = torch.stack([noise.normals(step) for step in range(50)]).numpy()
    bound = -norm.ppf(PROBABILITY / 2)
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[..., :2], x[..., 1:])):
        assert abs((a * b).mean()) < bound / math.sqrt(a.size)


def test_noise_does_not_depend_on_the_batch() -> None:
    alone = Noise(5, ["b"], [7])
    together = Noise(5, ["a", "b", "c"], [3, 7, 30])
    for step in (0, 15, 16, 100, 2**33):
        assert torch.equal(alone.normals(step), together.normals(step)[3:10])


def test_noise_differs_between_seeds_replicas_steps_and_purposes() -> None:
    values = [
        Noise(0, ["a"], [4]).normals(0),
        Noise(1, ["a"], [4]).normals(0),
        Noise(0, ["b"], [4]).normals(0),
        Noise(0, ["a"], [4]).normals(1),
        Noise(0, ["a"], [4]).normals(2**32),  # the upper word of the step counts too
        Noise(0, ["a"], [4]).normals(0, stream=1),
    ]
    assert len({tuple(v.flatten().tolist()) for v in values}) == len(values)
    assert replica_key(1, "1") != replica_key(11, "")


@pytest.mark.parametrize("first", [0, 5, 2**32 - 3])
def test_noise_of_several_steps_is_that_of_each(first: int) -> None:
    noise = Noise(3, ["a", "b"], [4, 3])
    steps = torch.arange(first, first + 20)
    several = noise.normals(steps)
    assert several.shape == (20, 7, 3)
    assert torch.equal(several, torch.stack([noise.normals(k) for k in steps.tolist()]))


# --- BAOAB -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w_dt", [0.2, 1.0, 1.7])
def test_baoab_samples_the_positions_of_an_oscillator_without_error_of_the_time_step(w_dt: float) -> None:
    # <x^2> = kT / k exactly (Leimkuhler & Matthews 2013), up to the limit of stability w dt = 2
    temperature, k = 300.0, 5.0
    dt_fs = w_dt / math.sqrt(k) / units.fs
    config = MDConfig(temperatures_K=(temperature,), timestep_fs=dt_fs, friction_per_fs=0.5 / dt_fs, seed=11)
    spread = math.sqrt(BOLTZMANN * temperature / k)
    x = spread * Noise(1, ["start"], [N]).normals(0)  # from the distribution itself: no equilibration
    v = math.sqrt(BOLTZMANN * temperature) * Noise(2, ["start"], [N]).normals(0)
    *_, last = run(oscillator(k), hydrogens(N), config, 60, x, v)
    statistic = float((last.positions**2).sum()) / spread**2
    low, high = chi2.ppf(PROBABILITY / 2, 3 * N), chi2.isf(PROBABILITY / 2, 3 * N)
    assert low < statistic < high
    # and the velocities have the known error, T (1 - (w dt)^2 / 4)
    kinetic = float((last.velocities**2).sum()) / (BOLTZMANN * temperature * (1 - w_dt**2 / 4))
    assert low < kinetic < high


@pytest.mark.parametrize("temperature", [300.0, 600.0, 1200.0])
def test_kinetic_energies_are_chi_squared_distributed(temperature: float) -> None:
    # from rest: after 200 steps of friction 0.05 the start is forgotten (exp(-20)); w dt = 0.01 leaves no visible error
    config = MDConfig(temperatures_K=(temperature,), timestep_fs=1.0, friction_per_fs=0.1, seed=1)
    k = (0.01 / units.fs) ** 2
    zeros = torch.zeros(N, 3, dtype=torch.float64)
    *_, last = run(oscillator(k), hydrogens(N), config, 100, zeros, zeros)
    kinetic = (last.velocities**2).sum(1).numpy() / (BOLTZMANN * temperature)  # chi-squared with 3 degrees of freedom
    bins = 50
    counts, _ = np.histogram(chi2.cdf(kinetic, 3), bins=bins, range=(0, 1))
    assert counts.sum() == N
    assert ((counts - N / bins) ** 2 / (N / bins)).sum() < chi2.isf(PROBABILITY, bins - 1)


def test_conserved_energy_of_langevin_dynamics_converges_with_the_time_step() -> None:
    # heat of hundreds of kT goes through; what is left is the error of the other parts, which falls as dt^2
    errors = []
    x = 0.1 * Noise(1, ["start"], [50]).normals(0)
    v = 0.1 * Noise(2, ["start"], [50]).normals(0)
    for dt_fs in (0.2, 0.1):
        config = MDConfig(temperatures_K=(300.0,), timestep_fs=dt_fs, friction_per_fs=0.05, seed=4)
        layout = Layout(replicas_of([hydrogens(50)], config))
        start = oscillator(20.0)(x)[0] + layout.kinetic_energy(v)
        states = list(run(oscillator(20.0), hydrogens(50), config, round(100 / dt_fs), x, v))
        conserved = [float(s.potential_energy + layout.kinetic_energy(s.velocities) - s.heat - start) for s in states]
        errors.append(np.abs(conserved).max())
        assert abs(float(states[-1].heat)) > 50 * errors[-1]
    assert errors[1] < 0.4 * errors[0]


def test_friction_zero_is_velocity_verlet() -> None:
    x = 0.1 * Noise(1, ["start"], [5]).normals(0)
    v = 0.1 * Noise(2, ["start"], [5]).normals(0)
    free = MDConfig(friction_per_fs=0.0, timestep_fs=0.5)
    *_, one = run(oscillator(3.0), hydrogens(5), free, 50, x, v)
    *_, other = run(oscillator(3.0), hydrogens(5), MDConfig(ensemble="nve", timestep_fs=0.5), 50, x, v)
    torch.testing.assert_close(one.positions, other.positions, rtol=0, atol=1e-12)
    assert float(one.heat) == 0


# --- velocity Verlet -------------------------------------------------------------------------------------------------


def test_energy_error_of_velocity_verlet_falls_as_the_square_of_the_time_step() -> None:
    atoms, potential = triatomic(), Morse()
    deviations = []
    for dt_fs in (0.4, 0.2, 0.1):
        config = MDConfig(temperatures_K=(600.0,), timestep_fs=dt_fs, time_ps=0.2, ensemble="nve", seed=2)
        simulation = Simulation(potential, [atoms], config)  # type: ignore[arg-type]
        simulation.start()
        energies = []
        for _ in range(config.n_steps):
            simulation.step()
            kinetic = simulation.layout.kinetic_energy(simulation.state.velocities)
            energies.append(float(simulation.state.potential_energy + kinetic))
        deviations.append(np.std(energies))
    orders = [math.log2(a / b) for a, b in pairwise(deviations)]
    assert orders == pytest.approx([2.0, 2.0], abs=0.1)


class _AsCalculator(Calculator):
    """A Morse potential for ASE."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (ASE's name)

    def __init__(self, potential: Morse) -> None:
        super().__init__()
        self.potential = potential

    def calculate(self, atoms=None, properties=("energy",), system_changes=()) -> None:  # type: ignore[no-untyped-def]
        super().calculate(atoms, properties, system_changes)
        prediction = self.potential.predict(self.potential.collate([self.potential.graph(atoms)]))
        assert prediction.forces is not None
        self.results = {"energy": float(prediction.energy[0]), "forces": prediction.forces.numpy()}


def test_ase_goes_the_same_way_step_for_step() -> None:
    potential = Morse()
    simulation = Simulation(potential, [triatomic()], MDConfig(ensemble="nve", seed=3))  # type: ignore[arg-type]
    simulation.start()
    atoms = triatomic()
    atoms.set_velocities(simulation.state.velocities.numpy())
    atoms.calc = _AsCalculator(potential)
    dynamics = AseVelocityVerlet(atoms, timestep=0.5 * units.fs)
    for _ in range(200):
        simulation.step()
        dynamics.run(1)
        np.testing.assert_allclose(simulation.state.positions.numpy(), atoms.positions, rtol=0, atol=1e-10)
        np.testing.assert_allclose(simulation.state.velocities.numpy(), atoms.get_velocities(), rtol=0, atol=1e-10)


# --- start -----------------------------------------------------------------------------------------------------------


def test_initial_velocities_have_no_drift_and_in_vacuum_no_rotation() -> None:
    molecule, periodic = triatomic(), triatomic()
    periodic.set_cell([6.0, 6.0, 6.0])
    periodic.pbc = True
    config = MDConfig(temperatures_K=(300.0,))
    layout = Layout(replicas_of([molecule, periodic], config))
    velocities = layout.initial_velocities(Noise(0, layout.names, layout.atoms_per_replica))
    masses = molecule.get_masses()[:, None]
    for v, rotates in zip(layout.split(velocities), (False, True), strict=True):
        momentum = masses * v.numpy()
        assert np.abs(momentum.sum(0)).max() < 1e-12
        angular = np.cross(molecule.positions - molecule.get_center_of_mass(), momentum).sum(0)
        assert (np.abs(angular).max() > 1e-3) == rotates


@pytest.mark.parametrize(
    ("atoms", "nve"),
    [
        (triatomic(), 3),
        (Atoms("CO2", [[0, 0, 0], [0, 0, 1.2], [0, 0, -1.2]]), 4),
        (Atoms("OH", [[0, 0, 0], [0, 0, 1]]), 1),
    ],
    ids=["bent", "linear", "diatomic"],
)
def test_temperatures_refer_to_the_degrees_of_freedom_that_move(atoms: Atoms, nve: int) -> None:
    config = MDConfig(temperatures_K=(300.0,))
    assert Layout(replicas_of([atoms], config), "nve").degrees_of_freedom.tolist() == [nve]
    assert Layout(replicas_of([atoms], config), "nvt").degrees_of_freedom.tolist() == [3 * len(atoms)]
    atoms = atoms.copy()
    atoms.set_cell([9.0, 9.0, 9.0])
    atoms.pbc = True
    assert Layout(replicas_of([atoms], config), "nve").degrees_of_freedom.tolist() == [3 * len(atoms) - 3]


def test_initial_velocities_follow_the_temperature() -> None:
    atoms = hydrogens(N)
    atoms.positions = np.random.default_rng(0).normal(size=(N, 3))
    layout = Layout(replicas_of([atoms], MDConfig(temperatures_K=(300.0, 1200.0))), "nve")
    velocities = layout.initial_velocities(Noise(0, layout.names, layout.atoms_per_replica))
    kinetic = layout.kinetic_energy(velocities)
    dof = 3 * N - 6
    for energy, temperature in zip(kinetic.tolist(), (300.0, 1200.0), strict=True):
        statistic = 2 * energy / (BOLTZMANN * temperature)
        assert chi2.ppf(PROBABILITY / 2, dof) < statistic < chi2.isf(PROBABILITY / 2, dof)
