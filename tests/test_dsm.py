"""perturb and dsm_loss_from_score: values, derivatives of every order, determinism, wrong input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from conftest import BACKENDS, NATIVE, on_backend
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from score_kernels import NoiseKey, ops

KEY = NoiseKey(2**63 + 11, purpose=4, draw=17, first_sample=2**32 - 2)
SHAPES = [(1, 1), (7, 2), (5, 3), (4, 4), (6, 5), (2, 64), (3, 130), (2, 257), (3, 2050),
          (4, 3, 8, 8), (9,), (300, 2), (3, 0), (0, 3)]  # fmt: skip
SCORES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, score, sigma and weight of a batch."""
    rows = shape[0]
    return (torch.randn(shape), torch.randn(shape).to(dtype), 0.01 + torch.rand(rows),
            0.1 + torch.rand(rows))  # fmt: skip


def expand_like(values: Tensor, like: Tensor) -> Tensor:
    """[B] as fp64 [B, 1, ...]."""
    return values.double().view(-1, *[1] * (like.dim() - 1))


def exact_loss(score: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    z = ops.normal(score.shape, KEY).double()
    residual = expand_like(sigma, score) * score.double() + z
    return (
        0.5
        * weight.double()
        * residual.square().reshape(len(score), math.prod(score.shape[1:])).sum(1)
    )


def relative(got: Tensor, want: Tensor) -> float:
    norm = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / norm if norm else float(got.norm())


def is_rounded(got: Tensor, exact: Tensor) -> bool:
    """Whether got is exact rounded once to its dtype: half an ulp of each element, in fp16 also of
    a subnormal one."""
    relative = {
        torch.float32: tolerances.FP32_RELATIVE,
        torch.bfloat16: 2**-8,
        torch.float16: 2**-10,
    }
    subnormal = 2**-25 * math.sqrt(got.numel()) if got.dtype == torch.float16 else 0.0
    error = float((got.double() - exact).norm())
    return error <= relative[got.dtype] * float(exact.norm()) + subnormal


@pytest.mark.parametrize("shape", SHAPES)
def test_perturb_is_one_fma_on_every_backend(shape: tuple[int, ...]) -> None:
    x, _, sigma, _ = inputs(shape)
    want = x.double() + expand_like(sigma, x) * ops.normal(shape, KEY).double()
    results = []
    for name in BACKENDS:
        with on_backend(name):
            results.append(ops.perturb(x, sigma, KEY))
    assert all(torch.equal(r, results[0]) for r in results[1:])
    np.testing.assert_allclose(results[0].double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", SCORES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_against_fp64(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    _, score, sigma, weight = inputs(shape, dtype)
    upstream = torch.randn(shape[0])
    for w in (weight, None):
        leaf, wide = score.clone().requires_grad_(), score.double().requires_grad_()
        loss = ops.dsm_loss_from_score(leaf, sigma, KEY, weight=w)
        want = exact_loss(wide, sigma, torch.ones_like(sigma) if w is None else w)
        assert loss.dtype == torch.float32 and loss.shape == shape[:1]
        assert relative(loss.detach(), want.detach()) < tolerances.FP32_RELATIVE
        expected = torch.autograd.grad((want * upstream.double()).sum(), wide)[0]
        got = torch.autograd.grad((loss * upstream).sum(), leaf, retain_graph=True)[0]
        assert got.dtype == dtype and is_rounded(got, expected)
        # The first backward gave its buffer away: the next one has another, and leaves it alone.
        kept = got.clone()
        again = torch.autograd.grad((loss * -2 * upstream).sum(), leaf)[0]
        assert is_rounded(again, -2 * expected) and torch.equal(got, kept)


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (20_000, 2), (3, 100_003)])
def test_threads_and_instruction_sets_change_no_bit(shape: tuple[int, ...]) -> None:
    _, score, sigma, weight = inputs(shape)
    results = []
    for name in NATIVE:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with on_backend(name):
                leaf = score.clone().requires_grad_()
                loss = ops.dsm_loss_from_score(leaf, sigma, KEY, weight=weight)
                loss.sum().backward()
                results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(loss, results[0][0]) for loss, _ in results[1:])
    assert all(torch.equal(grad, results[0][1]) for _, grad in results[1:])


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    _, score, sigma, weight = inputs((5, 700))
    whole = ops.dsm_loss_from_score(score, sigma, KEY, weight=weight)
    alone = [
        ops.dsm_loss_from_score(
            score[i : i + 1],
            sigma[i : i + 1],
            KEY.for_samples(KEY.first_sample + i),
            weight=weight[i : i + 1],
        )
        for i in range(5)
    ]
    assert torch.equal(torch.cat(alone), whole)


