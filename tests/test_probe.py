"""probe_dot, probe_scale and ssm_reduce: values, adjointness, every derivative, wrong input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from conftest import NATIVE, on_backend
from torch import Tensor

from score_kernels import NoiseKey, ops

KEY = NoiseKey(2**63 + 11, purpose=64, draw=17, first_sample=2**32 - 2)
PROBES = ["rademacher", "gaussian", "sphere"]
SHAPES = [(1, 1), (7, 2), (5, 3), (4, 4), (2, 64), (3, 130), (2, 2050), (4, 3, 8, 8), (9,)]


def probe(shape: tuple[int, ...], kind: str) -> Tensor:
    """The probe itself in fp64, from the materialised noise."""
    v = (ops.rademacher if kind == "rademacher" else ops.normal)(shape, KEY).double()
    if kind != "sphere":
        return v
    rows = v.reshape(shape[0], math.prod(shape[1:]))
    return (rows * (rows.shape[1] / rows.square().sum(1, keepdim=True)).sqrt()).view(shape)


def sums(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).reshape(len(a), math.prod(a.shape[1:])).sum(1)


def close(got: Tensor, want: Tensor, scale: Tensor) -> bool:
    """Within fp32 rounding of sums whose terms have the given magnitude."""
    bound = 4 * tolerances.FP32_RELATIVE * scale.abs().max()
    return bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_against_fp64(backend: str, shape: tuple[int, ...], kind: str) -> None:
    v, upstream = probe(shape, kind), torch.randn(shape[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        s, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        size = sums(v.abs(), s.abs()) + sums(v.abs(), g.abs()) + sums(s, s)
        assert close(ops.probe_dot(s, KEY, probe=kind), sums(v, s), size)
        for reduced, second in ((True, sums(s, s)), (False, sums(v, s).square())):
            got = ops.ssm_reduce(g, s, KEY, probe=kind, variance_reduced=reduced)
            assert close(got, sums(v, g) + 0.5 * second, size + second)
    scaled = ops.probe_scale(upstream, shape, KEY, probe=kind)
    want = upstream.double().view(-1, *[1] * (len(shape) - 1)) * v
    torch.testing.assert_close(scaled.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", PROBES)
def test_transforms_of_torch_func(backend: str, kind: str) -> None:
    """Every instance of a vmap has the same probe; there the formulas are plain torch's."""
    s, g, along = (torch.randn(3, 4, 5) for _ in range(3))
    step = torch.rand(4) + 0.1

    def calls(s: Tensor, g: Tensor) -> list[Tensor]:
        return [
            ops.probe_dot(s, KEY, probe=kind),
            ops.probe_scale(g[:, 0], s.shape, KEY, probe=kind),
            *(ops.ssm_reduce(g, s, KEY, probe=kind, variance_reduced=r) for r in (True, False)),
            *(ops.fd_reduce(s, g, step, KEY, probe=kind, variance_reduced=r)
              for r in (True, False)),
        ]  # fmt: skip

    mapped = torch.func.vmap(calls)(s, g)
    for i in range(3):
        for got, want in zip(mapped, calls(s[i], g[i]), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-4)

    # Samples are not hidden from their noise.
    with pytest.raises(RuntimeError, match="x: got samples under torch.func.vmap"):
        torch.func.vmap(lambda x: ops.fd_pair(x, step, KEY, probe=kind))(s)
    ahead, behind = torch.func.jvp(
        lambda x: ops.fd_pair(x, step, KEY, probe=kind), (s[0],), (along[0],)
    )[1].chunk(2)
    assert torch.equal(ahead, along[0]) and torch.equal(behind, along[0])

    def loss(s: Tensor) -> Tensor:
        return ops.ssm_reduce(s.square(), s, KEY, probe=kind).sum()

    leaf = s[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    # Forward over reverse, and forward alone.
    torch.testing.assert_close(torch.func.grad(loss)(s[0]), gradient, rtol=1e-4, atol=1e-4)
    hessian = torch.func.hessian(loss)(s[0]).reshape(20, 20)
    torch.testing.assert_close(hessian, hessian.diag().diag())
    _, ahead = torch.func.jvp(loss, (s[0],), (along[0],))
    torch.testing.assert_close(ahead, (gradient * along[0]).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PROBES)
def test_threads_and_instruction_sets_change_no_bit(kind: str) -> None:
    for shape in ((64, 3, 32, 32), (20_000, 2), (3, 100_003)):
        s, g, results = torch.randn(shape), torch.randn(shape), []
        for name in NATIVE:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with on_backend(name):
                    results.append(ops.ssm_reduce(g, s, KEY, probe=kind))
        assert all(torch.equal(r, results[0]) for r in results[1:])


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("shape", SHAPES)
def test_differences_against_fp64(backend: str, shape: tuple[int, ...], kind: str) -> None:
    v, x, step = probe(shape, kind), torch.randn(shape), torch.rand(shape[0]) + 0.1
    wide = step.double().view(-1, *[1] * (len(shape) - 1))
    pair = ops.fd_pair(x, step, KEY, probe=kind)
    want = torch.cat([x.double() + wide * v, x.double() - wide * v])
    torch.testing.assert_close(pair.double(), want, rtol=2e-6, atol=2e-6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        above, below = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        derivative = (above.double() - below.double()) / (2 * wide)
        mean = 0.5 * (above.double() + below.double())
        for reduced, second in ((True, sums(mean, mean)), (False, sums(v, mean).square())):
            got = ops.fd_reduce(above, below, step, KEY, probe=kind, variance_reduced=reduced)
            size = sums(v.abs(), derivative.abs()) + second + sums(v.abs(), mean.abs()).square()
            assert close(got, sums(v, derivative) + 0.5 * second, size)


@pytest.mark.parametrize("kind", PROBES)
def test_each_is_the_other_s_adjoint(backend: str, kind: str) -> None:
    s, g = torch.randn(5, 70), torch.randn(5)
    left = float((ops.probe_dot(s, KEY, probe=kind).double() * g.double()).sum())
    right = float((s.double() * ops.probe_scale(g, (5, 70), KEY, probe=kind).double()).sum())
    assert abs(left - right) < 1e-4
    leaf = s.clone().requires_grad_()
    (ops.probe_dot(leaf, KEY, probe=kind) * g).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, ops.probe_scale(g, (5, 70), KEY, probe=kind))


@pytest.mark.parametrize("kind", PROBES)
def test_gradcheck(kind: str) -> None:
    s, g = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def dot(s: Tensor) -> Tensor:
        return ops.probe_dot(s.sin(), KEY, probe=kind)

    def scale(b: Tensor) -> Tensor:
        return ops.probe_scale(b.sin(), (3, 5), KEY, probe=kind)

    def reduced(g: Tensor, s: Tensor) -> Tensor:
        return ops.ssm_reduce(g.sin(), s.sin(), KEY, probe=kind)

    def plain(g: Tensor, s: Tensor) -> Tensor:
        return ops.ssm_reduce(g.sin(), s.sin(), KEY, probe=kind, variance_reduced=False)

    step = torch.rand(3, dtype=torch.float64) + 0.1

    def pair(s: Tensor) -> Tensor:
        return ops.fd_pair(s.sin(), step, KEY, probe=kind)

    def difference(g: Tensor, s: Tensor) -> Tensor:
        reduced = ops.fd_reduce(g.sin(), s.sin(), step, KEY, probe=kind)
        return reduced + ops.fd_reduce(
            g.sin(), s.sin(), step, KEY, probe=kind, variance_reduced=False
        )

    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (pair, (s,)),
        (difference, (g, s)),
        (dot, (s,)), (scale, (b,)), (reduced, (g, s)), (plain, (g, s))]  # fmt: skip
    for function, leaves in cases:
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", ["probe_sums", "probe_scale", "probe_shift"])
def test_opcheck(backend: str, name: str) -> None:
    torch.use_deterministic_algorithms(False)
    arguments: dict[str, tuple[Any, ...]] = {
        "probe_sums": ("normal", torch.randn(3, 5), torch.randn(3, 5), True),
        "probe_shift": ("normal", torch.randn(3, 5), torch.randn(3)),
        "probe_scale": ("rademacher", torch.randn(3), [3, 5]),
    }
    op = getattr(torch.ops.score_kernels, name).default
    torch.library.opcheck(op, (*arguments[name], -7, 64, 2, 3, None))


