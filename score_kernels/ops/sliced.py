"""Sliced score matching: probes made in the kernel, never stored.

A probe ``v`` has independent elements with E[v v^T] = I: Rademacher signs ("rademacher", the least
variance), normals ("gaussian"), or a point of the sphere of radius sqrt(D) ("sphere").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import choose
from score_kernels.noise import Key, NoiseKey
from score_kernels.ops._dispatch import (
    KEY_SCHEMA,
    apply,
    check_key,
    dense,
    direct,
    refuse_vmap,
    register,
    state_dtype,
    transformed,
)
from score_kernels.ops._formulas import expand_like, probe_like, sums, wide

__all__ = ["fd_pair", "fd_reduce", "probe_dot", "probe_scale", "ssm_reduce"]

# A point of the sphere is a normal probe, scaled.
_KINDS = {"rademacher": "rademacher", "gaussian": "normal", "sphere": "normal"}


def probe_dot(s: Tensor, noise: NoiseKey, *, probe: str = "rademacher") -> Tensor:
    """Per sample ``v . s``, summed over the D elements. The adjoint of :func:`probe_scale`.

    Args:
        s: ``[B, ...]`` float32, bfloat16, float16, or float64 on the reference backend.
        noise: names the probe ``v``; see :class:`score_kernels.NoiseKey`.
        probe: "rademacher", "gaussian" or "sphere".

    Returns:
        ``[B]`` float32 (float64 for float64 s). Differentiable in s any number of times.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    _check_probe("s", s, noise, probe)
    if direct(s):
        return _dot(_probe_sums, s, noise, probe)
    if transformed():
        return _dot_formula(s, noise, probe=probe)
    return apply(_Dot, s, noise, probe)


def probe_scale(
    g: Tensor, shape: Sequence[int], noise: NoiseKey, *, probe: str = "rademacher"
) -> Tensor:
    """``g_b v`` for each sample b. The adjoint of :func:`probe_dot`.

    Args:
        g: ``[B]`` float32, or float64 on the reference backend; ones give the probe itself.
        shape: ``[B, ...]`` of the result.
        noise: names the probe ``v``; see :class:`score_kernels.NoiseKey`.
        probe: "rademacher", "gaussian" or "sphere".

    Returns:
        A tensor of the shape in g's dtype. Differentiable in g any number of times.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    sizes = checks.noise_shape(shape)
    checks.state("g", g)
    if g.shape != sizes[:1]:
        raise ValueError(f"g: got shape {tuple(g.shape)}, expected [B] = {sizes[:1]}")
    _check_probe("g", g, noise, probe)
    if direct(g):
        return _scale(g, sizes, noise, probe)
    if transformed():
        return _scale_formula(g, sizes, noise, probe=probe)
    return apply(_Scale, g, sizes, noise, probe)


def ssm_reduce(
    g: Tensor,
    s: Tensor,
    noise: NoiseKey,
    *,
    probe: str = "rademacher",
    variance_reduced: bool = True,
) -> Tensor:
    """Per sample ``v . g + 1/2 ||s||^2``, or ``v . g + 1/2 (v . s)^2`` without variance reduction.

    The sliced score matching objective (Song et al. 2019, arXiv 1905.07088) once ``g`` holds
    ``(grad s) v`` or ``v^T grad s``. One pass over s and g.

    Args:
        g, s: ``[B, ...]`` of one shape and dtype, as in :func:`probe_dot`.
        noise, probe: as in :func:`probe_dot`.
        variance_reduced: which of the two; their expectations agree.

    Returns:
        ``[B]``. Differentiable in g and s any number of times.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    _check_probe("s", s, noise, probe)
    _check_like("g", g, "s", s)
    if direct(g, s):
        return _objective(_probe_sums, s, g, None, noise, probe, variance_reduced)
    if transformed():
        return _formula(wide(g), wide(s), noise, probe, variance_reduced)
    return apply(_Objective, s, g, None, noise, probe, variance_reduced)


