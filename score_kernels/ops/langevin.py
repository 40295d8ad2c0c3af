"""The update of a chain: affine steps, Langevin's among them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import choose, registry
from score_kernels.backends.reference import CLAMP, NO_END, WRAP, End
from score_kernels.noise import Key, NoiseKey
from score_kernels.ops._dispatch import (
    KEY_SCHEMA,
    apply,
    check_key,
    dense,
    direct,
    is_compiling,
    is_grad_enabled,
    new_like,
    refuse_vmap,
    register,
    undisturbed,
    wants_grad,
)

__all__ = ["affine_step_", "langevin_step", "langevin_step_", "table_step_"]

# A kernel that writes through a pointer must say so, or autograd would not notice that a tensor it
# has saved has changed. The public function wraps this one, for a twentieth of a step.
_increment_version = torch._C._increment_version
_FLOAT32 = torch.float32
_SCORES = (torch.float32, torch.bfloat16, torch.float16)


def affine_step_(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
    """``x <- a x + b score + c z`` in place, the step of every sampler.

    ``z`` is ``normal(x.shape, noise)``, never stored. In float32 the step is the fixed chain
    ``fma(c, z, fma(b, score, a * x))`` with the coefficients rounded to float32, so that chains
    agree to the bit across backends; ``c = 0`` draws no noise. Differentiable in x and score.

    Args:
        x: ``[B, ...]`` float32, or float64 on the reference backend.
        score: x's shape and device; float32, bfloat16 or float16 (or x's own float64).
        a, b, c: finite numbers, within float32's range.
        noise: names the noise; each step of a chain takes its own, ``NoiseKey(seed).at(step)``.

    Returns:
        x.

    Raises:
        TypeError: a dtype or an argument's kind is not one of the above.
        ValueError: shapes or devices differ, or a number is not finite or out of range.
    """
    number = checks.within_float32
    a, b, c = number("a", a), number("b", b), number("c", c)
    return _step_in_place(x, score, a, b, c, noise)


def langevin_step_(x: Tensor, score: Tensor, alpha: float, noise: NoiseKey) -> Tensor:
    """``x <- x + (alpha/2) score + sqrt(alpha) z`` in place. See :func:`langevin_step`."""
    if type(alpha) is not float or not 0.0 <= alpha <= checks.LARGEST:
        alpha = checks.within_float32("alpha", checks.not_negative("alpha", alpha))
    return _step_in_place(x, score, 1.0, 0.5 * alpha, math.sqrt(alpha), noise)


def langevin_step(x: Tensor, score: Tensor, alpha: float, noise: NoiseKey) -> Tensor:
    """One step of Langevin dynamics, ``x + (alpha/2) score + sqrt(alpha) z``.

    The update of Song and Ermon (2019, arXiv 1907.05600, Algorithm 1). Codes that write
    ``x + step score + sqrt(2 step) z`` have ``alpha = 2 step``.

    Args:
        x: ``[B, ...]`` float32, or float64 on the reference backend.
        score: x's shape and device; float32, bfloat16 or float16 (or x's own float64).
        alpha: step size, a number of at least 0, in squared units of x.
        noise: names the noise ``z``; each step of a chain takes its own, ``NoiseKey(seed).at(t)``.

    Returns:
        A new tensor like x. Differentiable in x and score, any number of times.

    Raises:
        TypeError: a dtype or an argument's kind is not one of the above.
        ValueError: shapes or devices differ, or alpha is negative or not finite.
    """
    if type(alpha) is not float or not 0.0 <= alpha <= checks.LARGEST:
        alpha = checks.within_float32("alpha", checks.not_negative("alpha", alpha))
    _check_step(x, score, noise)
    arguments = x, score, 1.0, 0.5 * alpha, math.sqrt(alpha), noise
    if direct(x, score):
        return _affine_step(*arguments)
    refuse_vmap(x=x, score=score)
    return apply(_AffineStep, *arguments)


def table_step_(
    x: Tensor,
    score: Tensor,
    table: Tensor,
    step: Tensor | None,
    noise: NoiseKey,
    *,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    precondition: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    wrap: float | None = None,
) -> Tensor:
    """:func:`affine_step_` with coefficients on the device, and more in the same pass.

    With a `step`, ``a, b, c = table[step]`` and the noise's draw is moved on by it: a captured CUDA
    graph that ends with ``step.add_(1)`` does the next step of a chain at each replay. Without one
    the table has a line for each sample, or one for all.

    With `known` the table has two more columns, scale and noise_scale: where `mask` is true,
    ``x <- scale known + noise_scale z``, whatever x and score are there (inpainting). With a
    `precondition` G elsewhere ``x <- a x + b G score + c sqrt(G) z``. Last, x is clamped or
    wrapped. Not differentiable.

    Args:
        x: ``[B, ...]`` float32 (or float64 on the reference backend), contiguous.
        score: x's shape and device; float32, bfloat16 or float16.
        table: x's dtype and device, contiguous; ``[steps, 3]`` or, without a step, ``[B, 3]`` or
            ``[1, 3]``; with known ``[..., 5]``.
        step: int64 without dimensions, on x's device, ``0 <= step < steps``; or None. On a GPU,
            where reading it would wait for the device, a step out of range makes x NaN.
        noise: names the noise, with a step that of step 0; see :class:`score_kernels.NoiseKey`.
        known, mask: x's shape and device, contiguous; x's dtype and bool.
        precondition: x's shape, dtype and device, contiguous, of at least 0.
        clamp: (low, high), which x is limited to.
        wrap: a period P; x is moved into [0, P) by multiples of it, exact to rounding while x is
            within 2^22 periods.

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
    if precondition is not None:
        _check_part("precondition", precondition, x.dtype, x.shape, "that of x", x)
    end = step_end(clamp, wrap)
    if not x.is_contiguous() or (not is_compiling() and x.is_neg()):
        raise ValueError(f"x: got strides {x.stride()}, expected a contiguous tensor")
    given = {"x": x, "score": score, "table": table, "known": known, "precondition": precondition}
    for name, value in given.items():
        if wants_grad(value):
            raise ValueError(f"{name}: got requires_grad=True, expected a tensor without gradient")
    _table_op(x, score, table, step, known, mask, precondition, *end, noise)
    return x


