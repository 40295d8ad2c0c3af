"""Conversions between what networks predict and the score: against closed forms and DDPM's loss."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor, nn

from score_kernels import NoiseKey, annealed_langevin, dsm_loss, ops
from score_kernels.diffusion.prediction import as_score, convert
from score_kernels.diffusion.sde import SDE, VE, VP, DDPMSchedule, SubVP
from score_kernels.noise import Purpose

KINDS = ["epsilon", "x0", "v", "score"]
SCHEDULES = [
    None,
    VE(0.01, 50.0),
    VP(),
    SubVP(),
    SubVP(0.5, 7.0),
    DDPMSchedule.linear(),
    DDPMSchedule.cosine(50),
]
Schedule = SDE | DDPMSchedule | None
each_kind = pytest.mark.parametrize("kind", KINDS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def column(each: Tensor, x: Tensor) -> Tensor:
    return each.reshape(-1, *[1] * (x.dim() - 1))


def coordinates(schedule: Schedule, level: Tensor) -> tuple[Tensor, Tensor]:
    """(m, std) as the schedule itself has them, from a network's input level."""
    if schedule is None:
        return torch.ones_like(level), level
    if isinstance(schedule, DDPMSchedule):
        abar = schedule.alphas_bar[level]
        return abar.sqrt(), (1 - abar).sqrt()
    return schedule.mean(level), schedule.std(level)


class Gaussian(nn.Module):
    """What a perfectly trained network predicts where the data are N(mu, variance I)."""

    def __init__(self, kind: str, schedule: Schedule, mu: float, variance: float) -> None:
        super().__init__()
        self.kind, self.schedule, self.mu, self.variance = kind, schedule, mu, variance

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        assert level.dtype == (
            torch.int64 if isinstance(self.schedule, DDPMSchedule) else torch.float32
        )
        level = level if isinstance(self.schedule, DDPMSchedule) else level.double()
        m, std = (column(each, x) for each in coordinates(self.schedule, level))
        score = (m * self.mu - x) / (m**2 * self.variance + std**2)
        x0 = self.mu - m * self.variance * score
        return {
            "score": score,
            "epsilon": -std * score,
            "x0": x0,
            "denoiser": x0,
            "v": -m * std * score - std * x0,
        }[self.kind]


def levels(schedule: Schedule, count: int) -> Tensor:
    """Noise levels that the schedule has, in float32."""
    if isinstance(schedule, DDPMSchedule):
        return schedule.sigmas[torch.randint(len(schedule.sigmas), (count,))].float()
    if schedule is None:
        return (torch.rand(count) * 10 - 5).exp()
    # Many of them early, where x_0 and y nearly agree.
    return schedule.sigma(torch.rand(count, dtype=torch.float64).mul(-8).exp()).float()


@each_schedule
@pytest.mark.parametrize("kind", [*KINDS, "denoiser"])
def test_perfect_networks_of_gaussian_data(kind: str, schedule: Schedule) -> None:
    """-(y - mu) / (variance + sigma^2), whatever was predicted.

    A network's time is float32: off by 2^-24 of it, which moves log sigma and log m by no
    more than 20 times that (beta, or VE's rate, at most 20) and the score by at most eight times as
    much, counted by its parts in y and in mu.
    """
    if kind == "denoiser" and schedule is not None:
        return
    mu, variance = 0.7, 0.3
    sigma = levels(schedule, 257)
    y = mu + (variance + sigma.double()[:, None].square()).sqrt() * torch.randn(257, 5).double()
    score = as_score(Gaussian(kind, schedule, mu, variance), kind=kind, schedule=schedule)
    total = variance + sigma.double()[:, None].square()
    got = score(y, sigma)
    assert got.dtype == torch.float64
    slack = 160 * 2**-24 * (y.abs() + mu) / total
    assert bool(((got - (mu - y) / total).abs() <= slack).all())


