"""Reverse diffusions: Euler-Maruyama, and predictors with correctors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from score_kernels import checks
from score_kernels.backends import Backend
from score_kernels.diffusion.sde import SDE, VE, VP, DDPMSchedule, SubVP, linspace
from score_kernels.noise import Key
from score_kernels.ops._dispatch import check_addresses
from score_kernels.ops._formulas import segment_sums
from score_kernels.sampling.engine import Chain, Phase, run
from score_kernels.sampling.model import Score
from score_kernels.sampling.options import Options

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
    2011.13456), s the score of x at its time. As `annealed_langevin`, except:

    Args:
        score: ``score(y, sigma)`` of data plus noise, as everywhere; it is called at ``y = x / m``.
        shape_or_init: the prior is N(0, 1) (VE: N(0, sigma_max^2)); a state is x at time 1.
        sde: :class:`score_kernels.diffusion.sde.VE`, ``VP`` or ``SubVP``.
        steps: their number.
        end: the time to stop at, in [0, 1); for VP and SubVP above 0.
        denoise: end with ``y + sigma^2 score(y, sigma)``; without it the result is x at time `end`.
    """
    times = _times(sde, steps, end)
    plan = [_predictor(_euler, now, then) for now, then in pairwise(times)]
    name, prior = "euler_maruyama", _prior(sde, times)
    return run(name, score, shape_or_init, plan, prior, options, denoise=denoise)


