"""Noise levels and step sizes: by hand, or chosen from the data by the techniques of NCSNv2.

The techniques are those of Song and Ermon, "Improved Techniques for Training Score-Based Generative
Models" (2020, arXiv 2006.09011), NCSNv2 for short: technique 1 is `max_pairwise_distance`, 2 is
`sigma_ratio`, 4 is `best_step_size`; `suggest_schedule` puts them together.

Step sizes are of form A, ``x <- x + (alpha/2) score + sqrt(alpha) z``, everywhere. The paper writes
form B, ``x <- x + alpha score + sqrt(2 alpha) z``: its epsilon is half our `step_size`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.diffusion.distance import Cloud, max_pairwise_distance, pairwise_distance_bounds

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

# Of neighbouring levels: beyond it squares would overflow.
_LARGEST_RATIO = 1e50
# The overlap of a level with itself: 3 standard deviations to either side.
_FULL_OVERLAP = math.erf(3 / math.sqrt(2))
# NCSN's ten levels from 1 to 0.01 (Song and Ermon 2019, arXiv 1907.05600).
_NCSN_RATIO = 10 ** (2 / 9)
# Largest distances that cost no more floating-point operations than this are computed exactly.
_EXACT_OPERATIONS = 1e12


@dataclass(frozen=True, eq=False)
class Schedule:
    """Settings of `annealed_langevin`, and why they are what they are; prints as the latter.

    Attributes:
        sigmas: ``[L]`` float32, decreasing.
        steps_per_level: T, update steps at each level.
        step_size: epsilon of form A, in squared units of the data at the smallest level.
        why: each number and where it comes from, as text of several lines.
    """

    sigmas: Tensor
    steps_per_level: int
    step_size: float
    why: str

    @property
    def network_calls(self) -> int:
        """Calls of the network for one batch of samples, ``L T``, without a denoising step."""
        return len(self.sigmas) * self.steps_per_level

    def __str__(self) -> str:
        return self.why


def geometric_sigmas(sigma_max: float, sigma_min: float, levels: int) -> Tensor:
    """Noise levels in a geometric progression, ``sigma_1 = sigma_max > ... > sigma_L = sigma_min``.

    The schedule of NCSN (Song and Ermon 2019, arXiv 1907.05600). Computed in float64.

    Args:
        sigma_max: standard deviation of the largest noise, in units of the data.
        sigma_min: of the smallest, ``0 < sigma_min < sigma_max``.
        levels: their number L, at least 2 (or 1 with ``sigma_min == sigma_max``).

    Returns:
        ``[L]`` float32, decreasing.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    levels = checks.count("levels", levels, least=1)
    if levels == 1:
        if sigma_min != sigma_max:
            raise ValueError(
                f"levels: got 1 with sigma_max = {sigma_max} and sigma_min = "
                f"{sigma_min}, expected at least 2 levels between different sigmas"
            )
        return torch.tensor([checks.positive("sigma_max", sigma_max)])
    sigma_max, sigma_min = checks.ends(sigma_max, sigma_min)
    logs = torch.linspace(math.log(sigma_max), math.log(sigma_min), levels, dtype=torch.float64)
    return logs.exp().float()


