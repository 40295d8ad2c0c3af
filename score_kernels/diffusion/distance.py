"""The largest distance between two samples, or bounds of it, from blocks of matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

from score_kernels import checks
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.ops import words

__all__ = ["max_pairwise_distance", "pairwise_distance_bounds", "samples"]

# Samples and numbers in a block at most: products of two blocks stay in a core's cache.
_SIDE, _NUMBERS = 512, 2**23


def max_pairwise_distance(data: Tensor, *, progress: bool = False) -> float:
    """The largest Euclidean distance between two samples, ``max_ij |x_i - x_j|``.

    Technique 1 of Song and Ermon (2020, arXiv 2006.09011): the largest noise level, so that noise
    can carry a chain from any sample to any other.

    Float32 products ``|x|^2 / 2 + |y|^2 / 2 - x.y`` around the mean of the data find the farthest
    pairs of each block, whose distances are then computed from differences in float64. The result
    is the distance of a real pair, to float64 rounding, and within 1e-5 of the largest. Where
    `torch.set_float32_matmul_precision` allows TF32 or bfloat16 products, pairs that are farther by
    up to about 1e-3 or 1e-2 may be missed.

    Cost: ``N^2 D`` floating-point operations for N samples of D numbers. Memory: blocks of at most
    512 samples and 2^23 numbers, and 4 bytes a sample.

    Args:
        data: ``[N, ...]``, N at least 2, float16, bfloat16, float32 or float64, on any device
            that has float64. Data that is not contiguous within a sample is copied once.
        progress: show a progress bar.

    Returns:
        The distance, in units of the data; 0.0 if all samples are equal.

    Raises:
        TypeError: data is not a dense floating-point tensor.
        ValueError: fewer than two samples, samples without elements, a NaN or an infinity.
    """
    x = _Centred(data, torch.float32)
    best, side = 0.0, x.side
    blocks = trange(0, x.count, side, desc="largest distance", unit="block", disable=not progress)
    with torch.autocast(data.device.type, enabled=False):
        for p in blocks:
            left = x.block(slice(p, p + side))
            for q in range(p, x.count, side):
                right = left if q == p else x.block(slice(q, q + side))
                less = _half_squares(left, right, x.half[q : q + side])
                half = less.amax(1) + x.half[p : p + side]
                if half.max().item() > (1 - 1e-3) * best**2 / 2:
                    top = half.topk(min(8, len(half))).indices
                    distances = x.distances(p + top, q + less[top].argmax(1))
                    best = max(best, distances.max().item())
    return best * x.unit


def pairwise_distance_bounds(
    data: Tensor, *, points: int = 100, seed: int = 0, progress: bool = False
) -> tuple[float, float]:
    """Bounds of the largest distance between two samples, from a few samples' distances.

    With ``r_i`` the largest distance from sample i to any other, the triangle inequality gives
    ``max_i r_i <= max_jk |x_j - x_k| <= 2 min_i r_i`` for any choice of samples i. The lower
    bound is the distance of a real pair, improved by going from its far end to the sample farthest
    from there as long as this gains, at most ten times. The upper bound is at most the sum of the
    two largest distances from the mean. Computed in float64; the upper bound is raised by 1e-9 of
    itself.

    Cost: ``2 N points D`` floating-point operations and some passes over the data.

    Args:
        data: as in `max_pairwise_distance`.
        points: how many samples i, at least 1; all of them if there are no more.
        seed: which: those with the smallest words of ``NoiseKey(seed)``, purpose ``USER``, element
            ``i`` of sample 0 standing for sample i of the data.
        progress: show a progress bar.

    Returns:
        ``(lower, upper)`` in units of the data; ``(0.0, 0.0)`` if all samples are equal.

    Raises:
        TypeError, ValueError: as in `max_pairwise_distance`, or points or seed is out of range.
    """
    points = checks.count("points", points, least=1)
    key = NoiseKey(seed, purpose=Purpose.USER)
    x = _Centred(data, torch.float64)
    drawn = words((1, x.count), key, device="cpu").flatten().argsort(stable=True)[:points]
    blocks = drawn.to(x.half.device).split(x.side)
    blocks = tqdm(blocks, desc="distances of some samples", unit="block", disable=not progress)
    found = [x.farthest(index) for index in blocks]
    reach, partner = (torch.cat(parts) for parts in zip(*found, strict=True))
    lower, upper = reach.max().item(), 2 * reach.min().item()
    end = partner[reach.argmax()][None]
    for _ in range(10):
        further, end = x.farthest(end)
        if further.item() <= lower:
            break
        lower = further.item()
    upper = min(upper, (2 * x.half).sqrt().topk(2).values.sum().item()) * (1 + 1e-9)
    return lower * x.unit, upper * x.unit


def samples(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked data as ``[N, D]``, and least and largest of each of the D numbers in float64."""
    checks.instance("data", data, Tensor, "a tensor [N, ...]")
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


class _Centred:
    """Samples less their mean, block by block, in units of `unit`."""

    def __init__(self, data: Tensor, dtype: torch.dtype) -> None:
        self._rows, low, high = samples(data)
        self.count, dim = self._rows.shape
        self.side = min(_SIDE, max(1, _NUMBERS // dim))
        starts = range(0, self.count, self.side)
        mean = torch.zeros_like(low)
        for p in starts:
            mean += self._rows[p : p + self.side].sum(0, dtype=torch.float64) / self.count
        # A number that all samples share is its own mean, whatever the sum was rounded to.
        mean = mean.clamp(low, high)
        data_range = (high - low).max().item()
        # Differences of numbers of up to 32 bits are rounded once, and their squares are in range.
        narrow = data.dtype != torch.float64 and 2.0**-20 < data_range < 2.0**20
        self._wide = torch.promote_types(dtype, torch.float32 if narrow else torch.float64)
        self._mean, self._dtype = mean.to(self._wide), dtype
        self.unit = 1.0 if narrow or data_range == 0 else data_range
        squares = [self.block(slice(p, p + self.side)).square().sum(1) for p in starts]
        self.half = torch.cat(squares) / 2

    def block(self, index: slice | Tensor) -> Tensor:
        x = self._rows[index].to(self._wide) - self._mean
        return (x if self.unit == 1 else x.div_(self.unit)).to(self._dtype)

    def distances(self, i: Tensor, j: Tensor) -> Tensor:
        """Of pairs of samples, from differences in float64."""
        difference = self._rows[i].double() - self._rows[j].double()
        return torch.linalg.vector_norm(difference.div_(self.unit), dim=1)

    def farthest(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The largest distances from some samples, and the samples at the other end."""
        left = self.block(index)
        best = self.half.new_full((len(index),), -math.inf)
        end = torch.zeros_like(index)
        for q in range(0, self.count, self.side):
            columns = slice(q, q + self.side)
            value, at = _half_squares(left, self.block(columns), self.half[columns]).max(1)
            end = torch.where(value > best, at + q, end)
            best = torch.maximum(best, value)
        return self.distances(index, end), end


def _half_squares(left: Tensor, right: Tensor, half: Tensor) -> Tensor:
    """``|y|^2 / 2 - x.y`` for all x of the left and y of the right block."""
    products = left @ right.T
    return torch.sub(half, products, out=products)
