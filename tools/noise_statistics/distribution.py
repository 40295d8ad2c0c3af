"""One number at a time: moments, the distribution, the tails."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from tools.noise_statistics import laws
from tools.noise_statistics.findings import Finding

BINS = 1 << 16
TESTED_TAILS = (3.0, 4.0, 5.0, 6.0)
# For the picture.
TAILS = np.arange(3, 6.76, 0.25)
# Doubles that stay in a core's cache while their powers are summed.
_PIECE = 1 << 14


class Moments:
    """Means of z, z^2, ... z^8."""

    ORDERS = range(1, 9)

    def __init__(self) -> None:
        self.count = 0
        self.sums = np.zeros(8)

    def add(self, z: np.ndarray) -> None:
        for first in range(0, len(z), _PIECE):
            x = z[first : first + _PIECE].astype(np.float64)
            x2 = x * x
            x3, x4 = x * x2, x2 * x2
            self.sums += x.sum(), x @ x, x @ x2, x2 @ x2, x @ x4, x2 @ x4, x3 @ x4, x4 @ x4
        self.count += len(z)

    def findings(self) -> list[Finding]:
        out = []
        for k, total in zip(self.ORDERS, self.sums, strict=True):
            mean, scale = normal_moment(k), math.sqrt(moment_variance(k) / self.count)
            p = laws.two_sided((total / self.count - mean) / scale)
            out.append(
                Finding(f"mean of z^{k}", f"{total / self.count:.7g}", f"{mean} +- {scale:.2g}", p)
            )
        return out


def normal_moment(k: int) -> int:
    """E z^k = (k - 1)!! for even k."""
    return 0 if k % 2 else math.prod(range(1, k, 2))


def moment_variance(k: int) -> int:
    """Var z^k = E z^2k - (E z^k)^2."""
    return normal_moment(2 * k) - normal_moment(k) ** 2


class Distribution:
    """Of sorted blocks: the exact goodness-of-fit statistics of each, and counts of them all.

    Kolmogorov and Smirnov's distance is ``max_i |F(z_i) - i/n|`` from both ends of each step;
    Anderson and Darling's statistic, which weighs the tails, is
    ``-n - 1/n sum_i (2i - 1) (ln F(z_i) + ln(1 - F(z_{n+1-i})))`` over z in rising order.
    """

    def __init__(self) -> None:
        self.count = 0
        self.histogram = np.zeros(BINS, np.int64)
        self.above = np.zeros(len(TAILS), np.int64)
        self.below = np.zeros(len(TAILS), np.int64)
        self.smallest, self.largest = math.inf, -math.inf
        self.kolmogorov: list[float] = []
        self.anderson: list[float] = []
        self.extremes: list[float] = []
        self.edges = special.ndtri(np.arange(1, BINS) / BINS).astype(np.float32)

    def add(self, z: np.ndarray) -> None:
        """z: one block of float32, sorted."""
        n = len(z)
        self.histogram += np.diff(np.searchsorted(z, self.edges, "right"), prepend=0, append=n)
        tails = TAILS.astype(np.float32)
        self.above += n - np.searchsorted(z, tails, "right")
        self.below += np.searchsorted(z, -tails, "left")
        low, high = float(z[0]), float(z[-1])
        self.smallest, self.largest = min(self.smallest, low), max(self.largest, high)
        distance, statistic = goodness_of_fit(z)
        self.kolmogorov.append(laws.kolmogorov(distance, n))
        self.anderson.append(laws.anderson_darling(statistic))
        self.extremes.append(laws.extreme(max(-low, high), n, sides=2))
        self.count += n

    def findings(self) -> list[Finding]:
        n, blocks = self.count, len(self.kolmogorov)
        out = []
        for name, p_values in (
            ("Kolmogorov-Smirnov", self.kolmogorov),
            ("Anderson-Darling", self.anderson),
            ("largest absolute value", self.extremes),
        ):
            p = laws.uniform(p_values)
            few = sum(v < 0.01 for v in p_values)
            figure = f"{few} of {blocks} p-values below 0.01"
            out.append(Finding(f"{name} of each block", figure, "p-values uniform", p))
        below = laws.below_rounded(self.edges)
        chi, p = laws.chi_square(self.histogram, n * np.diff(below, prepend=0.0, append=1.0))
        expected = f"{BINS - 1} +- {math.sqrt(2 * BINS):.0f}"
        out.append(Finding(f"chi-square of {BINS} bins", f"{chi:.0f}", expected, p))
        # The distance at some points is at most that at all of them: p can only be too large.
        distance = float(np.abs(np.cumsum(self.histogram)[:-1] / n - below).max())
        figure = f"{math.sqrt(n) * distance:.3f} / sqrt(n)"
        name = f"Kolmogorov-Smirnov of all at {BINS - 1} points"
        p = laws.kolmogorov(distance, n)
        out.append(Finding(name, figure, "up to about 1.4 / sqrt(n)", p))
        return out + self._tails()

    def _tails(self) -> list[Finding]:
        out = []
        for threshold, above, below in zip(TAILS, self.above, self.below, strict=True):
            if threshold in TESTED_TAILS:
                sides = ((f"above {threshold:.0f}", above), (f"below -{threshold:.0f}", below))
                for side, beyond in sides:
                    expected, p = laws.tail(float(threshold), self.count, int(beyond))
                    text = f"{expected:,.4g}" if expected < 1e4 else f"{expected:,.0f}"
                    out.append(Finding(side, f"{beyond:,}", text, p))
        for name, value in (("largest", self.largest), ("smallest", -self.smallest)):
            p = laws.extreme_p(value, self.count)
            sign = "" if name == "largest" else "-"
            typical = special.ndtri(math.exp(math.log(0.5) / self.count))
            out.append(Finding(name, f"{sign}{value:.4f}", f"about {sign}{typical:.2f}", p))
        return out


def goodness_of_fit(z: np.ndarray) -> tuple[float, float]:
    """Kolmogorov and Smirnov's distance and Anderson and Darling's A^2 of sorted numbers."""
    n = len(z)
    x = z.astype(np.float64)
    middle = int(np.searchsorted(z, 0))
    # The smaller of F and 1 - F: the other one is its complement to the last bit.
    outer = special.ndtr(-np.abs(x))
    inner = 1 - outer
    below = np.concatenate((outer[:middle], inner[middle:]))
    rank = np.arange(n + 1) / n
    distance = max(float((rank[1:] - below).max()), float((below - rank[:-1]).max()))
    log_outer, log_inner = np.log(outer), np.log(inner)
    odd = np.arange(1, 2 * n, 2, dtype=np.float64)
    rest = odd[::-1]
    total = odd[:middle] @ log_outer[:middle] + odd[middle:] @ log_inner[middle:]
    total += rest[:middle] @ log_inner[:middle] + rest[middle:] @ log_outer[middle:]
    return distance, -n - float(total) / n


class Cells:
    """The joint law of four normals in a row: each in one of 8 equal parts, 4096 cells.

    Counted for the four of one Philox block, and for four of which two are the next block's.
    """

    PARTS = 8

    def __init__(self) -> None:
        self.edges = special.ndtri(np.arange(1, self.PARTS) / self.PARTS).astype(np.float32)
        self.counts = {0: np.zeros(self.PARTS**4, np.int64), 2: np.zeros(self.PARTS**4, np.int64)}

    def add(self, z: np.ndarray) -> None:
        part = np.zeros(len(z), np.uint8)
        for edge in self.edges:
            part += z > edge
        for shift, counts in self.counts.items():
            four = part[shift : len(part) - (len(part) - shift) % 4].reshape(-1, 4)
            cell = np.zeros(len(four), np.intp)
            for lane in range(4):
                cell = cell * self.PARTS + four[:, lane]
            counts += np.bincount(cell, minlength=self.PARTS**4)

    def findings(self) -> list[Finding]:
        one = np.diff(laws.below_rounded(self.edges), prepend=0.0, append=1.0)
        joint = one
        for _ in range(3):
            joint = np.outer(joint, one).ravel()
        out = []
        for shift, counts in self.counts.items():
            figure, p = laws.chi_square(counts, counts.sum() * joint)
            name = "four of one block" if shift == 0 else "four across two blocks"
            expected = f"{len(joint) - 1} +- {math.sqrt(2 * len(joint)):.0f}"
            out.append(
                Finding(f"chi-square of {len(joint)} cells, {name}", f"{figure:.0f}", expected, p)
            )
        return out
