"""The probability flow, an ordinary differential equation with the diffusion's distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from score_kernels import checks, ops
from score_kernels.bars import progress_bar
from score_kernels.diffusion.sde import levels_of, prior_of
from score_kernels.losses.sliced import refuse_inference, score_at, vector_jacobian
from score_kernels.noise import Key, NoiseKey, Purpose, addressed, fresh_seed
from score_kernels.sampling.engine import Chain, Phase, run, warn_of_training_mode
from score_kernels.sampling.model import Score
from score_kernels.sampling.options import Options

__all__ = ["log_likelihood", "probability_flow"]


def probability_flow(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sigmas: Any,
    *,
    method: str = "heun",
    churn: float = 0.0,
    churn_noise: float = 1.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    gamma: float | Sequence[float] | Tensor | None = None,
    step_scale: float = 1.0,
    **options: Unpack[Options],
) -> Tensor:
    """The flow ``dy/dsigma = -sigma score(y, sigma)`` from the first level to 0.

    Heun's method as in Karras et al. (2022, arXiv 2206.00364, algorithms 1 and 2): two calls of the
    score a step, one in the last; or Euler's, one call. With `churn` each step first raises the
    noise from sigma to ``t = (1 + gamma) sigma``, ``gamma = min(churn / L, sqrt(2) - 1)``. Euler's
    step to the next level is ``y <- y + step_scale (t - sigma_{i+1}) t score(y, t)``.

    Args as in :func:`annealed_langevin`, and:
        sigmas: see :func:`score_kernels.edm_sigmas`; or a :class:`score_kernels.DDPMSchedule`, all
            levels of it.
        method: "heun" or "euler".
        churn, churn_noise, churn_range: S_churn, S_noise and (S_min, S_max) of the paper.
        gamma: in the place of churn: one number or one for each level, at least 0.
        step_scale: a factor of the slope, of both of Heun's; above 1 a step leaves less noise than
            the next level's. AlphaFold 3 (Abramson et al. 2024, doi 10.1038/s41586-024-07487-w,
            algorithm 18) is Euler's method with 1.5, churn_noise 1.003 and a gamma of 0.8 where the
            next level is above 1, 0 elsewhere.
    """
    levels = levels_of(sigmas)
    checks.choice("method", method, ("heun", "euler"))
    churn = checks.not_negative("churn", churn)
    churn_noise = checks.not_negative("churn_noise", churn_noise)
    low, high = checks.limits("churn_range", churn_range)
    if gamma is None:
        gammas = [min(churn / len(levels), math.sqrt(2) - 1)]
    elif churn:
        raise ValueError(f"gamma: got it beside churn {churn}, expected one of the two")
    else:
        gammas = checks.one_or_each("gamma", gamma, len(levels), checks.not_negative)
    if len(gammas) < len(levels):
        gammas *= len(levels)
    step_scale = checks.positive("step_scale", step_scale)
    plan = []
    for sigma, following, rise in zip(levels, [*levels[1:], 0.0], gammas, strict=True):
        raised = (1 + rise) * sigma if low <= sigma <= high else sigma
        noise = churn_noise * math.sqrt(raised**2 - sigma**2)
        heun = method == "heun" and following > 0
        drop = step_scale * (raised - following)
        b = drop * (following / 2 if heun else raised)
        flow = partial(_flow, raised, following, drop, noise, heun)
        plan.append(Phase(sigma, 1.0, b, next_level=(following, 1.0), pre_step=flow))
    prior = prior_of(sigmas, levels[0])
    return run("probability_flow", score, shape_or_init, plan, prior, options)


def _flow(
    sigma: float, following: float, drop: float, noise: float, heun: bool, chain: Chain, key: Key
) -> tuple[Tensor, None]:
    """Add noise up to sigma and, for Heun's method, do half of the step to the following level."""
    x, model, step = chain.x, chain.model, chain.backend.affine_step
    if noise:
        chain.add_noise(noise, key)
        model.set_level(sigma)
    score = model(x)
    if not heun:
        return score, None
    b = drop * sigma
    ahead = torch.empty_like(x)
    step(ahead, x, score, 1.0, b, 0.0, key)
    step(x, x, score, 1.0, b / 2, 0.0, key)
    model.set_level(following)
    return model(ahead), None


