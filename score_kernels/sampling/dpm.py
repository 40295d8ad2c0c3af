"""DPM-Solver++, which follows the flow by predictions of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from score_kernels import checks
from score_kernels.diffusion.sde import levels_of, prior_of
from score_kernels.noise import Key, NoiseKey
from score_kernels.sampling.engine import Chain, Phase, run
from score_kernels.sampling.model import Score
from score_kernels.sampling.options import Options

__all__ = ["dpm_solver"]


def dpm_solver(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sigmas: Any,
    *,
    eta: float = 0.0,
    **options: Unpack[Options],
) -> Tensor:
    """DPM-Solver++(2M), of order two with one call a step.

    Lu et al. (2022, arXiv 2211.01095), on y, data plus noise, from the first level to 0. With the
    predicted data ``D = y + sigma^2 score(y, sigma)``, those of the step before D_prev, and
    ``h = log(sigma / sigma')``, a step to sigma' is::

        y <- e^(-(1 + eta) h) y + (1 - e^(-(1 + eta) h)) D' + sigma' sqrt(1 - e^(-2 eta h)) z

    with ``D' = D + (h / h_prev) (D - D_prev) / 2``, in the first step D. The one to 0 returns D.

    Args as in :func:`annealed_langevin`, except:
        sigmas: noise levels, strictly decreasing, or all of a
            :class:`score_kernels.diffusion.sde.DDPMSchedule`. Steps h of one length are best:
            those of ``geometric_sigmas(schedule.sigmas[-1].item(), 0.02, 20)``. The last timesteps
            of a schedule, evenly spaced, are several times as far apart.
        eta: 0 solves the probability flow, without noise but the start's; 1 the reverse diffusion
            (SDE-DPM-Solver++(2M), with noise), others one between or beyond.

    D of the step just done is the auxiliary tensor "data" of `Progress`, in the state's dtype.
    """
    levels = levels_of(sigmas)
    eta = checks.not_negative("eta", eta)
    plan, h_before = [], math.inf
    for sigma, following in pairwise(levels):
        # log(sigma / following), above 0 for neighbouring numbers too.
        h = math.log1p((sigma - following) / following)
        a, b = math.exp(-(1 + eta) * h), -math.expm1(-(1 + eta) * h)
        c = following * math.sqrt(-math.expm1(-2 * eta * h))
        step = partial(_predict, sigma, h / (2 * h_before))
        plan.append(Phase(sigma, a, b, c, next_level=(following, 1.0), pre_step=step))
        h_before = h
    last = partial(_predict, levels[-1], 0.0)
    plan.append(Phase(levels[-1], 0.0, 1.0, next_level=(0.0, 1.0), pre_step=last))
    if options.get("wrap") is not None:
        raise ValueError(
            "wrap: got it with dpm_solver, whose estimates of two steps may be periods apart; "
            "expected another sampler, such as ddim or probability_flow"
        )
    prior = prior_of(sigmas, levels[0])
    return run("dpm_solver", score, shape_or_init, plan, prior, options, init_aux=_init_aux)


def _init_aux(x: Tensor, key: NoiseKey) -> dict[str, Tensor]:
    return {"data": torch.zeros_like(x)}


def _predict(sigma: float, weight: float, chain: Chain, key: Key) -> tuple[Tensor, None]:
    """The data as seen at sigma, carried on by `weight` times its change since the last step."""
    x, data, step = chain.x, chain.aux["data"], chain.backend.affine_step
    score = chain.model(x)
    if not weight:
        step(data, x, score, 1.0, sigma**2, 0.0, key)
        return data, None
    ahead = data * -weight
    step(data, x, score, 1.0, sigma**2, 0.0, key)
    step(ahead, ahead, data, 1.0, 1 + weight, 0.0, key)
    return ahead, None
