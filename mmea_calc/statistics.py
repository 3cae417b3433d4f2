"""Means of correlated series with honest errors, drifts, and autocorrelation functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError

FloatArray = NDArray[np.floating[Any]]

# Fewer samples than this give a mean without an error.
LEAST_SAMPLES = 16
# Values whose Fourier transforms are held in memory at once by `correlation`; 2**22 complex numbers are 64 MiB.
_TRANSFORMED_AT_ONCE = 2**22


@dataclass(frozen=True)
class BlockAverage:
    """The mean of a correlated series and its standard error; the unit is that of the series.

    Attributes:
        mean: of the whole series.
        error: standard error of the mean at the chosen block length.
        converged: whether the series is long enough for the error to have reached its plateau; if it is not, the true
            error is likely to be larger than `error`.
        n_samples: length of the series.
        block_length: chosen number of samples in a block.
        block_lengths: tried numbers of samples in a block, (n_levels,).
        errors: standard error at each of them, (n_levels,).
        error_uncertainties: standard deviations of `errors`, (n_levels,).
    """

    mean: float
    error: float
    converged: bool
    n_samples: int
    block_length: int
    block_lengths: NDArray[np.int64]
    errors: FloatArray
    error_uncertainties: FloatArray

    @property
    def statistical_inefficiency(self) -> float:
        """How many samples in sequence are worth one that is independent."""
        return float((self.error / self.errors[0]) ** 2) if self.errors[0] > 0 else 1.0


def block_average(values: ArrayLike) -> BlockAverage:
    """Mean and standard error of a correlated series by blocking.

    Neighbouring samples are averaged in pairs, again and again, until two blocks are left; the error grows until blocks
    are independent (Flyvbjerg and Petersen, J. Chem. Phys. 91, 461 (1989)). The block length b is the smallest with
    b^3 > 2 n (error_b / error_1)^4 (Lee et al., Phys. Rev. E 83, 066706 (2011)). Where none satisfies this, the series
    is too short, and the largest error over levels with at least eight blocks is given.

    Args:
        values: (n_samples,), at least two, equally spaced in time.

    Raises:
        DataError: another shape, fewer samples, or values that are not finite.
    """
    series = _series(values, 2, "block averages")
    lengths, errors, uncertainties = [], [], []
    blocks, length = series, 1
    while blocks.size >= 2:
        n = blocks.size
        error = float(np.sqrt(blocks.var(ddof=1) / n))
        lengths.append(length)
        errors.append(error)
        uncertainties.append(error / np.sqrt(2.0 * (n - 1)))
        # An odd sample out is left to the levels below.
        blocks, length = 0.5 * (blocks[0 : n - 1 : 2] + blocks[1::2]), 2 * length
    all_lengths, all_errors = np.array(lengths, dtype=np.int64), np.array(errors)
    chosen, converged = _plateau(all_lengths, all_errors, series.size)
    return BlockAverage(
        mean=float(series.mean()),
        error=float(all_errors[chosen]),
        converged=converged,
        n_samples=series.size,
        block_length=int(all_lengths[chosen]),
        block_lengths=all_lengths,
        errors=all_errors,
        error_uncertainties=np.array(uncertainties),
    )


def _plateau(lengths: NDArray[np.int64], errors: FloatArray, n_samples: int) -> tuple[int, bool]:
    """Level of the block length that is chosen, and whether it satisfies the criterion."""
    if errors[0] == 0.0:
        return 0, True
    inefficiency = (errors / errors[0]) ** 2
    satisfied = np.flatnonzero(lengths.astype(float) ** 3 > 2.0 * n_samples * inefficiency**2)
    # With fewer blocks than four an error says nothing of itself; it may fall by chance and feign a plateau.
    if satisfied.size and n_samples // lengths[satisfied[0]] >= 4:
        return int(satisfied[0]), True
    candidates = np.flatnonzero(n_samples // lengths >= 8)
    candidates = candidates if candidates.size else np.arange(1)
    return int(candidates[np.argmax(errors[candidates])]), False


@dataclass(frozen=True)
class Drift:
    """A straight line through a series: its slope per unit of time, and the slope's standard error."""

    slope: float
    error: float


