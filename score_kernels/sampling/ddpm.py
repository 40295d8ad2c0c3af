"""DDPM and DDIM, in the data's own scale.

A chain of DDPM holds ``x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) z``; here it is run as ``y = x_i /
sqrt(abar_i)``, data plus noise of ``sigma_i = sqrt((1 - abar_i) / abar_i)``, which is what a score
sees. In y every step of DDPM and DDIM is ``y <- y + b score(y, sigma) + c z``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from score_kernels import checks
from score_kernels.diffusion.sde import DDPMSchedule, linspace
from score_kernels.sampling.engine import Options, Phase, Score, run

__all__ = ["ddim", "ddpm"]

_SCHEDULE = "a score_kernels.diffusion.sde.DDPMSchedule"


def ddpm(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    schedule: DDPMSchedule,
    *,
    variance: str = "small",
    **options: Unpack[Options],
) -> Tensor:
    """Ancestral DDPM, all timesteps (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    In DDPM's scale ``x <- (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + sqrt(v) z``, v the
    posterior's variance ("small") or beta ("large"), and no noise in the last step; in y::

        y <- y + (sigma_i^2 - sigma_{i-1}^2) score(y, sigma_i) + c z

    with ``c = sigma_{i-1} sqrt(1 - sigma_{i-1}^2 / sigma_i^2)``, or ``sqrt(beta_i / abar_{i-1})``.

    Args as in :func:`annealed_langevin`, except:
        score: ``score(y, sigma)``; of a network that predicts noise, see `as_score`.
        shape_or_init: the prior is ``N(0, 1)`` in x; a state, or the recorded ones, are y.
        schedule: the levels, a :class:`score_kernels.diffusion.sde.DDPMSchedule`.
        variance: "small" or "large".
    """
    checks.instance("schedule", schedule, DDPMSchedule, _SCHEDULE)
    checks.choice("variance", variance, ("small", "large"))
    plan = _plan(schedule.sigmas.flip(0).tolist(), eta=1.0)
    if variance == "large":
        abar = torch.cat([schedule.alphas_bar.new_ones(1), schedule.alphas_bar])
        noise = ((1 - abar[1:] / abar[:-1]) / abar[:-1]).sqrt().flip(0).tolist()
        for phase, c in zip(plan[:-1], noise, strict=False):
            phase.c = c
    return run("ddpm", score, shape_or_init, plan, _prior(plan), options)


def ddim(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    schedule: DDPMSchedule,
    *,
    steps: int = 50,
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
        eta: 0 to 1.
    """
    checks.instance("schedule", schedule, DDPMSchedule, _SCHEDULE)
    steps, levels = checks.count("steps", steps, least=1), len(schedule.sigmas)
    if steps > levels:
        raise ValueError(f"steps: got {steps}, expected at most the schedule's {levels}")
    eta = checks.not_negative("eta", eta)
    if eta > 1:
        raise ValueError(f"eta: got {eta}, expected a number from 0 to 1")
    chosen = linspace(levels - 1, 0, steps).round().long()
    plan = _plan(schedule.sigmas[chosen].tolist(), eta)
    return run("ddim", score, shape_or_init, plan, _prior(plan), options)


def _plan(levels: list[float], eta: float) -> list[Phase]:
    """From each level to the next, and from the last to no noise."""
    plan = []
    for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
        c = eta * following * math.sqrt(1 - (following / sigma) ** 2)
        b = sigma**2 - sigma * math.sqrt(following**2 - c**2)
        plan.append(Phase(sigma, 1.0, b, c, next_level=(following, 1.0)))
    return plan


def _prior(plan: list[Phase]) -> float:
    """Deviation of y where x is standard normal: 1 / sqrt(abar) = sqrt(1 + sigma^2)."""
    return math.sqrt(1 + plan[0].sigma ** 2)