def fd_pair(x: Tensor, step: Tensor, noise: NoiseKey, *, probe: str = "rademacher") -> Tensor:
    """A central difference's 2 B points: ``x + h v``, then ``x - h v``.

    Pang et al. (2020, arXiv 2007.03317).

    Args:
        x: ``[B, ...]`` float32, or float64 on the reference backend.
        step: ``[B]``, the steps h in x's dtype, without gradient.
        noise, probe: as in :func:`probe_dot`.

    Returns:
        ``[2 B, ...]``. Differentiable in x.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    checks.state("x", x)
    _check_probe("x", x, noise, probe)
    checks.per_sample("step", step, x, x.dtype)
    if direct(x, step):
        return _pair(x, step, noise, probe)
    refuse_vmap(x=x)
    if transformed():
        shift = expand_like(step, x) * probe_like(x, noise, probe)
        return torch.cat([x + shift, x - shift])
    return apply(_Pair, x, step, noise, probe)


def fd_reduce(
    above: Tensor,
    below: Tensor,
    step: Tensor,
    noise: NoiseKey,
    *,
    probe: str = "rademacher",
    variance_reduced: bool = True,
) -> Tensor:
    """:func:`ssm_reduce` of a central difference, in one pass over the two scores.

    ``g = (above - below) / (2 h)`` and ``s = (above + below) / 2``.

    Args:
        above, below: ``[B, ...]``, the scores at ``x + h v`` and ``x - h v``.
        step: ``[B]``, the steps h in the dtype of the result, without gradient.
        noise, probe, variance_reduced: as in :func:`ssm_reduce`.

    Returns:
        ``[B]``. Differentiable in above and below any number of times.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    _check_probe("above", above, noise, probe)
    _check_like("below", below, "above", above)
    checks.per_sample("step", step, above, state_dtype(above))
    if direct(above, below, step):
        return _objective(_probe_sums, above, below, step, noise, probe, variance_reduced)
    if transformed():
        above, below = wide(above), wide(below)
        g = (above - below) / expand_like(2 * step, above)
        return _formula(g, 0.5 * (above + below), noise, probe, variance_reduced)
    return apply(_Objective, above, below, step, noise, probe, variance_reduced)


def _dot_formula(s: Tensor, noise: NoiseKey, *, probe: str) -> Tensor:
    return sums(probe_like(s, noise, probe) * wide(s))


def _scale_formula(g: Tensor, shape: Sequence[int], noise: NoiseKey, *, probe: str) -> Tensor:
    v = probe_like(torch.empty((), dtype=g.dtype, device=g.device).expand(shape), noise, probe)
    return expand_like(g, v) * v


def _formula(g: Tensor, s: Tensor, noise: NoiseKey, probe: str, reduced: bool) -> Tensor:
    v = probe_like(s, noise, probe)
    return sums(v * g) + 0.5 * (sums(s * s) if reduced else sums(v * s).square())


def _check_like(name: str, value: Tensor, other: str, like: Tensor) -> None:
    checks.score(name, value)
    same_device = value.is_cpu and like.is_cpu or value.device == like.device
    if value.shape != like.shape or value.dtype is not like.dtype or not same_device:
        got, wanted = (f"shape {tuple(t.shape)} of {t.dtype} on {t.device}" for t in (value, like))
        raise ValueError(f"{name}: got {got}, expected that of {other}, {wanted}")


def _check_probe(name: str, values: Tensor, noise: NoiseKey, probe: str) -> None:
    checks.score(name, values)
    check_key(noise, name, values)
    if probe not in _KINDS:
        checks.choice("probe", probe, _KINDS)


# The op of the sums or, where the dispatcher is bypassed, its implementation.
Sums = Callable[[str, Tensor, Tensor | None, bool, Key], Tensor]


def _dot(sums_of: Sums, s: Tensor, noise: NoiseKey, probe: str) -> Tensor:
    return _along(sums_of(_KINDS[probe], s, None, False, noise), 1, s, probe)


def _along(sums: Tensor, index: int, like: Tensor, probe: str) -> Tensor:
    """A sum of the kernel's probe with something, for the probe asked for."""
    along = sums.select(0, index)
    if probe != "sphere" or not like.numel():
        return along
    return along * (math.prod(like.shape[1:]) / sums.select(0, 0)).sqrt()


def _objective(
    sums_of: Sums,
    a: Tensor,
    b: Tensor,
    step: Tensor | None,
    noise: NoiseKey,
    probe: str,
    reduced: bool,
) -> Tensor:
    """ssm_reduce of s = a and g = b or, with a step, fd_reduce of above = a and below = b."""
    sums = sums_of(_KINDS[probe], a, b, step is not None, noise)
    along = _along(sums, 2, a, probe)
    if step is not None:
        along = along / (2 * step)
    squares = sums.select(0, 3) if reduced else _along(sums, 1, a, probe).square()
    return along.add(squares, alpha=0.5)