def step_end(clamp: Any, wrap: Any) -> End:
    """What a step ends with: see csrc/args.h's TableArgs."""
    if clamp is not None and wrap is not None:
        raise ValueError("wrap: got one beside clamp, expected one of the two")
    if clamp is not None:
        return CLAMP, *checks.limits("clamp", clamp)
    if wrap is not None:
        period = checks.within_float32("wrap", checks.positive("wrap", wrap))
        checks.within_float32("1 / wrap", 1 / period)
        return WRAP, 1 / period, period
    return NO_END


def _check_part(
    name: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...], wanted: str, x: Tensor
) -> None:
    checks.instance(name, value, Tensor, "a tensor")
    if value.dtype != dtype or value.device != x.device:
        raise TypeError(
            f"{name}: got {value.dtype} on {value.device}, expected {dtype} on {x.device}"
        )
    if value.shape != shape or not value.is_contiguous():
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} and strides {value.stride()}, "
            f"expected {wanted}, contiguous"
        )


def _check_step(x: Tensor, score: Tensor, noise: NoiseKey) -> None:
    checks.state("x", x)
    checks.score_like(x, score)
    check_key(noise, "x", x)


def _step_in_place(
    x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey
) -> Tensor:
    # What is plainly right is not checked by name: that takes a third of a small step.
    if (
        undisturbed()
        and type(x) is type(score) is Tensor
        and not (is_grad_enabled() and (x.requires_grad or score.requires_grad))
        and x.dtype is _FLOAT32
        and score.dtype in _SCORES
        and x.is_cpu
        and score.is_cpu
        and x.shape == score.shape
        and 1 < x.numel() <= 1 << 34
        and type(noise) is NoiseKey
        and noise[3] < 1 << 55
        and ((rows := noise[4]) is None or (rows.is_cpu and rows.shape[0] == x.shape[0] + 1))
        and x.is_contiguous()
        and score.is_contiguous()
    ):
        backend = registry.cpu_float32 or registry.choose_cpu_float32()
        backend.affine_step(x, x, score, a, b, c, noise)
        _increment_version((x,))
        return x
    _check_step(x, score, noise)
    if not direct(x, score):
        refuse_vmap(x=x, score=score)
        return apply(_AffineStepInPlace, x, score, a, b, c, noise)
    _affine_step_(x, score, a, b, c, noise)
    return x


