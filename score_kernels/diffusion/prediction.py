"""Networks of other forms as scores ``score(x, sigma)``.

The wrappers are modules with the parameters, devices and state dictionary (under ``net.``) of the
network inside, to which keyword arguments beyond ``x`` and ``sigma`` (classes, say) are passed on.

Diffusion models predict one of four quantities, each of which gives the others. With data plus
noise ``y = x_0 + sigma z``, m the factor of the data of a schedule (1 without one), ``std = m
sigma`` and the network's input ``x_t = m y = m x_0 + std z``:

| name | what it is | as the score of y |
|---|---|---|
| epsilon | z | ``-epsilon / sigma`` |
| x0 | x_0 | ``(x0 - y) / sigma^2`` |
| v | ``m z - std x_0`` | ``-(v / m + sigma y) / (sigma (1 + sigma^2))`` |
| score | ``grad log p_t(x_t)`` | ``m score`` |

v is that of Salimans and Ho (2022, arXiv 2202.00512), here for any schedule: ``m^2 + std^2`` need
not be 1. A trained network predicts the mean of its quantity given x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from score_kernels import checks
from score_kernels.diffusion.sde import SDE, DDPMSchedule
from score_kernels.ops._formulas import expand_like

__all__ = ["as_score", "by_label", "by_sigma", "convert", "unconditional"]

# (value, y, sigma, m) -> value, all of one dtype, the last two [B, 1, ...].
_Map = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_FROM_SCORE: dict[str, _Map] = {
    "epsilon": lambda score, y, sigma, m: -sigma * score,
    "x0": lambda score, y, sigma, m: y + sigma * (sigma * score),
    "v": lambda score, y, sigma, m: -m * sigma * (y + (1 + sigma * sigma) * score),
    "score": lambda score, y, sigma, m: score / m,
}
_TO_SCORE: dict[str, _Map] = {
    "epsilon": lambda epsilon, y, sigma, m: -epsilon / sigma,
    # Divided twice: sigma^2 leaves float32's range long before sigma does.
    "x0": lambda x0, y, sigma, m: (x0 - y) / sigma / sigma,
    "v": lambda v, y, sigma, m: -(v / m + sigma * y) / sigma / (1 + sigma * sigma),
    "score": lambda score_t, y, sigma, m: m * score_t,
    "score * sigma": lambda product, y, sigma, m: product / sigma,
}


def as_score(
    net: Callable[..., Any], *, kind: str, schedule: SDE | DDPMSchedule | None = None
) -> nn.Module:
    """A network that predicts noise, x0, v, score or energy, as a score.

    Args:
        net: a module or function ``net(x, level, **conditions)``; returns x's shape, or an object
            that has it as ``.sample``; an energy ``net(x, sigma)`` or ``net(x)`` returns ``[B]``.
        kind: what it predicts: "epsilon", "x0", "v" or "score" of this module's table, or
            "denoiser", the x_0 of EDM's ``D(y, sigma)`` (Karras et al. 2022, arXiv 2206.00364), or
            "energy", -log of a density up to a constant, whose negative gradient is the score:
            it is taken in samplers too, where gradients are off, and keeps its graph where they are
            on, as in losses. Both without a schedule.
        schedule: what x and level ``[B]`` are: without one ``(y, sigma)``; of a :class:`SDE`
            ``(x_t, t)`` with t float32, the time of sigma, outside 0 to 1 where sigma is outside
            the schedule and not multiplied by 999 or the like; of a :class:`DDPMSchedule`
            ``(x_t, i)`` with i int64, the timestep whose level is nearest to sigma, and between
            levels ``x_t = y / sqrt(1 + sigma^2)``.

    Returns:
        A module called as ``score(y, sigma, **conditions)`` with sigma ``[B]`` float32. Times and
        m are computed in float64, the score in float32 at least. Nothing waits for the device.

    Raises:
        TypeError: net cannot be called, schedule is not a schedule, or what net returns no tensor.
        ValueError: kind is none of the above, or one of the last two with a schedule; when called,
            sigma is not ``[B]`` or net returns another shape, as if it predicts variances too.
    """
    _check_schedule(schedule)
    checks.choice("kind", kind, (*_FROM_SCORE, "denoiser", "energy"))
    if kind in ("denoiser", "energy") and schedule is not None:
        more = "; 'x0' takes schedules" if kind == "denoiser" else ""
        raise ValueError(
            f"schedule: got {type(schedule).__name__} with kind = {kind!r}, expected none{more}"
        )
    if kind == "energy":
        return _EnergyScore(net)
    return _Score(net, "x0" if kind == "denoiser" else kind, schedule)


def convert(
    value: Tensor,
    y: Tensor,
    sigma: Tensor,
    *,
    source: str,
    target: str,
    schedule: SDE | DDPMSchedule | None = None,
) -> Tensor:
    """One quantity of this module's table from another.

    Args:
        value: ``[B, ...]``, the quantity `source`.
        y: ``[B, ...]``, data plus noise, ``x_t / m``.
        sigma: ``[B]``, the noise levels of y, above 0.
        source, target: "epsilon", "x0", "v" or "score".
        schedule: that of m and x_t in "v" and "score"; none: ``m = 1``, ``x_t = y``.

    Returns:
        ``[B, ...]``, the quantity `target`, computed in the widest dtype of the three and in
        float32 at least, by way of the score: at a sigma far above the data's scale, x0 and v are
        precise to a few roundings of y, not of themselves.

    Raises:
        TypeError, ValueError: a tensor or schedule of another type, a wrong name or shape.
    """
    checks.choice("source", source, _FROM_SCORE)
    checks.choice("target", target, _FROM_SCORE)
    _check_schedule(schedule)
    for name, tensor in (("y", y), ("value", value), ("sigma", sigma)):
        checks.score(name, tensor)
    checks.sigma(sigma, y)
    if value.shape != y.shape:
        raise ValueError(
            f"value: got shape {tuple(value.shape)}, expected that of y, {tuple(y.shape)}"
        )
    value, y, sigma, m = _aligned(value, y, sigma, _mean(schedule, sigma))
    return _FROM_SCORE[target](_TO_SCORE[source](value, y, sigma, m), y, sigma, m)


def unconditional(net: nn.Module) -> nn.Module:
    """``score(x, sigma) = net(x) / sigma``: a network without the noise level as input.

    Technique 3 of NCSNv2 (Song and Ermon 2020, arXiv 2006.09011): the norm of a trained score grows
    as ``1 / sigma``, so that the network's output has one scale at all levels.

    Args:
        net: a module ``net(x, **conditions)`` with x ``[B, ...]``; returns x's shape.

    Returns:
        A module called as ``score(x, sigma, **conditions)``; there a sigma that is not ``[B]``
        raises a ValueError.
    """
    return _Score(net, "score * sigma", takes_level=False)


def by_sigma(net: nn.Module, *, divide: bool = True) -> nn.Module:
    """``score(x, sigma) = net(x, sigma) / sigma``, or the output itself without `divide`.

    Network and result are otherwise those of :func:`unconditional`.
    """
    return _Score(net, "score * sigma" if divide else "score")


def by_label(net: nn.Module, sigmas: Any, *, divide: bool = True) -> nn.Module:
    """``score(x, sigma_i) = net(x, i) / sigma_i``, or the output itself without `divide`.

    The labels i are ``[B]`` int64, 0 that of the largest of `sigmas`, the strictly decreasing
    levels that the network was trained on. The published networks of NCSN (`CondRefineNetDilated`
    and the like; Song and Ermon 2019, arXiv 1907.05600) and of NCSNv2 (`NCSNv2`, `NCSNv2Deeper`,
    `NCSNv2Deepest`; 2020, arXiv 2006.09011), whose last line divides by sigma, return the score
    itself: take ``divide=False``. With `divide` the network's output is ``sigma score``.

    Network and result are otherwise those of :func:`unconditional`. A sigma that is none of the
    levels raises a ValueError on a CPU; on other devices, which the check would wait for, that
    sample's score is nan.
    """
    levels = torch.tensor(checks.noise_levels(sigmas), dtype=torch.float32, device="cpu")
    return _Score(net, "score * sigma" if divide else "score", levels=levels)


class _EnergyScore(nn.Module):
    """The negative gradient of an energy."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        super().__init__()
        checks.function("net", net)
        self.net = net

    def forward(self, x: Tensor, *sigma: Tensor, **conditions: Any) -> Tensor:
        def total(x: Tensor) -> Tensor:
            energy = self.net(x, *given, **conditions)
            checks.instance("net", energy, Tensor, "a tensor")
            if energy.shape != x.shape[:1]:
                raise ValueError(
                    f"net: got an energy of shape {tuple(energy.shape)}, expected one number a "
                    f"sample, {tuple(x.shape[:1])}"
                )
            return energy.sum()

        with torch.inference_mode(False):
            # Tensors of inference mode cannot be differentiated, their copies can.
            x, *given = (a.clone() if a.is_inference() else a for a in (x, *sigma))
            score = -torch.func.grad(total)(x)
        # Gradients of parameters are kept by torch.func.grad where they are off, too.
        return score if torch.is_grad_enabled() else score.detach()