def log_likelihood(
    score: Score,
    x: Tensor,
    sigmas: Any,
    *,
    probes: int = 1,
    probe: str = "rademacher",
    prior_std: float | None = None,
    seed: int | None = None,
    first_sample: int = 0,
    samples: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """log p of samples at the smallest level, in nats.

    ``log p(x) = log N(y_1; 0, prior_std^2) - int sigma tr(grad score(y, sigma)) dsigma`` over the
    flow from x at sigma_L to y_1 at sigma_1 (Song et al. 2021, arXiv 2011.13456, section 4.3), by
    Heun's method in log sigma; the trace by the Hutchinson estimator, whose probes are the same
    all along a path. p is the density of the data plus noise of sigma_L.

    Args:
        score: ``score(x, sigma)``, differentiable once in x, samples not influencing each other.
        x: ``[B, ...]`` float32 or float64.
        sigmas: noise levels, strictly decreasing, at least two, or a
            :class:`score_kernels.DDPMSchedule`; a few hundred for four digits.
        probes: how many of the trace per sample; the estimate's variance falls with their number.
        probe: "rademacher", "gaussian" or "sphere".
        prior_std: of the distribution at sigma_1; default: sigma_1, which is right to the extent
            that the data's own range is small against it.
        seed, first_sample, samples: name the probes, as in the samplers.
        progress: show a progress bar.

    Returns:
        ``[B]``, x's dtype, without gradient.
    """
    checks.function("score", score)
    checks.flag("progress", progress)
    checks.state("x", x)
    levels = levels_of(sigmas)[::-1]
    if len(levels) < 2:
        raise ValueError("sigmas: got 1 noise level, expected at least 2")
    if not x.numel():
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one element")
    refuse_inference()
    warn_of_training_mode(score, stacklevel=3)
    probes = checks.count("probes", probes, least=1)
    std = levels[-1] if prior_std is None else checks.positive("prior_std", prior_std)
    seed = fresh_seed() if seed is None else seed
    key = NoiseKey(seed, purpose=Purpose.TRACE, first_sample=first_sample)
    key = addressed(key, samples, None, None)
    with torch.no_grad():
        keys = [key.at(i) for i in range(probes)]
        state, total = x.clone(), x.new_zeros(x.shape[0])
        pairs = list(pairwise(levels))
        for now, then in progress_bar(pairs, unit="step", desc="likelihood", disable=not progress):
            h = math.log(then / now)
            value, trace = _score_and_trace(score, state, now, keys, probe)
            ahead = state - h * now**2 * value
            value_then, trace_then = _score_and_trace(score, ahead, then, keys, probe)
            state = state - 0.5 * h * (now**2 * value + then**2 * value_then)
            total -= 0.5 * h * (now**2 * trace + then**2 * trace_then)
        rows = state.reshape(x.shape[0], -1)
        log_prior = -0.5 * (rows / std).square().sum(1)
        return total + log_prior - rows.shape[1] * math.log(std * math.sqrt(2 * math.pi))


def _score_and_trace(
    score: Score, x: Tensor, sigma: float, keys: list[NoiseKey], probe: str
) -> tuple[Tensor, Tensor]:
    """The score, and the trace of its derivative as the mean of ``v . grad (v . s)``."""
    level = x.new_full(x.shape[:1], sigma, dtype=torch.float32)
    ones = x.new_ones(x.shape[0])

    checked = score_at(score, level, {})

    def call(y: Tensor) -> Tensor:
        return checked(y).to(x.dtype)

    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = call(leaf)
    trace = torch.zeros_like(ones)
    for key in keys:
        v = ops.probe_scale(ones, x.shape, key, probe=probe)
        more = key is not keys[-1]
        along = vector_jacobian(call, leaf, value, v, create_graph=False, retain=more)
        trace += ops.probe_dot(along, key, probe=probe) / len(keys)
    return value.detach(), trace
