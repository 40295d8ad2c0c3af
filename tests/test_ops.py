"""The update ops: values in float64, derivatives, dispatch, and wrong inputs.

That every backend has the reference's bits is a check of selfcheck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
import torch._dynamo.testing
from conftest import on_backend
from steps import endings, lines_and_masks
from torch import Tensor

import score_kernels
from score_kernels import NoiseKey, ops
from score_kernels.backends.reference import CLAMP, WRAP

KEY = NoiseKey(2**63 + 11, purpose=2, draw=17, first_sample=2**32 - 2)
SHAPES = [(1, 1), (3, 1), (7, 2), (5, 3), (4, 4), (6, 5), (2, 64), (3, 130), (2, 257), (2, 1023)]
SHAPES += [(3, 2050), (4, 3, 8, 8), (2, 3, 5, 7, 2), (9,), (3, 0), (0, 3), (0,)]
SCORES = [torch.float32, torch.bfloat16, torch.float16]
# The state as it is.
STAY = torch.tensor([[1.0, 0.0, 0.0]])


def inputs(
    shape: tuple[int, ...], score: torch.dtype = torch.float32, state: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=state), (10 * torch.randn(shape)).to(score)


def exact(x: Tensor, score: Tensor, a: float, b: float, c: float) -> Tensor:
    z = ops.normal(x.shape, KEY).double()
    return a * x.double() + b * score.double() + c * z


@pytest.mark.parametrize("dtype", SCORES)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_against_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, score = inputs(shape, dtype)
    alpha, error = 0.02, tolerances.FP32_RELATIVE
    with on_backend("reference"):
        step = ops.langevin_step(x, score, alpha, KEY)
        # alpha / 2 before the score and sqrt(alpha) before the noise.
        want = exact(x, score, 1.0, alpha / 2, math.sqrt(alpha))
        np.testing.assert_allclose(step.double(), want, rtol=error, atol=4 * error)
        state = x.clone()
        assert ops.affine_step_(state, score, 0.9, -0.3, 0.7, KEY) is state
        want = exact(x, score, 0.9, -0.3, 0.7)
        np.testing.assert_allclose(state.double(), want, rtol=error, atol=4 * error)


@pytest.mark.parametrize("dtype", SCORES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tables_and_known_elements_against_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, score = inputs(shape, dtype)
    known, error = torch.randn(shape), tolerances.FP32_RELATIVE
    z = ops.normal(shape, KEY).double()
    for (lines, mask), (gain, end) in zip(lines_and_masks(shape), endings(shape), strict=False):
        k = [v.view(-1, *[1] * (len(shape) - 1)) for v in lines.double().unbind(1)]
        g = torch.ones(()) if gain is None else gain
        want = k[0] * x + k[1] * g * score.double() + k[2] * g.double().sqrt() * z
        if mask is not None:
            want = torch.where(mask, k[3] * known + k[4] * z, want)
        part = None if mask is None else known
        with on_backend("reference"):
            got = ops.table_step_(
                x.clone(), score, lines, None, KEY, known=part, mask=mask, precondition=gain,
                clamp=end[1:] if end[0] == CLAMP else None, wrap=end[2] if end[0] == WRAP else None,
            )  # fmt: skip
        if end[0] == CLAMP:
            want = want.clamp(*end[1:])
        elif end[0] == WRAP:
            assert ((0 <= got) & (got < end[2])).all()
            # Next to the period 0 is as near.
            far = got - want
            got = want + far - end[2] * (far / end[2]).round()
        np.testing.assert_allclose(got.double(), want, rtol=error, atol=40 * error)


@pytest.mark.parametrize("period", [1.0, 0.3, 7.1])
def test_wrapped_states_are_inside_the_period(backend: str, period: float) -> None:
    """Next to its multiples, below and above; a remainder that rounds to the period is 0."""
    near = torch.arange(-50, 50).float() * period
    x = torch.cat(
        [near, near.nextafter(near + 1), near.nextafter(near - 1), torch.tensor([-1e-30])]
    )
    got = ops.table_step_(x[None].clone(), x[None], STAY, None, KEY, wrap=period)[0]
    assert ((0 <= got) & (got < np.float32(period))).all()
    far = (got.double() - x.double()) / np.float32(period)
    assert (far - far.round()).abs().max() < 1e-5
    bad = torch.tensor([[math.nan, math.inf, -math.inf]])
    assert ops.table_step_(bad.clone(), bad, STAY, None, KEY, wrap=period).isnan().all()


def test_a_clamp_keeps_what_is_not_a_number(backend: str) -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 0.3, 1.5, -2.5]])
    got = ops.table_step_(x.clone(), torch.zeros(1, 6), STAY, None, KEY, clamp=(-1, 1.25))
    assert got[0, 0].isnan()
    assert got[0, 1:].tolist() == [1.25, -1.0, pytest.approx(0.3), 1.25, -1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clamp": 3.0}, r"clamp: got 3.0, expected two numbers"),
        ({"clamp": (torch.zeros(2), torch.ones(2))}, r"clamp: got \(tensor.*expected two numbers"),
        ({"clamp": (2, 1)}, r"clamp: got \(2, 1\), expected low <= high"),
        ({"clamp": (math.nan, 1)}, r"clamp: got \(nan, 1\), expected low <= high"),
        ({"wrap": 0.0}, "wrap: got 0.0, expected"),
        ({"wrap": 1.0, "clamp": (0, 1)}, "wrap: got one beside clamp"),
        ({"precondition": torch.ones(1, 1)}, "precondition: got shape"),
        ({"precondition": torch.ones(1, 2).double()}, "precondition: got torch.float64"),
    ],
)
def test_ends_and_preconditioners_that_are_wrong(given: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.table_step_(x, x, STAY, None, KEY, **given)


def test_a_counter_is_a_line_of_the_table_and_a_draw(backend: str) -> None:
    x, score = inputs((7, 33))
    table, step = torch.randn(3, 3), torch.tensor(2)
    want = ops.affine_step_(x.clone(), score, *table[2].tolist(), KEY.at(KEY.draw + 2))
    assert torch.equal(ops.table_step_(x, score, table, step, KEY), want)


def test_known_elements_are_exact_whatever_is_there(backend: str) -> None:
    """Signs of zeros and infinities are kept; a score that is NaN there does not matter."""
    known = torch.tensor([[0.0, -0.0, 3.5, math.inf, -1e-45, 1.0, 2.0]])
    mask = torch.tensor([[True] * 5 + [False] * 2])
    line = torch.tensor([[1.0, 1.0, 0.5, 1.0, 0.0]])
    nowhere = torch.where(mask, torch.nan, 1.0)
    x = ops.table_step_(nowhere.clone(), nowhere, line, None, KEY, known=known, mask=mask)
    assert torch.equal(x[mask].view(torch.int32), known[mask].view(torch.int32))
    assert x[~mask].isfinite().all()
    # What is known may be a view of the state itself, whole or in part.
    memory = torch.randn(8)
    state, ahead = memory[:7].view(1, 7), memory[1:].view(1, 7)
    for view in (state, ahead):
        want = view.clone()
        ops.table_step_(state, state.clone(), line, None, KEY, known=view, mask=mask)
        assert torch.equal(state[mask], want[mask])


@pytest.mark.parametrize("dtype", SCORES)
def test_scores_of_every_value(backend: str, dtype: torch.dtype) -> None:
    """All 65,536 bit patterns, subnormals, infinities and NaN."""
    score = torch.tensor([0.0, -0.0, 1e-45, -1e-40, math.inf, -math.inf, math.nan, 3e38])
    if dtype != torch.float32:
        score = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    got = ops.affine_step_(torch.zeros(1, len(score)), score[None], 1.0, 1.0, 0.0, KEY)
    np.testing.assert_array_equal(got.numpy(), score[None].float().numpy())


@pytest.mark.parametrize("elements", [4, 7])
def test_where_there_is_no_noise_none_is_added(backend: str, elements: int) -> None:
    """A product with 0 would change the sign of a zero."""
    zero = torch.full((3, elements), -0.0)
    assert ops.affine_step_(zero.clone(), zero, 0.9, 0.2, 0.0, KEY).signbit().all()
    mask = torch.arange(elements).expand(3, -1) % 2 == 0
    known, table = zero.clone(), torch.tensor([[0.9, 0.2, 0.0, 0.5, 0.0]])
    for c, noise_scale in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.3)):
        table[0, 2], table[0, 4] = c, noise_scale
        x = ops.table_step_(zero.clone(), zero, table, None, KEY, known=known, mask=mask.clone())
        for where, scale in ((mask, noise_scale), (~mask, c)):
            assert x[where].signbit().all() if not scale else (x[where] != 0).all()
    plain = ops.table_step_(zero.clone(), zero, table[:, :3].contiguous(), None, KEY)
    assert plain.signbit().all()


def test_fp64_state_is_updated_in_fp64() -> None:
    x, score = inputs((3, 7), state=torch.float64)
    for s in (score, score.double(), score.bfloat16()):
        want = exact(x, s, 1.0, 0.05, math.sqrt(0.1))
        torch.testing.assert_close(ops.langevin_step(x, s, 0.1, KEY), want, rtol=1e-15, atol=1e-15)


def test_memory_layout_does_not_enter(backend: str) -> None:
    x, score = inputs((4, 3, 6, 5))
    want = ops.langevin_step(x, score, 0.1, KEY)
    channels_last = score.to(memory_format=torch.channels_last)
    layouts = {
        "transposed": x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "channels last": x.to(memory_format=torch.channels_last),
        "every second": torch.stack((x, x), -1)[..., 0],
    }
    for name, view in layouts.items():
        assert torch.equal(ops.langevin_step(view, score, 0.1, KEY), want), name
        assert ops.langevin_step_(view, channels_last, 0.1, KEY) is view
        assert torch.equal(view, want), name


def test_aliased_inputs(backend: str) -> None:
    """The score may be the state itself, or overlap it."""
    x = torch.randn(3, 40)
    want = ops.langevin_step(x, x.clone(), 0.1, KEY)
    same = x.clone()
    assert torch.equal(ops.langevin_step_(same, same, 0.1, KEY), want)
    memory = torch.randn(3 * 40 + 8)
    first, second = memory[:120].view(3, 40), memory[8:].view(3, 40)
    want = ops.langevin_step(first.clone(), second.clone(), 0.1, KEY)
    assert torch.equal(ops.langevin_step_(first, second, 0.1, KEY), want)
    # At the same address, in half the bytes; more than the reference takes at a time.
    x = torch.randn(3, 100_000)
    halves = x.view(torch.bfloat16).view(-1)[:300_000].view(3, 100_000)
    halves.normal_()
    want = ops.langevin_step(x.clone(), halves.clone(), 0.1, KEY)
    torch.testing.assert_close(ops.langevin_step_(x, halves, 0.1, KEY), want, rtol=0, atol=0)


def test_gradients(backend: str) -> None:
    x, score = inputs((3, 10))
    for s in (score, score.bfloat16()):
        leaf_x, leaf_s = x.clone().requires_grad_(), s.clone().requires_grad_()
        weight = torch.randn(3, 10)
        (ops.langevin_step(leaf_x, leaf_s, 0.3, KEY) * weight).sum().backward()
        torch.testing.assert_close(leaf_x.grad, weight)
        torch.testing.assert_close(leaf_s.grad, (0.15 * weight).to(s.dtype))
        assert leaf_s.grad is not None and leaf_s.grad.dtype == s.dtype


def test_in_place_gradients(backend: str) -> None:
    x, score = inputs((3, 10))
    leaf_x, leaf_s = x.clone().requires_grad_(), score.clone().requires_grad_()
    state = leaf_x * 2
    out = ops.affine_step_(state, leaf_s, 0.5, 0.25, 1.0, KEY)
    assert out is state
    assert torch.equal(state, ops.affine_step_(2 * x, score, 0.5, 0.25, 1.0, KEY))
    state.sum().backward()
    torch.testing.assert_close(leaf_x.grad, torch.ones_like(x))
    torch.testing.assert_close(leaf_s.grad, torch.full_like(x, 0.25))
    with pytest.raises(RuntimeError, match="leaf"):
        ops.affine_step_(leaf_x, score, 0.5, 0.25, 1.0, KEY)


@pytest.mark.parametrize("dtype", SCORES)
def test_autograd_notices_a_state_changed_in_place(backend: str, dtype: torch.dtype) -> None:
    """A state saved for some backward and then stepped must raise, not give wrong gradients."""
    x, score = inputs((3, 10), dtype)
    weight = torch.ones(10, requires_grad=True)
    energy = (x * weight).sum()
    ops.langevin_step_(x, score, 0.1, KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        energy.backward()
    with torch.inference_mode():
        ops.langevin_step_(torch.zeros(2, 3), torch.zeros(2, 3), 0.1, KEY)


def test_gradcheck() -> None:
    x, score = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def step(x: Tensor, score: Tensor) -> Tensor:
        # Squares, so that the second derivative is not zero.
        return ops.langevin_step(x.square(), score.square(), 0.3, KEY)

    def step_in_place(x: Tensor, score: Tensor) -> Tensor:
        return ops.affine_step_(x.square(), score.square(), 0.7, 0.2, 0.5, KEY)

    for function in (step, step_in_place):
        assert torch.autograd.gradcheck(function, (x, score))
        assert torch.autograd.gradgradcheck(function, (x, score))


def test_functional_transforms() -> None:
    x, score = inputs((3, 4))
    grad = torch.func.grad(lambda s: ops.langevin_step(x, s, 0.3, KEY).sum())(score)
    torch.testing.assert_close(grad, torch.full_like(score, 0.15))
    with pytest.raises(
        RuntimeError,
        match="x: got samples under torch.func.vmap, .*make the noise first",
    ):
        torch.func.vmap(lambda a, b: ops.langevin_step(a, b, 0.3, KEY))(x[None], score[None])


KEY_FIELDS = (-7, 1, 2, 3)
# Of three rows.
ADDRESSES = (None, KEY.rows(torch.tensor([5, 5, 2]), draws=torch.tensor([0, 1, 2])).addresses)


@pytest.mark.parametrize("name", ["words", "normal", "uniform", "rademacher"])
def test_opcheck_of_fills(backend: str, name: str) -> None:
    for addresses in ADDRESSES:
        opcheck(name, [3, 5], torch.device("cpu"), *KEY_FIELDS, addresses)


@pytest.mark.parametrize("dtype", SCORES)
@pytest.mark.parametrize("name", ["affine_step", "affine_step_"])
def test_opcheck_of_steps(backend: str, name: str, dtype: torch.dtype) -> None:
    for addresses in ADDRESSES:
        opcheck(name, *inputs((3, 5), dtype), 1.0, 0.1, 0.2, *KEY_FIELDS, addresses)


def opcheck(name: str, *arguments: Any) -> None:
    # opcheck compares two runs; poisoned memory would be reported as its own mutation.
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(getattr(torch.ops.score_kernels, name).default, arguments)


def test_compiled_whole(backend: str) -> None:
    """fullgraph, with the key changing from call to call and no compilation for it."""

    def chain(x: Tensor, score: Tensor, noise: NoiseKey) -> Tensor:
        y = ops.langevin_step(x.sin(), score.cos(), 0.1, noise)
        return ops.affine_step_(y, score, 0.5, 0.1, 0.2, noise) + ops.normal((3, 8), noise)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chain, fullgraph=True, backend=counter)
    x, score = inputs((3, 8))
    for step in range(6):
        noise = NoiseKey(2**64 - 5, first_sample=9).at(step)
        assert torch.equal(compiled(x, score, noise), chain(x, score, noise))
    # Once as constants, once with them dynamic, and then never again.
    assert counter.frame_count == 2


def test_compiled_by_inductor_with_gradients() -> None:
    def loss(x: Tensor, score: Tensor) -> Tensor:
        return ops.langevin_step(x, score * 2, 0.5, KEY).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for function in (loss, compiled):
        x, score = torch.arange(12.0).view(3, 4), torch.ones(3, 4, requires_grad=True)
        function(x, score).backward()
        want = 2 * ops.langevin_step(x, score.detach() * 2, 0.5, KEY) * 0.25 * 2
        torch.testing.assert_close(score.grad, want)


def test_fake_tensors_see_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 3)
        assert ops.langevin_step(x, torch.empty(4, 3), 0.1, KEY).shape == (4, 3)
        assert ops.normal((5, 2), KEY, device="cpu").shape == (5, 2)


GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "wrong, error, match",
    [
        ({"score": torch.zeros(3, 2)}, ValueError, r"score: got shape \(3, 2\).*\(2, 3\)"),
        ({"score": GOOD.to("meta")}, ValueError, "score: got device meta.*cpu"),
        ({"score": GOOD.double()}, TypeError, "score: got dtype.*64"),
        ({"score": GOOD.int()}, TypeError, "score: got dtype.*int32"),
        ({"score": None}, TypeError, "score: got NoneType"),
        ({"x": GOOD.int()}, TypeError, "x: got dtype torch.int32.*float32"),
        ({"x": GOOD.bfloat16()}, TypeError, "x: got dtype.*keep it in float32"),
        ({"x": GOOD.numpy()}, TypeError, "x: got ndarray.*expected a tensor"),
        ({"x": torch.tensor(1.0), "score": torch.tensor(1.0)}, ValueError, r"x: .*expected \[B"),
        ({"alpha": -0.1}, ValueError, "alpha: got -0.1"),
        ({"alpha": math.nan}, ValueError, "alpha: got nan"),
        ({"alpha": math.inf}, ValueError, "alpha: got inf"),
        ({"alpha": "0.1"}, TypeError, "alpha: got str"),
        ({"alpha": torch.tensor(0.1)}, TypeError, "alpha: got a tensor.*item"),
        ({"noise": 7}, TypeError, "noise: got int 7.*NoiseKey"),
        ({"noise": NoiseKey(0, first_sample=2**56 - 1)}, ValueError, "first_sample"),
    ],
)
@pytest.mark.parametrize("step", [ops.langevin_step, ops.langevin_step_])
def test_wrong_inputs_are_named(
    step: Callable[..., Tensor], wrong: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        step(**({"x": GOOD, "score": GOOD, "alpha": 0.1, "noise": KEY} | wrong))


def test_more_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="x: got strides"):
        ops.langevin_step_(torch.zeros(1, 3).expand(2, 3), GOOD, 0.1, KEY)
    for position, name in enumerate("abc"):
        for value, error in ((math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)):
            coefficients: list[Any] = [1.0, 1.0, 1.0]
            coefficients[position] = value
            with pytest.raises(error, match=f"{name}: got"):
                ops.affine_step_(GOOD.clone(), GOOD, *coefficients, KEY)
    for shape in ((), (2, -1), (1, 2**35)):
        with pytest.raises(ValueError, match="shape: got"):
            ops.normal(shape, KEY)
    for shape in (5, "23", (2.0, 1)):
        with pytest.raises(TypeError, match=r"shape(\[0\])?: got"):
            ops.normal(shape, KEY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype: got torch.int32"):
        ops.normal((2,), KEY, dtype=torch.int32)
    with pytest.raises(TypeError, match="noise: got"):
        ops.words((2,), 3)  # type: ignore[arg-type]


def test_backends_are_forced_and_refused_by_name() -> None:
    with pytest.raises(ValueError, match="name: got 'tpu'.*native.*reference"):
        score_kernels.use_backend("tpu")
    x64 = torch.zeros(2, 3, dtype=torch.float64)
    refusal = "backend: 'native' is forced but.*float32.*float64"
    with score_kernels.use_backend("native"), pytest.raises(ValueError, match=refusal):
        ops.langevin_step(x64, x64, 0.1, KEY)
    # Leaving the block restores the choice by dtype.
    assert ops.langevin_step(x64, x64, 0.1, KEY).dtype == torch.float64


def test_a_block_forces_a_backend_in_its_thread_and_while_it_is_open() -> None:
    from score_kernels.backends import choose, reference, registry
    from score_kernels.backends.compiled import native

    def chosen() -> Any:
        return choose(torch.device("cpu"), torch.float32)

    block = score_kernels.use_backend("reference")
    assert chosen() is native
    with ThreadPoolExecutor(1) as pool:
        other = score_kernels.use_backend("reference")
        with block:
            assert chosen() is reference.backend
            assert pool.submit(chosen).result() is native
            # A small step remembers its backend, but not that of a block.
            ops.langevin_step_(torch.zeros(2, 3), torch.zeros(2, 3), 0.1, KEY)
            assert registry.cpu_float32 is None
            # Blocks that overlap in two threads, the first to open being the first to close.
            pool.submit(other.__enter__).result()
        assert chosen() is native and pool.submit(chosen).result() is reference.backend
        pool.submit(other.__exit__, None, None, None).result()
        assert pool.submit(chosen).result() is native
    try:
        score_kernels.set_backend("reference")
        assert chosen() is reference.backend
        with score_kernels.use_backend(None):
            assert chosen() is native
        assert chosen() is reference.backend
    finally:
        score_kernels.set_backend(None)
    assert chosen() is native