@pytest.mark.parametrize("rank", [1, 2, 4])
@each_schedule
def test_every_pair_composes(schedule: Schedule, rank: int) -> None:
    """All four from one draw of x_0 and z, by their definitions; each pair to a few roundings.

    x_0 and y are known to a rounding of |x_0| + |y|; what that does to the others is `reach`.
    """
    shape = (101, 3, 1, 2)[:rank]
    sigma = (torch.rand(101, dtype=torch.float64) * 6 - 3).mul(2.302585).exp()
    x0, z = torch.randn(shape).double(), torch.randn(shape).double()
    s = column(sigma, x0)
    if schedule is None:
        m = torch.ones_like(s)
    elif isinstance(schedule, SDE):
        m = column(schedule.mean(schedule.time(sigma)), x0)
    else:
        m = 1 / (1 + s**2).sqrt()
    y = x0 + s * z
    truth = {"epsilon": z, "x0": x0, "v": m * z - m * s * x0, "score": -z / (m * s)}
    reach = {
        "epsilon": 1 / s,
        "x0": torch.ones_like(s),
        "v": m * (1 / s + s),
        "score": 1 / m / s**2,
    }
    size = x0.abs() + y.abs() + s * z.abs()
    for source, target in itertools.product(KINDS, KINDS):
        got = convert(truth[source], y, sigma, source=source, target=target, schedule=schedule)
        slack = 64 * 2**-53 * reach[target] * size
        assert bool(((got - truth[target]).abs() <= slack).all()), (source, target)
        back = convert(got, y, sigma, source=target, target=source, schedule=schedule)
        error = (back - truth[source]).abs() / (reach[source] * size)
        assert error.max() <= 1e-12, (source, target)