def _factor(g: Tensor, shape: Sequence[int], noise: NoiseKey, probe: str) -> Tensor:
    """The factor of the kernel's probe that makes it g times the probe asked for."""
    if probe != "sphere" or not math.prod(shape[1:]):
        return g
    blank = g.new_zeros(()).expand(shape)
    vv = _sums_op("normal", blank, None, False, noise)[0]
    return g * (math.prod(shape[1:]) / vv).sqrt()


def _scale(g: Tensor, shape: Sequence[int], noise: NoiseKey, probe: str) -> Tensor:
    return _scale_op(_KINDS[probe], _factor(g, shape, noise, probe), shape, noise)


def _pair(x: Tensor, step: Tensor, noise: NoiseKey, probe: str) -> Tensor:
    factor = _factor(step, x.shape, noise, probe)
    return _shift_op(_KINDS[probe], x, factor, noise).flatten(0, 1)


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, noise: NoiseKey, probe: str) -> Tensor:
        ctx.shape, ctx.dtype, ctx.noise, ctx.probe = tuple(s.shape), s.dtype, noise, probe
        return _dot(_sums_op, s, noise, probe).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = _scale_formula if transformed(grad) else probe_scale
        return scale(grad, ctx.shape, ctx.noise, probe=ctx.probe).to(ctx.dtype), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, shape: Sequence[int], noise: NoiseKey, probe: str) -> Tensor:
        ctx.noise, ctx.probe = noise, probe
        return _scale(g, shape, noise, probe)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dot = _dot_formula if transformed(grad) else probe_dot
        return dot(grad, ctx.noise, probe=ctx.probe), None, None, None


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        step: Tensor | None,
        noise: NoiseKey,
        probe: str,
        reduced: bool,
    ) -> Tensor:
        ctx.noise, ctx.probe, ctx.reduced = noise, probe, reduced
        ctx.save_for_backward(a, None if step is None else b, step)
        return _objective(_sums_op, a, b, step, noise, probe, reduced)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, step = ctx.saved_tensors
        s = a if step is None else 0.25 * (a + b)
        scale = _scale_formula if transformed(grad) else probe_scale
        if ctx.reduced:
            to_s = grad.view(-1, *[1] * (s.dim() - 1)) * s
        else:
            along = probe_dot(s, ctx.noise, probe=ctx.probe)
            to_s = scale(grad * along, s.shape, ctx.noise, probe=ctx.probe)
        factor = grad if step is None else grad / (2 * step)
        to_g = scale(factor, s.shape, ctx.noise, probe=ctx.probe)
        to_a, to_b = (to_s, to_g) if step is None else (to_s + to_g, to_s - to_g)
        return to_a.to(a.dtype), to_b.to(a.dtype), None, None, None, None


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, noise: NoiseKey, probe: str) -> Tensor:
        return _pair(x, step, noise, probe)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        above, below = grad.chunk(2)
        return above + below, None, None, None


def _probe_sums(kind: str, a: Tensor, b: Tensor | None, differences: bool, key: Key) -> Tensor:
    b = None if b is None else dense(b)
    sums_of = choose(a.device, state_dtype(a)).probe_sums
    return sums_of(kind, dense(a), b, differences, key)


def _probe_scale(kind: str, factor: Tensor, shape: Sequence[int], key: Key) -> Tensor:
    scale = choose(factor.device, factor.dtype).probe_scale
    return scale(kind, dense(factor), tuple(shape), key)


def _probe_shift(kind: str, x: Tensor, factor: Tensor, key: Key) -> Tensor:
    return choose(x.device, x.dtype).probe_shift(kind, dense(x), dense(factor), key)


_sums_op = register(
    f"probe_sums(str kind, Tensor a, Tensor? b, bool differences, {KEY_SCHEMA}) -> Tensor",
    _probe_sums,
    lambda kind, a, *_: a.new_empty((4, a.shape[0]), dtype=state_dtype(a)),
)
_scale_op = register(
    f"probe_scale(str kind, Tensor factor, SymInt[] shape, {KEY_SCHEMA}) -> Tensor",
    _probe_scale,
    lambda kind, factor, shape, *_: factor.new_empty(shape),
)
_shift_op = register(
    f"probe_shift(str kind, Tensor x, Tensor factor, {KEY_SCHEMA}) -> Tensor",
    _probe_shift,
    lambda kind, x, *_: x.new_empty((2, *x.shape)),
)
