"""The update of a chain: one affine step, of which Langevin's is a case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import choose, native
from score_kernels.noise import NoiseKey
from score_kernels.ops._dispatch import KEY, apply, register, signed, unsigned

__all__ = ["affine_step_", "langevin_step", "langevin_step_", "table_step_"]


def affine_step_(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
    """``x <- a x + b score + c z`` in place: the step every sampler of the family is made of.

    ``z`` is ``normal(x.shape, noise)``, never stored. In float32 the step is the fixed chain
    ``fma(c, z, fma(b, score, a * x))`` with the coefficients rounded to float32, so that chains
    agree to the bit across backends; ``c = 0`` draws no noise. Differentiable in x and score.

    Args:
        x: ``[B, ...]`` float32, or float64 on the reference backend.
        score: x's shape and device; float32, bfloat16 or float16 (or x's own float64).
        a, b, c: finite numbers.
        noise: names the noise; see :class:`score_kernels.NoiseKey`.

    Returns:
        x.

    Raises:
        TypeError: a dtype or an argument's kind is not one of the above.
        ValueError: shapes or devices differ, or a number is not finite or out of range.
    """
    a, b, c = checks.number("a", a), checks.number("b", b), checks.number("c", c)
    return _step(x, score, a, b, c, noise, in_place=True)


def langevin_step_(x: Tensor, score: Tensor, alpha: float, noise: NoiseKey) -> Tensor:
    """``x <- x + (alpha/2) score + sqrt(alpha) z`` in place. See :func:`langevin_step`."""
    if type(alpha) is not float or not 0.0 <= alpha < math.inf:
        # Only what is not plainly right is checked in full: that costs a tenth of a small step.
        alpha = checks.not_negative("alpha", alpha)
    return _step(x, score, 1.0, 0.5 * alpha, math.sqrt(alpha), noise, in_place=True)


def langevin_step(x: Tensor, score: Tensor, alpha: float, noise: NoiseKey) -> Tensor:
    """One step of Langevin dynamics, ``x + (alpha/2) score + sqrt(alpha) z``.

    This is form A of Song and Ermon (2019, arXiv 1907.05600, Algorithm 1). Codes that write
    ``x + step score + sqrt(2 step) z`` (form B) have ``alpha = 2 step``.

    Args:
        x: ``[B, ...]`` float32, or float64 on the reference backend.
        score: x's shape and device; float32, bfloat16 or float16 (or x's own float64).
        alpha: step size, a number of at least 0, in squared units of x.
        noise: names the noise ``z``; see :class:`score_kernels.NoiseKey`.

    Returns:
        A new tensor like x. Differentiable in x and score, any number of times.

    Raises:
        TypeError: a dtype or an argument's kind is not one of the above.
        ValueError: shapes or devices differ, or alpha is negative or not finite.
    """
    if type(alpha) is not float or not 0.0 <= alpha < math.inf:
        # Only what is not plainly right is checked in full: that costs a tenth of a small step.
        alpha = checks.not_negative("alpha", alpha)
    return _step(x, score, 1.0, 0.5 * alpha, math.sqrt(alpha), noise, in_place=False)


def table_step_(
    x: Tensor,
    score: Tensor,
    table: Tensor,
    step: Tensor | None,
    noise: NoiseKey,
    *,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`affine_step_` with coefficients that lie on the device, and with known elements.

    With a `step`, ``a, b, c = table[step]`` and the noise's draw is moved on by it: a captured CUDA
    graph that ends with ``step.add_(1)`` does the next step of a chain at each replay. Without one
    the table has a line for each sample, or one for all.

    With `known` the table has two columns more, a scale and a spread: where `mask` is true,
    ``x <- scale known + spread z``, whatever x and score are there (inpainting). Not
    differentiable.

    Args:
        x: ``[B, ...]`` float32 (or float64 on the reference backend), contiguous.
        score: x's shape and device; float32, bfloat16 or float16.
        table: x's dtype and device, contiguous; ``[steps, 3]`` or, without a step, ``[B, 3]`` or
            ``[1, 3]``; with known ``[..., 5]``.
        step: int64 without dimensions, on x's device, ``0 <= step < steps``; or None. On a GPU,
            where a look at it would wait for the device, a step outside makes x NaN.
        noise: names the noise, with a step that of step 0; see :class:`score_kernels.NoiseKey`.
        known, mask: x's shape and device, contiguous; x's dtype and bool.

    Returns:
        x.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape or device, or out of range.
    """
    _check_step(x, score, noise)
    if (known is None) != (mask is None):
        missing = "known" if known is None else "mask"
        raise ValueError(f"{missing}: got none, expected it beside the other of known and mask")
    columns = 3 if known is None else 5
    checks.instance("table", table, Tensor, "a tensor")
    checks.dense("table", table)
    lines = table.shape[:1] if step is not None or table.shape[:1] == x.shape[:1] else (1,)
    wanted = f"[steps, {columns}]" if step is not None else f"[B, {columns}] or [1, {columns}]"
    _check_part("table", table, x.dtype, (*lines, columns), wanted, x)
    if step is not None:
        _check_part("step", step, torch.int64, (), "no dimensions", x)
        if noise.draw + table.shape[0] > 1 << 32:
            raise ValueError(
                f"noise: got draw {noise.draw} with a table of {table.shape[0]} steps, expected "
                "draw + steps <= 2**32"
            )
    if known is not None:
        _check_part("known", known, x.dtype, x.shape, "that of x", x)
        _check_part("mask", mask, torch.bool, x.shape, "that of x", x)
    if not x.is_contiguous() or x.is_neg():
        raise ValueError(
            f"x: got strides {x.stride()}{', negated lazily' if x.is_neg() else ''}, expected a "
            "contiguous tensor"
        )
    given = {"x": x, "score": score, "table": table, "known": known}
    for name, value in given.items():
        if torch.is_grad_enabled() and value is not None and value.requires_grad:
            raise ValueError(f"{name}: got requires_grad=True, expected a tensor without gradient")
    _table_op(x, score, table, step, known, mask, *signed(noise.fields()))
    return x