class Small(nn.Module):
    """A small smooth network of x and its level."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(size + 1, 24), nn.Tanh(), nn.Linear(24, size))

    def forward(self, x: Tensor, level: Tensor, *, shift: Tensor | float = 0.0) -> Tensor:
        return self.inner(torch.cat([x, level.to(x.dtype)[:, None] / 100], 1)) + shift


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddpm_s_loss_and_ours_have_one_gradient(dtype: torch.dtype, kind: str) -> None:
    """1/2 || eps_theta(x_t, i) - z ||^2 of Ho et al. 2020 is denoising score matching by name.

    In float64 the one difference is that our levels are float32; at those, DDPM's loss agrees to
    rounding. An error of z is 1 / sigma times one of x_0, and sqrt(abar) times one of v.
    """
    torch.manual_seed(4)
    chain = DDPMSchedule.linear(100, 1e-3, 0.2)
    net = Small().to(dtype)
    x0 = torch.randn(64, 6, dtype=dtype)
    step = torch.randint(100, (64,))
    key = NoiseKey(7, draw=3)

    score = as_score(net, kind=kind, schedule=chain)
    loss = dsm_loss(score, x0, chain.sigmas.flip(0), labels=99 - step, noise=key)
    ours = torch.autograd.grad(loss, list(net.parameters()))

    sigma = chain.sigmas[step].float().double()
    abar = chain.alphas_bar[step] if dtype == torch.float32 else 1 / (1 + sigma**2)
    m, std = (each.sqrt()[:, None].to(dtype) for each in (abar, 1 - abar))
    z = ops.normal(x0.shape, key.for_purpose(Purpose.DSM_NOISE), dtype=dtype)
    out = net(m * x0 + std * z, step)
    target, weight = {
        "epsilon": (z, torch.ones_like(abar)),
        "x0": (x0, abar / (1 - abar)),
        "v": (m * z - std * x0, abar),
    }[kind]
    direct = 0.5 * (weight.to(dtype)[:, None] * (out - target).square()).sum(1).mean()
    theirs = torch.autograd.grad(direct, list(net.parameters()))

    for a, b in zip(ours, theirs, strict=True):
        tolerance = tolerances.FP32_RELATIVE if dtype == torch.float32 else 1e-12
        assert (a - b).norm() <= tolerance * b.norm()
    assert loss.item() == pytest.approx(direct.item(), rel=tolerances.FP32_RELATIVE)


def test_between_the_levels_of_a_chain() -> None:
    """The nearest step is named; x_t has the size that sigma asks for."""
    chain = DDPMSchedule.linear(50)
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, step: Tensor) -> Tensor:
            seen.append((x, step))
            return x

    sigma = (chain.sigmas[[7, 30, 49]] * torch.tensor([1.001, 0.999, 1e3])).float()
    y = torch.randn(3, 4)
    as_score(Spy(), kind="epsilon", schedule=chain)(y, sigma)
    ((x, step),) = seen
    assert step.tolist() == [7, 30, 49] and step.dtype == torch.int64
    want = y.double() / (1 + sigma.double()[:, None] ** 2).sqrt()
    torch.testing.assert_close(x.double(), want, rtol=tolerances.FP32_RELATIVE, atol=0)
    assert torch.equal(step, chain.index(sigma))


@each_schedule
@each_kind
def test_a_module_that_trains_and_samples(kind: str, schedule: Schedule) -> None:
    net = Small(4)
    score = as_score(net, kind=kind, schedule=schedule)
    assert [id(p) for p in score.parameters()] == [id(p) for p in net.parameters()]
    assert list(score.state_dict()) == [f"net.{name}" for name in net.state_dict()]
    sigmas = levels(schedule, 64).unique().flip(0)[::9]
    dsm_loss(copy.deepcopy(score), torch.randn(16, 4), sigmas, seed=1, shift=0.5).backward()
    loss = dsm_loss(score, torch.randn(16, 4), sigmas, seed=1, shift=0.5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    small = 0.1 * float(sigmas[-1]) ** 2
    run = {"steps_per_level": 2, "step_size": small, "seed": 2}
    x = annealed_langevin(score, (5, 4), sigmas, **run)
    assert x.isfinite().all()


@each_schedule
def test_samples_do_not_see_each_other(schedule: Schedule) -> None:
    """To the bit, with a network whose rows are to the bit independent."""

    class Rows(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            return x.sin() * level[:, None].to(x.dtype)

    sigma, y = levels(schedule, 9), torch.randn(9, 3)
    for kind in KINDS:
        score = as_score(Rows(), kind=kind, schedule=schedule)
        whole = score(y, sigma)
        for i in range(9):
            assert torch.equal(score(y[i : i + 1], sigma[i : i + 1]), whole[i : i + 1])


def test_outputs_of_other_forms() -> None:
    net = Small(3)

    class Wrapped(nn.Module):
        def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.wrap = wrap

        def forward(self, x: Tensor, level: Tensor) -> Any:
            return self.wrap(net(x, level))

    y, sigma = torch.randn(2, 3), torch.tensor([0.5, 3.0])
    want = as_score(net, kind="epsilon")(y, sigma)
    inside = as_score(Wrapped(lambda out: SimpleNamespace(sample=out)), kind="epsilon")
    assert torch.equal(inside(y, sigma), want)
    with pytest.raises(TypeError, match=r"net: got tuple .*, expected a tensor, or an object"):
        as_score(Wrapped(lambda out: (out,)), kind="epsilon")(y, sigma)
    twice = as_score(Wrapped(lambda out: torch.cat([out, out], 1)), kind="epsilon")
    with pytest.raises(ValueError, match=r"net: got .*\(2, 6\), expected .*\(2, 3\).*variances"):
        twice(y, sigma)


@each_kind
def test_half_precision_networks_do_not_overflow(kind: str) -> None:
    """1e3 / 0.01 is past the largest fp16, 1e3 / 0.01^2 and 1e3 more so."""

    class Constant(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            assert x.dtype == torch.float16
            return torch.full_like(x, 1e3)

    y, sigma = torch.ones(2, 3).half(), torch.full((2,), 0.01)
    want = convert(torch.full((2, 3), 1e3).double(), y, sigma, source=kind, target="score")
    score = as_score(Constant(), kind=kind)(y, sigma)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), want, rtol=tolerances.FP32_RELATIVE, atol=0)


def test_chains_survive_half_and_compile() -> None:
    """`half()` leaves the table of levels as it is; a compiled score is the score."""
    chain = DDPMSchedule.linear()
    sigma, y = levels(chain, 64), torch.randn(64, 3)
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, step: Tensor) -> Tensor:
            seen.append(step)
            return x

    as_score(Spy(), kind="v", schedule=chain).half()(y, sigma)
    assert torch.equal(seen[0], chain.index(sigma))
    for schedule in (None, VP(), chain):
        score = as_score(Small(3), kind="v", schedule=schedule)
        compiled = torch.compile(score, fullgraph=True, backend="eager")
        assert torch.equal(compiled(y, sigma), score(y, sigma))


class Bowl(nn.Module):
    """The energy of a normal distribution with noise, and its score in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (x - self.mu).square().sum(1) / (2 * (1 + sigma**2))

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (self.mu - x) / (1 + sigma[:, None] ** 2)


