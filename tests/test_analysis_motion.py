"""Temperature, displacement and spectra of motion that is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms, units
from ase.data import atomic_masses
from ase.md.velocitydistribution import thermalize_momenta

from mmea_calc.analysis import motion
from mmea_calc.errors import DataError

PER_CM = 1.0 / 33356.4095  # 1/cm in 1/fs: c is 2.99792458e-5 cm/fs


def test_kinetic_energy_and_temperature_are_those_of_ase() -> None:
    atoms = Atoms("C20O10H5", positions=np.zeros((35, 3)))
    thermalize_momenta(atoms, temperature_K=431, rng=np.random.default_rng(0))
    velocities = atoms.get_velocities() * units.fs
    assert motion.kinetic_energy(velocities, atoms.get_masses()) == pytest.approx(atoms.get_kinetic_energy())
    assert motion.kinetic_temperature_K(velocities, atoms.get_masses()) == pytest.approx(atoms.get_temperature())
    fewer = motion.kinetic_temperature_K(velocities, atoms.get_masses(), 99)
    assert fewer == pytest.approx(atoms.get_temperature() * 105 / 99)


def test_maxwell_boltzmann_velocities_have_their_temperature() -> None:
    masses = np.array([1.008, 15.999])
    rng = np.random.default_rng(0)
    kT = 8.617333262e-5 * 700.0
    # sqrt(kT / m) in A/fs: 1 eV/u is (9.8226948e-2 A/fs)^2
    v = rng.normal(size=(20000, 2, 3)) * np.sqrt(kT / masses)[:, None] * 9.8226948e-2
    t = motion.kinetic_temperature_K(v, masses)
    assert t.shape == (20000,)
    assert t.mean() == pytest.approx(700.0, rel=4 * np.sqrt(2 / 6 / 20000))
    # canonical fluctuations: var T = 2 T^2 / n
    assert t.std() == pytest.approx(700.0 * np.sqrt(2 / 6), rel=0.03)


def test_ballistic_motion_is_displaced_by_the_square_of_time() -> None:
    rng = np.random.default_rng(0)
    v = rng.normal(scale=0.01, size=(7, 3))
    t = 2.0 * np.arange(300)
    x = rng.normal(scale=5.0, size=(7, 3)) + t[:, None, None] * v
    expected = np.mean(np.sum(v**2, axis=1)) * t**2
    assert np.allclose(motion.mean_squared_displacement(x), expected, rtol=1e-8, atol=1e-10)


def test_displacements_equal_the_plain_average_over_origins() -> None:
    x = np.cumsum(np.random.default_rng(1).normal(size=(40, 3, 3)), axis=0) + 1000.0
    plain = [np.mean(np.sum((x[k:] - x[: 40 - k]) ** 2, axis=-1)) for k in range(40)]
    assert np.allclose(motion.mean_squared_displacement(x), plain)


def test_a_random_walk_diffuses_with_its_coefficient() -> None:
    D, dt = 0.3, 10.0  # A^2/ps, fs
    steps = np.random.default_rng(2).normal(scale=np.sqrt(2 * D * dt / 1000), size=(2000, 200, 3))
    msd = motion.mean_squared_displacement(np.cumsum(steps, axis=0))
    lag = dt * np.arange(2000)
    assert motion.diffusion_coefficient(lag, msd) == pytest.approx(D, rel=0.1)


def test_a_common_motion_is_taken_out_by_mass() -> None:
    masses = np.array([1.0, 3.0])
    x = np.array([[0.0, 0, 0], [1.0, 0, 0]]) + np.arange(5.0)[:, None, None]
    still = motion.without_drift(x, masses)
    assert np.allclose(still, still[0])
    assert np.allclose(masses @ still[0], 0.0)


def vibration(wavenumber_per_cm: float, dt: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities of two atoms that vibrate against each other."""
    w = 2 * np.pi * wavenumber_per_cm * PER_CM
    t = dt * np.arange(n)
    axis = np.array([[0.3, -0.4, 0.5], [-0.3, 0.4, -0.5]])
    return 0.05 * np.cos(w * t)[:, None, None] * axis, -0.05 * w * np.sin(w * t)[:, None, None] * axis


@pytest.mark.parametrize("wavenumber", [250.0, 1712.0, 3657.0])
def test_a_vibration_appears_at_its_wavenumber(wavenumber: float) -> None:
    _, v = vibration(wavenumber, 4.0, 2500)
    spectrum = motion.vibrational_spectrum(v, [12.0, 12.0], 4.0)
    assert motion.spectrum_peaks_per_cm(spectrum) == pytest.approx([wavenumber], abs=0.5)
    assert spectrum.nyquist_per_cm == pytest.approx(4169.55, rel=1e-5)
    step = spectrum.wavenumber_per_cm[1]
    assert spectrum.density_cm.sum() * step == pytest.approx(1.0)


def test_a_line_is_as_wide_as_the_resolution() -> None:
    _, v = vibration(1500.0, 1.0, 40000)
    s = motion.vibrational_spectrum(v, [1.0, 1.0], 1.0, resolution_per_cm=40.0)
    above = s.wavenumber_per_cm[s.density_cm > s.density_cm.max() / 2]
    assert np.ptp(above) == pytest.approx(40.0, abs=2.5)


