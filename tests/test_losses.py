"""Denoising score matching: closed forms, gradients, reproducibility, and every wrong input."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from scipy import stats
from torch import Tensor, nn

from score_kernels import NoiseKey, dsm_loss, geometric_sigmas, ops
from score_kernels.noise import Purpose

SIGMAS = geometric_sigmas(2.0, 0.1, 5)


def zero(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros_like(x)


def per_sample(net: Any, x: Tensor, sigmas: Any, key: NoiseKey) -> Tensor:
    """The loss of each sample on its own: what the noise contract makes possible."""
    return torch.stack(
        [dsm_loss(net, x[i : i + 1], sigmas, noise=key.for_samples(i)) for i in range(len(x))]
    )


@pytest.mark.parametrize("shape", [(4000, 12), (500, 3, 8, 8), (2000,)])
def test_the_zero_network_s_loss_is_half_the_dimension(shape: tuple[int, ...]) -> None:
    """|z|^2 / 2 summed over D: chi-square with B D degrees of freedom."""
    x = torch.rand(shape)
    loss = float(dsm_loss(zero, x, SIGMAS, seed=1))
    cdf = stats.chi2.cdf(2 * loss * shape[0], math.prod(shape))
    assert tolerances.ALPHA / 2 < cdf < 1 - tolerances.ALPHA / 2, loss


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_the_perfect_score_of_a_gaussian_reaches_the_floor(sigma: float) -> None:
    """Data N(0, I): (D/2) / (1 + sigma^2), here tested as a mean with its standard error."""
    dimension, batch = 10, 40_000
    x = torch.randn(batch, dimension, generator=torch.Generator().manual_seed(6))
    key = NoiseKey(2)

    def perfect(x: Tensor, sigma: Tensor) -> Tensor:
        return -x / (1 + sigma**2)[:, None]

    z = ops.normal(x.shape, key.for_purpose(Purpose.DSM_NOISE))
    level = torch.full((batch,), sigma)
    each = 0.5 * (sigma * perfect(x + sigma * z, level) + z).double().square().sum(1)
    loss = float(dsm_loss(perfect, x, [sigma], noise=key))
    np.testing.assert_allclose(loss, float(each.mean()), rtol=10 * tolerances.FP32_RELATIVE)
    floor = dimension / 2 / (1 + sigma**2)
    score = (loss - floor) / float(each.std() / math.sqrt(batch))
    assert 2 * stats.norm.sf(abs(score)) > tolerances.ALPHA / 3


def test_the_loss_is_the_formula(backend: str) -> None:
    """In fp64, with sigma per sample and the contract's own noise and levels."""
    key, batch = NoiseKey(77, draw=3), 50
    clean = torch.randn(batch, 2, 3, 4, dtype=torch.float64).float().double()
    words = ops.words((batch, 1), key.for_purpose(Purpose.DSM_LEVEL))[:, 0]
    labels = torch.tensor([int(w) * 5 >> 32 for w in words])
    assert set(labels.tolist()) == set(range(5))
    z = ops.normal(clean.shape, key.for_purpose(Purpose.DSM_NOISE)).double()
    sigma = SIGMAS[labels].double().view(-1, 1, 1, 1)
    noisy = clean + sigma * z
    each = 0.5 * (sigma * -noisy / (1 + sigma**2) + z).square().sum((1, 2, 3))
    x = clean if backend == "reference" else clean.float()

    def net(x: Tensor, sigma: Tensor) -> Tensor:
        return -x / (1 + sigma.to(x.dtype) ** 2).view(-1, 1, 1, 1)

    def check(want: Tensor, **options: Any) -> None:
        got = dsm_loss(net, x, SIGMAS, noise=key, **options)
        tolerance = 10 * tolerances.FP32_RELATIVE
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)

    check(each.mean())
    others = 4 - labels
    sigma = SIGMAS[others].double().view(-1, 1, 1, 1)
    noisy = clean + sigma * z
    reverse = 0.5 * (sigma * -noisy / (1 + sigma**2) + z).square().sum((1, 2, 3))
    check(reverse.mean(), labels=others)
    check(each.sum(), reduction="sum")
    check(each, reduction="none")
    for power in (0.5, 3.0):
        check((each * SIGMAS[labels].double() ** (power - 2)).mean(), weighting=power)
    factors = torch.rand(batch)
    check((factors.double() * each).mean(), weighting=factors)
    loss, table = dsm_loss(net, x, SIGMAS, noise=key, return_per_level=True)
    assert loss == dsm_loss(net, x, SIGMAS, noise=key) and not table.requires_grad
    want = torch.stack([each[labels == i].mean() for i in range(5)])
    torch.testing.assert_close(table.double(), want, rtol=1e-5, atol=1e-5)


