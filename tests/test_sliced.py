"""Sliced and exact score matching: closed forms, agreement, gradients, fallbacks, wrong input."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from score_kernels import NoiseKey, Purpose, dsm_loss, exact_score_loss, ops, sliced_score_loss

METHODS = ["double_backward", "jvp", "finite_difference"]
PROBES = ["rademacher", "gaussian", "sphere"]


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 4)).to(dtype)


def gradient(loss: Tensor, net: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("probe", ["rademacher", "sphere"])
def test_the_gaussian_s_score_has_minus_half_the_dimension(
    backend: str, method: str, probe: str
) -> None:
    """s = -x: v^T grad s v = -D for |v|^2 = D, and E 1/2 |x|^2 = D/2."""
    dimension, batch = 12, 20_000
    x = torch.randn(batch, dimension)
    loss = float(sliced_score_loss(lambda y: -y, x, seed=1, probe=probe, method=method))
    want = float((0.5 * x.double().square().sum(1)).mean()) - dimension
    # The rest is fp32: differences divide a rounding of 1e-7 by 2 h = 0.02.
    assert abs(loss - want) < 1e-3
    score = (loss + dimension / 2) / math.sqrt(dimension / 2 / batch)
    assert 2 * stats.norm.sf(abs(score)) > tolerances.ALPHA / 6


@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_papers(method: str, probe: str, variance_reduced: bool) -> None:
    """Equations 7 and 8 of arXiv 1905.07088 and 13 of 2007.03317 in NumPy, of s = (W y + sin 2y) /
    sigma at sigmas far from 1, each sample the mean of its three probes."""
    key, batch = NoiseKey(4, draw=9, first_sample=2), 6
    x = torch.randn(batch, 4, dtype=torch.float64).numpy()
    w = torch.randn(4, 4, dtype=torch.float64).numpy()
    sigma = np.array([0.25, 0.5, 2.0, 4.0, 8.0, 16.0])

    def s(y: np.ndarray) -> np.ndarray:
        return (y @ w.T + np.sin(2 * y)) / sigma[:, None]

    want = np.zeros(batch)
    for i in range(3):
        own = key.for_purpose(Purpose.SSM_PROBE + i)
        v = (ops.rademacher if probe == "rademacher" else ops.normal)((batch, 4), own)
        v = v.double().numpy()
        if probe == "sphere":
            v *= 2 / np.linalg.norm(v, axis=1, keepdims=True)
        along, value = ((v @ w.T + 2 * np.cos(2 * x) * v) / sigma[:, None]), s(x)
        if method == "finite_difference":
            h = 0.1 * sigma[:, None]
            along = (s(x + h * v) - s(x - h * v)) / (2 * h)
            value = (s(x + h * v) + s(x - h * v)) / 2
        second = (value**2).sum(1) if variance_reduced else (v * value).sum(1) ** 2
        want += ((v * along).sum(1) + second / 2) / 3

    def score(y: Tensor, sigma: Tensor) -> Tensor:
        return (y @ torch.from_numpy(w).T + torch.sin(2 * y)) / sigma[:, None].double()

    options: dict[str, Any] = {"probe": probe, "probes": 3, "variance_reduced": variance_reduced}
    options |= {"noise": key, "method": method, "fd_step": 0.1}
    levels = torch.from_numpy(sigma).float()
    for reduction, wanted in (("none", want), ("mean", want.mean()), ("sum", want.sum())):
        got = sliced_score_loss(score, torch.from_numpy(x), levels, reduction=reduction, **options)
        np.testing.assert_allclose(got.detach(), wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        got = sliced_score_loss(score, torch.from_numpy(x), levels, **options)
    np.testing.assert_allclose(got, want.mean(), rtol=1e-6, atol=1e-6)
    options["probes"] = 64
    assert sliced_score_loss(score, torch.from_numpy(x), levels, **options).isfinite()


def test_exact_loss_is_the_formula() -> None:
    net, x = network(), torch.randn(6, 4, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(net))(x)
    want = (jacobian.diagonal(dim1=1, dim2=2).sum(1) + 0.5 * net(x).square().sum(1)).mean()
    torch.testing.assert_close(exact_score_loss(net, x), want)
    noisy = exact_score_loss(lambda y, s: net(y) / s[:, None], x, 2.0)
    torch.testing.assert_close(
        noisy,
        (jacobian.diagonal(dim1=1, dim2=2).sum(1) / 2 + net(x).square().sum(1) / 8).mean(),
    )


@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize("probe", PROBES)
def test_the_expectation_is_the_exact_loss(probe: str, variance_reduced: bool) -> None:
    """40 draws over the same 2000 samples: their mean, to its standard error."""
    net, x = network(), torch.randn(2000, 4, dtype=torch.float64)
    exact = float(exact_score_loss(net, x))
    batches = [
        float(
            sliced_score_loss(
                net, x, noise=NoiseKey(3).at(i), probe=probe, variance_reduced=variance_reduced
            )
        )
        for i in range(40)
    ]
    mean, spread = torch.tensor(batches).mean(), torch.tensor(batches).std() / math.sqrt(40)
    p = 2 * stats.t.sf(abs(float((mean - exact) / spread)), 39)
    assert p > tolerances.ALPHA / 6


@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize("probe", PROBES)
def test_the_three_methods_agree(probe: str, variance_reduced: bool) -> None:
    """Same probes: the first two to rounding, differences to h^2, gradients too."""
    net, x = network(), torch.randn(50, 4, dtype=torch.float64)
    sigma = torch.rand(50) + 0.5

    def score(y: Tensor, s: Tensor) -> Tensor:
        return net(y) / s[:, None]

    losses = {}
    for method in METHODS:
        loss = sliced_score_loss(
            score, x, sigma, seed=4, probe=probe, probes=3, method=method, fd_step=1e-3,
            variance_reduced=variance_reduced,
        )  # fmt: skip
        losses[method] = (loss.detach(), gradient(loss, net))
    for got, want in zip(losses["jvp"], losses["double_backward"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for got, want in zip(losses["finite_difference"], losses["double_backward"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_native_equals_reference(method: str) -> None:
    from conftest import BACKENDS, on_backend

    net, x = network(dtype=torch.float32), torch.randn(50, 4)
    results = []
    for name in BACKENDS:
        with on_backend(name):
            loss = sliced_score_loss(net, x, seed=4, probes=2, method=method)
            results.append((loss.detach(), gradient(loss, net)))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-4, atol=1e-4)


def test_denoising_and_exact_gradients_agree_in_expectation() -> None:
    """Vincent (2011): sigma^2 times the explicit objective on the noisy data has the gradient of
    the denoising loss. Data N(0, 1), s = w x: explicit on N(0, 1 + sigma^2) in closed form."""
    sigma, w, batch = 0.7, -0.4, 4000
    weight = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for i in range(50):
        loss = dsm_loss(lambda y, s: weight * y, x, [sigma], noise=NoiseKey(5).at(i))
        grads.append(float(torch.autograd.grad(loss, weight)[0]))
    # d/dw E[w + w^2 y^2 / 2], y = x + sigma z, over the x at hand.
    want = sigma**2 * (1 + w * (float(x.square().mean()) + sigma**2))
    mean, spread = torch.tensor(grads).mean(), torch.tensor(grads).std() / math.sqrt(50)
    assert 2 * stats.t.sf(abs(float((mean - want) / spread)), 49) > tolerances.ALPHA


def test_a_sample_s_probes_do_not_depend_on_its_batch() -> None:
    net, x, key = network(), torch.randn(6, 4, dtype=torch.float64), NoiseKey(9, draw=2)
    alone = [sliced_score_loss(net, x[i : i + 1], noise=key.for_samples(i)) for i in range(6)]
    torch.testing.assert_close(torch.stack(alone).mean(), sliced_score_loss(net, x, noise=key))
    torch.manual_seed(1)
    first = sliced_score_loss(net, x)
    torch.manual_seed(1)
    assert first == sliced_score_loss(net, x)


class Attention(nn.Module):
    """Flash attention: its backward has no derivative, and it has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(x.view(-1, 4, 1, 8)).transpose(1, 2)
        h = nn.functional.scaled_dot_product_attention(h, h, h)
        return h.transpose(1, 2).reshape(x.shape)