def test_long_sums_are_accurate() -> None:
    """A million elements: the loss of the zero score is the noise's own sum of squares."""
    score = torch.zeros(1, 1_000_003)
    z = ops.normal(score.shape, KEY).double()
    got = float(ops.dsm_loss_from_score(score, torch.ones(1), KEY))
    assert abs(got / float(0.5 * z.square().sum()) - 1) < 2**-24


def test_parts_of_long_rows_are_joined_in_double(backend: str) -> None:
    """Added in float32, the parts that a thread adds to the first would be rounded away."""
    score = torch.zeros(1, 4_000_003)
    score[:, :4096] = 6000
    want = 0.5 * (score.double() + ops.normal(score.shape, KEY).double()).square().sum()
    got = ops.dsm_loss_from_score(score, torch.ones(1), KEY).double()
    torch.testing.assert_close(got, want[None], rtol=3e-7, atol=0)


def test_gradcheck() -> None:
    score = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    sigma, weight = torch.rand(3) + 0.1, torch.rand(3)

    def loss(s: Tensor) -> Tensor:
        return ops.dsm_loss_from_score(s.sin(), sigma, KEY, weight=weight)

    def noisy(x: Tensor) -> Tensor:
        return ops.perturb(x.square(), sigma, KEY)

    for function, leaf in ((loss, score), (noisy, x)):
        assert torch.autograd.gradcheck(function, (leaf,))
        assert torch.autograd.gradgradcheck(function, (leaf,))


@pytest.mark.parametrize("shape", [(4, 7), (3, 2050)])
def test_second_derivatives_against_fp64(backend: str, shape: tuple[int, ...]) -> None:
    _, score, sigma, weight = inputs(shape)
    direction = torch.randn(shape)

    def second(leaf: Tensor, loss: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss(leaf.sin()).sum(), leaf, create_graph=True)
        return torch.autograd.grad((grad * v).sum(), leaf)[0]

    wide = score.double().requires_grad_()
    want = second(wide, lambda s: exact_loss(s, sigma, weight), direction.double())
    leaf = score.clone().requires_grad_()
    got = second(leaf, lambda s: ops.dsm_loss_from_score(s, sigma, KEY, weight=weight), direction)
    assert relative(got, want) < tolerances.FP32_RELATIVE


def test_sigma_and_weight_are_differentiable_too() -> None:
    x, score, sigma, weight = inputs((4, 6))
    leaves = [t.double().float().requires_grad_() for t in (sigma, weight)]
    loss = ops.dsm_loss_from_score(score, leaves[0], KEY, weight=leaves[1]).sum()
    got = torch.autograd.grad(loss, leaves)
    wide = [t.double().requires_grad_() for t in (sigma, weight)]
    want = torch.autograd.grad(exact_loss(score, *wide).sum(), wide)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(ops.perturb(x, leaves[0], KEY).sum(), leaves[0])
    torch.testing.assert_close(gradient, ops.normal((4, 6), KEY).sum(1))


def training_loss(x: Tensor, weight: Tensor, sigma: Tensor) -> Tensor:
    noisy = ops.perturb(x, sigma, KEY)
    return ops.dsm_loss_from_score(torch.tanh(noisy @ weight), sigma, KEY).mean()


