"""Networks of other forms as scores: ``score(x, sigma)``, what losses, trainer and samplers call.

A network that takes ``(x, sigma)`` and returns the score needs nothing from here. The wrappers are
modules, so their parameters, devices and state dictionaries are those of the network inside. What
is passed beyond ``x`` and ``sigma`` (classes, say) reaches the network as it came.

What diffusion models predict is one of four quantities, each of which gives the others. With
``y = x_0 + sigma z`` the data plus noise that a score is told, m what a schedule leaves of the data
(1 without one) and ``x_t = m y = m x_0 + std z`` what its network sees:

| name | what it is | as the score of y |
|---|---|---|
| epsilon | z | ``-epsilon / sigma`` |
| x0 | x_0 | ``(x0 - y) / sigma^2`` |
| v | ``m z - std x_0`` | ``-(v / m + sigma y) / (sigma (1 + sigma^2))`` |
| score | ``grad log p_t(x_t)`` | ``m score`` |

v is that of Salimans and Ho (2022, arXiv 2202.00512), who have ``m^2 + std^2 = 1``; its line here
needs no more than ``std = m sigma``, so that it holds for every schedule. Each is meant as the mean
over what y can have come from, which is what a network learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from score_kernels import checks
from score_kernels.diffusion.sde import SDE, DDPMSchedule

__all__ = ["as_score", "by_label", "by_sigma", "convert", "unconditional"]

# (value, y, sigma, m) -> value, the last two shaped to fit the first two.
_Map = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Quantity(NamedTuple):
    """A quantity of the module's table: to the score of y, and back."""

    to_score: _Map
    from_score: _Map


_QUANTITIES = {
    "epsilon": _Quantity(
        lambda epsilon, y, sigma, m: -epsilon / sigma,
        lambda score, y, sigma, m: -sigma * score,
    ),
    # Divided twice: sigma^2 leaves float32's range long before sigma does.
    "x0": _Quantity(
        lambda x0, y, sigma, m: (x0 - y) / sigma / sigma,
        lambda score, y, sigma, m: y + sigma * (sigma * score),
    ),
    "v": _Quantity(
        lambda v, y, sigma, m: -(v / m + sigma * y) / sigma / (1 + sigma * sigma),
        lambda score, y, sigma, m: -m * sigma * (y + (1 + sigma * sigma) * score),
    ),
    "score": _Quantity(
        lambda score_t, y, sigma, m: m * score_t,
        lambda score, y, sigma, m: score / m,
    ),
}


