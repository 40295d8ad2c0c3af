"""Noise levels and step sizes, chosen by hand or from the data.

NCSNv2 is Song and Ermon, "Improved Techniques for Training Score-Based Generative Models" (2020,
arXiv 2006.09011). Its technique 1 is `max_pairwise_distance`, 2 `sigma_ratio`, 4 `best_step_size`;
`suggest_schedule` combines them. Step sizes are those of ``x + (alpha/2) score + sqrt(alpha) z``;
the paper's update ``x + alpha score + sqrt(2 alpha) z`` has half of them. Arguments that are of the
wrong kind or out of range raise a TypeError or a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.diffusion.distance import (
    gathered,
    max_pairwise_distance,
    pairwise_distance_bounds,
    samples,
)
from score_kernels.diffusion.sde import linspace

__all__ = [
    "Schedule",
    "best_step_size",
    "edm_sigmas",
    "geometric_sigmas",
    "level_count",
    "level_overlap",
    "max_pairwise_distance",
    "pairwise_distance_bounds",
    "sigma_ratio",
    "suggest_schedule",
    "variance_ratio",
]

# The overlap of a level with itself: 3 standard deviations to either side.
_FULL_OVERLAP = math.erf(3 / math.sqrt(2))
# NCSN's ten levels from 1 to 0.01 (Song and Ermon 2019, arXiv 1907.05600).
_NCSN_RATIO = 10 ** (2 / 9)
# Floating-point operations, N^2 D, for an exact largest distance: enough for MNIST's 60,000 images.
_EXACT_OPERATIONS = 3e12


@dataclass(frozen=True, eq=False)
class Schedule:
    """Settings of `annealed_langevin` and the reasons for them, which it prints.

    Attributes:
        sigmas: ``[L]`` float32, decreasing.
        steps_per_level: T.
        step_size: of ``x + (alpha/2) score + sqrt(alpha) z`` at the smallest level, in squared
            units of the data.
        why: each number and where it comes from, as text of several lines.
    """

    sigmas: Tensor
    steps_per_level: int
    step_size: float
    why: str

    @property
    def network_calls(self) -> int:
        """Network calls for one batch of samples, ``L T``, without a denoising step."""
        return len(self.sigmas) * self.steps_per_level

    def __str__(self) -> str:
        return self.why


def geometric_sigmas(sigma_max: float, sigma_min: float, levels: int) -> Tensor:
    """Noise levels in a geometric progression from sigma_max to sigma_min.

    The schedule of NCSN (Song and Ermon 2019, arXiv 1907.05600), in units of the data: ``[levels]``
    float32, decreasing, computed in float64. One level is allowed with ``sigma_min == sigma_max``.
    """
    levels = checks.count("levels", levels, least=1)
    if levels == 1:
        sigma_min = checks.positive("sigma_min", sigma_min)
        if sigma_min == checks.positive("sigma_max", sigma_max):
            return torch.tensor([sigma_min], dtype=torch.float32, device="cpu")
    sigma_max, sigma_min = checks.ends(sigma_max, sigma_min)
    levels = checks.count("levels", levels, least=2)
    high, low = math.log(sigma_max), math.log(sigma_min)
    return linspace(high, low, levels).exp().float()


def edm_sigmas(
    sigma_max: float = 80.0, sigma_min: float = 0.002, levels: int = 18, rho: float = 7.0
) -> Tensor:
    """Noise levels equally spaced in ``sigma^(1/rho)``, for `probability_flow`.

    ``sigma_i = (sigma_max^(1/rho) + i / (L - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``
    (Karras et al. 2022, arXiv 2206.00364, equation 5), L = levels: ``[L]`` float32, decreasing,
    computed in float64, without the 0 that the paper appends. A rho of 1 makes the steps equal, a
    larger one puts more levels at small noise.
    """
    sigma_max, sigma_min = checks.ends(sigma_max, sigma_min)
    levels = checks.count("levels", levels, least=2)
    rho = checks.positive("rho", rho)
    # In units of sigma_max: with a small rho, sigma^(1/rho) may overflow.
    low = (sigma_min / sigma_max) ** (1 / rho)
    return (sigma_max * linspace(1, low, levels).pow(rho)).float()


def level_overlap(dim: int, ratio: float) -> float:
    """Probability that noise of one level looks like that of the next.

    ``Phi(sqrt(2 D) (ratio - 1) + 3 ratio) - Phi(sqrt(2 D) (ratio - 1) - 3 ratio)``, Phi being the
    standard normal distribution function, D = dim the numbers in a sample, and ratio that of the
    levels, ``sigma_i / sigma_{i+1} >= 1``. The radius of noise of level sigma_i is about
    ``N(sqrt(D) sigma_i, sigma_i^2 / 2)``; this is the probability that it is within three standard
    deviations of the next level's. Technique 2 of Song and Ermon (2020, arXiv 2006.09011).
    """
    dim = checks.count("dim", dim, least=1)
    ratio = checks.number("ratio", ratio)
    if ratio < 1:
        raise ValueError(f"ratio: got {ratio}, expected at least 1")
    # Over the standard normal's upper tails, so that nothing cancels.
    scale, gap = math.sqrt(2 * dim), ratio - 1
    lower, upper = (scale - 3) * gap - 3, (scale + 3) * gap + 3
    if lower > 0:
        return _tail(lower) - _tail(upper)
    return 1 - _tail(upper) - _tail(-lower)


def sigma_ratio(dim: int, overlap: float = 0.5) -> float:
    """The ratio of neighbouring noise levels with the given overlap.

    Solves ``level_overlap(dim, ratio) = overlap`` to 1e-12 of the ratio, for an overlap above 0 and
    below 0.9973, that at ratio 1. The paper takes about 0.5, which in 3072 dimensions (CIFAR-10)
    gives 1.039796. Raises a ValueError for a dim of at most 4, where any two levels overlap by
    0.9973 or more.
    """
    dim = checks.count("dim", dim, least=1)
    overlap = checks.positive("overlap", overlap)
    if dim <= 4:
        raise ValueError(
            f"dim: got {dim}, expected at least 5: in {dim} dimensions the overlap is from "
            f"{_FULL_OVERLAP:.4f} to 1 at any ratio; NCSN's published levels have {_NCSN_RATIO:.3f}"
        )
    if overlap >= _FULL_OVERLAP:
        raise ValueError(
            f"overlap: got {overlap}, expected above 0 and below {_FULL_OVERLAP:.4f}, the overlap "
            "at ratio 1"
        )
    # From ratio 1 on the overlap rises at first, then falls to 0: it falls below a value that is
    # less than that of ratio 1 exactly once.
    start = 1 / math.sqrt(2 * dim)
    return 1 + _first(lambda gap: level_overlap(dim, 1 + gap) < overlap, start)


def level_count(sigma_max: float, sigma_min: float, ratio: float) -> int:
    """Number of geometric levels whose ratio is nearest to `ratio`.

    ``1 + round(log(sigma_max / sigma_min) / log(ratio))``, at least 2. From 50 to 0.01 with the
    ratio of overlap 0.5 in 3072 dimensions: 219.
    """
    sigma_max, sigma_min = checks.ends(sigma_max, sigma_min)
    ratio = _above_one(ratio)
    return 1 + max(1, round((math.log(sigma_max) - math.log(sigma_min)) / math.log(ratio)))


def variance_ratio(step_size: float, ratio: float, sigma_min: float, steps_per_level: int) -> float:
    """Variance of a chain after a noise level, divided by sigma_i^2.

    ``r = (1 - eta)^(2 T) (ratio^2 - f) + f``, ``f = 2 / (2 - eta)``, ``eta = step_size /
    (2 sigma_min^2)``, at every level and above 1: the chain comes from the level above with the
    variance ``ratio^2 sigma_i^2`` and does T = steps_per_level steps towards a single data point.
    The step_size, twice the paper's epsilon, is that of the smallest level, sigma_min, and below
    ``4 sigma_min^2``. Proposition behind technique 4 of Song and Ermon (2020, arXiv 2006.09011).
    """
    step_size = checks.positive("step_size", step_size)
    ratio = _above_one(ratio)
    sigma_min = checks.positive("sigma_min", sigma_min)
    steps = checks.count("steps_per_level", steps_per_level, least=1)
    eta = step_size / sigma_min / sigma_min / 2
    if eta >= 2:
        raise ValueError(
            f"step_size: got {step_size}, expected less than 4 sigma_min^2 = {4 * sigma_min**2}: "
            "with longer steps a chain diverges"
        )
    # As 1 + (1 - eta)^(2 T) (ratio^2 - 1) + (1 - (1 - eta)^(2 T)) eta / (2 - eta), all above 0.
    log_kept = -math.inf if eta == 1 else 2 * steps * math.log1p(-eta if eta < 1 else eta - 2)
    excess = (ratio - 1) * (ratio + 1)
    return 1 + math.exp(log_kept) * excess - math.expm1(log_kept) * eta / (2 - eta)


def best_step_size(ratio: float, sigma_min: float, steps_per_level: int) -> float:
    """The step size whose `variance_ratio` is closest to 1.

    Minimises ``|r - 1|`` over ``0 < eta < 1``, with r the `variance_ratio` at ``step_size =
    2 eta sigma_min^2``, to float64 rounding: technique 4. Returns the step size of the smallest
    level, in squared units of the data; at level i it is ``step_size sigma_i^2 / sigma_min^2``. For
    CIFAR-10's published levels, 232 from 50 to 0.01 with 5 steps at each, it is 1.24e-5, r being
    1.0555; the paper's epsilon, half of it, is published as 6.2e-6.
    """
    ratio = _above_one(ratio)
    sigma_min = checks.noise_level("sigma_min", sigma_min)
    k = 2 * checks.count("steps_per_level", steps_per_level, least=1)
    excess = k * (ratio - 1) * (ratio + 1)

    # The sign of dr / d eta. With eta = 1 - exp(-t) it is that of
    #   -k (ratio^2 - 1) + k eta / (2 - eta) + 2 exp(-t) (exp(k t) - 1) / (2 - eta)^2,
    # which rises with t: r has one minimum. In t, 1 - eta is precise however small it is.
    def rises(t: float) -> bool:
        if k * t > 700:
            return True
        eta = -math.expm1(-t)
        shrunk = 2 * math.exp(-t) * math.expm1(k * t) / (2 - eta) ** 2
        return k * eta / (2 - eta) + shrunk > excess

    eta = -math.expm1(-_first(rises, 1 / k))
    return 2 * eta * sigma_min * sigma_min


def suggest_schedule(
    data: Any,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    levels: int | None = None,
    overlap: float = 0.5,
    steps_per_level: int | None = None,
    network_calls: int | None = None,
    progress: bool = False,
) -> Schedule:
    """Noise levels and a step size for data, by NCSNv2's techniques.

    ``print(suggest_schedule(data))`` says what was chosen and why. The techniques are rules of
    thumb for images (Song and Ermon 2020, arXiv 2006.09011).

    Args:
        data: ``[N, ...]`` or a dataset, as in `max_pairwise_distance`: the training data or a good
            part of it, scaled as the network sees it.
        sigma_min: default: a hundredth of the data's range, the largest difference of two samples
            in any of their numbers: 0.01 for images in [0, 1].
        sigma_max: default: technique 1, the largest distance between two samples where that takes
            at most 3e12 operations, ``N^2 D``, or else the upper one of `pairwise_distance_bounds`:
            a level too large costs a few more levels, one too small can cut off some of the data.
        levels: the number L of geometric levels; default: technique 2, `sigma_ratio`, with a ratio
            of at most 10^(2/9) = 1.668 as in NCSN's published levels.
        overlap: of neighbouring levels, where levels is not given.
        steps_per_level: default: 5, as in NCSNv2. The step size is technique 4's `best_step_size`.
        network_calls: instead of steps_per_level, how many calls of the network a batch of samples
            may cost: ``T = max(1, network_calls // L)``.
        progress: show progress bars.

    Raises:
        TypeError, ValueError: as in `max_pairwise_distance`; all samples are equal; both
            steps_per_level and network_calls are given; a number is out of range.
    """
    steps, why_steps = 5, "as in NCSNv2 for CIFAR-10"
    if steps_per_level is not None:
        steps = checks.count("steps_per_level", steps_per_level, least=1)
        why_steps = "given"
    if network_calls is not None:
        network_calls = checks.count("network_calls", network_calls, least=1)
        if steps_per_level is not None:
            raise ValueError(
                f"network_calls: got {network_calls} beside steps_per_level = {steps_per_level}, "
                "expected one of the two"
            )
    overlap = checks.positive("overlap", overlap)
    data = gathered(data)
    rows, least, largest = samples(data)
    count, dim = rows.shape
    data_range = (largest - least).max().item()
    if data_range == 0:
        raise ValueError(f"data: got {count} equal samples, expected data that differ")
    why_low = why_high = why_levels = "given"
    if sigma_min is None:
        sigma_min, why_low = 0.01 * data_range, f"1/100 of the range of the data, {data_range:.6g}"
    if sigma_max is None and count**2 * dim <= _EXACT_OPERATIONS:
        sigma_max = max_pairwise_distance(data, progress=progress)
        why_high = "technique 1: the largest distance between two samples, exact"
    elif sigma_max is None:
        lower, sigma_max = pairwise_distance_bounds(data, progress=progress)
        why_high = f"technique 1: the largest distance is from {lower:.6g} to {sigma_max:.6g}"
    high, low = checks.ends(sigma_max, sigma_min)
    log_range = math.log(high) - math.log(low)
    if levels is None:
        asked = math.inf if dim <= 4 else sigma_ratio(dim, overlap)
        why_levels = f"technique 2 asks for {asked:.6g}"
        if asked > _NCSN_RATIO:
            why_levels = f"at most {_NCSN_RATIO:.4g} as in NCSN"
        levels = level_count(high, low, min(asked, _NCSN_RATIO))
        # The nearest number of levels may be one short of the limit.
        if log_range / (levels - 1) > math.log(_NCSN_RATIO) + 1e-9:
            levels += 1
    levels = checks.count("levels", levels, least=2)
    ratio = math.exp(log_range / (levels - 1))
    if network_calls is not None:
        steps = max(1, network_calls // levels)
        why_steps = f"{network_calls} network calls given, for {levels} levels"
        if network_calls < levels:
            why_steps += "; 1 each costs more"
    step_size = best_step_size(ratio, low, steps)
    overlap, left = level_overlap(dim, ratio), variance_ratio(step_size, ratio, low, steps)
    neighbours = f"neighbours overlap by {overlap:.3g} in {dim} dimensions"
    if overlap < 0.01:
        neighbours += f": too little, take some {level_count(high, low, sigma_ratio(dim))} levels"
    table = [
        ("sigma_max", f"{high:.6g}", why_high),
        ("sigma_min", f"{low:.6g}", why_low),
        ("levels", f"{levels}", f"geometric, ratio {ratio:.6g}; {why_levels}"),
        ("", "", neighbours),
        ("steps_per_level", f"{steps}", why_steps),
        ("step_size", f"{step_size:.6g}", "technique 4, for x + (alpha/2) score + sqrt(alpha) z"),
        ("", "", f"levels end with {left:.4g} times the variance of their noise"),
        ("", "", f"{step_size / 2:.6g} for x + alpha score + sqrt(2 alpha) z"),
        ("network calls", f"{levels * steps}", "levels x steps_per_level for a batch of samples"),
    ]
    shape = " x ".join(map(str, data.shape[1:])) or "1"
    why = f"""\
Annealed Langevin dynamics for {count} samples of {shape} numbers.
Sigmas are in units of the data. Techniques 1, 2 and 4 are those of NCSNv2
(Song and Ermon 2020, arXiv 2006.09011).
"""
    for row in table:
        why += "\n{:<16}{:<13}{}".format(*row)
    return Schedule(geometric_sigmas(high, low, levels), steps, step_size, why)


def _above_one(ratio: float) -> float:
    ratio = checks.number("ratio", ratio)
    if ratio <= 1:
        raise ValueError(f"ratio: got {ratio}, expected above 1")
    return ratio


def _tail(x: float) -> float:
    """Probability that a standard normal is above x."""
    return math.erfc(x / math.sqrt(2)) / 2


def _first(holds: Callable[[float], bool], start: float) -> float:
    """The least positive number from which on a condition holds, by bisection to float64."""
    high = start
    while not holds(high):
        high *= 2
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
