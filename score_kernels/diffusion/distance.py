"""The largest distance between two samples, or bounds of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.bars import progress_bar
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.ops import words

__all__ = ["max_pairwise_distance", "pairwise_distance_bounds", "samples"]

# Samples and numbers in a block at most: products of two blocks stay in a core's cache.
_SIDE, _NUMBERS = 512, 2**23


def max_pairwise_distance(data: Any, *, progress: bool = False) -> float:
    """The largest Euclidean distance between two samples, ``max_ij |x_i - x_j|``.

    Technique 1 of Song and Ermon (2020, arXiv 2006.09011) for the largest noise level, so that
    noise can carry a chain from any sample to any other.

    Float32 products ``|x|^2 / 2 + |y|^2 / 2 - x.y`` around the mean find the farthest pairs, whose
    distances are computed again from differences in float64. The result is the distance of a real
    pair and within 1e-5 of the largest; where `torch.set_float32_matmul_precision` allows TF32 or
    bfloat16, within about 1e-3 or 1e-2. Cost: ``N^2 D`` floating-point operations; memory: blocks
    of at most 512 samples and 2^23 numbers, and 4 bytes a sample.

    Args:
        data: ``[N, ...]``, N at least 2, float16, bfloat16, float32 or float64, on any device
            that has float64. Data that is not contiguous within a sample is copied once. Or a
            torch Dataset of such samples, or of tuples that begin with them, read as a whole.
        progress: show a progress bar.

    Returns:
        The distance, in units of the data; 0.0 if all samples are equal.

    Raises:
        TypeError: data is not a floating-point tensor.
        ValueError: fewer than two samples, samples without elements, a NaN or an infinity.
    """
    rows, block, half, blocks, unit = _centred(data, torch.float32)
    best = 0.0
    bar = progress_bar(blocks, desc="largest distance", unit="block", disable=not progress)
    with torch.autocast(rows.device.type, enabled=False):
        for n, p in enumerate(bar):
            left = block(p)
            for q in blocks[n:]:
                right = left if q is p else block(q)
                products = half[q] - left @ right.T
                farthest = products.amax(1) + half[p]
                if farthest.max().item() > (1 - 1e-3) * best**2 / 2:
                    top = farthest.topk(min(8, len(farthest))).indices
                    ends = p.start + top, q.start + products[top].argmax(1)
                    best = max(best, _distances(rows, *ends, unit).max().item())
    return best * unit


def pairwise_distance_bounds(
    data: Any, *, points: int = 100, seed: int = 0, progress: bool = False
) -> tuple[float, float]:
    """Bounds of the largest distance between two samples, from a few samples.

    With ``r_i`` the largest distance from sample i to any other, ``max_i r_i <= max_jk |x_j - x_k|
    <= 2 min_i r_i`` for any choice of samples i. The lower bound is the distance of a real pair:
    from its far end the search goes on to the sample farthest from there while this gains, at most
    ten times. The upper bound is at most the sum of the two largest distances from the mean.
    Computed in float64, the upper bound raised by 1e-9 of itself. Cost: ``2 N points D``
    floating-point operations and some passes over the data.

    Args:
        data: as in `max_pairwise_distance`, as are the errors.
        points: how many samples i, at least 1; all of them if there are no more.
        seed: which: sample i of the data has element i of sample 0 of ``NoiseKey(seed)``, purpose
            ``DISTANCE``; those with the smallest words are taken.
        progress: show a progress bar.

    Returns:
        ``(lower, upper)`` in units of the data; ``(0.0, 0.0)`` if all samples are equal.
    """
    points = checks.count("points", points, least=1)
    key = NoiseKey(seed, purpose=Purpose.DISTANCE)
    rows, block, half, blocks, unit = _centred(data, torch.float64)

    def farthest(index: Tensor) -> tuple[Tensor, Tensor]:
        left = block(index)
        best = half.new_full((len(index),), -math.inf)
        end = torch.zeros_like(index)
        for q in blocks:
            value, at = (half[q] - left @ block(q).T).max(1)
            end = torch.where(value > best, at + q.start, end)
            best = torch.maximum(best, value)
        return _distances(rows, index, end, unit), end

    drawn = words((1, len(rows)), key, device="cpu").flatten().argsort(stable=True)[:points]
    parts = drawn.to(rows.device).split(blocks[0].stop)
    bar = progress_bar(parts, desc="distances of some samples", unit="block", disable=not progress)
    reach, partner = (torch.cat(found) for found in zip(*map(farthest, bar), strict=True))
    lower, upper = reach.max().item(), 2 * reach.min().item()
    end = partner[reach.argmax()][None]
    for _ in range(10):
        further, end = farthest(end)
        if further.item() <= lower:
            break
        lower = further.item()
    upper = min(upper, (2 * half).sqrt().topk(2).values.sum().item()) * (1 + 1e-9)
    return lower * unit, upper * unit


def gathered(data: Any) -> Any:
    """The samples of a dataset, read once, as a tensor; anything else as it is."""
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, (Tensor, np.ndarray, list, tuple)) or not indexed:
        return data
    count: int = len(data)
    items = [data[i] for i in range(count)]
    items = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
    return torch.stack(items) if all(isinstance(item, Tensor) for item in items) else data


def samples(data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Checked data as ``[N, D]``, and least and largest of each of the D numbers in float64."""
    data = gathered(data)
    expected = "a tensor [N, ...], as torch.from_numpy(array) is, or a dataset"
    checks.instance("data", data, Tensor, expected)
    if not data.dtype.is_floating_point:
        raise TypeError(
            f"data: got dtype {data.dtype}, expected floating-point data; data.float() / 255 "
            "brings bytes of images to [0, 1]"
        )
    checks.score("data", data)
    if data.is_meta:
        raise ValueError("data: got a tensor on meta, expected one with values")
    if data.shape[0] < 2 or data[0].numel() == 0:
        raise ValueError(
            f"data: got shape {tuple(data.shape)}, expected [N, ...] with N at least 2 and at "
            "least one number in a sample"
        )
    rows = data.detach().reshape(len(data), -1)
    low, high = rows.amin(0).double(), rows.amax(0).double()
    if not (high - low).isfinite().all():
        bad = (~rows.isfinite().all(1)).nonzero().flatten()[:1].tolist()
        what = f"NaN or infinity in sample {bad[0]}" if bad else "a range beyond float64"
        raise ValueError(f"data: got {what}, expected finite data")
    return rows, low, high


