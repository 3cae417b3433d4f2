"""How atoms move: kinetic temperature, mean squared displacement, velocity autocorrelation, vibrational spectrum.

Velocities are in A/fs, masses in u (amu), times in fs, wavenumbers in 1/cm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import units
from numpy.typing import ArrayLike, NDArray
from scipy.signal import find_peaks

from mmea_calc.errors import DataError

from ..statistics import correlation

FloatArray = NDArray[np.floating[Any]]

# 1/fs -> 1/cm: a vibration of one per fs has this wavenumber.
PER_CM = 1e15 / (units._c * 100.0)
# u (A/fs)^2 -> eV: ASE's unit of time makes u (A/time)^2 one eV.
_EV = 1.0 / units.fs**2
A2_PER_PS_IN_CM2_PER_S = 1e-4
# Full width at half maximum of a Gaussian over its standard deviation.
_FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))


def kinetic_energy(velocities_A_per_fs: ArrayLike, masses_amu: ArrayLike) -> FloatArray:
    """Kinetic energy of each frame, (...,), eV, from velocities (..., n_atoms, 3) and masses (n_atoms,)."""
    v, m = _velocities(velocities_A_per_fs, masses_amu)
    return np.asarray(0.5 * _EV * np.einsum("...ai,a->...", v**2, m))


def kinetic_temperature_K(
    velocities_A_per_fs: ArrayLike, masses_amu: ArrayLike, n_degrees_of_freedom: int | None = None
) -> FloatArray:
    """Kinetic temperature 2 E_kin / (k_B n) of each frame, (...,), K.

    Args:
        velocities_A_per_fs: (..., n_atoms, 3).
        masses_amu: (n_atoms,).
        n_degrees_of_freedom: n; 3 n_atoms unless given, which is right for Langevin dynamics. Where the motion of
            the centre of mass was removed and stays so, as under velocity Verlet, it is 3 less; without rotation 6.
    """
    energy = kinetic_energy(velocities_A_per_fs, masses_amu)
    n = 3 * np.shape(velocities_A_per_fs)[-2] if n_degrees_of_freedom is None else n_degrees_of_freedom
    if n < 1:
        raise DataError(f"a temperature needs at least one degree of freedom, got {n}")
    return 2.0 * energy / (units.kB * n)


def mean_squared_displacement(positions_A: ArrayLike) -> FloatArray:
    """<|x(t + k) - x(t)|^2> over atoms and all time origins t, (n_frames,), A^2, lag 0 first.

    By fast Fourier transform (Calandrini et al., Collection SFN 12, 201 (2011)). Long lags have few origins: beyond
    half the trajectory the curve is mostly noise.

    Args:
        positions_A: unwrapped, (n_frames, n_atoms, 3), A.

    Raises:
        DataError: another shape, or positions that are not finite.
    """
    x = _trajectory(positions_A)
    # Relative to the mean, because the difference of two large sums below would lose its digits.
    x = x - x.mean(axis=0)
    n, n_atoms = x.shape[:2]
    squares = np.einsum("tai,tai->t", x, x)
    # sum over origins of |x(t)|^2 + |x(t + k)|^2, for every lag k
    total = np.concatenate([[0.0], np.cumsum(squares)])
    lags = np.arange(n)
    sums = total[n - lags] + total[n] - total[lags]
    msd = sums / (n - lags) - 2.0 * correlation(x)
    msd[0] = 0.0
    return np.asarray(np.maximum(msd, 0.0) / n_atoms)


def diffusion_coefficient(lag_fs: ArrayLike, msd_A2: ArrayLike, window: tuple[float, float] = (0.1, 0.5)) -> float:
    """Einstein's diffusion coefficient: a sixth of the slope of the displacement over part of the lags, A^2/ps.

    Args:
        lag_fs, msd_A2: (n_frames,).
        window: the part, as fractions of the longest lag. Before it motion is ballistic, after it noise prevails.

    Raises:
        DataError: fewer than two lags within the window.
    """
    lag, msd = np.asarray(lag_fs, dtype=float), np.asarray(msd_A2, dtype=float)
    inside = (lag >= window[0] * lag[-1]) & (lag <= window[1] * lag[-1])
    if inside.sum() < 2:
        raise DataError(f"a diffusion coefficient needs two lags or more, got {int(inside.sum())}: run for longer")
    return float(np.polyfit(lag[inside] / 1000.0, msd[inside], 1)[0] / 6.0)


def velocities_by_differences(positions_A: ArrayLike, spacing_fs: float) -> FloatArray:
    """Velocities half-way between frames, (n_frames - 1, n_atoms, 3), A/fs: (x(t + dt) - x(t)) / dt.

    A vibration of frequency f is weakened by sin(pi f dt) / (pi f dt); `vibrational_spectrum` takes that back exactly
    when it is told so. Nothing brings back frequencies above 1 / (2 dt): they appear folded to lower ones.
    """
    return np.diff(_trajectory(positions_A), axis=0) / spacing_fs


def velocity_autocorrelation(velocities_A_per_fs: ArrayLike, masses_amu: ArrayLike) -> FloatArray:
    """Mass-weighted C(k) = sum over atoms of m <v(t) . v(t + k)>, over its value at k = 0; (n_frames,).

    Args:
        velocities_A_per_fs: (n_frames, n_atoms, 3).
        masses_amu: (n_atoms,).
    """
    v, m = _velocities(velocities_A_per_fs, masses_amu)
    c = correlation(v, m[:, None])
    if c[0] <= 0.0:
        raise DataError("all velocities are zero: there is nothing to correlate")
    return c / c[0]


@dataclass(frozen=True)
class Spectrum:
    """A vibrational density of states.

    Attributes:
        wavenumber_per_cm: (n,), from 0 to the highest that the spacing of the frames resolves.
        density_cm: (n,), cm; its integral over the wavenumbers is 1, each normal mode having an equal part of it
            where energy is equally distributed.
        resolution_per_cm: full width at half maximum that a line has at least.
        nyquist_per_cm: the highest wavenumber; faster vibrations appear folded below it.
    """

    wavenumber_per_cm: FloatArray
    density_cm: FloatArray
    resolution_per_cm: float
    nyquist_per_cm: float


def vibrational_spectrum(
    velocities_A_per_fs: ArrayLike,
    masses_amu: ArrayLike,
    spacing_fs: float,
    *,
    resolution_per_cm: float | None = None,
    from_differences: bool = False,
) -> Spectrum:
    """Power spectrum of the mass-weighted velocity autocorrelation (Dickey and Paskin, Phys. Rev. 188, 1407 (1969)).

    The autocorrelation (over all origins, divided by n_frames, which keeps the spectrum positive) is multiplied by a
    Gaussian and Fourier transformed; this is the periodogram of the velocities smoothed by a Gaussian.

    Args:
        velocities_A_per_fs: (n_frames, n_atoms, 3), equally spaced.
        masses_amu: (n_atoms,).
        spacing_fs: between frames.
        resolution_per_cm: full width at half maximum of the smoothing; None: 10, but not below what the length T of
            the trajectory allows, 2 / (c T).
        from_differences: the velocities are from `velocities_by_differences`; their weakening is taken back.

    Raises:
        DataError: fewer than four frames, or shapes that do not fit.
    """
    v, m = _velocities(velocities_A_per_fs, masses_amu)
    if v.ndim != 3 or len(v) < 4:
        raise DataError(f"a spectrum needs velocities (n_frames >= 4, n_atoms, 3), got {v.shape}: run for longer")
    n = len(v)
    finest = 2.0 * PER_CM / (n * spacing_fs)
    width = max(10.0, finest) if resolution_per_cm is None else resolution_per_cm
    c = correlation(v, m[:, None], biased=True)
    deviation_fs = _FWHM * PER_CM / (2.0 * np.pi * width)
    c = c * np.exp(-0.5 * (np.arange(n) * spacing_fs / deviation_fs) ** 2)
    # At least four points across a line.
    length = 2 ** int(np.ceil(np.log2(max(2 * n, 4.0 * PER_CM / (width * spacing_fs)))))
    even = np.zeros(length)
    even[:n] = c
    even[length - n + 1 :] = c[:0:-1]
    density = np.maximum(np.fft.rfft(even).real, 0.0)
    per_fs = np.fft.rfftfreq(length, spacing_fs)
    if from_differences:
        density /= np.sinc(per_fs * spacing_fs) ** 2
    wavenumber = per_fs * PER_CM
    area = float(density.sum() * (wavenumber[1] - wavenumber[0]))
    if area <= 0.0:
        raise DataError("all velocities are zero: there is no spectrum")
    return Spectrum(wavenumber, density / area, width, 0.5 * PER_CM / spacing_fs)


def spectrum_peaks_per_cm(spectrum: Spectrum, *, at_least: float = 0.1, lowest_per_cm: float = 50.0) -> FloatArray:
    """Wavenumbers of the peaks, ascending, 1/cm; the highest point of each is refined by a parabola.

    Args:
        spectrum: from `vibrational_spectrum`.
        at_least: how far a peak must stand out of its surroundings, as a fraction of the highest density considered.
        lowest_per_cm: what lies below is left out: translation and rotation of the whole.
    """
    x, y = spectrum.wavenumber_per_cm, spectrum.density_cm
    considered = x >= lowest_per_cm
    if not considered.any():
        return np.zeros(0)
    found, _ = find_peaks(np.where(considered, y, 0.0), prominence=at_least * float(y[considered].max()))
    found = found[(found > 0) & considered[found - 1]]
    before, at, after = y[found - 1], y[found], y[found + 1]
    shift = 0.5 * (before - after) / (before - 2.0 * at + after)
    return np.asarray(x[found] + shift * (x[1] - x[0]))


def without_drift(values: ArrayLike, masses_amu: ArrayLike) -> FloatArray:
    """Positions or velocities (..., n_atoms, 3) relative to those of the centre of mass."""
    x, m = np.asarray(values, dtype=np.float64), np.asarray(masses_amu, dtype=np.float64)
    return np.asarray(x - np.einsum("...ai,a->...i", x, m / m.sum())[..., None, :])


def uniform_spacing_fs(times_fs: ArrayLike) -> float:
    """The spacing of equally spaced frames, fs.

    Raises:
        DataError: fewer than two frames, or spacings that differ.
    """
    times = np.asarray(times_fs, dtype=np.float64)
    if times.size < 2:
        raise DataError(f"motion needs at least two frames, got {times.size}: run for longer")
    steps = np.diff(times)
    if steps.min() <= 0 or np.ptp(steps) > 1e-6 * steps.mean():
        raise DataError(
            f"motion needs frames at equal distances in time; theirs are from {steps.min():g} to {steps.max():g} fs"
        )
    return float((times[-1] - times[0]) / (times.size - 1))


def _trajectory(positions_A: ArrayLike) -> FloatArray:
    x = np.asarray(positions_A, dtype=np.float64)
    if x.ndim != 3 or x.shape[2] != 3 or not x.shape[0]:
        raise DataError(f"expected positions of shape (n_frames, n_atoms, 3), got {x.shape}")
    if not np.all(np.isfinite(x)):
        raise DataError("positions are not finite; look for a failed replica")
    return x


def _velocities(velocities_A_per_fs: ArrayLike, masses_amu: ArrayLike) -> tuple[FloatArray, FloatArray]:
    v, m = np.asarray(velocities_A_per_fs, dtype=np.float64), np.asarray(masses_amu, dtype=np.float64)
    if m.ndim != 1 or v.ndim < 2 or v.shape[-2:] != (len(m), 3):
        raise DataError(f"expected velocities (..., n_atoms, 3) and masses (n_atoms,), got {v.shape} and {m.shape}")
    return v, m
