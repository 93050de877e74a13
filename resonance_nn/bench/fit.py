"""Fits of measurements: Student's t, and the exponent of a power law with its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def student_t95(degrees: int) -> float:
    """The 97.5% quantile of Student's t, for two-sided 95% intervals, to 0.001: a table, and from 10 degrees of freedom
    on the expansion in 1/degrees (Cornish & Fisher 1960)."""
    if degrees < 1:
        raise ValueError(f"degrees = {degrees}: must be ≥ 1; an interval needs more points than coefficients")
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return T95.get(degrees) or z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def confidence95(values: Sequence[float]) -> float | None:
    """Half the 95% confidence interval of the mean (Student's t); None of fewer than two, or where one is infinite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return student_t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient · x^exponent; ``low`` and ``high`` bound the exponent with 95% confidence, None of two points."""

    exponent: float
    coefficient: float
    low: float | None
    high: float | None
    points: int

    def at(self, x: float) -> float:
        return self.coefficient * x**self.exponent


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares of log y on log x.

    Args:
        x, y: positive, two or more distinct x; repeated measurements of an x are points of their own.

    Raises:
        ValueError: fewer than two distinct x, unequal numbers of points, or values ≤ 0.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} points at {len(set(x))} distinct x: must be as many, at 2 x or more")
    if min(*x, *y) <= 0:
        raise ValueError(f"a value of {min(*x, *y)}: a power law is fitted to values > 0")
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    n, mean_u, mean_v = len(u), statistics.fmean(u), statistics.fmean(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    intercept = mean_v - slope * mean_u
    low = high = None
    if n > 2:
        residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(u, v, strict=True))
        half = student_t95(n - 2) * math.sqrt(residual / (n - 2) / spread)
        low, high = slope - half, slope + half
    return PowerLaw(slope, math.exp(intercept), low, high, n)