def _centred(
    data: Any, dtype: torch.dtype
) -> tuple[Tensor, Callable[[slice | Tensor], Tensor], Tensor, list[slice], float]:
    """Rows; some of them less the mean, in units; half their squares; their blocks; the unit."""
    rows, low, high = samples(data)
    count, dim = rows.shape
    side = min(_SIDE, max(1, _NUMBERS // dim))
    blocks = [slice(p, p + side) for p in range(0, count, side)]
    mean = torch.zeros_like(low)
    for p in blocks:
        mean += rows[p].sum(0, dtype=torch.float64) / count
    data_range = (high - low).max().item()
    # A power of two, so that nothing is rounded and squares stay in float32's range.
    unit = 2.0 ** (math.frexp(data_range)[1] - 1)
    narrow = rows.dtype != torch.float64 and data_range < 2.0**127
    wide = torch.promote_types(dtype, torch.float32 if narrow else torch.float64)
    # A number that all samples share is its own mean, whatever the sum was rounded to.
    mean = mean.clamp(low, high).to(wide)

    def block(index: slice | Tensor) -> Tensor:
        return (rows[index].to(wide) - mean).div_(unit).to(dtype)

    half = torch.cat([block(p).square().sum(1) for p in blocks]) / 2
    return rows, block, half, blocks, unit


def _distances(rows: Tensor, i: Tensor, j: Tensor, unit: float) -> Tensor:
    difference = rows[i].double() - rows[j].double()
    return torch.linalg.vector_norm(difference.div_(unit), dim=1)
