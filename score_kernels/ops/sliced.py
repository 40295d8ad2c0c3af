"""Random projections for sliced score matching: the probe is made in the kernel, never stored.

A probe ``v`` has independent elements with E[v v^T] = I: random signs ("rademacher", the least
variance), normals ("gaussian"), or a point of the sphere of radius sqrt(D) ("sphere").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import choose
from score_kernels.noise import NoiseKey
from score_kernels.ops._dispatch import KEY, apply, register, signed, transformed, unsigned
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
    _check_probe(s, noise, probe, "s")
    if transformed():
        return sums(probe_like(s, noise, probe) * wide(s))
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
    _check_probe(g, noise, probe, "g")
    if transformed():
        v = probe_like(g.new_empty(()).expand(sizes), noise, probe)
        return expand_like(g, v) * v
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
    _check_probe(s, noise, probe, "s")
    _check_like("g", g, "s", s)
    reduced = checks.flag("variance_reduced", variance_reduced)
    if transformed():
        return _formula(wide(g), wide(s), noise, probe, reduced)
    return apply(_Reduce, g, s, noise, probe, reduced)


def fd_pair(x: Tensor, step: Tensor, noise: NoiseKey, *, probe: str = "rademacher") -> Tensor:
    """The batch of 2 B of a central difference along the probe: ``x + h v``, then ``x - h v``.

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
    _check_probe(x, noise, probe, "x")
    _check_steps(step, x)
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
    """:func:`ssm_reduce` of a central difference: ``g = (above - below) / (2 h)`` and
    ``s = (above + below) / 2``, in one pass over the two scores.

    Args:
        above, below: ``[B, ...]``, the scores at ``x + h v`` and ``x - h v``.
        step: ``[B]``, the steps h in the dtype of the result, without gradient.
        noise, probe, variance_reduced: as in :func:`ssm_reduce`.

    Returns:
        ``[B]``. Differentiable in above and below any number of times.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    _check_probe(above, noise, probe, "above")
    _check_like("below", below, "above", above)
    _check_steps(step, above)
    reduced = checks.flag("variance_reduced", variance_reduced)
    if transformed():
        above, below = wide(above), wide(below)
        slope = (above - below) / expand_like(2 * step, above)
        return _formula(slope, 0.5 * (above + below), noise, probe, reduced)
    return apply(_Difference, above, below, step, noise, probe, reduced)


def _formula(g: Tensor, s: Tensor, noise: NoiseKey, probe: str, reduced: bool) -> Tensor:
    v = probe_like(s, noise, probe)
    return sums(v * g) + 0.5 * (sums(s * s) if reduced else sums(v * s).square())


def _check_like(name: str, value: Tensor, other: str, like: Tensor) -> None:
    checks.score(name, value)
    for what, got, expected in (
        ("shape", tuple(value.shape), tuple(like.shape)),
        ("dtype", value.dtype, like.dtype),
        ("device", value.device, like.device),
    ):
        if got != expected:
            raise ValueError(f"{name}: got {what} {got}, expected that of {other}, {expected}")


def _check_steps(step: Tensor, batch: Tensor) -> None:
    checks.state("step", step)
    dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
    if step.dtype != dtype:
        raise TypeError(f"step: got dtype {step.dtype}, expected {dtype}")
    if step.shape != batch.shape[:1] or step.device != batch.device:
        raise ValueError(
            f"step: got shape {tuple(step.shape)} on {step.device}, expected [B] = "
            f"{tuple(batch.shape[:1])} on {batch.device}"
        )


def _check_probe(values: Tensor, noise: NoiseKey, probe: str, name: str) -> None:
    checks.instance("noise", noise, NoiseKey, "a NoiseKey")
    checks.score(name, values)
    checks.noise_shape(values.shape, name)
    checks.sample_range(noise.first_sample, values.shape[0])
    checks.choice("probe", probe, _KINDS)


def _sums(
    a: Tensor, b: Tensor | None, noise: NoiseKey, probe: str, differences: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """v.a, v.b and a.a per sample; with differences of (a + b) / 2 and a - b."""
    key = signed(noise.fields())
    sums = _sums_op(_KINDS[probe], a, b, differences, *key)
    vv, va, vb, aa = sums.unbind(0)
    elements = math.prod(a.shape[1:])
    if probe == "sphere" and elements:
        radius = (elements / vv).sqrt()
        va, vb = radius * va, radius * vb
    return va, vb, aa


def _factor(g: Tensor, shape: tuple[int, ...], noise: NoiseKey, probe: str) -> Tensor:
    """What the kernel's probe is to be multiplied with for g times the probe asked for."""
    if probe != "sphere" or not math.prod(shape[1:]):
        return g
    blank = g.new_zeros(()).expand(shape)
    key = signed(noise.fields())
    vv = _sums_op("normal", blank, None, False, *key)[0]
    return g * (math.prod(shape[1:]) / vv).sqrt()


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(s: Tensor, noise: NoiseKey, probe: str) -> Tensor:
        return _sums(s, None, noise, probe)[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        s, ctx.noise, ctx.probe = inputs
        ctx.shape, ctx.dtype = tuple(s.shape), s.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = apply(_Scale, grad, ctx.shape, ctx.noise, ctx.probe)
        return scaled.to(ctx.dtype), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, shape: tuple[int, ...], noise: NoiseKey, probe: str) -> Tensor:
        factor = _factor(g, shape, noise, probe)
        key = signed(noise.fields())
        return _scale_op(_KINDS[probe], factor, shape, *key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.noise, ctx.probe = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return apply(_Dot, grad, ctx.noise, ctx.probe), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        g: Tensor, s: Tensor, noise: NoiseKey, probe: str, variance_reduced: bool
    ) -> Tensor:
        vs, vg, ss = _sums(s, g, noise, probe)
        return vg + 0.5 * (ss if variance_reduced else vs.square())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, s, ctx.noise, ctx.probe, ctx.variance_reduced = inputs
        ctx.save_for_backward(s)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (s,) = ctx.saved_tensors
        shape = tuple(s.shape)
        to_g = apply(_Scale, grad, shape, ctx.noise, ctx.probe).to(s.dtype)
        if ctx.variance_reduced:
            to_s = grad.view(-1, *[1] * (s.dim() - 1)) * s
        else:
            along = apply(_Dot, s, ctx.noise, ctx.probe)
            to_s = apply(_Scale, grad * along, shape, ctx.noise, ctx.probe)
        return to_g, to_s.to(s.dtype), None, None, None


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, step: Tensor, noise: NoiseKey, probe: str) -> Tensor:
        factor = _factor(step, tuple(x.shape), noise, probe)
        pair = _shift_op(_KINDS[probe], x, factor, *signed(noise.fields()))
        return pair.flatten(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        above, below = grad.chunk(2)
        return above + below, None, None, None


class _Difference(torch.autograd.Function):
    @staticmethod
    def forward(
        above: Tensor,
        below: Tensor,
        step: Tensor,
        noise: NoiseKey,
        probe: str,
        variance_reduced: bool,
    ) -> Tensor:
        vs, vg, ss = _sums(above, below, noise, probe, differences=True)
        return vg / (2 * step) + 0.5 * (ss if variance_reduced else vs.square())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        above, below, step, ctx.noise, ctx.probe, ctx.variance_reduced = inputs
        ctx.save_for_backward(above, below, step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        above, below, step = ctx.saved_tensors
        shape = tuple(above.shape)
        slope = apply(_Scale, grad / (2 * step), shape, ctx.noise, ctx.probe)
        half = 0.25 * (above + below)
        if ctx.variance_reduced:
            mean = grad.view(-1, *[1] * (above.dim() - 1)) * half
        else:
            along = apply(_Dot, half, ctx.noise, ctx.probe)
            mean = apply(_Scale, grad * along, shape, ctx.noise, ctx.probe)
        to = above.dtype
        return (mean + slope).to(to), (mean - slope).to(to), None, None, None, None


def _probe_sums(kind: str, a: Tensor, b: Tensor | None, differences: bool, *key: int) -> Tensor:
    b = None if b is None else b.contiguous()
    state = torch.float64 if a.dtype == torch.float64 else torch.float32
    return choose(a.device, state).probe_sums(kind, a.contiguous(), b, differences, unsigned(key))


def _probe_scale(kind: str, factor: Tensor, shape: list[int], *key: int) -> Tensor:
    backend = choose(factor.device, factor.dtype)
    return backend.probe_scale(kind, factor.contiguous(), tuple(shape), unsigned(key))


def _probe_shift(kind: str, x: Tensor, factor: Tensor, *key: int) -> Tensor:
    backend = choose(x.device, x.dtype)
    return backend.probe_shift(kind, x.contiguous(), factor.contiguous(), unsigned(key))


def _fake_sums(kind: str, a: Tensor, *_: Any) -> Tensor:
    state = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((4, a.shape[0]), dtype=state)


def _fake_scale(kind: str, factor: Tensor, shape: list[int], *_: Any) -> Tensor:
    return factor.new_empty(shape)


_sums_op = register(
    f"probe_sums(str kind, Tensor a, Tensor? b, bool differences, {KEY}) -> Tensor",
    _probe_sums,
    _fake_sums,
)
_scale_op = register(
    f"probe_scale(str kind, Tensor factor, SymInt[] shape, {KEY}) -> Tensor",
    _probe_scale,
    _fake_scale,
)
_shift_op = register(
    f"probe_shift(str kind, Tensor x, Tensor factor, {KEY}) -> Tensor",
    _probe_shift,
    lambda kind, x, *_: x.new_empty((2, *x.shape)),
)