def edm_sigmas(
    sigma_max: float = 80.0, sigma_min: float = 0.002, levels: int = 18, rho: float = 7.0
) -> Tensor:
    """Noise levels equally spaced in ``sigma^(1/rho)``.

    ``sigma_i = (sigma_max^(1/rho) + i / (L - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho``, for
    `probability_flow` (Karras et al. 2022, arXiv 2206.00364, equation 5). Computed in float64.

    Args:
        sigma_max, sigma_min: the ends, ``0 < sigma_min < sigma_max``, in units of the data.
        levels: their number L, at least 2; the 0 that the paper appends is left to the sampler.
        rho: 1 for equal steps; larger ones put more levels at small noise.

    Returns:
        ``[L]`` float32, decreasing.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    sigma_max, sigma_min = checks.ends(sigma_max, sigma_min)
    levels = checks.count("levels", levels, least=2)
    rho = checks.positive("rho", rho)
    # In units of sigma_max: sigma^(1/rho) of a small rho may leave the range of numbers.
    low = (sigma_min / sigma_max) ** (1 / rho)
    return (sigma_max * torch.linspace(1, low, levels, dtype=torch.float64).pow(rho)).float()


def level_overlap(dim: int, ratio: float) -> float:
    """How much of one noise level's samples lies where the next level's do, in [0, 1].

    ``Phi(sqrt(2 D) (ratio - 1) + 3 ratio) - Phi(sqrt(2 D) (ratio - 1) - 3 ratio)`` with Phi the
    standard normal distribution function: in D dimensions the radius of noise of standard deviation
    sigma_i is close to ``N(sqrt(D) sigma_i, sigma_i^2 / 2)``, and this is the probability that the
    larger level's radius is within three deviations of the smaller one's. Technique 2 of Song and
    Ermon (2020, arXiv 2006.09011).

    Args:
        dim: D, numbers in a sample.
        ratio: of neighbouring levels, ``sigma_i / sigma_{i+1} >= 1``.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    dim = checks.count("dim", dim, least=1)
    ratio = checks.number("ratio", ratio)
    if ratio < 1:
        raise ValueError(f"ratio: got {ratio}, expected at least 1")
    return _overlap(dim, ratio - 1)


def sigma_ratio(dim: int, overlap: float = 0.5) -> float:
    """The ratio of neighbouring noise levels that makes them overlap as much as asked for.

    Solves ``level_overlap(dim, ratio) = overlap`` to 1e-12 of the ratio. Technique 2 of Song and
    Ermon (2020, arXiv 2006.09011), who take about 0.5. In 3072 dimensions (CIFAR-10) 0.5 gives
    1.039796.

    Args:
        dim: D, numbers in a sample, at least 5.
        overlap: above 0 and below 0.9973, which is the overlap at ratio 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, or dim is at most
            4: there any two levels overlap by 0.9973 or more, so that this sets no limit.
    """
    dim = checks.count("dim", dim, least=1)
    overlap = checks.positive("overlap", overlap)
    if dim <= 4:
        raise ValueError(
            f"dim: got {dim} with overlap = {overlap}, expected at least 5: in {dim} dimensions "
            f"the overlap is from {_FULL_OVERLAP:.4f} to 1 at any ratio, so that it sets no limit; "
            f"choose a ratio yourself, {_NCSN_RATIO:.3f} is that of NCSN's published levels"
        )
    if overlap >= _FULL_OVERLAP:
        raise ValueError(
            f"overlap: got {overlap}, expected above 0 and below {_FULL_OVERLAP:.4f}, that of "
            "levels at ratio 1; a smaller overlap means fewer levels"
        )
    # With g = ratio - 1 and s = sqrt(2 D) > 3, the overlap is Phi(a) - Phi(b), a = (s + 3) g + 3,
    # b = (s - 3) g - 3. Its derivative (s + 3) phi(a) - (s - 3) phi(b) is negative where
    # (s - 3) / (s + 3) exp(6 s g (1 + g)) > 1: it changes sign once, from rising to falling. The
    # overlap rises from that of ratio 1, which is above the one asked for, and falls to 0:
    # it crosses the one asked for exactly once.
    return 1 + _crossing(lambda g: _overlap(dim, g) < overlap, 1 / math.sqrt(2 * dim))