def as_score(net: nn.Module, *, kind: str, schedule: SDE | DDPMSchedule | None = None) -> nn.Module:
    """A network that predicts the noise, the clean sample, v or a score, as a score.

    Args:
        net: ``net(x, told, **conditions)``; returns x's shape, or an object that has it as
            ``.sample``.
        kind: what it predicts: "epsilon", "x0", "v" or "score", see this module's table (a score is
            that of what the network sees), or "denoiser", the x_0 of EDM's ``D(y, sigma)`` (Karras
            et al. 2022, arXiv 2206.00364), with no schedule.
        schedule: what the network sees and is told.

            - none: ``(y, sigma)`` with sigma ``[B]`` float32.
            - a :class:`SDE`: ``(x_t, t)`` with t ``[B]`` float32, the time of
              this sigma; outside 0 to 1 where sigma is outside the schedule. Networks that want a
              multiple of t (999 t, say) take it themselves.
            - a :class:`DDPMSchedule`: ``(x_t, i)`` with i ``[B]`` int64, the step
              whose level is nearest to sigma. Between levels x_t still is what sigma asks for,
              ``y / sqrt(1 + sigma^2)``: of the right size, told of a level slightly off.

    Returns:
        A module called as ``score(y, sigma, **conditions)`` with sigma ``[B]``. Times and m are
        computed in float64, the score in float32 at least, whatever the network computes in.
        Nothing waits for the device.

    Raises:
        TypeError: net is not a module, or schedule not a schedule; when called, net returns
            something else than above.
        ValueError: kind is not one of the above, or is "denoiser" with a schedule; when called,
            sigma is not ``[B]`` or net returns another shape, such as the twice as many channels of
            a network that predicts variances too.
    """
    return _AsScore(net, kind, schedule)


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
        schedule: whose m and x_t "v" and "score" are meant with; none: m = 1, ``x_t = y``.

    Returns:
        ``[B, ...]``, the quantity `target`, computed in the widest dtype of the three and in
        float32 at least. It goes by way of the score: at a sigma far above the data's scale, x0 and
        v come out within a few roundings of y, not of themselves.

    Raises:
        TypeError: schedule is not a schedule, or a tensor not one of floats.
        ValueError: a name is not one of the above, or a shape is wrong.
    """
    for name, quantity in (("source", source), ("target", target)):
        checks.choice(name, quantity, _QUANTITIES)
    _check_schedule(schedule)
    for name, tensor in (("y", y), ("value", value), ("sigma", sigma)):
        checks.score(name, tensor)
        if tensor.device != y.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of y, {y.device}")
    checks.sigma(sigma, y)
    if value.shape != y.shape:
        raise ValueError(
            f"value: got shape {tuple(value.shape)}, expected that of y, {tuple(y.shape)}"
        )
    value, y, sigma, m = _wide(value, y, sigma, _mean(schedule, sigma))
    score = _QUANTITIES[source].to_score(value, y, sigma, m)
    return _QUANTITIES[target].from_score(score, y, sigma, m)


def unconditional(net: nn.Module) -> nn.Module:
    """``score(x, sigma) = net(x) / sigma``: a network that is not told the noise level.

    Technique 3 of NCSNv2 (Song and Ermon 2020, arXiv 2006.09011): the norm of a trained score grows
    as ``1 / sigma``, so that the network itself keeps one scale over all levels.

    Args:
        net: ``net(x, **conditions)`` with x ``[B, ...]``; returns x's shape.

    Returns:
        A module called as ``score(x, sigma, **conditions)``, sigma ``[B]``.

    Raises:
        TypeError: net is not a module.
        ValueError: when called, sigma is not ``[B]``.
    """
    return _Unconditional(net, divide=True)


def by_sigma(net: nn.Module, *, divide: bool = True) -> nn.Module:
    """``score(x, sigma) = net(x, sigma) / sigma``, or ``net(x, sigma)`` itself.

    Args:
        net: ``net(x, sigma, **conditions)`` with sigma ``[B]`` float32; returns x's shape.
        divide: whether its output is divided by sigma.

    Returns, Raises:
        As :func:`unconditional`.
    """
    return _BySigma(net, divide)


def by_label(net: nn.Module, sigmas: Any, *, divide: bool = True) -> nn.Module:
    """``score(x, sigma_i) = net(x, i) / sigma_i``, or ``net(x, i)`` itself: a network that is told
    the index of the level, 0 for the largest.

    With `divide` the form of NCSNv2's code (Song and Ermon 2020, arXiv 2006.09011), without it that
    of NCSN (Song and Ermon 2019, arXiv 1907.05600).

    Args:
        net: ``net(x, labels, **conditions)`` with labels ``[B]`` int64; returns x's shape.
        sigmas: the levels it was trained on, strictly decreasing.
        divide: whether its output is divided by sigma.

    Returns:
        A module called as ``score(x, sigma, **conditions)``, every sigma one of the levels.

    Raises:
        TypeError: net is not a module.
        ValueError: sigmas do not decrease; when called, sigma is not ``[B]`` or, on a CPU, none of
            the levels. On other devices, which would have to be waited for, the score of a sample
            at no level is nan.
    """
    return _ByLabel(net, sigmas, divide)


class _Wrapper(nn.Module):
    """The network inside, and whether its output is divided by sigma."""

    def __init__(self, net: nn.Module, divide: bool) -> None:
        super().__init__()
        checks.instance("net", net, nn.Module, "a torch.nn.Module")
        self.net = net
        self.divide = checks.flag("divide", divide)


class _Unconditional(_Wrapper):
    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        checks.sigma(sigma, x)
        return _over(self.net(x, **conditions), sigma)


class _BySigma(_Wrapper):
    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        checks.sigma(sigma, x)
        out = self.net(x, sigma, **conditions)
        return _over(out, sigma) if self.divide else out


class _ByLabel(_Wrapper):
    sigmas: Tensor

    def __init__(self, net: nn.Module, sigmas: Any, divide: bool) -> None:
        super().__init__(net, divide)
        table = torch.tensor(checks.noise_levels(sigmas), dtype=torch.float32)
        # Kept rising, as searchsorted wants it.
        self.register_buffer("sigmas", table.flip(0), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        checks.sigma(sigma, x)
        last = len(self.sigmas) - 1
        place = torch.searchsorted(self.sigmas, sigma).clamp_(max=last)
        known = self.sigmas[place] == sigma
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and not known.all():
            other = float(sigma[~known][0])
            raise ValueError(f"sigma: got {other:g}, expected one of the {last + 1} levels")
        out = self.net(x, last - place, **conditions)
        return _over(out, torch.where(known, sigma if self.divide else 1.0, math.nan))


class _AsScore(nn.Module):
    def __init__(self, net: nn.Module, kind: str, schedule: SDE | DDPMSchedule | None) -> None:
        super().__init__()
        checks.instance("net", net, nn.Module, "a torch.nn.Module")
        _check_schedule(schedule)
        checks.choice("kind", kind, (*_QUANTITIES, "denoiser"))
        if kind == "denoiser" and schedule is not None:
            raise ValueError(
                f"schedule: got {type(schedule).__name__} with kind = 'denoiser', expected none: "
                "it is told sigma itself; 'x0' takes schedules"
            )
        self.net = net
        self.kind = kind
        self.schedule = schedule

    def forward(self, y: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        checks.sigma(sigma, y)
        told, m = self._told(sigma)
        x = y if self.schedule is None else (_fit(m, y) * y).to(y.dtype)
        out = self.net(x, told, **conditions)
        if not isinstance(out, Tensor):
            out = getattr(out, "sample", out)
            checks.instance("net", out, Tensor, "a tensor, or an object with one as .sample")
        if out.shape != y.shape:
            raise ValueError(
                f"kind: got {self.kind!r} of a network that returns shape {tuple(out.shape)}, "
                f"expected that of x, {tuple(y.shape)}; of one that predicts variances too, wrap "
                "the half that is the prediction"
            )
        quantity = _QUANTITIES["x0" if self.kind == "denoiser" else self.kind]
        return quantity.to_score(*_wide(out, y, sigma, m))

    def _told(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is told, and m in float64."""
        if isinstance(self.schedule, SDE):
            time = self.schedule.time(sigma.double()).float()
            # At the time as it is told: a difference to x_t / m would be divided by sigma^2.
            return time, self.schedule.mean(time.double())
        m = _mean(self.schedule, sigma)
        return (sigma if self.schedule is None else self.schedule.index(sigma)), m