def test_levels_without_samples_are_nan_and_conditions_reach_the_network() -> None:
    seen = []

    def net(x: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        seen.append(classes)
        return torch.zeros_like(x)

    classes = torch.tensor([3, 1])
    labels = torch.tensor([4, 4])
    x = torch.zeros(2, 6)
    _, table = dsm_loss(
        net, x, SIGMAS, seed=1, labels=labels, return_per_level=True, classes=classes
    )
    assert seen[0] is classes and table.isnan().tolist() == [True] * 4 + [False]
    leaf = torch.ones(6, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss, table = dsm_loss(
            lambda y, s: leaf * y, x, SIGMAS, seed=1, reduction=reduction, return_per_level=True
        )
        assert loss.requires_grad and not table.requires_grad
    with pytest.raises(TypeError, match="unexpected keyword"):
        dsm_loss(zero, x, SIGMAS, wieghting=1.0)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    net = nn.Linear(6, 6)
    x, key = torch.randn(9, 6), NoiseKey(3)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return net(x) / sigma[:, None]

    torch.testing.assert_close(
        per_sample(score, x, SIGMAS, key).mean(), dsm_loss(score, x, SIGMAS, noise=key)
    )


def test_gradients_reach_the_network_and_the_data() -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return dsm_loss(lambda y, s: torch.tanh(y @ weight), x, SIGMAS, seed=5)

    assert torch.autograd.gradcheck(loss, (weight, x))


def test_levels_that_change_in_place_are_looked_at_again() -> None:
    x, sigmas = torch.rand(64, 5), SIGMAS.clone()
    array = sigmas.numpy()

    def loss() -> Tensor:
        return dsm_loss(lambda y, sigma: y, x, sigmas, seed=1)

    def afresh() -> Tensor:
        return dsm_loss(lambda y, sigma: y, x, sigmas.tolist(), seed=1)

    before = loss()
    sigmas.mul_(0.5)
    assert torch.equal(loss(), afresh()) and not torch.equal(loss(), before)
    # Neither is counted as a change by autograd.
    sigmas.data.mul_(2)
    assert torch.equal(loss(), before)
    array[-1] = array[0]
    with pytest.raises(ValueError, match="strictly decreasing"):
        loss()


def test_levels_seen_in_other_threads_and_transforms_are_not_mixed_up() -> None:
    x, schedules = torch.rand(64, 5), [SIGMAS * k for k in (1, 2, 3, 4)]

    def loss(sigmas: Any) -> Tensor:
        return dsm_loss(lambda y, sigma: y, x, sigmas, seed=1)

    want = [loss(sigmas.tolist()) for sigmas in schedules]
    torch.func.grad(lambda k: loss(schedules[1]) * k)(torch.tensor(1.0))
    with torch.inference_mode():
        loss(schedules[2])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            assert list(map(float, pool.map(loss, schedules))) == list(map(float, want))


def test_levels_are_drawn_evenly() -> None:
    words = ops.words((100_000, 1), NoiseKey(8, purpose=Purpose.DSM_LEVEL))[:, 0]
    counts = torch.bincount(words * 10 >> 32, minlength=10).numpy()
    assert len(counts) == 10 and stats.chisquare(counts).pvalue > tolerances.ALPHA


def test_compiled_whole() -> None:
    net = nn.Linear(6, 6)
    x, labels, weights = torch.randn(9, 6), torch.arange(9) % 5, torch.rand(9)

    def loss(x: Tensor, noise: NoiseKey) -> Tensor:
        plain = dsm_loss(lambda y, s: net(y), x, SIGMAS, noise=noise)
        return plain + dsm_loss(
            lambda y, s: net(y), x, SIGMAS, noise=noise, labels=labels, weighting=weights
        )

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(3):
        got, want = compiled(x, NoiseKey(3).at(step)), loss(x, NoiseKey(3).at(step))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, net.weight), torch.autograd.grad(want, net.weight)
        )