def _check_part(
    name: str, value: Any, dtype: torch.dtype, shape: Sequence[int], wanted: str, x: Tensor
) -> None:
    checks.instance(name, value, Tensor, "a tensor")
    checks.dense(name, value)
    if value.dtype != dtype or value.device != x.device:
        raise TypeError(
            f"{name}: got {value.dtype} on {value.device}, expected {dtype} on {x.device}"
        )
    if value.shape != tuple(shape) or not value.is_contiguous():
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} and strides {value.stride()}, "
            f"expected {wanted}, contiguous"
        )


def _step(
    x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey, *, in_place: bool
) -> Tensor:
    out = native.quick_step(x, score, a, b, c, noise, in_place)
    if out is not None:
        return out
    _check_step(x, score, noise)
    return apply(_AffineStepInPlace if in_place else _AffineStep, x, score, a, b, c, noise)


def _check_step(x: Tensor, score: Tensor, noise: NoiseKey) -> None:
    checks.instance("noise", noise, NoiseKey, "a NoiseKey")
    checks.state("x", x)
    checks.score_like(x, score)
    checks.sample_range(noise.first_sample, x.shape[0])
    checks.noise_shape(x.shape, "x")


class _AffineStep(torch.autograd.Function):
    """The step as a function of x and score; its derivatives do not need the noise.

    No jvp: torch.compile traces no function that has one.
    """

    @staticmethod
    def forward(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
        return _step_op(x, score, a, b, c, *signed(noise.fields()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, score, ctx.a, ctx.b, _, _ = inputs
        ctx.score_dtype = score.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_score = ctx.needs_input_grad[:2]
        return (
            ctx.a * grad if to_x else None,
            (ctx.b * grad).to(ctx.score_dtype) if to_score else None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        raise RuntimeError(
            "x: got a state under torch.func.vmap, expected a whole batch [B, ...]: noise belongs "
            "to the samples of a batch, and the step already runs over all of them"
        )


class _AffineStepInPlace(_AffineStep):
    @staticmethod
    def forward(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
        _in_place_op(x, score, a, b, c, *signed(noise.fields()))
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _AffineStep.setup_context(ctx, inputs, output)
        ctx.mark_dirty(inputs[0])


def readable(x: Tensor, score: Tensor) -> Tensor:
    """A score to read while the state x is written: contiguous, and x itself or apart from it."""
    if not score.is_contiguous():
        return score.contiguous()
    itself = score.data_ptr() == x.data_ptr() and score.dtype == x.dtype
    return score if itself else _apart(x, score)


def _apart(x: Tensor, value: Tensor) -> Tensor:
    """A contiguous tensor, copied if x would be written over it."""
    overlap = -value.nbytes < value.data_ptr() - x.data_ptr() < x.nbytes
    return value.clone() if overlap else value


def _shares_elements(x: Tensor) -> bool:
    """Whether two indices of x lead to one place in memory."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    # Strides that are not nested, or shared ones: count the places.
    if torch._debug_has_internal_overlap(x) == 1:
        return True
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    places = torch.zeros(reach, dtype=torch.bool)
    places.as_strided(x.shape, x.stride(), 0).fill_(True)
    return int(places.count_nonzero()) < x.numel()


def _affine_step(x: Tensor, score: Tensor, a: float, b: float, c: float, *key: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = choose(x.device, x.dtype).affine_step
    step(out, x.contiguous(), score.contiguous(), a, b, c, unsigned(key))
    return out


def _affine_step_(x: Tensor, score: Tensor, a: float, b: float, c: float, *key: int) -> None:
    step = choose(x.device, x.dtype).affine_step
    if x.is_contiguous() and not x.is_neg():
        step(x, x, readable(x, score), a, b, c, unsigned(key))
        torch.autograd.graph.increment_version(x)
        return
    if _shares_elements(x):
        raise ValueError(
            f"x: got strides {x.stride()} for shape {tuple(x.shape)}, expected a "
            "tensor whose elements do not share memory (clone an expanded one)"
        )
    dense = x.resolve_neg().contiguous()
    step(dense, dense, score.contiguous(), a, b, c, unsigned(key))
    x.copy_(dense)


def _table_step_(
    x: Tensor,
    score: Tensor,
    table: Tensor,
    step: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    *key: int,
) -> None:
    if step is not None and step.is_cpu and not 0 <= int(step) < len(table):
        raise ValueError(f"step: got {int(step)}, expected 0 <= step < {len(table)}")
    backend = choose(x.device, x.dtype)
    # Kernels may read all but the score after they have written x. What has no memory of its own
    # arrives here as one value for all elements.
    score, table = readable(x, score), _apart(x, table.contiguous())
    step, known, mask = (
        None if t is None else _apart(x, t.contiguous()) for t in (step, known, mask)
    )
    backend.table_step(x, x, score, table, step, unsigned(key), known, mask)
    torch.autograd.graph.increment_version(x)


def _fake_step(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_STEP = f"Tensor score, float a, float b, float c, {KEY}"
_step_op = register(f"affine_step(Tensor x, {_STEP}) -> Tensor", _affine_step, _fake_step)
_in_place_op = register(
    f"affine_step_(Tensor(a!) x, {_STEP}) -> ()", _affine_step_, lambda *_: None
)
_table_op = register(
    "table_step_(Tensor(a!) x, Tensor score, Tensor table, Tensor? step, Tensor? known, "
    f"Tensor? mask, {KEY}) -> ()",
    _table_step_,
    lambda *_: None,
)
