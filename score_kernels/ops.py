"""The ops: checks, dispatch and autograd over the backends.

Every op is a torch custom op (``torch.ops.score_kernels.*``) with a fake implementation, so that
``torch.compile``, ``torch.export`` and fake tensors see it. Called eagerly on plain tensors, the
functions here go to the backend directly, which is where small batches are fast. Under
``torch.compile`` a new key compiles nothing anew; a new step size does, because torch makes a
Python float that only an op sees a constant.

Noise is named by a :class:`score_kernels.NoiseKey` and made inside the kernel. Samples are rows:
``x`` is ``[B, ...]`` with any number of further dimensions, and element ``i`` of a sample is the
``i``-th in C order whatever the memory layout. Non-contiguous inputs are copied once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from score_kernels import _check
from score_kernels.backends import choose, native
from score_kernels.noise import Key, NoiseKey

__all__ = [
    "affine_step_",
    "langevin_step",
    "langevin_step_",
    "normal",
    "rademacher",
    "uniform",
    "words",
]

_KEY = "SymInt seed, SymInt purpose, SymInt draw, SymInt first_sample"
_FILLS = ("words", "normal", "uniform", "rademacher")

_library = torch.library.Library("score_kernels", "DEF")
for _kind in _FILLS:
    _library.define(f"{_kind}(SymInt[] shape, Device? device, {_KEY}) -> Tensor")
_library.define(f"affine_step(Tensor x, Tensor score, float a, float b, float c, {_KEY}) -> Tensor")
_library.define(
    f"affine_step_(Tensor(a!) x, Tensor score, float a, float b, float c, {_KEY}) -> ()"
)


def words(
    shape: Sequence[int], noise: NoiseKey, *, device: torch.device | str | None = None
) -> Tensor:
    """The 32-bit words behind each element of a batch of noise, for checks.

    Args:
        shape: ``[B, ...]``.
        noise: names the noise; see :class:`score_kernels.NoiseKey`.
        device: default: torch's default device.

    Returns:
        int64 tensor of the shape, values in ``[0, 2**32)``.
    """
    return _fill("words", shape, noise, torch.int64, device)


def normal(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals, the same bits on every backend and device.

    ``z0 = sqrt(-2 ln u) cos(theta)``, ``z1 = sqrt(-2 ln u) sin(theta)`` (Box and Muller, 1958) from
    pairs of words, within 2e-6 of the exact function, tails to 6.7; see ``csrc/noise.h``.

    Args:
        shape: ``[B, ...]``.
        noise: names the noise; see :class:`score_kernels.NoiseKey`.
        dtype: any floating dtype; other dtypes than float32 hold the float32 value, converted.
        device: default: torch's default device.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    return _fill("normal", shape, noise, dtype, device)


def uniform(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms in (0, 1], ``fma(float(word), 2**-32, 2**-33)`` in float32. Arguments: `normal`."""
    return _fill("uniform", shape, noise, dtype, device)


def rademacher(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random signs, -1 where the word's top bit is set, else +1. Arguments: `normal`."""
    return _fill("rademacher", shape, noise, dtype, device)


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


def _step(
    x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey, *, in_place: bool
) -> Tensor:
    out = native.quick_step(x, score, a, b, c, noise, in_place)
    if out is not None:
        return out
    _check_step(x, score, noise)
    return (_AffineStepInPlace if in_place else _AffineStep).apply(x, score, a, b, c, noise)


def _check_step(x: Tensor, score: Tensor, noise: NoiseKey) -> None:
    _check.instance("noise", noise, NoiseKey, "a NoiseKey")
    _check.state("x", x)
    _check.score_like(x, score)
    _check.sample_range(noise.first_sample, x.shape[0])
    _check.noise_shape(x.shape)


def _signed(key: Key) -> Key:
    """A key as an op's arguments: schemas have signed 64-bit integers."""
    return (key[0] - 2**64 if key[0] >= 2**63 else key[0], *key[1:])


def _unsigned(key: Key) -> Key:
    return (key[0] & (2**64 - 1), *key[1:])


class _AffineStep(torch.autograd.Function):
    """The step as a function of x and score; its derivatives do not need the noise."""

    @staticmethod
    def forward(x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey) -> Tensor:
        return torch.ops.score_kernels.affine_step(x, score, a, b, c, *_signed(noise.fields()))

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
        torch.ops.score_kernels.affine_step_(x, score, a, b, c, *_signed(noise.fields()))
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _AffineStep.setup_context(ctx, inputs, output)
        ctx.mark_dirty(inputs[0])


def _fill(
    kind: str,
    shape: Sequence[int],
    noise: NoiseKey,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    _check.instance("noise", noise, NoiseKey, "a NoiseKey")
    sizes = _check.noise_shape(shape)
    _check.sample_range(noise.first_sample, sizes[0])
    if kind != "words" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating dtype")
    home = None if device is None else torch.device(device)
    op = getattr(torch.ops.score_kernels, kind)
    return op(list(sizes), home, *_signed(noise.fields())).to(dtype)


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
    step(out, x.contiguous(), score.contiguous(), a, b, c, _unsigned(key))
    return out


def _affine_step_(x: Tensor, score: Tensor, a: float, b: float, c: float, *key: int) -> None:
    step = choose(x.device, x.dtype).affine_step
    if x.is_contiguous():
        step(x, x, _contiguous_score(x, score), a, b, c, _unsigned(key))
        torch.autograd.graph.increment_version(x)
        return
    if torch._debug_has_internal_overlap(x) == 1:
        raise ValueError(
            f"x: got strides {x.stride()} for shape {tuple(x.shape)}, expected a "
            "tensor whose elements do not share memory (clone an expanded one)"
        )
    dense = x.contiguous()
    step(dense, dense, score.contiguous(), a, b, c, _unsigned(key))
    x.copy_(dense)


def _fake_step(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register_fill(kind: str) -> None:
    def fill(shape: list[int], device: torch.device | None, *key: int) -> Tensor:
        seed, purpose, draw, first_sample = _unsigned(key)
        noise = NoiseKey(seed, purpose=purpose, draw=draw, first_sample=first_sample)
        home = torch.get_default_device() if device is None else device
        return choose(home, torch.float32).fill(kind, tuple(shape), noise, home)

    def fake(shape: list[int], device: torch.device | None, *_: Any) -> Tensor:
        dtype = torch.int64 if kind == "words" else torch.float32
        return torch.empty(shape, dtype=dtype, device=device)

    _library.impl(kind, fill, "CompositeExplicitAutograd")
    torch.library.register_fake(f"score_kernels::{kind}", fake)


for _kind in _FILLS:
    _register_fill(_kind)
_library.impl("affine_step", _affine_step, "CompositeExplicitAutograd")
_library.impl("affine_step_", _affine_step_, "CompositeExplicitAutograd")
torch.library.register_fake("score_kernels::affine_step", _fake_step)
torch.library.register_fake("score_kernels::affine_step_", lambda *_: None)