def predictor_corrector(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sde: Any,
    *,
    steps: int | None = None,
    predictor: str | None = "reverse_diffusion",
    corrector: str | None = "ald",
    snr: float = 0.16,
    corrector_steps: int = 1,
    corrector_first: bool = True,
    batch_mean: bool = False,
    max_step: float | None = None,
    segments: Tensor | None = None,
    end: float | None = None,
    denoise: bool = True,
    **options: Unpack[Options],
) -> Tensor:
    """Predictor-corrector sampling (Song et al. 2021, arXiv 2011.13456, algorithms 2 and 3).

    At each time a predictor brings the state to the next one and corrector steps of Langevin
    dynamics, ``x <- x + e s + sqrt(2 e) z``, bring it closer to its distribution there; each of
    them is a step of the chain.

    - predictor "reverse_diffusion": VE ``x + G s + sqrt(G) z``, ``G = sigma_i^2 - sigma_{i-1}^2``;
      VP ``(2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z``, ``beta = beta(t) h``; SubVP as
      "euler_maruyama".
    - "ancestral": VE ``x + G s + sqrt(sigma_{i-1}^2 G / sigma_i^2) z``; VP ``(x + beta s) /
      sqrt(1 - beta) + sqrt(beta) z``.
    - "euler_maruyama": as :func:`euler_maruyama`. None: correctors only.
    - corrector "ald": ``e = 2 k (snr std)^2``, "langevin": ``e = 2 k (snr ||z|| / ||s||)^2``, with
      ``k = 1`` for VE and ``1 - beta`` else. None: predictors only.

    The times of a diffusion are `steps + 1` from 1 to `end`, of which the last is not predicted
    from. Noise levels in its place are themselves the times, as in the authors' code
    (score_sde_pytorch): N of them, the smallest included, with a corrector at each and a last
    prediction to noise 0, without noise (`corrector_first=False`: at each but the first)::

        levels = sk.geometric_sigmas(50, 0.01, 1000)          # or DDPMSchedule.linear(1000)
        sk.predictor_corrector(score, shape, levels, corrector="langevin", batch_mean=True)

    Args as in :func:`euler_maruyama`, and:
        sde: a diffusion; or noise levels, two or more: strictly decreasing sigmas (VE), or a
            :class:`score_kernels.DDPMSchedule` (VP, with its betas), without "euler_maruyama".
        steps, end: of a diffusion; default: 1000 and 1e-3.
        predictor, corrector: see above; not both None.
        snr: r of the paper, the corrector's signal-to-noise ratio.
        corrector_steps: at each time.
        corrector_first: correct at a time before predicting from it, as the authors' code does, or
            predict and correct where that leads.
        batch_mean: of "langevin": take the norms' means over the batch, as the authors' code does;
            a sample then depends on those beside it. By default each sample has its own norms,
            which adds to the variance in few dimensions: see docs/samplers.md.
        max_step: of "langevin": e is at most this, and this where the score is 0; default: no
            bound, and e = 0 where the score is 0.
        segments: of "langevin", int64 ``[B]``, for packed batches: rows of one number, 0 to B - 1,
            are one sample, whose norms run over all of them.
        denoise: as there; with noise levels the last step is the predictor's, or without it there
            is none, and the result has the smallest noise.
    """
    discrete = isinstance(sde, DDPMSchedule) or hasattr(sde, "__iter__") and type(sde) is not str
    if discrete:
        for name, value in (("steps", steps), ("end", end)):
            if value is not None:
                raise ValueError(f"{name}: got {value} beside noise levels, expected none")
        times = _levels(sde)
    else:
        steps = 1000 if steps is None else steps
        times = _times(sde, steps, 1e-3 if end is None else end)
        steepest = max(now.beta for now in times)
        if steepest >= 1:
            least = math.floor(steepest * steps) + 1
            raise ValueError(
                f"steps: got {steps}, in which beta h reaches {steepest:.3g}; expected it below 1, "
                f"at least {least} steps"
            )
    predictors = next(p for kind, p in _PREDICTORS.items() if isinstance(sde, kind))
    if predictor is not None:
        kind = "noise levels" if discrete else type(sde).__name__
        checks.choice("predictor", predictor, predictors, f" for {kind}, or None")
    if corrector is not None:
        checks.choice("corrector", corrector, ("ald", "langevin"), ", or None")
    if predictor is None and corrector is None:
        raise ValueError("predictor: got None beside corrector None, expected one of the two")
    corrector_first = checks.flag("corrector_first", corrector_first)
    batch_mean, denoise = checks.flag("batch_mean", batch_mean), checks.flag("denoise", denoise)
    if segments is not None:
        checks.segments(segments)
    if max_step is not None:
        max_step = checks.positive("max_step", max_step)
    for name, given in (
        ("batch_mean", batch_mean),
        ("max_step", max_step is not None),
        ("segments", segments is not None),
    ):
        if given and corrector != "langevin":
            raise ValueError(f"{name}: got it beside corrector {corrector!r}, expected 'langevin'")
    snr = checks.positive("snr", snr)
    repeats = checks.count("corrector_steps", corrector_steps, least=1)

    def by_norms(largest: float, chain: Chain, key: Key) -> tuple[Tensor, Tensor]:
        score = chain.model(chain.x)
        ratio = norm_ratio(chain.backend, score, key, batch_mean, segments, largest)
        return score, ratio

    def correct(at: _Time, kept: float) -> Phase:
        if corrector == "ald":
            e = 2 * kept * (snr * at.std) ** 2
            return Phase(at.sigma, 1.0, e / at.mean, math.sqrt(2 * e), repeats, at.mean)
        # The norm is that of the score's value, m times the score of x.
        e = 2 * kept * snr**2 * at.mean
        unit = at.mean * e
        largest = min(max_step / unit, checks.LARGEST) if max_step and unit else math.inf
        step = partial(by_norms, largest)
        return Phase(at.sigma, 1.0, e, math.sqrt(2 * unit), repeats, at.mean, None, step)

    plan = []
    for now, then in pairwise(times):
        last = not then.std
        if corrector is not None and corrector_first:
            plan.append(correct(now, 1 - now.beta))
        if predictor is not None and (denoise or not last):
            plan.append(_predictor(predictors[predictor], now, then))
        if corrector is not None and not corrector_first and not last:
            plan.append(correct(then, 1 - (then if discrete else now).beta))
    # With noise levels, the last prediction does it.
    denoise = denoise and (predictor is None or not discrete)
    name, prior = "predictor_corrector", _prior(sde, times)
    return run(name, score, shape_or_init, plan, prior, options, denoise=denoise)


def _prior(sde: Any, times: list[_Time]) -> float:
    """The prior's deviation: sigma_1 of what explodes, 1 of what preserves the variance."""
    if isinstance(sde, VE):
        return sde.sigma_max
    return 1.0 if isinstance(sde, (SDE, DDPMSchedule)) else times[0].sigma


class _Time(NamedTuple):
    """A diffusion at a time; drift, diffusion and beta are times the step h to the next one."""

    mean: float
    std: float
    sigma: float
    drift: float
    diffusion: float
    beta: float


def _times(sde: SDE, steps: int, end: float) -> list[_Time]:
    checks.instance("sde", sde, SDE, "a diffusion of score_kernels.diffusion.sde")
    steps = checks.count("steps", steps, least=1)
    end = checks.not_negative("end", end)
    if not end < 1 or not end and not isinstance(sde, VE):
        raise ValueError(f"end: got {end}, expected a time above 0 and below 1")
    t = linspace(1, end, steps + 1)
    h = -t.diff(append=t[-1:])
    beta = sde.beta(t) if isinstance(sde, VP) else torch.zeros_like(t)
    states = sde.mean(t), sde.std(t), sde.sigma(t)
    rates = sde.drift(t) * h, sde.diffusion(t) * h, beta * h
    return [_Time(*row) for row in torch.stack(states + rates, 1).tolist()]


