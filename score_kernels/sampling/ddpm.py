"""DDPM and DDIM, in the data's own scale.

A chain of DDPM holds ``x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) z``; here it is run as ``y = x_i /
sqrt(abar_i)``, data plus noise of ``sigma_i = sqrt((1 - abar_i) / abar_i)``, which is what a score
sees. In y every step of DDPM and DDIM is ``y <- y + b score(y, sigma) + c z``, of the noise levels
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from score_kernels import checks
from score_kernels.diffusion.sde import DDPMSchedule, levels_of, linspace
from score_kernels.sampling.engine import Phase, run
from score_kernels.sampling.model import Score
from score_kernels.sampling.options import Options

__all__ = ["ddim", "ddpm"]


def ddpm(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    schedule: Any,
    *,
    timesteps: Sequence[int] | Tensor | None = None,
    variance: str = "small",
    **options: Unpack[Options],
) -> Tensor:
    """Ancestral DDPM (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    In DDPM's scale ``x <- (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + sqrt(v) z``, v the
    posterior's variance ("small") or beta ("large"), and no noise in the last step; in y::

        y <- y + (sigma_i^2 - sigma_{i-1}^2) score(y, sigma_i) + c z

    with ``c = sigma_{i-1} sqrt(1 - sigma_{i-1}^2 / sigma_i^2)``, or ``sqrt(beta_i / abar_{i-1})``.

    Args as in :func:`annealed_langevin`, except:
        score: ``score(y, sigma)``; of a network that predicts noise, see `as_score`.
        shape_or_init: the prior is ``N(0, 1)`` in x; a state, or the recorded ones, are y.
        schedule: a :class:`score_kernels.diffusion.sde.DDPMSchedule`, or noise levels, strictly
            decreasing, with ``abar = 1 / (1 + sigma^2)``.
        timesteps: the levels to run over, strictly decreasing integers from N - 1 to 0, the
            smallest level's: ``range(999, -1, -10)``; default: all. The chain takes each to the
            next one of them, with ``beta_i = 1 - abar_i / abar_{i-1}``, and the last to no noise.
        variance: "small" or "large".
    """
    levels = levels_of(schedule, "schedule")
    if timesteps is not None:
        levels = _levels_at(levels, timesteps)
    checks.choice("variance", variance, ("small", "large"))
    plan = _plan(levels, 1.0, variance)
    return run("ddpm", score, shape_or_init, plan, _prior(plan), options)


def ddim(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    schedule: Any,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    eta: float = 0.0,
    **options: Unpack[Options],
) -> Tensor:
    """DDIM (Song, Meng and Ermon 2021, arXiv 2010.02502) over some timesteps.

    From sigma to sigma' with ``c = eta sigma' sqrt(1 - sigma'^2 / sigma^2)``::

        y <- y + (sigma^2 - sigma sqrt(sigma'^2 - c^2)) score(y, sigma) + c z

    ``eta = 0`` draws no noise but the start's and is Euler's method on the probability flow in
    sigma; ``eta = 1`` over all levels is :func:`ddpm`.

    Args as in :func:`ddpm`, and:
        steps: how many of the N levels, spaced evenly over their indices; the last is level 0.
            Default: 50 of a schedule, or all if it has fewer; all of given noise levels.
        timesteps: which ones, as in :func:`ddpm`, in the place of steps.
        eta: 0 to 1.
    """
    levels = levels_of(schedule, "schedule")
    if timesteps is not None:
        if steps is not None:
            raise ValueError(f"timesteps: got them beside steps = {steps}, expected one of the two")
        levels = _levels_at(levels, timesteps)
    else:
        most = len(levels)
        if steps is None:
            steps = min(50, most) if isinstance(schedule, DDPMSchedule) else most
        if checks.count("steps", steps, least=1) > most:
            raise ValueError(f"steps: got {steps}, expected at most the number of levels, {most}")
        levels = _levels_at(levels, linspace(most - 1, 0, steps).round().long())
    eta = checks.not_negative("eta", eta)
    if eta > 1:
        raise ValueError(f"eta: got {eta}, expected a number from 0 to 1")
    plan = _plan(levels, eta)
    return run("ddim", score, shape_or_init, plan, _prior(plan), options)


def _levels_at(levels: list[float], timesteps: Any) -> list[float]:
    """The levels at strictly decreasing timesteps, 0 that of the smallest, which is the last."""
    if isinstance(timesteps, (Tensor, np.ndarray)) and timesteps.ndim == 1:
        timesteps = timesteps.tolist()
    expected = f"strictly decreasing integers from {len(levels) - 1} to 0"
    if isinstance(timesteps, str):
        raise TypeError(f"timesteps: got {timesteps!r}, expected {expected}")
    checks.instance("timesteps", timesteps, Sequence, expected)
    chosen = [checks.count(f"timesteps[{i}]", t, least=0) for i, t in enumerate(timesteps)]
    if not chosen:
        raise ValueError(f"timesteps: got none, expected {expected}")
    for i, (before, after) in enumerate(pairwise([len(levels), *chosen])):
        if after >= before:
            got = f"timesteps[{i}] = {after}" + (f" after {before}" if i else "")
            raise ValueError(f"timesteps: got {got}, expected {expected}")
    return [levels[-1 - t] for t in chosen]


def _plan(levels: list[float], eta: float, variance: str = "small") -> list[Phase]:
    """From each level to the next, and from the last to no noise."""
    plan = []
    for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
        c = eta * following * math.sqrt(1 - (following / sigma) ** 2)
        b = sigma**2 - sigma * math.sqrt(following**2 - c**2)
        if variance == "large" and following:
            # (1 - abar / abar') / abar' with 1 / abar = 1 + sigma^2.
            c = math.sqrt((sigma**2 - following**2) * (1 + following**2) / (1 + sigma**2))
        plan.append(Phase(sigma, 1.0, b, c, next_level=(following, 1.0)))
    return plan


def _prior(plan: list[Phase]) -> float:
    """Deviation of y where x is standard normal: 1 / sqrt(abar) = sqrt(1 + sigma^2)."""
    return math.sqrt(1 + plan[0].sigma ** 2)