@pytest.mark.parametrize("how", ["aot_eager", "inductor", "checkpoint", "func"])
def test_training_under_transforms(backend: str, how: str) -> None:
    x, sigma = torch.randn(6, 8), torch.rand(6) + 0.1
    weight = torch.randn(8, 8, requires_grad=True)
    (want,) = torch.autograd.grad(training_loss(x, weight, sigma), weight)
    if how == "func":
        got = torch.func.grad(lambda w: training_loss(x, w, sigma))(weight.detach())
        stacked = torch.func.vmap(lambda w: training_loss(x, w, sigma))(torch.stack([weight] * 2))
        torch.testing.assert_close(stacked[0], training_loss(x, weight, sigma))
    elif how == "checkpoint":
        loss = checkpoint(training_loss, x, weight, sigma, use_reentrant=False)
        (got,) = torch.autograd.grad(loss, weight)
    else:
        torch._dynamo.reset()
        compiled = torch.compile(training_loss, fullgraph=True, backend=how)
        (got,) = torch.autograd.grad(compiled(x, weight, sigma), weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_autocast_scores_are_taken_as_they_come() -> None:
    x, sigma = torch.randn(6, 8), torch.rand(6) + 0.1
    weight = torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = ops.perturb(x, sigma, KEY) @ weight
        loss = ops.dsm_loss_from_score(score, sigma, KEY)
    assert score.dtype == torch.bfloat16 and loss.dtype == torch.float32
    want = exact_loss(score.detach(), sigma, torch.ones(6))
    assert relative(loss.detach(), want) < tolerances.FP32_RELATIVE


@pytest.mark.parametrize("name", ["perturb", "dsm_loss", "dsm_gradient"])
@pytest.mark.parametrize("dtype", SCORES)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(False)
    x, score, sigma, weight = inputs((3, 5), dtype)
    arguments: dict[str, tuple[Any, ...]] = {
        "perturb": (x, sigma),
        "dsm_loss": (score, sigma, weight, True),
        "dsm_gradient": (score, sigma, None, weight),
    }
    op = getattr(torch.ops.score_kernels, name).default
    torch.library.opcheck(op, (*arguments[name], -7, 1, 2, 3, None))


def test_strides_do_not_enter(backend: str) -> None:
    x, score, sigma, weight = inputs((4, 3, 5))
    turned = score.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    every_second = torch.stack((sigma, sigma), -1)[:, 0]
    want = ops.dsm_loss_from_score(score, sigma, KEY, weight=weight)
    assert torch.equal(ops.dsm_loss_from_score(turned, every_second, KEY, weight=weight), want)
    mixed = x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    assert torch.equal(ops.perturb(mixed, every_second, KEY), ops.perturb(x, sigma, KEY))
    # An expanded upstream gradient, as mean() and sum() send.
    leaf = turned.clone().requires_grad_()
    ops.dsm_loss_from_score(leaf, sigma, KEY).mean().backward()
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape


GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "function, arguments, error, match",
    [
        (ops.perturb, (GOOD, torch.ones(3), KEY), ValueError, r"sigma: got shape \(3,\).*\(2,\)"),
        (ops.perturb, (GOOD, torch.ones(2).double(), KEY), TypeError, "sigma: got dtype"),
        (ops.perturb, (GOOD, 1.0, KEY), TypeError, "sigma: got float"),
        (ops.perturb, (GOOD, torch.ones(2, device="meta"), KEY), ValueError, "sigma: got.*on meta"),
        (ops.perturb, (GOOD.half(), torch.ones(2), KEY), TypeError, "x: got dtype"),
        (ops.perturb, (GOOD, torch.ones(2), 3), TypeError, "noise: got int"),
        (ops.dsm_loss_from_score, (GOOD.int(), torch.ones(2), KEY), TypeError, "score: got dtype"),
        (ops.dsm_loss_from_score, (GOOD, torch.ones(1), KEY), ValueError, "sigma: got shape"),
        (ops.dsm_loss_from_score, (GOOD.sum(), torch.ones(1), KEY), ValueError, "score: got a"),
        (ops.dsm_loss_from_score, (None, torch.ones(1), KEY), TypeError, "score: got NoneType"),
    ],
)
def test_wrong_inputs_are_named(
    function: Callable[..., Tensor], arguments: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        function(*arguments)


def test_a_wrong_weight_is_named() -> None:
    for weight, error in ((torch.ones(3), ValueError), (math.nan, TypeError)):
        with pytest.raises(error, match="weight: got"):
            ops.dsm_loss_from_score(GOOD, torch.ones(2), KEY, weight=weight)  # type: ignore[arg-type]
