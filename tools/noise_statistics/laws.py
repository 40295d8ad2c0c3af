"""Laws of the statistics: what each is compared with, as a p-value."""

from __future__ import annotations

import math

import numpy as np
from scipy import special, stats


def two_sided(deviations: float) -> float:
    """Of a standard normal."""
    return float(2 * stats.norm.sf(abs(deviations)))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Pearson's statistic and its p-value, both sides: counts may also fit too well."""
    figure = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return figure, _both_sides(float(stats.chi2.cdf(figure, freedom)))


def uniform(p_values: list[float]) -> float:
    """Kolmogorov and Smirnov's exact p-value of numbers that should be uniform in [0, 1]."""
    return float(stats.kstest(p_values, "uniform").pvalue)


def kolmogorov(distance: float, count: int) -> float:
    """P(D_n > distance) of Kolmogorov and Smirnov's distance."""
    return float(stats.kstwo.sf(distance, count))


def anderson_darling(statistic: float) -> float:
    """P(A^2 > statistic) for a fully known law and many numbers.

    The limit ``adinf`` of Marsaglia and Marsaglia, "Evaluating the Anderson-Darling distribution"
    (Journal of Statistical Software 9(2), 2004), within 3e-5. Their correction for n numbers is
    below 0.05 / n and left out.
    """
    if statistic <= 0:
        return 1.0
    if statistic < 2:
        series = (2.00012, 0.247105, -0.0649821, 0.0347962, -0.011672, 0.00168691)
        scale = math.exp(-1.2337141 / statistic) / math.sqrt(statistic)
        return 1 - scale * _polynomial(statistic, series)
    series = (1.0776, -2.30695, 0.43424, -0.082433, 0.008056, -0.0003146)
    return -math.expm1(-math.exp(_polynomial(statistic, series)))


def extreme(largest: float, count: int, sides: int = 1) -> float:
    """P(all of count normals are below largest), in absolute value for two sides."""
    return float(1 - sides * stats.norm.sf(largest)) ** count


def extreme_p(largest: float, count: int) -> float:
    """Of the largest of count normals: neither too small nor too large."""
    return _both_sides(extreme(largest, count))


def tail(threshold: float, count: int, beyond: int) -> tuple[float, float]:
    """Normals expected beyond the threshold on one side, and the exact binomial p-value."""
    probability = float(stats.norm.sf(threshold))
    return count * probability, float(stats.binomtest(beyond, count, probability).pvalue)


def map_tail(threshold: float) -> float:
    """P(z > threshold) of the contract's own map, exact but for its 2e-6 of fp32 arithmetic.

    ``z = r cos(theta)`` with theta uniform and r one of 2^32 equally likely radii, so the mean over
    the words of ``P(cos(theta) > threshold / r) = arccos(threshold / r) / pi``. The threshold is
    above zero; the nearer, the more words: 3 takes a second, 1 a minute.
    """
    last = math.ceil(2**32 * math.exp(-(threshold**2) / 2)) + 1
    total = 0.0
    for first in range(0, last, 1 << 20):
        word = np.arange(first, min(first + (1 << 20), last)).astype(np.float32)
        u = (word.astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
        r = np.sqrt(-2 * np.log(u.astype(np.float64)))
        total += float(np.arccos(np.minimum(threshold / r, 1)).sum())
    return total / math.pi / 2**32


def below_rounded(threshold: np.ndarray) -> np.ndarray:
    """P(a normal rounds to at most the fp32 threshold): it is below the next midpoint."""
    up = np.nextafter(threshold, np.float32(np.inf)).astype(np.float64)
    return special.ndtr((threshold.astype(np.float64) + up) / 2)


def _polynomial(x: float, coefficients: tuple[float, ...]) -> float:
    value = 0.0
    for c in reversed(coefficients):
        value = value * x + c
    return value


def _both_sides(below: float) -> float:
    return 2 * min(below, 1 - below)