def drift(times: ArrayLike, values: ArrayLike, *, walks: bool = False, n_blocks: int = 8) -> Drift:
    """Slope of a series over time, and its standard error from parts of the series.

    A series that fluctuates about a line, such as the energy of dynamics without a thermostat: least squares. Its
    residuals are correlated, so the textbook error of a regression would be far too small; they are averaged over
    `n_blocks` blocks, taken as independent, and the error is that of a regression through these means.

    A series that walks at random, such as the conserved quantity of dynamics with a thermostat, which every random
    force moves a little: no line describes it, but its changes in separate parts are independent. The slope is the
    mean over `n_blocks` parts of the slope in each, and the error the standard error of that mean.

    Args:
        times: (n_samples,), increasing.
        values: (n_samples,).
        walks: which of the two it is.
        n_blocks: fewer for a series with fewer than two samples in each.

    Returns:
        Unit of the values over unit of the times; the error is NaN with fewer than six samples.

    Raises:
        DataError: fewer than two samples, other shapes, or values that are not finite.
    """
    x, y = _series(times, 2, "a drift"), _series(values, 2, "a drift")
    if x.shape != y.shape:
        raise DataError(f"a drift needs one time per value, got {x.size} times and {y.size} values")
    if x[0] == x[-1]:
        raise DataError("a drift needs samples at different times; all have the same")
    n = min(n_blocks, x.size // 2)
    if n < 3:
        return Drift(_slope(x, y), float("nan"))
    if walks:
        parts = zip(np.array_split(x, n), np.array_split(y, n), strict=True)
        slopes = np.array([_slope(*part) for part in parts])
        return Drift(float(slopes.mean()), float(slopes.std(ddof=1) / np.sqrt(n)))
    slope, centred = _slope(x, y), x - x.mean()
    residuals = y - y.mean() - slope * centred
    means = np.array([block.mean() for block in np.array_split(residuals, n)])
    middles = np.array([block.mean() for block in np.array_split(centred, n)])
    variance = float(means @ means) / (n - 2)
    return Drift(slope, float(np.sqrt(variance / (middles @ middles))))


def _slope(x: FloatArray, y: FloatArray) -> float:
    """Of the line of least squares."""
    centred = x - x.mean()
    return float(centred @ (y - y.mean())) / float(centred @ centred)


def correlation(series: ArrayLike, weights: ArrayLike | None = None, *, biased: bool = False) -> FloatArray:
    """Autocorrelation C(k) = sum over columns of w <x(t) x(t + k)>, averaged over all time origins t.

    By fast Fourier transform (Wiener-Khinchin). No mean is subtracted.

    Args:
        series: (n_samples, ...); every index beyond the first numbers one column.
        weights: one per column, of the trailing shape of `series` or broadcast to it; 1 unless given.
        biased: divide by n_samples at every lag rather than by the number of origins n_samples - k.

    Returns:
        (n_samples,), lag 0 first.

    Raises:
        DataError: no samples, or values that are not finite.
    """
    x = np.asarray(series, dtype=np.float64)
    if x.ndim == 0 or x.shape[0] < 1 or not np.all(np.isfinite(x)):
        raise DataError("an autocorrelation needs at least one sample, and only finite ones; look for a failed replica")
    n = x.shape[0]
    w = np.ones(x.shape[1:]) if weights is None else np.broadcast_to(np.asarray(weights, dtype=float), x.shape[1:])
    columns, w = x.reshape(n, -1), w.reshape(-1)
    length = 2 ** int(np.ceil(np.log2(2 * n)))
    power = np.zeros(length // 2 + 1)
    step = max(1, _TRANSFORMED_AT_ONCE // length)
    for start in range(0, columns.shape[1], step):
        transformed = np.fft.rfft(columns[:, start : start + step], length, axis=0)
        power += (transformed.real**2 + transformed.imag**2) @ w[start : start + step]
    sums = np.fft.irfft(power, length)[:n]
    return sums / (n if biased else np.arange(n, 0, -1))


def _series(values: ArrayLike, least: int, purpose: str) -> FloatArray:
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or series.size < least:
        raise DataError(f"{purpose} need a series of at least {least} values, got shape {series.shape}: run for longer")
    if not np.all(np.isfinite(series)):
        raise DataError(f"{purpose} need finite values; {int(np.sum(~np.isfinite(series)))} are not")
    return series
