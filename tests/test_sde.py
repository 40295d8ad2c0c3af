"""The diffusions: each against its own differential equations, and the way back to time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from score_kernels.diffusion.sde import SDE, VE, VP, DDPMSchedule, SubVP

T = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)
KINDS = [VE(), VE(0.1, 3.0), VP(), VP(2.0, 2.0), SubVP(), SubVP(0.5, 7.0)]
each_kind = pytest.mark.parametrize("sde", KINDS, ids=lambda s: type(s).__name__)


def derivative(f: object, t: Tensor, h: float = 1e-5) -> Tensor:
    return (f(t + h) - f(t - h)) / (2 * h)  # type: ignore[operator]


@each_kind
def test_mean_and_variance_solve_their_equations(sde: SDE) -> None:
    """m' = f m, (std^2)' = 2 f std^2 + g^2; central differences are good to about h^2."""
    torch.testing.assert_close(
        derivative(sde.mean, T), sde.drift(T) * sde.mean(T), rtol=1e-6, atol=1e-7
    )
    variance = derivative(lambda t: sde.std(t).square(), T)
    want = 2 * sde.drift(T) * sde.std(T).square() + sde.diffusion(T)
    torch.testing.assert_close(variance, want, rtol=1e-5, atol=1e-7)


@each_kind
def test_time_is_the_way_back_of_sigma(sde: SDE) -> None:
    torch.testing.assert_close(sde.time(sde.sigma(T)), T, rtol=0, atol=1e-13)
    assert bool((sde.sigma(T).diff() > 0).all())


def test_published_ends() -> None:
    """DDPM's linear betas: abar_1000 = 4.0e-5; VP is their limit."""
    ddpm = DDPMSchedule.linear()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(ddpm.alphas_bar, (1 - betas).cumprod(0))
    one = torch.ones((), dtype=torch.float64)
    assert float(VP().mean(one).square()) == pytest.approx(float(ddpm.alphas_bar[-1]), rel=0.1)


@pytest.mark.parametrize("offset", [0.008, 0.1])
def test_the_cosine_schedule(offset: float) -> None:
    """Equation 17 of arXiv 2102.09672, abar = f(t) / f(0), and betas of at most 0.999."""
    times = np.arange(101) / 100
    f = np.cos((times + offset) / (1 + offset) * np.pi / 2) ** 2
    want = f[1:] / f[0]
    # The last beta would be 1.
    want[-1] = 0.001 * want[-2]
    np.testing.assert_allclose(DDPMSchedule.cosine(100, offset).alphas_bar, want, rtol=1e-12)
    assert DDPMSchedule.cosine().alphas_bar[499] == pytest.approx(0.4938, abs=1e-4)


def test_sigmas_and_betas_of_a_chain() -> None:
    schedule = DDPMSchedule([0.8, 0.5, 0.2])
    np.testing.assert_allclose(schedule.sigmas, [0.5, 1.0, 2.0], rtol=1e-15)
    linear = DDPMSchedule.linear(3, 0.1, 0.5).alphas_bar
    np.testing.assert_allclose(linear, [0.9, 0.9 * 0.7, 0.9 * 0.7 * 0.5], rtol=1e-15)


def test_index_is_the_nearest_step() -> None:
    # By ratio: between 0.5 and 2 the middle is 1, not 1.25.
    coarse = DDPMSchedule([0.8, 0.2])
    assert coarse.index(torch.tensor([0.99, 1.01, 1.24])).tolist() == [0, 1, 1]
    ddpm = DDPMSchedule.linear(50)
    assert torch.equal(ddpm.index(ddpm.sigmas.float()), torch.arange(50))
    near = ddpm.sigmas * torch.exp(0.4 * ddpm.sigmas.log().diff().min() * (torch.rand(50) * 2 - 1))
    assert torch.equal(ddpm.index(near), torch.arange(50))
    assert ddpm.index(torch.tensor([1e-9, 1e9])).tolist() == [0, 49]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma_min: got 3.0, expected less than sigma_max = 2.0"):
        VE(3.0, 2.0)
    with pytest.raises(ValueError, match="beta_min: got 0"):
        VP(0)
    with pytest.raises(ValueError, match=r"begin with \[0.5, 0.4, 0.6\], expected strictly decr"):
        DDPMSchedule([0.5, 0.4, 0.6, 0.3])
    for values in ([0.5, 0.6], [0.5, 0.5], [1.0, 0.5], [0.5, 0.0], []):
        with pytest.raises(ValueError, match="alphas_bar: got values that begin with"):
            DDPMSchedule(values)
    with pytest.raises(TypeError, match="alphas_bar: got float 0.5, expected a tensor or"):
        DDPMSchedule(0.5)
