"""Reverse diffusions: Euler-Maruyama, and predictors with correctors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from score_kernels import checks
from score_kernels.backends import Backend
from score_kernels.diffusion.sde import SDE, VE, VP, SubVP
from score_kernels.noise import Key
from score_kernels.sampling.engine import Options, Phase, Score, ScoreModel, State, run

__all__ = ["euler_maruyama", "predictor_corrector"]


def euler_maruyama(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sde: SDE,
    *,
    steps: int = 1000,
    end: float = 1e-3,
    denoise: bool = True,
    **options: Unpack[Options],
) -> Tensor:
    """A diffusion's reverse, ``dx = (f x - g^2 s) dt + g dw``, in equal steps of time.

    ``x <- (1 - f h) x + g^2 h s + g sqrt(h) z`` from time 1 to `end` (Song et al. 2021, arXiv
    2011.13456), s the score of x at its time.

    Args:
        score: ``score(y, sigma)`` of data plus noise, as everywhere; it is called at ``y = x / m``.
        shape_or_init: ``[B, ...]`` to start from the prior, N(0, 1) (VE: N(0, sigma_max^2)), or a
            state at time 1.
        sde: :class:`score_kernels.diffusion.sde.VE`, ``VP`` or ``SubVP``.
        steps: their number.
        end: the time to stop at, in [0, 1); for VP and SubVP above 0.
        denoise: end with ``y + sigma^2 score(y, sigma)``; without it the result is x at time `end`.
        options: see :class:`score_kernels.sampling.Options`.

    Returns, Raises:
        As `annealed_langevin`.
    """
    moments = _moments(sde, steps, end)
    plan = [_predictor("euler_maruyama", sde, *pair) for pair in pairwise(moments)]
    name = "euler_maruyama"
    return run(name, score, shape_or_init, plan, _prior(sde), denoise=denoise, **options)


def predictor_corrector(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sde: SDE,
    *,
    steps: int = 1000,
    predictor: str | None = "reverse_diffusion",
    corrector: str | None = "langevin",
    snr: float = 0.16,
    corrector_steps: int = 1,
    corrector_first: bool = True,
    batch_mean: bool = False,
    end: float = 1e-3,
    denoise: bool = True,
    **options: Unpack[Options],
) -> Tensor:
    """Predictor-corrector sampling (Song et al. 2021, arXiv 2011.13456, algorithms 2 and 3).

    At each of `steps` times a predictor brings the state to the next one and corrector steps of
    Langevin dynamics, ``x <- x + e s + sqrt(2 e) z``, bring it closer to its distribution there:

    - predictor "reverse_diffusion": VE ``x + G s + sqrt(G) z``, ``G = sigma_i^2 - sigma_{i-1}^2``;
      VP ``(2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z``, ``beta = beta(t) h``; SubVP as
      "euler_maruyama".
    - "ancestral": VE ``x + G s + sqrt(sigma_{i-1}^2 G / sigma_i^2) z``; VP ``(x + beta s) /
      sqrt(1 - beta) + sqrt(beta) z``.
    - "euler_maruyama": as :func:`euler_maruyama`. None: correctors only.
    - corrector "langevin": ``e = 2 k (snr ||z|| / ||s||)^2``, "ald": ``e = 2 k (snr std)^2``, with
      ``k = 1`` for VE and ``1 - beta`` else. None: predictors only.

    Args:
        score, shape_or_init, sde, steps, end, denoise, options: as in :func:`euler_maruyama`.
        predictor, corrector: see above; not both None.
        snr: r above, the corrector's signal-to-noise ratio.
        corrector_steps: at each time.
        corrector_first: correct at a time before predicting from it, as the authors' code does, or
            predict and correct where that leads.
        batch_mean: take the norms' means over the batch, as the authors' code does; a sample then
            depends on those beside it. By default each sample has its own.

    Returns, Raises:
        As `annealed_langevin`; every predictor and corrector step is a step of the chain.
    """
    moments = _moments(sde, steps, end)
    if predictor is not None:
        names = ["euler_maruyama", "reverse_diffusion"]
        if not isinstance(sde, SubVP):
            names.append("ancestral")
        checks.choice("predictor", predictor, names, f" for {type(sde).__name__}, or None")
    steepest = max(now.beta * (now.time - then.time) for now, then in pairwise(moments))
    if steepest >= 1:
        least = math.floor(steepest * (len(moments) - 1)) + 1
        raise ValueError(
            f"steps: got {len(moments) - 1}, in which beta h reaches {steepest:.3g}; expected it "
            f"below 1, at least {least} steps"
        )
    if corrector is not None:
        checks.choice("corrector", corrector, ("langevin", "ald"), ", or None")
    if predictor is None and corrector is None:
        raise ValueError("predictor: got None beside corrector None, expected one of the two")
    corrector_first = checks.flag("corrector_first", corrector_first)
    batch_mean = checks.flag("batch_mean", batch_mean)
    snr = checks.positive("snr", snr)
    repeats = checks.count("corrector_steps", corrector_steps, least=1)
    plan = []
    for now, then in pairwise(moments):
        phases = []
        if predictor is not None:
            phases.append(_predictor(predictor, sde, now, then))
        if corrector is not None:
            kept = 1.0 if isinstance(sde, VE) else 1 - now.beta * (now.time - then.time)
            at = now if corrector_first else then
            phase = _corrector(corrector, at, kept, snr, batch_mean, repeats)
            phases.insert(0 if corrector_first else 1, phase)
        plan += phases
    name = "predictor_corrector"
    return run(name, score, shape_or_init, plan, _prior(sde), denoise=denoise, **options)


class _Moment(NamedTuple):
    """A diffusion at a time."""

    time: float
    mean: float
    std: float
    sigma: float
    drift: float
    diffusion: float
    beta: float


def _moments(sde: SDE, steps: int, end: float) -> list[_Moment]:
    checks.instance("sde", sde, SDE, "a diffusion of score_kernels.diffusion.sde")
    steps = checks.count("steps", steps, least=1)
    end = checks.not_negative("end", end)
    if not end < 1 or not end and not isinstance(sde, VE):
        raise ValueError(f"end: got {end}, expected a time above 0 and below 1")
    t = torch.linspace(1, end, steps + 1, dtype=torch.float64)
    beta = sde.beta(t) if isinstance(sde, VP) else torch.zeros_like(t)
    columns = (t, sde.mean(t), sde.std(t), sde.sigma(t), sde.drift(t), sde.diffusion(t), beta)
    return [_Moment(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _prior(sde: SDE) -> float:
    return sde.sigma_max if isinstance(sde, VE) else 1.0


def _predictor(name: str, sde: SDE, now: _Moment, then: _Moment) -> Phase:
    h = now.time - then.time
    beta = now.beta * h
    if isinstance(sde, VE) and name != "euler_maruyama":
        g = now.sigma**2 - then.sigma**2
        a, b, c = 1.0, g, math.sqrt(g)
        if name == "ancestral":
            c *= then.sigma / now.sigma
    elif name == "reverse_diffusion" and not isinstance(sde, SubVP):
        a, b, c = 2 - math.sqrt(1 - beta), beta, math.sqrt(beta)
    elif name == "ancestral":
        kept = math.sqrt(1 - beta)
        a, b, c = 1 / kept, beta / kept, math.sqrt(beta)
    else:
        g = now.diffusion * h
        a, b, c = 1 - now.drift * h, g, math.sqrt(g)
    # b is for the score of x itself: the score's value over m.
    following = then.sigma, then.mean
    return Phase(now.sigma, a, b / now.mean, c, mean=now.mean, next_level=following)


def _corrector(
    name: str, at: _Moment, kept: float, snr: float, batch_mean: bool, repeats: int
) -> Phase:
    """``x + e s + sqrt(2 e) z``, s the score of x itself."""
    if name == "ald":
        e = 2 * kept * (snr * at.std) ** 2
        return Phase(at.sigma, 1.0, e / at.mean, math.sqrt(2 * e), repeats, at.mean)
    # The norm is that of the score's value, m times the score of x.
    e = 2 * kept * snr**2 * at.mean
    c = math.sqrt(2 * at.mean * e)
    return Phase(at.sigma, 1.0, e, c, repeats, at.mean, pre_step=_ByNorms(batch_mean))


@dataclass(frozen=True, slots=True)
class _ByNorms:
    """Step sizes in proportion to ``(||z|| / ||score||)^2``."""

    batch_mean: bool

    def __call__(
        self, model: ScoreModel, backend: Backend, state: State, key: Key
    ) -> tuple[Tensor, Tensor]:
        score = model(state.x)
        return score, norm_ratio(backend, score, key, self.batch_mean)


def norm_ratio(backend: Backend, score: Tensor, key: Key, batch_mean: bool) -> Tensor:
    """``(||z|| / ||score||)^2`` for the noise of a step, ``[B]``, or ``[1]`` of the mean norms.

    0 where the score is 0: there is nothing to weigh the noise against. One pass, which makes the
    noise; nothing waits for the device.
    """
    sums = backend.probe_sums("normal", score, None, False, key)
    if batch_mean:
        # The ratio of the means is that of the sums.
        sums = sums.sqrt().sum(1, keepdim=True).square()
    return (sums[0] / sums[3]).nan_to_num_(0.0, 0.0)