class _AffineStep(torch.autograd.Function):
    """The step as a function of x and score; its derivatives do not need the noise.

    No jvp: torch.compile traces no function that has one.
    """

    @staticmethod
    def forward(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
        step = _compiled if is_compiling() else _new_op
        return step(x, score, a, b, c, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, score, ctx.a, ctx.b, _, _ = inputs
        ctx.score_dtype = score.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_score = ctx.needs_input_grad[:2]
        grad_x = ctx.a * grad if to_x else None
        grad_score = (ctx.b * grad).to(ctx.score_dtype) if to_score else None
        return grad_x, grad_score, None, None, None, None


class _AffineStepInPlace(_AffineStep):
    @staticmethod
    def forward(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
        if is_compiling():
            return x.copy_(_compiled(x, score, a, b, c, noise))
        _in_place_op(x, score, a, b, c, noise)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _AffineStep.setup_context(ctx, inputs, output)
        ctx.mark_dirty(inputs[0])


def _compiled(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
    """The step with its coefficients in a tensor: torch.compile compiles an op anew for each value
    of a number, and not for those of a product with a tensor."""
    one = x.new_ones(())
    table = torch.stack([one * a, one * b, one * c])[None]
    out = x.clone(memory_format=torch.contiguous_format)
    _table_op(out, score, table, None, None, None, None, *NO_END, noise)
    return out


def _shares_elements(x: Tensor) -> bool:
    """Whether two indices of x may lead to one element in memory, as after `expand`."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def _affine_step(x: Tensor, score: Tensor, a: float, b: float, c: float, key: Key) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = choose(x.device, x.dtype).affine_step
    step(out, dense(x), dense(score), a, b, c, key)
    return out


def _affine_step_(x: Tensor, score: Tensor, a: float, b: float, c: float, key: Key) -> None:
    step = choose(x.device, x.dtype).affine_step
    if x.is_contiguous() and not (x.numel() == 1 and x.is_neg()):
        step(x, x, dense(score), a, b, c, key)
        _increment_version((x,))
        return
    if _shares_elements(x):
        raise ValueError(
            f"x: got strides {x.stride()} for shape {tuple(x.shape)}, expected a "
            "tensor whose elements do not share memory (clone an expanded one)"
        )
    copy = dense(x)
    step(copy, copy, dense(score), a, b, c, key)
    x.copy_(copy)


def _table_step_(
    x: Tensor,
    score: Tensor,
    table: Tensor,
    step: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    precondition: Tensor | None,
    end: int,
    low: float,
    high: float,
    key: Key,
) -> None:
    if step is not None and step.is_cpu and not 0 <= int(step) < len(table):
        raise ValueError(f"step: got {int(step)}, expected 0 <= step < {len(table)}")
    step_by_table = choose(x.device, x.dtype).table_step
    ending = end, low, high
    step_by_table(x, x, dense(score), table, step, key, known, mask, precondition, ending)
    _increment_version((x,))


_STEP = f"Tensor score, float a, float b, float c, {KEY_SCHEMA}"
_new_op = register(f"affine_step(Tensor x, {_STEP}) -> Tensor", _affine_step, new_like)
_in_place_op = register(
    f"affine_step_(Tensor(a!) x, {_STEP}) -> ()", _affine_step_, lambda *_: None
)
_table_op = register(
    "table_step_(Tensor(a!) x, Tensor score, Tensor table, Tensor? step, Tensor? known, "
    f"Tensor? mask, Tensor? precondition, int end, float low, float high, {KEY_SCHEMA}) -> ()",
    _table_step_,
    lambda *_: None,
)