class NoDerivative(torch.autograd.Function):
    """Twice x, by a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_missing_double_backward_is_noticed_behind_other_branches() -> None:
    net, x = network(), torch.randn(5, 4, dtype=torch.float64)
    for score in (
        lambda y: NoDerivative.apply(net(y)) * net(y) + net(y),
        lambda y: net(y) + net(y) * NoDerivative.apply(net(y)),
        lambda y: net(NoDerivative.apply(net(y))) + y.square(),
    ):
        with pytest.raises(RuntimeError, match="method: got 'double_backward'"):
            sliced_score_loss(score, x, seed=1, method="double_backward")


def test_a_missing_double_backward_is_noticed() -> None:
    net, x = Attention(), torch.randn(5, 32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            loss = sliced_score_loss(net, x, seed=1)
            loss.backward()
    mine = [w for w in said if "sliced_score_loss" in str(w.message)]
    assert len(mine) == 1 and "finite_difference" in str(mine[0].message)
    assert net.mix.weight.grad is not None and bool(net.mix.weight.grad.isfinite().all())
    with pytest.raises(RuntimeError, match="method: got 'double_backward'.*finite_difference"):
        sliced_score_loss(net, x, seed=1, method="double_backward")
    with pytest.raises(NotImplementedError, match="forward AD"):
        sliced_score_loss(net, x, seed=1, method="jvp")
    with sdpa_kernel(SDPBackend.MATH):
        exact = sliced_score_loss(net, x, seed=1, method="double_backward")
    assert abs(float(exact) - float(loss)) < 1e-2
    # Without training no second derivative is needed.
    with torch.no_grad():
        first = sliced_score_loss(net, x, seed=1, method="double_backward")
    assert not first.requires_grad
    torch.testing.assert_close(first, exact.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str) -> None:
    """First and second derivatives by the parameters, through the public functions."""
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64)

    def sliced(weight: Tensor) -> Tensor:
        return sliced_score_loss(lambda y: torch.tanh(y @ weight), x, seed=1, method=method)

    def exact(weight: Tensor) -> Tensor:
        return exact_score_loss(lambda y: torch.tanh(y @ weight), x)

    def denoising(weight: Tensor) -> Tensor:
        return dsm_loss(lambda y, s: torch.tanh(y @ weight), x, [1.0, 0.5], seed=1)

    for function in (sliced, exact, denoising):
        assert torch.autograd.gradcheck(function, (weight,))
        assert torch.autograd.gradgradcheck(function, (weight,))


def test_autocast() -> None:
    """Half-precision scores serve where no small difference of them is taken."""
    net, x = network(dtype=torch.float32), torch.randn(200, 4)
    want = float(sliced_score_loss(net, x, seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sliced_score_loss(net, x, seed=1, method="double_backward")
        with pytest.raises(RuntimeError, match="got scores of torch.bfloat16.*double_backward"):
            sliced_score_loss(net, x, seed=1, method="finite_difference")
    assert loss.dtype == torch.float32 and abs(float(loss) - want) < 0.02
    assert bool(gradient(loss, net).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_transforms(method: str) -> None:
    """func.grad by every method; torch.compile where torch can trace it: not a gradient inside."""
    net, x, key = network(), torch.randn(5, 4, dtype=torch.float64), NoiseKey(3)

    def loss(x: Tensor) -> Tensor:
        return sliced_score_loss(net, x, noise=key, method=method)

    want = loss(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])
    again = checkpoint(loss, x, use_reentrant=False)
    torch.testing.assert_close(gradient(again, net), gradient(loss(x), net))
    if method != "double_backward":
        torch._dynamo.reset()
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient(got, net), gradient(want, net))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_data_when_asked(method: str) -> None:
    net = network()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss = sliced_score_loss(net, x, seed=2, method=method)
    (got,) = torch.autograd.grad(loss, x)
    assert got.shape == x.shape and bool((got != 0).any())


GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"probes": 0}, ValueError, "probes: got 0"),
        ({"probes": 65}, ValueError, "probes: got 65"),
        ({"probes": 1.5}, TypeError, "probes: got float"),
        ({"fd_step": 0.0}, ValueError, "fd_step: got 0.0"),
        ({"fd_step": math.nan}, ValueError, "fd_step: got nan"),
        ({"method": "magic"}, ValueError, "method: got 'magic'"),
        ({"probe": "cauchy"}, ValueError, "probe: got 'cauchy'"),
        ({"x": GOOD.int()}, TypeError, "x: got dtype"),
        ({"x": GOOD[:0]}, ValueError, r"x: got shape \(0, 3\)"),
        ({"sigma": torch.ones(3)}, ValueError, r"sigma: got shape \(3,\)"),
        ({"sigma": -1.0}, ValueError, "sigma: got -1.0"),
        ({"score": 3}, TypeError, "score: got int"),
        ({"score": lambda x: x[:1]}, ValueError, r"score: got shape \(1, 3\)"),
        ({"noise": NoiseKey(1), "seed": 1}, ValueError, "seed: got 1 beside noise"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_wrong_inputs_are_named(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments = {"score": lambda x: -x, "x": GOOD, **options}
    score, x = arguments.pop("score"), arguments.pop("x")
    with pytest.raises(error, match=match):
        sliced_score_loss(score, x, **arguments)


@pytest.mark.parametrize("method", ["double_backward", "jvp", "finite_difference"])
def test_elements_that_share_memory(method: str) -> None:
    """Windows of one tensor that overlap, and one sample expanded, are as copies of them."""
    for x in (torch.randn(500).as_strided((40, 30), (7, 1)), torch.randn(1, 30).expand(40, 30)):
        got, want = (
            sliced_score_loss(lambda y: -(y**3), v, seed=1, method=method, fd_step=0.1)
            for v in (x, x.clone(memory_format=torch.contiguous_format))
        )
        torch.testing.assert_close(got, want)


def test_two_probes_are_averaged() -> None:
    net, x = network(), torch.randn(6, 4, dtype=torch.float64)
    loss = partial(sliced_score_loss, net, x, seed=5, reduction="none")
    one, two = loss(probes=1), loss(probes=2)
    # The first probe is that of one alone: the second makes half of the difference.
    assert not torch.equal(one, two)
    noise = NoiseKey(5).for_purpose(Purpose.SSM_PROBE + 1)
    v = ops.probe_scale(torch.ones(6, dtype=torch.float64), x.shape, noise)
    leaf = x.clone().requires_grad_()
    s = net(leaf)
    (grad,) = torch.autograd.grad(s, leaf, v)
    second = (grad * v).sum(1) + 0.5 * s.square().sum(1)
    torch.testing.assert_close(two, 0.5 * (one + second))
