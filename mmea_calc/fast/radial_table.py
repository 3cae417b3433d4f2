"""Radial functions as splines of the distance, for compiled networks whose radial MLPs are not trained.

What a convolution's radial MLP makes of Bessel functions and cutoff (MACE, arXiv 2206.07697, eq. 8) are functions
R_pc(r) of one number, smooth, and known before a call. With n equal intervals between 0 and the cutoff radius,
u = n r / r_max and i = floor(u),

    R_pc(r) = sum_m B_m(u - i) C_{i + m, pc},    m = 0 ... 5,

where the B_m are the quintic B-splines that are not zero on an interval. So a pair of atoms costs six products per
function instead of an MLP. Forces are the derivative of these splines, whose fourth derivative is continuous. Their
error is below the rounding of the MLP itself: n is doubled until it is (`ACCURACY`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from .arrangement import total

DEGREE = 5
# Intervals to begin with, and the largest error between the points that a spline goes through, in units of the largest
# value of all functions. Rounding of the coefficients is 1e-7 or 1e-16.
INTERVALS = {torch.float32: 512, torch.float64: 2048}
ACCURACY = {torch.float32: 2e-9, torch.float64: 1e-12}
_MOST_INTERVALS = 2**14
_LOOKED_AT = 256  # intervals whose inside is compared, evenly among all


def fit(function: Callable[[Tensor], Tensor], r_max: float, dtype: torch.dtype) -> Tensor | None:
    """Coefficients C of the splines of functions.

    Args:
        function: distances (n,), A, float64, between 0 and `r_max` -> values (n, n_functions), float64.
        r_max: A.
        dtype: of a network that they are for: decides how accurate they have to be.

    Returns:
        (n_intervals + 5, n_functions), float64; None where as many intervals as are sensible are not enough, or values
        are not finite.
    """
    n = INTERVALS[dtype]
    while n <= _MOST_INTERVALS:
        u = _sites(n)
        values = function(u * (r_max / n))
        if not bool(torch.isfinite(values).all()):
            return None
        coefficients = _through(u, values, n)
        some = torch.arange(0, n, n // _LOOKED_AT, dtype=torch.float64).unsqueeze(1)
        between = (some + torch.tensor([0.25, 0.5], dtype=torch.float64)).flatten()
        expected = function(between * (r_max / n))
        found = evaluate(between, coefficients, coefficients.new_tensor(n))
        if float((found - expected).abs().max()) <= ACCURACY[dtype] * float(values.abs().max()):
            return coefficients
        n *= 2
    return None


def evaluate(u: Tensor, coefficients: Tensor, n: Tensor) -> Tensor:
    """Splines at u (n_points,) in units of intervals -> (n_points, n_functions); constant beyond the last interval.

    `n` is the number of intervals, a tensor without dimensions. Differentiable any number of times with respect to u.
    """
    u = torch.minimum(u, n)
    last = (n - 1).to(torch.int64)
    return _Splines.apply(u, coefficients, last, 0)


class _Splines(torch.autograd.Function):
    """A derivative of the splines; the gradient of one is made of the next."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, coefficients: Tensor, last: Tensor, order: int) -> Tensor:
        ctx.save_for_backward(u, coefficients, last)
        ctx.order = order
        interval = torch.minimum(u.floor().to(torch.int64), last).clamp(min=0)  # also where u is not a number
        factors = _made(torch.stack([_horner(polynomial, u - interval) for polynomial in _basis(order)]))
        interval = _made(interval)
        rows = (coefficients.index_select(0, interval + m) for m in range(DEGREE + 1))
        return total(factor.unsqueeze(1) * row for factor, row in zip(factors, rows, strict=True))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        u, coefficients, last = ctx.saved_tensors
        return (grad * _Splines.apply(u, coefficients, last, ctx.order + 1)).sum(1), None, None, None


def _made(x: Tensor) -> Tensor:
    """The same. A compiler has it in memory from here on; it would compute it again for every function."""
    return x.as_strided(x.shape, x.stride())


@cache
def _basis(order: int = 0) -> tuple[tuple[float, ...], ...]:
    """The derivative of this order of each B_m(t), 0 <= t < 1: coefficients of its powers of t, the highest first.

    By the recursion of Cox and de Boor for knots at all integers.
    """
    splines = [np.poly1d([1.0])]
    for k in range(1, DEGREE + 1):
        rising = [np.poly1d([1.0, k - m]) / k for m in range(k + 1)]
        falling = [np.poly1d([-1.0, m + 1.0]) / k for m in range(k + 1)]
        below = [np.poly1d([0.0]), *splines, np.poly1d([0.0])]
        splines = [rising[m] * below[m] + falling[m] * below[m + 1] for m in range(k + 1)]
    return tuple(tuple(float(c) for c in np.polyder(spline, order).coeffs) or (0.0,) for spline in splines)


def _horner(polynomial: tuple[float, ...], t: Tensor) -> Tensor:
    value = torch.full_like(t, polynomial[0])
    for c in polynomial[1:]:
        value = value * t + c
    return value


def _sites(n: int) -> Tensor:
    """Where splines of n intervals are given: at the knots, and in the middle of the two first and two last intervals,
    (n + 5,).
    """
    middle = torch.tensor([0.5, 1.5, n - 1.5, n - 0.5], dtype=torch.float64)
    return torch.cat([torch.arange(n + 1, dtype=torch.float64), middle]).sort().values


def _through(u: Tensor, values: Tensor, n: int) -> Tensor:
    """Coefficients of the splines that go through values (n + 5, n_functions) at u (n + 5,)."""
    interval = u.floor().clamp(max=n - 1)
    factors = torch.stack([_horner(polynomial, u - interval) for polynomial in _basis()], dim=1).numpy()
    row = np.arange(len(u))[:, None]
    column = interval.to(torch.int64).numpy()[:, None] + np.arange(DEGREE + 1)
    above, below = int((column - row).max()), int((row - column).max())
    banded = np.zeros((above + below + 1, len(u)))
    banded[above + row - column, column] = factors
    return torch.from_numpy(solve_banded((below, above), banded, values.numpy())).contiguous()


__all__ = ["ACCURACY", "evaluate", "fit"]