def level_count(sigma_max: float, sigma_min: float, ratio: float) -> int:
    """Number of geometric levels from sigma_max to sigma_min whose ratio is nearest to `ratio`.

    ``1 + round(log(sigma_max / sigma_min) / log(ratio))``, at least 2. From 50 to 0.01 with the
    ratio of overlap 0.5 in 3072 dimensions: 219.

    Args:
        sigma_max, sigma_min: the ends, ``0 < sigma_min < sigma_max``.
        ratio: of neighbouring levels, above 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    sigma_max, sigma_min = checks.ends(sigma_max, sigma_min)
    ratio = _above_one(ratio)
    return 1 + max(1, round((math.log(sigma_max) - math.log(sigma_min)) / math.log(ratio)))


def variance_ratio(step_size: float, ratio: float, sigma_min: float, steps_per_level: int) -> float:
    """Variance of a chain at the end of a noise level over what it should be there, sigma_i^2.

    ``r = (1 - eta)^(2 T) (ratio^2 - f) + f``, ``f = 2 / (2 - eta)``, ``eta = step_size /
    (2 sigma_min^2)``: the chain comes from the level above with the variance ``ratio^2 sigma_i^2``
    and does T steps towards a single data point. r does not depend on the level, and is above 1:
    ``r - 1 = (1 - eta)^(2 T) (ratio^2 - 1) + (1 - (1 - eta)^(2 T)) eta / (2 - eta)``. Proposition
    behind technique 4 of Song and Ermon (2020, arXiv 2006.09011), whose epsilon is step_size / 2.

    Args:
        step_size: epsilon of form A (see `annealed_langevin`), below ``4 sigma_min^2``.
        ratio: of neighbouring levels, above 1.
        sigma_min: the smallest level.
        steps_per_level: T.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
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
    log_kept = -math.inf if eta == 1 else 2 * steps * math.log1p(-eta if eta < 1 else eta - 2)
    excess = (ratio - 1) * (ratio + 1)
    return 1 + math.exp(log_kept) * excess - math.expm1(log_kept) * eta / (2 - eta)


