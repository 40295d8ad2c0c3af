"""The update of a chain: one affine step, of which Langevin's is a case."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from score_kernels import _check
from score_kernels.backends import choose, native
from score_kernels.noise import NoiseKey
from score_kernels.ops._library import KEY, apply, register, signed, unsigned

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
    a, b, c = _check.number("a", a), _check.number("b", b), _check.number("c", c)
    return _step(x, score, a, b, c, noise, in_place=True)


def langevin_step_(x: Tensor, score: Tensor, alpha: float, noise: NoiseKey) -> Tensor:
    """``x <- x + (alpha/2) score + sqrt(alpha) z`` in place. See :func:`langevin_step`."""
    if type(alpha) is not float or not 0.0 <= alpha < math.inf:
        # Only what is not plainly right is checked in full: that costs a tenth of a small step.
        alpha = _check.not_negative("alpha", alpha)
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
        alpha = _check.not_negative("alpha", alpha)
    return _step(x, score, 1.0, 0.5 * alpha, math.sqrt(alpha), noise, in_place=False)


def table_step_(x: Tensor, score: Tensor, table: Tensor, step: Tensor, noise: NoiseKey) -> Tensor:
    """:func:`affine_step_` with ``a, b, c = table[step]`` and the noise's draw moved on by `step`.

    Both are read where the tensors are, so that a captured CUDA graph that ends with
    ``step.add_(1)`` does the next step of a chain at each replay. Not differentiable.

    Args:
        x: ``[B, ...]`` float32 (or float64 on the reference backend), contiguous.
        score: x's shape and device; float32, bfloat16 or float16.
        table: ``[steps, 3]`` float32 on x's device, contiguous.
        step: int64 without dimensions, on x's device, ``0 <= step < steps``. On a GPU, where a
            look at it would wait for the device, a step outside makes x NaN.
        noise: names the noise of step 0; see :class:`score_kernels.NoiseKey`.

    Returns:
        x.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape or device, or out of range.
    """
    _check_step(x, score, noise)
    _check.instance("table", table, Tensor, "a tensor")
    _check.instance("step", step, Tensor, "a tensor")
    for name, value, dtype, shape in (
        ("table", table, torch.float32, (*table.shape[:1], 3)),
        ("step", step, torch.int64, ()),
    ):
        if value.dtype != dtype or value.device != x.device:
            raise TypeError(
                f"{name}: got {value.dtype} on {value.device}, expected {dtype} on {x.device}"
            )
        if value.shape != shape or not value.is_contiguous():
            wanted = "[steps, 3]" if name == "table" else "no dimensions"
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)} and strides {value.stride()}, "
                f"expected {wanted}, contiguous"
            )
    if not x.is_contiguous() or x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"x: got strides {x.stride()} and requires_grad={x.requires_grad}, expected a "
            "contiguous tensor without gradient"
        )
    _table_op(x, score, table, step, *signed(noise.fields()))
    return x


def _step(
    x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey, *, in_place: bool
) -> Tensor:
    out = native.quick_step(x, score, a, b, c, noise, in_place)
    if out is not None:
        return out
    _check_step(x, score, noise)
    return apply(_AffineStepInPlace if in_place else _AffineStep, x, score, a, b, c, noise)


def _check_step(x: Tensor, score: Tensor, noise: NoiseKey) -> None:
    _check.instance("noise", noise, NoiseKey, "a NoiseKey")
    _check.state("x", x)
    _check.score_like(x, score)
    _check.sample_range(noise.first_sample, x.shape[0])
    _check.noise_shape(x.shape)


class _AffineStep(torch.autograd.Function):
    """The step as a function of x and score; its derivatives do not need the noise."""

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


class _AffineStepInPlace(_AffineStep):
    @staticmethod
    def forward(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
        _in_place_op(x, score, a, b, c, *signed(noise.fields()))
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _AffineStep.setup_context(ctx, inputs, output)
        ctx.mark_dirty(inputs[0])


def _contiguous_score(x: Tensor, score: Tensor) -> Tensor:
    """The score as the kernels read it: contiguous, and not half overlapping the state."""
    if not score.is_contiguous():
        return score.contiguous()
    distance = score.data_ptr() - x.data_ptr()
    if distance and -score.nbytes < distance < x.nbytes:
        return score.clone()
    return score


def _affine_step(x: Tensor, score: Tensor, a: float, b: float, c: float, *key: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = choose(x.device, x.dtype).affine_step
    step(out, x.contiguous(), score.contiguous(), a, b, c, unsigned(key))
    return out


def _affine_step_(x: Tensor, score: Tensor, a: float, b: float, c: float, *key: int) -> None:
    step = choose(x.device, x.dtype).affine_step
    if x.is_contiguous():
        step(x, x, _contiguous_score(x, score), a, b, c, unsigned(key))
        torch.autograd.graph.increment_version(x)
        return
    if torch._debug_has_internal_overlap(x) == 1:
        raise ValueError(
            f"x: got strides {x.stride()} for shape {tuple(x.shape)}, expected a "
            "tensor whose elements do not share memory (clone an expanded one)"
        )
    dense = x.contiguous()
    step(dense, dense, score.contiguous(), a, b, c, unsigned(key))
    x.copy_(dense)


def _table_step_(x: Tensor, score: Tensor, table: Tensor, step: Tensor, *key: int) -> None:
    if step.is_cpu and not 0 <= int(step) < len(table):
        raise ValueError(f"step: got {int(step)}, expected 0 <= step < {len(table)}")
    backend = choose(x.device, x.dtype)
    backend.table_step(x, x, _contiguous_score(x, score), table, step, unsigned(key))
    torch.autograd.graph.increment_version(x)


def _fake_step(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_STEP = f"Tensor score, float a, float b, float c, {KEY}"
_step_op = register(f"affine_step(Tensor x, {_STEP}) -> Tensor", _affine_step, _fake_step)
_in_place_op = register(
    f"affine_step_(Tensor(a!) x, {_STEP}) -> ()", _affine_step_, lambda *_: None
)
_table_op = register(
    f"table_step_(Tensor(a!) x, Tensor score, Tensor table, Tensor step, {KEY}) -> ()",
    _table_step_,
    lambda *_: None,
)
