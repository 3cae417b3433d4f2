"""Block averages, drifts and correlations of series whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mmea_calc.errors import DataError
from mmea_calc.statistics import block_average, correlation, drift


def autoregressive(n: int, phi: float, seed: int) -> NDArray[np.float64]:
    """x(t) = phi x(t - 1) + noise, stationary from the start, with variance 1."""
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    noise = rng.normal(size=n) * np.sqrt(1.0 - phi**2)
    noise[0] = rng.normal()
    return np.asarray(lfilter([1.0], [1.0, -phi], noise))


def exact_error(n: int, phi: float) -> float:
    """Standard error of the mean of an autoregressive series of variance 1: the sum over its correlations."""
    k = np.arange(1, n)
    return float(np.sqrt((1.0 + 2.0 * np.sum((1.0 - k / n) * phi**k)) / n))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.95])
def test_the_error_of_an_autoregressive_series_is_the_exact_one(phi: float) -> None:
    n = 2**15
    found = [block_average(autoregressive(n, phi, seed)) for seed in range(40)]
    assert np.mean([b.error for b in found]) == pytest.approx(exact_error(n, phi), rel=0.08)
    assert sum(b.converged for b in found) >= 38


def test_errors_cover_the_true_mean_as_often_as_a_gaussian_says() -> None:
    found = [block_average(autoregressive(4096, 0.9, seed)) for seed in range(300)]
    inside = np.mean([abs(b.mean) < b.error for b in found])
    assert inside == pytest.approx(0.683, abs=0.09)


def test_the_statistical_inefficiency_is_that_of_the_series() -> None:
    phi = 0.9
    found = np.mean([block_average(autoregressive(2**15, phi, s)).statistical_inefficiency for s in range(20)])
    assert found == pytest.approx((1 + phi) / (1 - phi), rel=0.15)


def test_a_series_shorter_than_its_correlations_is_not_called_converged() -> None:
    assert not any(block_average(autoregressive(64, 0.98, seed)).converged for seed in range(20))


def test_a_constant_series_has_no_error() -> None:
    average = block_average(np.full(100, 3.0))
    assert (average.mean, average.error, average.converged, average.statistical_inefficiency) == (3.0, 0.0, True, 1.0)


def test_the_first_level_is_the_textbook_error_of_independent_samples() -> None:
    x = np.random.default_rng(0).normal(size=101)
    average = block_average(x)
    assert average.errors[0] == pytest.approx(x.std(ddof=1) / np.sqrt(101))
    assert average.block_lengths.tolist() == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "at least 2 values"), ([[1.0, 2.0]], "got shape"), ([1.0, np.nan, 2.0], "1 are not")],
)
def test_a_series_that_says_nothing_is_refused(values: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        block_average(values)


def test_the_drift_of_a_line_is_its_slope() -> None:
    t = np.linspace(0, 7, 50)
    for walks in (False, True):
        line = drift(t, 2.0 - 0.3 * t, walks=walks)
        assert line.slope == pytest.approx(-0.3)
        assert line.error == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_a_drift_is_the_spread_that_one_sees() -> None:
    t = np.arange(2000.0)
    found = [drift(t, autoregressive(2000, 0.9, seed)) for seed in range(300)]
    seen = np.std([d.slope for d in found])
    assert np.sqrt(np.mean([d.error**2 for d in found])) == pytest.approx(seen, rel=0.25)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_error_of_a_random_walks_drift_is_the_spread_that_one_sees(noise: float) -> None:
    """Of the change itself: a line through a walk lies about it, and its residuals say little of its slope."""
    t, found = np.arange(2000.0), []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        found.append(drift(t, np.cumsum(rng.normal(size=t.size)) + noise * rng.normal(size=t.size), walks=True))
    seen = np.sqrt(np.mean([d.slope**2 for d in found]))
    assert np.sqrt(np.mean([d.error**2 for d in found])) == pytest.approx(seen, rel=0.15)
    assert seen == pytest.approx(np.sqrt(6 / 5 / t.size), rel=0.15)  # a walk of unit steps


def test_a_drift_over_few_samples_has_no_error() -> None:
    assert np.isnan(drift([0.0, 1.0, 2.0], [0.0, 1.0, 3.0]).error)


def test_a_drift_needs_times_that_fit() -> None:
    with pytest.raises(DataError, match="2 times and 3 values"):
        drift([0.0, 1.0], [0.0, 1.0, 2.0])
    with pytest.raises(DataError, match="different times"):
        drift([1.0, 1.0], [0.0, 1.0])


@pytest.mark.parametrize("biased", [False, True])
def test_correlations_by_transform_equal_the_plain_sums(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(1).normal(size=(37, 5, 3))
    w = np.random.default_rng(2).uniform(size=(5, 1))
    plain = [np.sum(w * x[: 37 - k] * x[k:]) / (37 if biased else 37 - k) for k in range(37)]
    assert np.allclose(correlation(x, w, biased=biased), plain)
    # and in several parts
    monkeypatch.setattr("mmea_calc.statistics._TRANSFORMED_AT_ONCE", 300)
    assert np.allclose(correlation(x, w, biased=biased), plain)


def test_correlations_of_a_series_that_is_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="finite"):
        correlation([0.0, np.inf])