def best_step_size(ratio: float, sigma_min: float, steps_per_level: int) -> float:
    """The step size that brings the variance at the end of each level closest to what it should be.

    Where ``|r - 1|`` is least over ``0 < eta < 1``, with r the `variance_ratio` at ``step_size =
    2 eta sigma_min^2``; there is one such minimum, and it is found to float64 rounding. Technique 4
    of Song and Ermon (2020, arXiv 2006.09011).

    Form A: ``x + (alpha/2) score + sqrt(alpha) z``, ``alpha_i = step_size sigma_i^2 / sigma_L^2``.
    The paper's epsilon (form B) is half of it. CIFAR-10's published levels, 232 from 50 to 0.01,
    with T = 5: 1.24e-5 here, 6.18e-6 in form B (published 6.2e-6), where r is 1.0555.

    Args:
        ratio: of neighbouring levels, above 1.
        sigma_min: the smallest level.
        steps_per_level: T.

    Returns:
        The step size of form A, in squared units of the data.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    ratio = _above_one(ratio)
    sigma_min = checks.positive("sigma_min", sigma_min)
    steps = checks.count("steps_per_level", steps_per_level, least=1)
    k = 2 * steps
    excess = k * (ratio - 1) * (ratio + 1)

    # (r - 1)' / (1 - eta)^(k - 1), with eta = 1 - exp(-t), is
    #   -k (ratio^2 - 1) + k eta / (2 - eta) + 2 exp(-t) (exp(k t) - 1) / (2 - eta)^2.
    # All but the first term rise with t, from 0 and without bound: r - 1 has one minimum. Counting
    # in t keeps 1 - eta precise, however close to 0 it is.
    def rises(t: float) -> bool:
        if k * t > 700:
            return True
        eta = -math.expm1(-t)
        shrunk = 2 * math.exp(-t) * math.expm1(k * t) / (2 - eta) ** 2
        return k * eta / (2 - eta) + shrunk > excess

    eta = -math.expm1(-_crossing(rises, 1 / k))
    step_size = 2 * eta * sigma_min * sigma_min
    if not 0 < step_size < math.inf:
        raise ValueError(
            f"sigma_min: got {sigma_min}, expected one whose square is within float64's range"
        )
    return step_size


def suggest_schedule(
    data: Tensor,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    levels: int | None = None,
    overlap: float = 0.5,
    steps_per_level: int | None = None,
    network_calls: int | None = None,
    progress: bool = False,
) -> Schedule:
    """Noise levels and a step size for some data, by the techniques of NCSNv2.

    ``print(suggest_schedule(data))`` says what was chosen and why. The techniques are rules of
    thumb for images (Song and Ermon 2020, arXiv 2006.09011): a place to start from.

    - sigma_max: the largest distance between two samples (technique 1), exact where this takes at
      most 1e12 operations, counted with the pairs that norms rule out left out. Otherwise a proven
      upper bound, `pairwise_distance_bounds`: too large a level costs a few more levels, too small
      a one can cut chains off from some of the data.
    - sigma_min: a hundredth of the data's range, which is the largest difference of two samples in
      any of their numbers: 0.01 for images in [0, 1].
    - levels: geometric, their number from `sigma_ratio` (technique 2), but never farther apart than
      NCSN's published levels, 10^(2/9) = 1.668; in up to 4 dimensions technique 2 sets no limit and
      that ratio is taken.
    - step_size: `best_step_size` (technique 4) for these levels.

    Args:
        data: ``[N, ...]`` as in `max_pairwise_distance`: the training data or a good part of it,
            scaled as the network sees it.
        sigma_min, sigma_max: the ends of the levels in units of the data, to choose them yourself.
        levels: their number L, at least 2, to choose it yourself; overlap is then not used.
        overlap: of neighbouring levels; see `sigma_ratio`.
        steps_per_level: T; default 5, as in NCSNv2.
        network_calls: instead of steps_per_level, how many calls of the network a batch of samples
            may cost: ``T = max(1, network_calls // L)``.
        progress: show progress bars.

    Raises:
        TypeError, ValueError: as in `max_pairwise_distance`; all samples are equal; both
            steps_per_level and network_calls are given; a number is out of range.
    """
    if steps_per_level is not None and network_calls is not None:
        raise ValueError(
            f"network_calls: got {network_calls} beside steps_per_level = {steps_per_level}, "
            "expected one of the two"
        )
    calls = None if network_calls is None else checks.count("network_calls", network_calls, least=1)
    steps = 5 if steps_per_level is None else steps_per_level
    steps = checks.count("steps_per_level", steps, least=1)
    cloud = Cloud(data)
    if cloud.spread == 0:
        raise ValueError(
            f"data: got {len(data)} equal samples, expected data that differ: a model of a "
            "constant needs no noise levels"
        )
    low, why_low = _smallest_level(sigma_min, cloud)
    high, why_high = _largest_level(sigma_max, cloud, progress)
    if not low < high:
        raise ValueError(
            f"sigma_max: got {high:g}, expected more than sigma_min = {low:g} ({why_low})"
        )
    if levels is None:
        overlap = checks.positive("overlap", overlap)
        levels, why_levels = _spacing(high, low, cloud.dim, overlap)
    else:
        levels = checks.count("levels", levels, least=2)
        why_levels = "Their number is given"
        ratio = _realised(high, low, levels)
        if ratio > _LARGEST_RATIO:
            raise ValueError(
                f"levels: got {levels} from {high:g} to {low:g}, expected so many that neighbours "
                f"differ by a factor of at most {_LARGEST_RATIO:g}"
            )
        if cloud.dim > 4:
            shared = level_overlap(cloud.dim, ratio)
            why_levels += f"; by technique 2 neighbours overlap by {shared:.3g}"
    ratio = _realised(high, low, levels)
    if calls is None:
        why_steps = "as in NCSNv2 for CIFAR-10" if steps_per_level is None else "given"
    else:
        steps = max(1, calls // levels)
        why_steps = f"{calls} network calls given, for {levels} levels"
        if calls < levels:
            why_steps += "; one step a level is the least, and costs more"
    step_size = best_step_size(ratio, low, steps)
    left = variance_ratio(step_size, ratio, low, steps)
    shape = " x ".join(map(str, data.shape[1:])) or "1"
    rows = (
        ("sigma_max", f"{high:.6g}", why_high),
        ("sigma_min", f"{low:.6g}", why_low),
        ("levels", f"{levels}", f"geometric, each {ratio:.6g} times the next. {why_levels}"),
        ("steps_per_level", f"{steps}", why_steps),
        (
            "step_size",
            f"{step_size:.6g}",
            "technique 4: leaves each level with a variance as close as can be to that of its "
            f"noise, {left:.4g} times it. In squared units of the data, for x + (alpha/2) score + "
            "sqrt(alpha) z; codes that write x + alpha score + sqrt(2 alpha) z take half of it, "
            f"{step_size / 2:.6g}",
        ),
        (
            "network calls",
            f"{levels * steps}",
            "levels x steps_per_level for each batch of samples; one more with a denoising step "
            "at the end",
        ),
    )
    why = "\n".join(
        [
            f"Annealed Langevin dynamics for {len(data)} samples of {shape} numbers.",
            "Sigmas are in units of the data. Techniques 1, 2 and 4 are those of NCSNv2",
            "(Song and Ermon 2020, arXiv 2006.09011).",
            "",
            *(_row(*row) for row in rows),
        ]
    )
    return Schedule(geometric_sigmas(high, low, levels), steps, step_size, why)


def _smallest_level(given: float | None, cloud: Cloud) -> tuple[float, str]:
    if given is not None:
        return checks.positive("sigma_min", given), "given"
    return 0.01 * cloud.spread, f"1/100 of the range of the data, {cloud.spread:.6g}"


def _largest_level(given: float | None, cloud: Cloud, progress: bool) -> tuple[float, str]:
    if given is not None:
        return checks.positive("sigma_max", given), "given"
    low, high = cloud.within(_EXACT_OPERATIONS, progress)
    if low == high:
        return high, "technique 1: the largest distance between two samples, exact"
    return high, (
        "technique 1, from above: the largest distance between two samples is from "
        f"{low:.6g} to {high:.6g}. Give sigma_max = max_pairwise_distance(data) for the exact one, "
        "which would take long here"
    )


def _spacing(high: float, low: float, dim: int, overlap: float) -> tuple[int, str]:
    """Number of levels by technique 2, and why."""
    published = f"{_NCSN_RATIO:.4g} as in NCSN (Song and Ermon 2019, arXiv 1907.05600)"
    if dim <= 4:
        ratio = _NCSN_RATIO
        why = (
            f"At most {published}: technique 2 sets no limit in {dim} dimensions, where any two "
            f"levels overlap by {_FULL_OVERLAP:.4f} or more"
        )
    else:
        ratio = sigma_ratio(dim, overlap)
        why = f"Technique 2: overlap {overlap:g} in {dim} dimensions asks for {ratio:.6g}"
        if ratio > _NCSN_RATIO:
            why = f"At most {published}: technique 2 would allow {ratio:.4g} in {dim} dimensions"
            ratio = _NCSN_RATIO
    levels = level_count(high, low, ratio)
    # The nearest number of levels may be one short of the limit.
    if _realised(high, low, levels) > _NCSN_RATIO * (1 + 1e-9):
        levels += 1
    return levels, why


def _realised(sigma_max: float, sigma_min: float, levels: int) -> float:
    return math.exp((math.log(sigma_max) - math.log(sigma_min)) / (levels - 1))


def _row(name: str, value: str, reason: str) -> str:
    head = f"{name:<16}{value:<13}"
    return textwrap.fill(reason, 90, initial_indent=head, subsequent_indent=" " * len(head))


def _above_one(ratio: float) -> float:
    ratio = checks.number("ratio", ratio)
    if not 1 < ratio <= _LARGEST_RATIO:
        raise ValueError(f"ratio: got {ratio}, expected above 1 and at most {_LARGEST_RATIO:g}")
    return ratio


def _overlap(dim: int, g: float) -> float:
    """`level_overlap` at the ratio ``1 + g``."""
    scale = math.sqrt(2 * dim)
    a, b = (scale + 3) * g + 3, (scale - 3) * g - 3
    # By the tails, so that nothing cancels: a >= 3, and where b is positive both are upper ones.
    if b > 0:
        return _tail(b) - _tail(a)
    return 1 - _tail(a) - _tail(-b)


def _tail(x: float) -> float:
    """Probability that a standard normal is above x."""
    return math.erfc(x / math.sqrt(2)) / 2


def _crossing(beyond: Callable[[float], bool], start: float) -> float:
    """Where a condition that holds from some positive number on begins to, to float64."""
    high = start
    while not beyond(high):
        high *= 2
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