def _levels(levels: Any) -> list[_Time]:
    """Noise levels as times, and noise 0 after the last."""
    if isinstance(levels, DDPMSchedule):
        abar = levels.alphas_bar.flip(0)
        betas = (1 - abar / torch.cat([abar[1:], abar.new_ones(1)])).tolist()
        columns = abar.sqrt(), (1 - abar).sqrt(), levels.sigmas.flip(0)
        states = torch.stack(columns, 1).tolist()
    else:
        states = [(1.0, sigma, sigma) for sigma in checks.noise_levels(levels, "sde")]
        betas = [0.0] * len(states)
    if len(betas) < 2:
        raise ValueError("sde: got 1 noise level, expected at least 2")
    pairs = zip(states, betas, strict=True)
    times = [_Time(m, std, sigma, 0.0, 0.0, beta) for (m, std, sigma), beta in pairs]
    return [*times, _Time(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)]


# The coefficients a, b and c of a predictor, ``x <- a x + b s + c z``.
_Coefficients = tuple[float, float, float]
_Table = dict[str, Callable[["_Time", "_Time"], _Coefficients]]


def _euler(now: _Time, _: _Time) -> _Coefficients:
    return 1 - now.drift, now.diffusion, math.sqrt(now.diffusion)


def _ve_reverse(now: _Time, then: _Time) -> _Coefficients:
    g = now.sigma**2 - then.sigma**2
    return 1.0, g, math.sqrt(g)


def _ve_ancestral(now: _Time, then: _Time) -> _Coefficients:
    a, b, c = _ve_reverse(now, then)
    return a, b, c * (then.sigma / now.sigma)


def _vp_reverse(now: _Time, _: _Time) -> _Coefficients:
    return 2 - math.sqrt(1 - now.beta), now.beta, math.sqrt(now.beta)


def _vp_ancestral(now: _Time, _: _Time) -> _Coefficients:
    kept = math.sqrt(1 - now.beta)
    return 1 / kept, now.beta / kept, math.sqrt(now.beta)


_EULER: _Table = {"euler_maruyama": _euler, "reverse_diffusion": _euler}
_VE: _Table = {"reverse_diffusion": _ve_reverse, "ancestral": _ve_ancestral}
_VP: _Table = {"reverse_diffusion": _vp_reverse, "ancestral": _vp_ancestral}
# By what is in the place of `sde`; the last are noise levels.
_PREDICTORS: dict[type, _Table] = {
    VE: {**_EULER, **_VE},
    SubVP: _EULER,
    VP: {**_EULER, **_VP},
    SDE: _EULER,
    DDPMSchedule: _VP,
    object: _VE,
}


def _predictor(coefficients: Callable[..., _Coefficients], now: _Time, then: _Time) -> Phase:
    a, b, c = coefficients(now, then)
    # b is for the score of x itself: the score's value over m. Nothing is added to a result.
    c, following = c if then.std else 0.0, (then.sigma, then.mean)
    return Phase(now.sigma, a, b / now.mean, c, mean=now.mean, next_level=following)


def norm_ratio(
    backend: Backend,
    score: Tensor,
    key: Key,
    batch_mean: bool,
    segments: Tensor | None = None,
    largest: float = math.inf,
) -> Tensor:
    """``(||z|| / ||score||)^2`` for the noise of a step, ``[B]``, or ``[1]`` of the mean norms.

    At most `largest`. With segments, norms are those of a segment's rows together. Where the score
    is 0, `largest` or, if that is infinite, 0: there is nothing to weigh the noise against. One
    pass, which makes the noise; nothing waits for the device.
    """
    if key[4] is not None:
        check_addresses(key[4], score)
    sums = backend.probe_sums("normal", score, None, False, key)
    if segments is not None:
        checks.segments_fit(segments, score)
        sums = segment_sums(sums.T, segments).T
    if batch_mean:
        # The ratio of the means is that of the sums.
        sums = sums.sqrt().sum(1, keepdim=True).square()
    elif segments is not None:
        sums = sums.index_select(1, segments)
    noise, _, _, norm = sums.unbind()
    bounded = largest < math.inf
    ratio = (noise / norm).nan_to_num_(0.0, largest if bounded else 0.0)
    return ratio.clamp_(max=largest) if bounded else ratio