def test_seeds() -> None:
    x = torch.randn(5, 3)
    assert dsm_loss(zero, x, SIGMAS, seed=4) == dsm_loss(zero, x, SIGMAS, noise=NoiseKey(4))
    assert dsm_loss(zero, x, SIGMAS, seed=4) != dsm_loss(zero, x, SIGMAS, seed=5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(dsm_loss(zero, x, SIGMAS)))
    assert losses[0] == losses[1] != losses[2]


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"x": GOOD.int()}, TypeError, "x: got dtype torch.int32"),
        ({"x": GOOD[:0]}, ValueError, "x: got a batch of 0"),
        ({"x": [1.0]}, TypeError, "x: got list"),
        ({"sigmas": [1.0, 2.0]}, ValueError, "sigmas: .*decreasing"),
        ({"sigmas": [math.inf]}, ValueError, r"sigmas\[0\]: got inf"),
        ({"noise": NoiseKey(1), "seed": 1}, ValueError, "seed: got 1 beside noise"),
        ({"noise": 5}, TypeError, "noise: got int 5"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, ValueError, "labels: got values from 0 to 5"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, ValueError, "labels: got values from -1"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: got shape \(3,\)"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: got dtype torch.float32"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels: got list"),
        ({"reduction": "max"}, ValueError, "reduction: got 'max'"),
        ({"weighting": math.nan}, ValueError, "weighting: got nan"),
        ({"weighting": "sigma"}, TypeError, "weighting: got str"),
        ({"weighting": torch.ones(3)}, ValueError, r"weighting: got shape \(3,\)"),
        ({"net": lambda x, s: x[:, :1]}, ValueError, r"net: got shape \(4, 1\)"),
        ({"net": lambda x, s: x.double()}, TypeError, "net: got dtype torch.float64"),
    ],
)
def test_wrong_inputs_are_named(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments = {"net": zero, "x": GOOD, "sigmas": SIGMAS, **options}
    net, x, sigmas = (arguments.pop(k) for k in ("net", "x", "sigmas"))
    with pytest.raises(error, match=match):
        dsm_loss(net, x, sigmas, **arguments)


def test_a_level_of_each_sample(backend: str) -> None:
    x, sigma = torch.randn(6, 5), torch.tensor([0.1, 7.3, 2.0, 0.5, 0.1, 3.3])
    key, levels = NoiseKey(3), [7.3, 3.3, 2.0, 0.5, 0.1]
    labels = torch.tensor([levels.index(round(s, 2)) for s in sigma.tolist()])

    def net(x: Tensor, sigma: Tensor) -> Tensor:
        return -(x - 0.3) / (1 + sigma**2)[:, None]

    for options in ({}, {"weighting": torch.rand(6)}, {"weighting": 1.0}):
        got = dsm_loss(net, x, sigma=sigma, noise=key, reduction="none", **options)
        want = dsm_loss(net, x, levels, labels=labels, noise=key, reduction="none", **options)
        assert torch.equal(got, want)


def test_log_uniform_levels_bound_the_divergence() -> None:
    """Of N(0, 1) from N(0.5, 1.44), in one dimension: times 2 log(high / low), less the floor."""
    batch, low, high = 400_000, 1e-3, 300.0
    key = NoiseKey(8)
    u = ops.uniform((batch, 1), key.for_purpose(40))[:, 0]
    sigma = low * (high / low) ** u
    x = ops.normal((batch, 1), key.for_purpose(41))

    def loss(mean: float, variance: float) -> Tensor:
        def net(y: Tensor, s: Tensor) -> Tensor:
            return (mean - y) / (variance + s**2)[:, None]

        return dsm_loss(net, x, sigma=sigma, noise=key, reduction="none").double()

    each = 2 * math.log(high / low) * (loss(0.5, 1.44) - loss(0.0, 1.0))
    divergence = 0.5 * ((1 + 0.25) / 1.44 - 1 + math.log(1.44))
    error = float(each.std()) / math.sqrt(batch)
    score = (float(each.mean()) - divergence) / error
    assert error < 0.03 * divergence
    assert 2 * stats.norm.sf(abs(score)) > tolerances.ALPHA


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigmas": SIGMAS}, "sigma: got it beside sigmas"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "sigma: got it beside labels"),
        ({"return_per_level": True}, "return_per_level: got True with sigma"),
        ({"sigma": torch.tensor([0.0, 1.0])}, "sigma: got numbers of at most 0"),
        ({"sigma": torch.tensor([math.inf, 1.0])}, "sigma: got numbers of at most 0"),
        ({"sigma": torch.ones(3)}, r"sigma: got shape \(3,\)"),
        ({"segments": torch.tensor([0, 0])}, "sigma: got several levels in a segment"),
    ],
)
def test_levels_of_samples_that_are_wrong(given: dict[str, Any], message: str) -> None:
    options = {"sigma": torch.tensor([0.5, 1.0])} | given
    with pytest.raises(ValueError, match=message):
        dsm_loss(zero, torch.zeros(2, 3), seed=1, **options)
