"""Langevin dynamics: plain, annealed over noise levels, and consistently annealed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from score_kernels import checks
from score_kernels.sampling.engine import Phase, run
from score_kernels.sampling.model import Score
from score_kernels.sampling.options import Options

__all__ = ["annealed_langevin", "consistent_annealed", "langevin"]


def langevin(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    *,
    step_size: float | Sequence[float] | Tensor,
    steps: int,
    sigma: float | None = None,
    temperature: float = 1.0,
    noise_scale: float | Sequence[float] | Tensor | None = None,
    precondition: Tensor | None = None,
    noise_first: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """Langevin dynamics, ``x <- x + (step_size/2) score(x) + sqrt(step_size) z``.

    As in Song and Ermon (2019, arXiv 1907.05600). On a Gaussian target of variance v the chain
    settles at the variance ``temperature v / (1 - step_size / (4 v))``.

    Args as in :func:`annealed_langevin`, except:
        score: ``score(x)``, or ``score(x, sigma)`` when sigma is given.
        shape_or_init: the prior is N(0, 1).
        step_size: in squared units of x, above 0; a sequence has one for each step, as stochastic
            gradient Langevin dynamics that decays (Welling and Teh 2011) and schedulers have.
        steps: number of update steps of the whole chain.
        sigma: a noise level passed to the score as ``[B]``, for networks that take one.
        temperature: the noise is scaled by its root, so that the chain samples p^(1 / temperature);
            0 is gradient ascent.
        noise_scale: the factor of z where it is not sqrt(step_size), for samplers of energy-based
            models that take large steps with little noise; one number or one for each step.
        precondition: see there; a tensor here.
    """
    level = math.nan if sigma is None else checks.noise_level("sigma", sigma)
    if precondition is not None:
        checks.instance("precondition", precondition, Tensor, "a tensor")
    steps = checks.count("steps", steps, least=0)
    sizes = checks.one_or_each("step_size", step_size, steps, checks.positive)
    root = math.sqrt(checks.not_negative("temperature", temperature))
    if noise_scale is None:
        scales = [math.sqrt(size) for size in sizes]
    else:
        scales = checks.one_or_each("noise_scale", noise_scale, steps, checks.not_negative)
    # Steps that are all alike are one phase.
    phases = max(len(sizes), len(scales))
    if len(sizes) < phases:
        sizes *= phases
    if len(scales) < phases:
        scales *= phases
    count = steps if phases == 1 else 1
    pairs = zip(sizes, scales, strict=True)
    plan = [Phase(level, 1.0, 0.5 * size, root * scale, count) for size, scale in pairs]
    return run(
        "langevin",
        score,
        shape_or_init,
        plan,
        1.0,
        options,
        precondition=precondition,
        noise_first=noise_first,
    )


def annealed_langevin(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sigmas: Any,
    *,
    steps_per_level: int | Sequence[int],
    step_size: float,
    denoise: bool = True,
    temperature: float = 1.0,
    reference_sigma: float | None = None,
    precondition: Tensor | Callable[[float], Tensor] | None = None,
    noise_first: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """Annealed Langevin dynamics (Algorithm 1 of Song and Ermon 2019, arXiv 1907.05600).

    For each noise level sigma_i, from the largest to the smallest, `steps_per_level` times::

        alpha_i = step_size * sigma_i^2 / sigma_L^2
        x <- x + (alpha_i / 2) score(x, sigma_i) + sqrt(temperature alpha_i) z

    Codes that write ``x + alpha score + sqrt(2 alpha) z``, such as those of NCSN and NCSNv2 for
    images, have half this step_size: their 2e-5 is 4e-5 here.

    Args:
        score: ``score(x, sigma)`` with x the state ``[B, ...]`` and sigma ``[B]`` float32 on x's
            device; returns x's shape in float32, bfloat16 or float16. Called without gradients;
            enable them inside if the score is a gradient. sigma must not be changed in place.
        shape_or_init: ``[B, ...]`` to start from the prior, N(0, sigma_1^2), or the initial state
            itself (float32; float64 runs on the reference backend), which is not changed.
        sigmas: noise levels, strictly decreasing: ``[L]`` tensor or a sequence. The step sizes are
            relative to the last one given: a part of a schedule, ``sigmas[:5]``, has longer steps
            unless reference_sigma is the schedule's own last level.
        steps_per_level: number of update steps at each level, or one number for each level; 0
            leaves a level out.
        step_size: as above, in squared units of x: alpha at the smallest level.
        temperature: of the noise alone; below 1 samples are nearer to the modes.
        reference_sigma: sigma_L of the step sizes; default: the last of sigmas.
        denoise: end with ``x + sigma_L^2 score(x, sigma_L)`` (Song and Ermon 2020, arXiv
            2006.09011).
        precondition: G of at least 0, a part of x's shape: ``x + (alpha/2) G score + sqrt(alpha G)
            z``; or a function that gives it for a noise level, a float. The denoising has none.
        noise_first: add the noise of a step before its score is taken: ``x <- x + sqrt(alpha) z``,
            then ``x <- x + (alpha/2) score(x)``, in one pass where no other option forbids it.
        options: see :class:`score_kernels.sampling.Options`.

    Returns:
        ``x``, or the recorded states; see ``record_every``.

    Raises:
        TypeError: an argument, or what score returns, is of the wrong kind or dtype.
        ValueError: sigmas do not decrease, a number is out of range, score returns another shape
            or device, or cuda_graph is asked for where there is no CUDA kernel.
        RuntimeError: cuda_graph is asked for and score cannot be captured.
    """
    levels = checks.noise_levels(sigmas)
    counts = checks.one_or_each(
        "steps_per_level", steps_per_level, len(levels), partial(checks.count, least=0)
    )
    if not any(counts):
        raise ValueError("steps_per_level: got 0 for every level, expected a step at some level")
    if len(counts) < len(levels):
        counts *= len(levels)
    step_size = checks.positive("step_size", step_size)
    root = math.sqrt(checks.not_negative("temperature", temperature))
    last = levels[-1]
    if reference_sigma is not None:
        last = checks.noise_level("reference_sigma", reference_sigma)
    plan = []
    for sigma, count in zip(levels, counts, strict=True):
        alpha = step_size * (sigma / last) ** 2
        plan.append(Phase(sigma, 1.0, 0.5 * alpha, root * math.sqrt(alpha), count))
    return run(
        "annealed_langevin",
        score,
        shape_or_init,
        plan,
        levels[0],
        options,
        denoise=denoise,
        precondition=precondition,
        noise_first=noise_first,
    )


def consistent_annealed(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sigmas: Any,
    *,
    step_size: float | None = None,
    denoise: bool = True,
    **options: Unpack[Options],
) -> Tensor:
    """Consistent annealed sampling (Jolicoeur-Martineau et al. 2020, arXiv 2009.05475).

    One step a level, with as much noise as brings the state exactly to the next one, with
    ``g = sigma_{i+1} / sigma_i``::

        x <- x + eta sigma_i^2 score(x, sigma_i) + sigma_{i+1} sqrt(1 - ((1 - eta) / g)^2) z

    If x is data plus noise of standard deviation sigma_i and the score is that of a single data
    point, the step leaves noise of exactly sigma_{i+1}. For more steps, use more levels.

    Args as in :func:`annealed_langevin`, except:
        sigmas: at least two levels.
        step_size: twice the paper's epsilon: ``eta = step_size / (2 sigma_L^2)`` at every level.
            For every ratio g of neighbours ``1 - g <= eta <= 1 + g``; a ValueError names the range
            that all levels allow. By default ``eta = 1 - g^2`` at each level, ancestral sampling,
            which any levels allow; for geometric levels that is ``2 sigma_L^2 (1 - g^2)``. On the
            mixture of examples/toy.py from sigma = 50 to 0.05, the first coordinate's Wasserstein
            distance was, at 20, 50 and 200 levels, 0.36, 0.14 and 0.03 by default; with eta =
            ``1 - g``, which adds no noise, 0.21, 0.24 and 0.29; with 1, 1.1 at each.
    """
    levels = checks.noise_levels(sigmas)
    if len(levels) < 2:
        raise ValueError("sigmas: got 1 noise level, expected at least 2")
    ratios = [following / sigma for sigma, following in pairwise(levels)]
    if step_size is None:
        etas = [1 - g * g for g in ratios]
    else:
        step_size = checks.positive("step_size", step_size)
        etas = [step_size / (2 * levels[-1] ** 2)] * len(ratios)
    plan = []
    for sigma, following, g, eta in zip(levels, levels[1:], ratios, etas, strict=False):
        kept = (1 - eta) / g
        inside = 1 - kept * kept
        # At the very ends of the range rounding may leave a hair less than 0.
        if inside < -1e-12:
            low, high = (2 * levels[-1] ** 2 * (1 + sign * min(ratios)) for sign in (-1, 1))
            raise ValueError(
                f"step_size: got {step_size:g}, expected from {low:g} to {high:g} for these "
                "levels, or None, which chooses for each"
            )
        c = following * math.sqrt(max(inside, 0.0))
        plan.append(Phase(sigma, 1.0, eta * sigma**2, c, next_level=(following, 1.0)))
    name = "consistent_annealed"
    return run(name, score, shape_or_init, plan, levels[0], options, denoise=denoise)
