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

from score_kernels import _check
from score_kernels.backends import choose
from score_kernels.noise import NoiseKey
from score_kernels.ops._library import KEY, library, signed, unsigned

__all__ = ["probe_dot", "probe_scale", "ssm_reduce"]

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
    return _Dot.apply(s, noise, probe)


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
    sizes = _check.noise_shape(shape)
    _check.state("g", g)
    if g.shape != sizes[:1]:
        raise ValueError(f"g: got shape {tuple(g.shape)}, expected [B] = {sizes[:1]}")
    _check_probe(g, noise, probe, "g")
    return _Scale.apply(g, sizes, noise, probe)


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
    _check.score("g", g)
    for name, got, expected in (
        ("shape", tuple(g.shape), tuple(s.shape)),
        ("dtype", g.dtype, s.dtype),
        ("device", g.device, s.device),
    ):
        if got != expected:
            raise ValueError(f"g: got {name} {got}, expected that of s, {expected}")
    return _Reduce.apply(g, s, noise, probe, bool(variance_reduced))


def _check_probe(values: Tensor, noise: NoiseKey, probe: str, name: str) -> None:
    _check.instance("noise", noise, NoiseKey, "a NoiseKey")
    _check.score(name, values)
    _check.noise_shape(values.shape)
    _check.sample_range(noise.first_sample, values.shape[0])
    if probe not in _KINDS:
        raise ValueError(f"probe: got {probe!r}, expected one of {', '.join(_KINDS)}")


def _sums(
    a: Tensor, b: Tensor | None, noise: NoiseKey, probe: str
) -> tuple[Tensor, Tensor, Tensor]:
    """v.a, v.b and a.a per sample."""
    vv, va, vb, aa = torch.ops.score_kernels.probe_sums(
        _KINDS[probe], a, b, *signed(noise.fields())
    ).unbind(0)
    if probe == "sphere":
        radius = (math.prod(a.shape[1:]) / vv).sqrt()
        va, vb = radius * va, radius * vb
    return va, vb, aa


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
        scaled = _Scale.apply(grad, ctx.shape, ctx.noise, ctx.probe)
        return scaled.to(ctx.dtype), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, shape: tuple[int, ...], noise: NoiseKey, probe: str) -> Tensor:
        key = signed(noise.fields())
        factor = g
        if probe == "sphere":
            blank = g.new_zeros(()).expand(shape)
            vv = torch.ops.score_kernels.probe_sums("normal", blank, None, *key)[0]
            factor = g * (math.prod(shape[1:]) / vv).sqrt()
        return torch.ops.score_kernels.probe_scale(_KINDS[probe], factor, shape, *key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.noise, ctx.probe = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Dot.apply(grad, ctx.noise, ctx.probe), None, None, None


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
        to_g = _Scale.apply(grad, shape, ctx.noise, ctx.probe).to(s.dtype)
        if ctx.variance_reduced:
            to_s = grad.view(-1, *[1] * (s.dim() - 1)) * s
        else:
            along = _Dot.apply(s, ctx.noise, ctx.probe)
            to_s = _Scale.apply(grad * along, shape, ctx.noise, ctx.probe)
        return to_g, to_s.to(s.dtype), None, None, None


def _probe_sums(kind: str, a: Tensor, b: Tensor | None, *key: int) -> Tensor:
    b = None if b is None else b.contiguous()
    state = torch.float64 if a.dtype == torch.float64 else torch.float32
    return choose(a.device, state).probe_sums(kind, a.contiguous(), b, unsigned(key))


def _probe_scale(kind: str, factor: Tensor, shape: list[int], *key: int) -> Tensor:
    backend = choose(factor.device, factor.dtype)
    return backend.probe_scale(kind, factor.contiguous(), tuple(shape), unsigned(key))


def _fake_sums(kind: str, a: Tensor, *_: Any) -> Tensor:
    state = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty((4, a.shape[0]), dtype=state)


def _fake_scale(kind: str, factor: Tensor, shape: list[int], *_: Any) -> Tensor:
    return factor.new_empty(shape)


library.define(f"probe_sums(str kind, Tensor a, Tensor? b, {KEY}) -> Tensor")
library.define(f"probe_scale(str kind, Tensor factor, SymInt[] shape, {KEY}) -> Tensor")
library.impl("probe_sums", _probe_sums, "CompositeExplicitAutograd")
library.impl("probe_scale", _probe_scale, "CompositeExplicitAutograd")
torch.library.register_fake("score_kernels::probe_sums", _fake_sums)
torch.library.register_fake("score_kernels::probe_scale", _fake_scale)
