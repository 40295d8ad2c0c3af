"""Diffusions ``dx = f(t) x dt + g(t) dw`` (Song et al. 2021, arXiv 2011.13456) and DDPM's chain.

A sample ``x_0`` becomes ``x_t = m(t) x_0 + std(t) z``. A score of this library is that of data plus
noise, ``score(y, sigma)`` with ``y = x_t / m(t)`` and ``sigma(t) = std(t) / m(t)``; so one score
serves all diffusions, and ``grad log p_t(x_t) = score(x_t / m, sigma) / m``.

Methods take and return tensors of any shape, elementwise; in float64 they are exact to a few ulps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks

__all__ = ["SDE", "VE", "VP", "DDPMSchedule", "SubVP"]


def linspace(first: float, last: float, count: int) -> Tensor:
    """Equally spaced float64 numbers on the CPU, whatever torch's defaults are."""
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


class SDE(ABC):
    """A diffusion over the times ``0 <= t <= 1``."""

    def mean(self, t: Tensor) -> Tensor:
        """m(t), the factor of the data."""
        return torch.ones_like(t)

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = m'(t) / m(t)."""
        return torch.zeros_like(t)

    @abstractmethod
    def std(self, t: Tensor) -> Tensor:
        """std(t), the standard deviation of the noise."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)^2."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The time at which ``std / m`` is sigma."""

    def sigma(self, t: Tensor) -> Tensor:
        """``std(t) / m(t)``, the noise level in units of the data."""
        return self.std(t) / self.mean(t)


class VE(SDE):
    """Variance exploding: ``m = 1``, ``std = sigma_min (sigma_max / sigma_min)^t``. NCSN's limit.

    The noise levels at times 0 and 1 are ``0 < sigma_min < sigma_max``.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_max, self.sigma_min = checks.ends(sigma_max, sigma_min)
        self._rate = math.log(self.sigma_max / self.sigma_min)

    def std(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self._rate * t).exp()

    def diffusion(self, t: Tensor) -> Tensor:
        return 2 * self._rate * self.std(t).square()

    def time(self, sigma: Tensor) -> Tensor:
        return (sigma / self.sigma_min).log() / self._rate


class VP(SDE):
    """Variance preserving: ``f = -beta / 2``, ``g^2 = beta``. DDPM's limit.

    ``beta(t)`` is linear from beta_min to beta_max, both above 0; ``m = exp(-1/2 int beta)``,
    ``std^2 = 1 - m^2``.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min = checks.positive("beta_min", beta_min)
        self.beta_max = checks.positive("beta_max", beta_max)

    def beta(self, t: Tensor) -> Tensor:
        """beta(t)."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def mean(self, t: Tensor) -> Tensor:
        return (-0.5 * self._integral(t)).exp()

    def std(self, t: Tensor) -> Tensor:
        return (-(-self._integral(t)).expm1()).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t)

    def time(self, sigma: Tensor) -> Tensor:
        return self._time_of(sigma.square().log1p())

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time_of(self, integral: Tensor) -> Tensor:
        # The root of rise/2 t^2 + beta_min t = integral, in the form that does not cancel.
        rise = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * rise * integral).sqrt())


class SubVP(VP):
    """Sub-variance preserving: VP's m with ``std = 1 - m^2``, ``g^2 = beta (1 - m^4)``."""

    def std(self, t: Tensor) -> Tensor:
        return -(-self._integral(t)).expm1()

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t) * -(-2 * self._integral(t)).expm1()

    def time(self, sigma: Tensor) -> Tensor:
        # m = (sqrt(sigma^2 + 4) - sigma) / 2 = exp(-asinh(sigma / 2)).
        return self._time_of(2 * (sigma / 2).asinh())


class DDPMSchedule:
    """DDPM's timesteps, ``x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) z`` for ``i = 0 .. N - 1``.

    Ho et al. 2020, arXiv 2006.11239. The argument `alphas_bar` is ``[N]``, the products of
    ``1 - beta``, strictly decreasing inside (0, 1).

    Attributes:
        alphas_bar: as given, float64 on the CPU.
        sigmas: ``[N]`` float64, ``sqrt((1 - abar) / abar)``, increasing.
    """

    def __init__(self, alphas_bar: Any) -> None:
        numbers = checks.numbers_of("alphas_bar", alphas_bar)
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        inside = (0 < values) & (values < 1)
        if not len(values) or not inside.all() or not (values.diff() < 0).all():
            raise ValueError(
                f"alphas_bar: got values that begin with {values[:3].tolist()}, expected strictly "
                "decreasing ones inside (0, 1)"
            )
        self.alphas_bar = values
        self._set_sigmas(((1 - values) / values).sqrt())

    def _set_sigmas(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        logs = sigmas.log()
        self._middles = (logs[1:] + logs[:-1]) / 2

    @classmethod
    def from_sigmas(cls, sigmas: Any) -> DDPMSchedule:
        """The schedule of given noise levels, ``abar = 1 / (1 + sigma^2)``.

        `sigmas` are strictly decreasing, as samplers take them: the last is that of timestep 0. The
        attribute of that name has the same numbers. Two levels so close, or one below about 1e-8,
        that float64 does not tell their abar apart, or from 1, are a ValueError.
        """
        levels = torch.tensor(checks.noise_levels(sigmas)[::-1], dtype=torch.float64, device="cpu")
        try:
            schedule = cls(1 / (1 + levels.square()))
        except ValueError:
            raise ValueError(
                f"sigmas: got levels down to {float(levels[0]):g}, expected ones whose "
                "abar = 1 / (1 + sigma^2) differ in float64, and from 1"
            ) from None
        # Without the rounding of abar.
        schedule._set_sigmas(levels)
        return schedule

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> DDPMSchedule:
        """DDPM's own: `steps` betas from `first` to `last`, equally spaced."""
        betas = linspace(first, last, steps)
        return cls((-betas).log1p().cumsum(0).exp())

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008) -> DDPMSchedule:
        """Of Nichol and Dhariwal 2021, arXiv 2102.09672; betas at most 0.999."""
        t = linspace(0, 1, steps + 1)
        level = ((t + offset) / (1 + offset) * math.pi / 2).cos().square()
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        return cls((-betas).log1p().cumsum(0).exp())

    def index(self, sigma: Tensor) -> Tensor:
        """The timestep of the nearest sigma, by ratio: int64, sigma's shape."""
        # Moved only once: every copy to the device would be waited for.
        self._middles = self._middles.to(sigma.device)
        return torch.searchsorted(self._middles, sigma.double().log().contiguous())


def prior_of(sigmas: Any, first: float) -> float:
    """Deviation of y at the first level: of a schedule's x = m y, that is standard normal."""
    return math.sqrt(1 + first**2) if isinstance(sigmas, DDPMSchedule) else first


def levels_of(sigmas: Any, name: str = "sigmas") -> list[float]:
    """Strictly decreasing noise levels: those given, or all of a `DDPMSchedule`."""
    if isinstance(sigmas, str) or not hasattr(sigmas, "__iter__"):
        expected = "noise levels or a score_kernels.DDPMSchedule"
        checks.instance(name, sigmas, DDPMSchedule, expected)
        return sigmas.sigmas.flip(0).tolist()
    return checks.noise_levels(sigmas, name)