def test_positions_alone_give_the_same_spectrum_as_velocities() -> None:
    """Two modes of equal velocity keep equal weights although differences weaken the fast one."""
    dt, n = 4.0, 4000
    parts = [vibration(600.0, dt, n), vibration(3400.0, dt, n)]
    x = sum(p * (600.0 / w) for (p, _), w in zip(parts, (600.0, 3400.0), strict=True))
    v = sum(p * (600.0 / w) for (_, p), w in zip(parts, (600.0, 3400.0), strict=True))
    direct = motion.vibrational_spectrum(v, [1.0, 1.0], dt)
    differences = motion.velocities_by_differences(np.float32(x), dt)
    assert differences.shape == (n - 1, 2, 3)
    found = motion.vibrational_spectrum(differences, [1.0, 1.0], dt, from_differences=True)
    assert motion.spectrum_peaks_per_cm(found) == pytest.approx([600.0, 3400.0], abs=0.5)
    for s in (direct, found):
        fast = s.wavenumber_per_cm > 2000
        assert s.density_cm[fast].sum() / s.density_cm.sum() == pytest.approx(0.5, abs=0.01)


def test_a_diatomic_molecule_vibrates_at_the_root_of_force_constant_over_reduced_mass() -> None:
    """CO, harmonic, velocity Verlet, which raises the frequency to 2/dt asin(w dt / 2)."""
    k, r0, dt = 118.0, 1.13, 0.5  # eV/A^2, A, fs
    m = atomic_masses[[6, 8]]
    to_A_per_fs2 = units.fs**2
    x = np.array([[0.0, 0, 0], [0.8, 0.6, 0.6]])
    v = np.zeros((2, 3))

    def acceleration(x: np.ndarray) -> np.ndarray:
        d = x[1] - x[0]
        r = np.linalg.norm(d)
        pull = k * (r - r0) * d / r
        return np.array([pull, -pull]) / m[:, None] * to_A_per_fs2

    a, frames = acceleration(x), []
    for step in range(20000):
        v = v + 0.5 * dt * a
        x = x + dt * v
        a = acceleration(x)
        v = v + 0.5 * dt * a
        if step % 4 == 0:
            frames.append(v)
    w = np.sqrt(k / (m[0] * m[1] / m.sum())) * units.fs
    exact = 2 / dt * np.arcsin(0.5 * w * dt) / (2 * np.pi * PER_CM)
    assert exact == pytest.approx(2160, abs=25)
    spectrum = motion.vibrational_spectrum(frames, m, 4 * dt)
    assert motion.spectrum_peaks_per_cm(spectrum) == pytest.approx([exact], abs=1.0)


def test_each_normal_mode_has_an_equal_part_of_the_spectrum() -> None:
    """Independent oscillators of equal energy, whatever their masses."""
    n, dt = 8000, 2.0
    masses = np.array([1.0, 12.0, 16.0])
    w = 2 * np.pi * PER_CM * np.array([3000.0, 1000.0, 400.0])
    t = dt * np.arange(n)[:, None]
    v = np.zeros((n, 3, 3))
    v[:, :, 0] = np.sin(w * t) / np.sqrt(masses)
    s = motion.vibrational_spectrum(v, masses, dt)
    for low, high in ((2500, 3500), (700, 1300), (100, 700)):
        part = (s.wavenumber_per_cm > low) & (s.wavenumber_per_cm < high)
        assert s.density_cm[part].sum() / s.density_cm.sum() == pytest.approx(1 / 3, abs=0.005)


def test_the_autocorrelation_of_a_vibration_is_its_cosine() -> None:
    _, v = vibration(1000.0, 1.0, 33356)
    c = motion.velocity_autocorrelation(v, [5.0, 7.0])
    lag = np.arange(2000)
    assert c[:2000] == pytest.approx(np.cos(2 * np.pi * 1000.0 * PER_CM * lag), abs=0.01)
    assert c[0] == 1.0


def test_independent_velocities_are_not_correlated() -> None:
    c = motion.velocity_autocorrelation(np.random.default_rng(0).normal(size=(4000, 10, 3)), np.ones(10))
    assert np.abs(c[1:2000]).max() < 5 / np.sqrt(2000 * 30)


def test_the_spacing_of_frames_is_checked() -> None:
    assert motion.uniform_spacing_fs(4.0 * np.arange(100)) == pytest.approx(4.0)
    with pytest.raises(DataError, match="from 1 to 2 fs"):
        motion.uniform_spacing_fs([0.0, 1.0, 3.0])
    with pytest.raises(DataError, match="at least two frames"):
        motion.uniform_spacing_fs([0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: motion.vibrational_spectrum(np.zeros((3, 1, 3)), [1.0], 1.0), "n_frames >= 4"),
        (lambda: motion.vibrational_spectrum(np.zeros((9, 1, 3)), [1.0], 1.0), "all velocities are zero"),
        (lambda: motion.velocity_autocorrelation(np.zeros((9, 1, 3)), [1.0]), "all velocities are zero"),
        (lambda: motion.kinetic_energy(np.zeros((9, 2, 3)), [1.0]), r"got \(9, 2, 3\) and \(1,\)"),
        (lambda: motion.mean_squared_displacement(np.zeros((9, 3))), r"got \(9, 3\)"),
        (lambda: motion.mean_squared_displacement(np.full((9, 1, 3), np.nan)), "not finite"),
        (lambda: motion.kinetic_temperature_K(np.ones((1, 3)), [1.0], 0), "degree of freedom"),
        (lambda: motion.diffusion_coefficient([0.0, 1.0], [0.0, 1.0]), "two lags"),
    ],
)
def test_what_cannot_be_computed_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(DataError, match=message):
        call()