def test_empty_batches(backend: str) -> None:
    for shape in ((0, 3), (3, 0), (0,)):
        assert ops.probe_dot(torch.zeros(shape), KEY).tolist() == [0.0] * shape[0]
        assert ops.probe_scale(torch.zeros(shape[0]), shape, KEY).shape == shape


def test_wrong_inputs_are_named() -> None:
    s = torch.zeros(2, 3)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: ops.probe_dot(s, KEY, probe="cauchy"), ValueError, "probe: got 'cauchy'"),
        (lambda: ops.probe_dot(s.int(), KEY), TypeError, "s: got dtype torch.int32"),
        (lambda: ops.probe_dot(s, 3), TypeError, "noise: got int"),  # type: ignore[arg-type]
        (lambda: ops.probe_scale(s[0], (2, 3), KEY), ValueError, r"g: got shape \(3,\)"),
        (lambda: ops.probe_scale(s[:, 0], (2, -3), KEY), ValueError, "shape: got -3"),
        (lambda: ops.ssm_reduce(s[:1], s, KEY), ValueError, r"g: got shape \(1, 3\)"),
        (
            lambda: ops.ssm_reduce(s.half(), s, KEY),
            ValueError,
            r"g: got shape .* of torch.float16",
        ),
        (lambda: ops.fd_pair(s, s[:, 0].half(), KEY), TypeError, "step: got dtype"),
        (lambda: ops.fd_pair(s, s[0], KEY), ValueError, r"step: got shape \(3,\)"),
        (lambda: ops.fd_reduce(s, s[:1], s[:, 0], KEY), ValueError, r"below: got shape \(1, 3\)"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()