def test_an_energy_s_negative_gradient_is_the_score() -> None:
    bowl, x, sigma = Bowl(), torch.randn(7, 3), torch.rand(7) + 0.5
    want = bowl.score(x, sigma).detach()
    # A module, a function and a bound method, in every mode of gradients.
    for net in (bowl, lambda x, sigma: bowl(x, sigma), bowl.forward):
        score = as_score(net, kind="energy")
        torch.testing.assert_close(score(x, sigma), want)
        with torch.no_grad():
            got = score(x, sigma)
        torch.testing.assert_close(got, want)
        assert not got.requires_grad and not x.requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(score(x.clone(), sigma.clone()), want)
    alone = as_score(lambda x: x.square().sum(1) / 2, kind="energy")
    torch.testing.assert_close(alone(x), -x)
    weighted = as_score(lambda x, sigma, w: w * bowl(x, sigma), kind="energy")
    torch.testing.assert_close(weighted(x, sigma, w=3.0), 3 * want)


def test_an_energy_is_sampled_and_trained() -> None:
    bowl, x = Bowl(), torch.randn(7, 3)
    score = as_score(bowl, kind="energy")
    assert list(score.state_dict()) == ["net.mu"]
    options: dict[str, Any] = {"steps_per_level": 3, "step_size": 0.1, "seed": 1}
    got, want = (annealed_langevin(s, x, [2.0, 1.0], **options) for s in (score, bowl.score))
    torch.testing.assert_close(got, want)
    losses = []
    for net in (score, bowl.score):
        bowl.zero_grad()
        dsm_loss(net, x, [2.0, 1.0], seed=3).backward()
        losses.append(bowl.mu.grad.clone())
    torch.testing.assert_close(*losses)
    # The derivative of a score, as sliced losses take it.
    leaf = x.clone().requires_grad_()
    (second,) = torch.autograd.grad(score(leaf, torch.ones(7)).sum(), leaf)
    torch.testing.assert_close(second, torch.full_like(x, -0.5))


def test_what_is_refused() -> None:
    net, y, sigma = Small(3), torch.randn(2, 3), torch.ones(2)
    with pytest.raises(TypeError, match="net: got float"):
        as_score(1.0, kind="epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule: got VP with kind = 'energy', expected none"):
        as_score(net, kind="energy", schedule=VP())
    with pytest.raises(ValueError, match=r"an energy of shape \(2, 3\), expected one number a"):
        as_score(lambda x: x, kind="energy")(y)
    with pytest.raises(ValueError, match="kind: got 'eps', expected one of 'epsilon', 'x0', 'v', "):
        as_score(net, kind="eps")
    with pytest.raises(TypeError, match="schedule: got list, expected an SDE"):
        as_score(net, kind="v", schedule=[1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule: got VP with kind = 'denoiser', expected none"):
        as_score(net, kind="denoiser", schedule=VP())
    with pytest.raises(ValueError, match=r"sigma: got shape \(\), expected \[2\]"):
        as_score(net, kind="v", schedule=VP())(y, torch.tensor(1.0))
    with pytest.raises(ValueError, match="source: got 'denoiser', expected one of 'epsilon'"):
        convert(y, y, sigma, source="denoiser", target="v")
    with pytest.raises(ValueError, match="target: got 'eps'"):
        convert(y, y, sigma, source="v", target="eps")
    for name, arguments in (
        ("value", (1.0, y, sigma)), ("y", (y, 1.0, sigma)), ("sigma", (y, y, 1.0)),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"{name}: got float"):
            convert(*arguments, source="v", target="x0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"value: got shape \(2, 2\), expected that of y, \(2, 3"):
        convert(y[:, 1:], y, sigma, source="v", target="score")