def _over(out: Tensor, sigma: Tensor) -> Tensor:
    # In float32, whatever the network computes in: at small sigma half precision overflows.
    wide = out.to(torch.promote_types(out.dtype, sigma.dtype))
    return wide / _fit(sigma, out)


def _mean(schedule: SDE | DDPMSchedule | None, sigma: Tensor) -> Tensor:
    """m of a level, in float64."""
    sigma = sigma.double()
    if schedule is None:
        return torch.ones_like(sigma)
    if isinstance(schedule, SDE):
        return schedule.mean(schedule.time(sigma))
    return (1 + sigma.square()).rsqrt()


def _wide(value: Tensor, y: Tensor, sigma: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """All four in one dtype, for a quantity's formulas: at small sigma half precision overflows."""
    dtype = torch.promote_types(torch.promote_types(value.dtype, y.dtype), sigma.dtype)
    return value.to(dtype), y.to(dtype), _fit(sigma, y).to(dtype), _fit(m, y).to(dtype)


def _fit(each: Tensor, x: Tensor) -> Tensor:
    return each.view(-1, *[1] * (x.dim() - 1))


def _check_schedule(schedule: Any) -> None:
    if schedule is not None and not isinstance(schedule, (SDE, DDPMSchedule)):
        raise TypeError(
            f"schedule: got {type(schedule).__name__}, expected an SDE, a DDPMSchedule or none"
        )