class _Score(nn.Module):
    """A network that is called with a noise level, its time or label, or without, as a score."""

    def __init__(
        self,
        net: Callable[..., Any],
        kind: str,
        schedule: SDE | DDPMSchedule | None = None,
        levels: Tensor | None = None,
        takes_level: bool = True,
    ) -> None:
        super().__init__()
        checks.function("net", net)
        self.net = net
        self.kind = kind
        self.schedule = schedule
        self.takes_level = takes_level
        # No buffer, which net.half() would round.
        self._rising = None if levels is None else levels.flip(0)

    def forward(self, y: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        checks.sigma(sigma, y)
        x, level, m = y, sigma, _mean(self.schedule, sigma)
        if self._rising is not None:
            # Moved only once: every copy to the device would be waited for.
            self._rising = self._rising.to(sigma.device)
            last = len(self._rising) - 1
            index = torch.searchsorted(self._rising, sigma.contiguous()).clamp_(max=last)
            known = self._rising[index] == sigma
            if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and not known.all():
                other = float(sigma[~known][0])
                raise ValueError(f"sigma: got {other:g}, expected one of the {last + 1} levels")
            level, m = last - index, torch.where(known, m, math.nan)
            sigma = m * sigma
        if isinstance(self.schedule, DDPMSchedule):
            level = self.schedule.index(sigma)
        elif self.schedule is not None:
            level = self.schedule.time(sigma.double()).float()
            # m at the network's float32 time: a difference to x_t / y would be divided by sigma^2.
            m = self.schedule.mean(level.double())
        if self.schedule is not None:
            wide = y.double()
            x = (expand_like(m, wide) * wide).to(y.dtype)
        out = self.net(x, level, **conditions) if self.takes_level else self.net(x, **conditions)
        if not isinstance(out, Tensor):
            out = getattr(out, "sample", out)
            checks.instance("net", out, Tensor, "a tensor, or an object with one as .sample")
        if out.shape != y.shape:
            raise ValueError(
                f"net: got an output of shape {tuple(out.shape)}, expected that of x, "
                f"{tuple(y.shape)}; if it predicts variances too, wrap the rest"
            )
        if out.device != y.device:
            raise ValueError(f"net: got an output on {out.device}, expected x's {y.device}")
        return _TO_SCORE[self.kind](*_aligned(out, y, sigma, m))


def _mean(schedule: SDE | DDPMSchedule | None, sigma: Tensor) -> Tensor:
    """m of each level, in float64 with a schedule."""
    if schedule is None:
        return torch.ones_like(sigma)
    if isinstance(schedule, SDE):
        return schedule.mean(schedule.time(sigma.double()))
    return (1 + sigma.double().square()).rsqrt()


def _aligned(value: Tensor, y: Tensor, sigma: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """All four in one dtype, float32 at least, and sigma and m as [B, 1, ...]."""
    dtype = torch.promote_types(torch.promote_types(value.dtype, y.dtype), sigma.dtype)
    y = y.to(dtype)
    return value.to(dtype), y, expand_like(sigma, y), expand_like(m, y)


def _check_schedule(schedule: Any) -> None:
    if schedule is not None and not isinstance(schedule, (SDE, DDPMSchedule)):
        raise TypeError(
            f"schedule: got {type(schedule).__name__}, expected an SDE, a DDPMSchedule or none"
        )
