"""The noise as noise: tails, pairs and independence, at tolerances.ALPHA.

Its moments and distribution are a check of selfcheck.

Keys are fixed, so that a pass is a pass for good; the levels say how surprising a failure would be
for a generator that is right.
"""

from __future__ import annotations

import numpy as np
import pytest
import tolerances
from scipy import stats

from score_kernels import NoiseKey, ops

COUNT = 10_000_000
PAIRS = 1_000_000


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return ops.normal((10, COUNT // 10), NoiseKey(1907, purpose=0)).double().numpy().ravel()


def two_sided(z: float) -> float:
    return 2 * stats.norm.sf(abs(z))


def test_tail_counts(normals: np.ndarray) -> None:
    """Numbers beyond 1 to 5 sigma, each side, against their Poisson (binomial) law."""
    thresholds = (1, 2, 3, 4, 5)
    for threshold in thresholds:
        for side in (normals > threshold, normals < -threshold):
            count = int(side.sum())
            p = stats.binomtest(count, COUNT, stats.norm.sf(threshold)).pvalue
            assert p > tolerances.ALPHA / (2 * len(thresholds)), (threshold, count)
    # The largest of 10^7 is beyond 4.5 but never beyond the contract's 6.77.
    assert 4.5 < np.abs(normals).max() < 6.77


def test_both_coordinates_and_the_radius(normals: np.ndarray) -> None:
    """Box and Muller's pairs: the angle is uniform over the whole circle, r^2 / 2 exponential."""
    pairs = normals.reshape(-1, 2)[:PAIRS]
    angle = np.arctan2(pairs[:, 1], pairs[:, 0]) / (2 * np.pi) + 0.5
    assert stats.kstest(angle, "uniform").pvalue > tolerances.ALPHA / 2
    assert stats.kstest((pairs**2).sum(1) / 2, "expon").pvalue > tolerances.ALPHA / 2


BASE = NoiseKey(77, purpose=2, draw=1000, first_sample=5000)
NEIGHBOURS = {
    "seed": NoiseKey(78, purpose=2, draw=1000, first_sample=5000),
    "sample": BASE.for_samples(5001),
    "draw": BASE.at(1001),
    "purpose": BASE.for_purpose(3),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_streams_are_independent(name: str) -> None:
    """Correlations of 10^6 pairs: of the numbers, their squares, and one element apart."""
    one = ops.normal((1, PAIRS), BASE).double().numpy().ravel()
    other = ops.normal((1, PAIRS), NEIGHBOURS[name]).double().numpy().ravel()
    assert not np.any(one == other)
    checks = {
        "plain": (one, other),
        "squares": (one**2, other**2),
        "ahead": (one[:-1], other[1:]),
        "behind": (one[1:], other[:-1]),
    }
    for what, (a, b) in checks.items():
        z = np.corrcoef(a, b)[0, 1] * np.sqrt(len(a))
        assert two_sided(z) > tolerances.ALPHA / len(checks), (what, z)


def test_elements_of_a_sample_are_independent() -> None:
    z = ops.normal((1, PAIRS), BASE).double().numpy().ravel()
    lags = (1, 2, 3, 4, 5, 8, 64)
    for lag in lags:
        score = np.corrcoef(z[:-lag], z[lag:])[0, 1] * np.sqrt(PAIRS - lag)
        assert two_sided(score) > tolerances.ALPHA / len(lags), (lag, score)


def test_the_batches_of_a_chain_do_not_repeat() -> None:
    """Rows of one batch, over draws: 4 million distinct words, as many as chance allows."""
    words = np.concatenate([ops.words((64, 1024), BASE.at(t)).numpy().ravel() for t in range(64)])
    repeated = len(words) - len(np.unique(words))
    # Birthdays: n^2 / 2^33 pairs of n words agree by chance.
    expected = len(words) ** 2 / 2**33
    assert stats.poisson.sf(repeated, expected) > tolerances.ALPHA
    assert stats.poisson.cdf(repeated, expected) > tolerances.ALPHA


def test_signs_are_fair() -> None:
    signs = ops.rademacher((1, COUNT), BASE).numpy()
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert stats.binomtest(int((signs > 0).sum()), COUNT, 0.5).pvalue > tolerances.ALPHA
