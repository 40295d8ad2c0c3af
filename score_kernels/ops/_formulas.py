"""Parts of the losses' formulas in plain torch, for transforms and derivatives without a kernel.

Noise is materialised there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from score_kernels.noise import NoiseKey
from score_kernels.ops._dispatch import state_dtype
from score_kernels.ops.random import normal, rademacher


def expand_like(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...] in the dtype of `like`."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def rows_of(x: Tensor) -> Tensor:
    """``[B, D]``, of ``[B]`` too."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(state_dtype(x))


def sums(x: Tensor) -> Tensor:
    """Over the elements of each sample: [B]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)


def segment_sums(values: Tensor, segments: Tensor) -> Tensor:
    """Sums of values ``[B, ...]`` over equal segments, in order: ``[B, ...]``, the last ones 0.

    As many as there are rows, so that nothing waits to learn the number of segments.
    """
    zero = torch.zeros_like(values)
    if values.is_cpu:
        return zero.index_add(0, segments, values)
    # Atomic additions have no order; this sorts.
    return zero.index_put((segments,), values, accumulate=True)


def first_rows(segments: Tensor) -> Tensor:
    """Of each row the index of the first one of its segment: ``[B]``."""
    rows = torch.arange(len(segments), device=segments.device)
    first = torch.full_like(rows, len(segments))
    return first.scatter_reduce_(0, segments, rows, "amin").index_select(0, segments)


def are_first(segments: Tensor) -> Tensor:
    """Whether each row is the first one of its segment: as often true as there are segments."""
    return first_rows(segments) == torch.arange(len(segments), device=segments.device)


def reduce_losses(each: Tensor, reduction: str, segments: Tensor | None) -> Tensor:
    """The losses ``[B]`` of rows, or their sum or mean, over samples or over segments."""
    if reduction == "none":
        if segments is None:
            return each
        return segment_sums(each, segments)[: int(segments.amax()) + 1]
    if reduction == "sum":
        return each.sum()
    return each.mean() if segments is None else each.sum() / are_first(segments).sum()


def probe_like(x: Tensor, noise: NoiseKey, probe: str) -> Tensor:
    """A probe of a kind in x's shape and device, float32 at least."""
    fill = rademacher if probe == "rademacher" else normal
    v = fill(x.shape, noise, dtype=state_dtype(x), device=x.device)
    elements = math.prod(x.shape[1:])
    if probe != "sphere" or not elements:
        return v
    return v * expand_like((elements / sums(v * v)).sqrt(), v)
