"""Networks of other forms as scores: ``score(x, sigma)``, what losses, trainer and samplers call.

A network that takes ``(x, sigma)`` and returns the score needs nothing from here. The wrappers are
modules, so their parameters, devices and state dictionaries are those of the network inside. What
is passed beyond ``x`` and ``sigma`` (classes, say) reaches the network as it came.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from score_kernels import _check

__all__ = ["by_label", "by_sigma", "unconditional"]


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
        _check.instance("net", net, nn.Module, "a torch.nn.Module")
        self.net = net
        self.divide = divide


class _Unconditional(_Wrapper):
    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        _check.sigma(sigma, x)
        return _over(self.net(x, **conditions), sigma)


class _BySigma(_Wrapper):
    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        _check.sigma(sigma, x)
        out = self.net(x, sigma, **conditions)
        return _over(out, sigma) if self.divide else out


class _ByLabel(_Wrapper):
    sigmas: Tensor

    def __init__(self, net: nn.Module, sigmas: Any, divide: bool) -> None:
        super().__init__(net, divide)
        table = torch.tensor(_check.noise_levels(sigmas), dtype=torch.float32)
        # Kept rising, as searchsorted wants it.
        self.register_buffer("sigmas", table.flip(0), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        _check.sigma(sigma, x)
        last = len(self.sigmas) - 1
        place = torch.searchsorted(self.sigmas, sigma).clamp_(max=last)
        known = self.sigmas[place] == sigma
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and not known.all():
            other = float(sigma[~known][0])
            raise ValueError(f"sigma: got {other:g}, expected one of the {last + 1} levels")
        out = self.net(x, last - place, **conditions)
        return _over(out, torch.where(known, sigma if self.divide else 1.0, math.nan))


def _over(out: Tensor, sigma: Tensor) -> Tensor:
    # In float32, whatever the network computes in: at small sigma half precision overflows.
    wide = out.to(torch.promote_types(out.dtype, sigma.dtype))
    return wide / sigma.view(-1, *[1] * (out.dim() - 1))
