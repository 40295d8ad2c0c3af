"""The largest distance between two samples: exact, or between two proven bounds.

Both work on :class:`Cloud`, which makes what it needs of the data block by block: the data itself
is neither copied nor converted as a whole, and no N x N matrix exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.ops import words

__all__ = ["Cloud", "max_pairwise_distance", "pairwise_distance_bounds"]

# Samples a side of one matrix product, and terms of its float32 sums: longer sums round more.
_SIDE, _DEPTH = 1024, 4096
# Numbers an elementwise pass converts to float64 at a time.
_PASS = 2**20
_UNIT32, _UNIT64 = 2.0**-24, 2.0**-53


def max_pairwise_distance(data: Tensor, *, progress: bool = False) -> float:
    """The largest Euclidean distance between two samples, ``max_ij |x_i - x_j|``.

    Technique 1 of Song and Ermon (2020, arXiv 2006.09011): the largest noise level, so that noise
    can carry a chain from any sample to any other.

    Exact: the float64 value to within ``(D + 16) 2^-50`` of itself, for D numbers a sample.
    Products of float32 blocks, ``|x|^2 / 2 + |y|^2 / 2 - x.y`` around the mean of the data, find
    the pairs that could be the farthest; a rounding bound decides which those are, and they are
    settled in float64, the farthest of each block by the difference of its two samples. Blocks
    whose samples are too close to the mean to beat the best pair so far
    (``|x - y| <= |x| + |y|``) are skipped.

    Cost: at most ``N^2 D`` floating-point operations, about three times as long if a large share of
    all pairs are equally far apart (one-hot vectors), which float64 has to settle. For 50,000
    samples of 3072 numbers (CIFAR-10's size) 7.7e12: measured, on two cores with AVX-512, 93
    seconds of CPU time for uniform random data, of which no pair can be skipped, and 15 where
    random contrasts let norms rule out 86% of all pairs. Memory: some blocks of 1024 x 4096 numbers
    and 24 bytes a sample.

    Args:
        data: ``[N, ...]``, N at least 2, float16, bfloat16, float32 or float64, on any device
            that has float64. Data that is not contiguous within a sample is copied once.
        progress: show a progress bar.

    Returns:
        The distance, in units of the data; 0.0 if all samples are equal.

    Raises:
        TypeError: data is not a dense floating-point tensor.
        ValueError: fewer than two samples, samples without elements, a NaN or an infinity, or
            float64 data beyond 2^960 or with differences below 2^-960.
    """
    cloud = Cloud(data)
    if cloud.spread == 0:
        return 0.0
    with _full_precision(cloud.device):
        return cloud.largest(cloud.climb(0, sweeps=2), progress) / cloud.scale


def pairwise_distance_bounds(
    data: Tensor, *, points: int = 100, seed: int = 0, progress: bool = False
) -> tuple[float, float]:
    """Two bounds of the largest distance between two samples, from a few samples' distances.

    With ``r_i`` the largest distance from sample i to any other, the triangle inequality gives
    ``max_i r_i <= max_jk |x_j - x_k| <= 2 min_i r_i`` for any choice of samples i. The lower
    bound is the distance of a pair that exists; it is sharpened by going on from the far end of
    the best pair to the sample farthest from that, as long as this gains, at most ten times. The
    upper bound is sharpened by the mean of the data, ``|x_j - x_k| <= |x_j - m| + |x_k - m|``. What
    float32 arithmetic can have lost is added to it: both bounds are proven ones.

    Cost: ``2 N points D`` floating-point operations and some passes over the data;
    `max_pairwise_distance` is the exact value.

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
    cloud = Cloud(data)
    if cloud.spread == 0:
        return 0.0, 0.0
    with _full_precision(cloud.device):
        return cloud.bounds(points, key, progress)


class Cloud:
    """Samples around their mean, ordered by their distance from it, the farthest first.

    A position is an index into that order. Lengths inside are in units of ``1 / scale``, a power of
    two that keeps squares within float32; ``scale`` is 1 for ordinary data.

    Attributes:
        dim: numbers in a sample.
        spread: the largest range (maximum less minimum) of any of them, in units of the data. It is
            no larger than the largest distance.
    """

    def __init__(self, data: Tensor) -> None:
        self._rows = _rows(data)
        self.device = self._rows.device
        self.count, self.dim = self._rows.shape
        # Every float64 norm or distance here is within this share of the true one.
        self.rounding = (self.dim + 16) * 4 * _UNIT64
        low, high, mean = self._moments()
        self.spread = (high - low).max().item()
        self.scale = 1.0
        if self.spread == 0:
            return
        if max(low.abs().max().item(), high.abs().max().item()) > 2.0**960 or (
            self.spread < 2.0**-960
        ):
            raise ValueError(
                f"data: got values from {low.min().item()} to {high.max().item()} that differ by "
                f"at most {self.spread}, expected none beyond 2**960 and differences of at least "
                "2**-960; scale the data first"
            )
        # A difference of two float32 numbers is rounded only once: float64 is not needed.
        self._narrow = data.dtype != torch.float64 and 2.0**-20 <= self.spread <= 2.0**20
        # The mean of finite numbers lies between them, whatever its rounding did.
        centre = torch.minimum(torch.maximum(mean, low), high)
        if self._narrow:
            centre = centre.float()
        else:
            self.scale = math.ldexp(1.0, -math.frexp(self.spread)[1])
        self._centre = centre
        norms = torch.empty(self.count, dtype=torch.float64, device=self.device)
        for index in self._passes():
            rows = self._centred(index, slice(None), torch.float64)
            norms[index] = torch.linalg.vector_norm(rows, dim=1)
        self._norms, self._order = norms.sort(descending=True, stable=True)
        self._half = self._norms.square() / 2
        # Ascending, for searches.
        self._closeness = -self._norms.cpu()
        # float32's share of (|x| + |y|)^2 in half a squared distance; see _candidates.
        terms = min(self.dim, _DEPTH) + -(-self.dim // _DEPTH) + 2
        self._margin = terms * _UNIT32 / (1 - terms * _UNIT32) / 4 + 4 * _UNIT32

    def distance(self, i: int, j: int) -> float:
        """The distance of the samples at two positions, from their difference in float64."""
        pair = self._rows.index_select(0, self._order[[i, j]]).double()
        return torch.linalg.vector_norm((pair[0] - pair[1]).mul_(self.scale)).item()

    def farthest(self, positions: Tensor, progress: bool = False) -> tuple[Tensor, Tensor]:
        """For each of some positions: half the largest squared distance from there, no less than
        the true one, and the position that float32 finds farthest."""
        index, norms = self._order[positions], self._norms[positions]
        most = norms.new_full((len(positions),), -math.inf)
        upper, who = most.clone(), torch.zeros_like(positions)
        for q in _bar(range(0, self.count, _SIDE), progress, "distances from some samples"):
            columns = slice(q, q + _SIDE)
            products = self._products(index, self._order[columns], torch.float32)
            value, at = torch.sub(self._half[columns].float(), products).max(1)
            value = value.double() + self._half[positions]
            who = torch.where(value > most, at + q, who)
            most = torch.maximum(most, value)
            reach = (norms + self._norms[q]).square()
            upper = torch.maximum(upper, value + self._margin * reach)
        return upper, who

    def climb(self, position: int, best: float = 0.0, sweeps: int = 10) -> float:
        """The best distance found by going to the farthest sample again and again."""
        for _ in range(sweeps):
            _, who = self.farthest(torch.tensor([position], device=self.device))
            found = self.distance(position, int(who))
            if found <= best:
                break
            best, position = found, int(who)
        return best

    def bounds(self, points: int, key: NoiseKey, progress: bool) -> tuple[float, float]:
        """`pairwise_distance_bounds`, in units of the data."""
        drawn = words((1, self.count), key, device="cpu").flatten().argsort(stable=True)[:points]
        positions = self._order.argsort()[drawn.to(self.device)]
        upper, who = self.farthest(positions, progress)
        first = int(upper.argmax())
        there = int(who[first])
        lower = self.distance(int(positions[first]), there)
        lower = self.climb(there, lower)
        around = 2 * math.sqrt(2 * upper.min().item())
        reach = min(around, self._norms[:2].sum().item()) * (1 + self.rounding)
        return lower / self.scale, max(lower, reach) / self.scale

    def within(self, operations: float, progress: bool) -> tuple[float, float]:
        """Bounds of the largest distance, in units of the data; equal, and so exact, if that takes
        no more floating-point operations than allowed."""
        with _full_precision(self.device):
            best = self.climb(0, sweeps=2)
            if 2.0 * self.dim * self.pairs(best) <= operations:
                best = self.largest(best, progress) / self.scale
                return best, best
            return self.bounds(100, NoiseKey(0, purpose=Purpose.USER), progress)

    def pairs(self, best: float) -> int:
        """How many pairs could be farther apart than `best`, judged by their norms."""
        first = torch.arange(1, self.count + 1)
        return int((self._within(self._closeness, best) - first).clamp_min_(0).sum())

    def largest(self, best: float, progress: bool) -> float:
        """The largest distance, if `best` is the distance of some pair."""
        self._room = self._half.new_empty(_SIDE * _SIDE, dtype=torch.float32)
        for p in _bar(range(0, self.count, _SIDE), progress, "largest distance"):
            left = None
            for q in range(p, self.count, _SIDE):
                # No sample from here on is far enough from the mean to go with the one at p.
                end = int(self._within(self._closeness[p], best))
                if q >= end:
                    break
                if left is None and self.dim <= _DEPTH:
                    left = self._centred(self._order[p : p + _SIDE], slice(None), torch.float32)
                # Of a block on the diagonal, most of what lies below it is left out.
                step = _SIDE // 2 if q == p else _SIDE
                for r in range(p, min(p + _SIDE, end), step):
                    columns = slice(max(q, r), min(q + _SIDE, end))
                    part = None if left is None else left[r - p : r - p + step]
                    best = self._candidates(slice(r, r + step), columns, part, best)
        return best

    def _within(self, closeness: Tensor, best: float) -> Tensor:
        """How many samples are far enough out to be farther than `best` from one at -closeness."""
        return torch.searchsorted(self._closeness, -closeness - best * (1 + self.rounding))

    def _candidates(self, rows: slice, columns: slice, left: Tensor | None, best: float) -> float:
        """`best`, or the largest distance of a pair of these rows and columns if that is more."""
        # Half a squared distance is h_x + h_y - x.y with h = |x|^2 / 2. Let u = 2^-24. The float32
        # x and y are within u |x| and u |y| of the true ones, which moves the distance by
        # u (|x| + |y|) and its half square by u (|x| + |y|)^2; h is that of the true ones: again
        # u (|x|^2 + |y|^2). A product summed in any order, n terms at a time, is off by
        # gamma_n |x| |y| <= gamma_n (|x| + |y|)^2 / 4. h_y and the difference round by
        # u (|y|^2 + |x| |y|). Together less than (gamma / 4 + 4 u) (|x| + |y|)^2.
        index, others = self._order[rows], self._order[columns]
        half = self._products(index, others, torch.float32, left)
        torch.sub(self._half[columns].float(), half, out=half)
        value = half.amax(1).double() + self._half[rows]
        margin = self._margin * (self._norms[rows] + self._norms[columns.start]).square()
        if (value + margin).max().item() <= best**2 / 2:
            return best
        # With the block's farthest pair settled, few others are still within the bound.
        i = int(value.argmax())
        best = max(best, self.distance(rows.start + i, columns.start + int(half[i].argmax())))
        limit = (best**2 / 2 - margin - self._half[rows]).float()
        # float32 may round the limit up.
        limit = torch.nextafter(limit, limit.new_tensor(-math.inf))
        hot = half > limit[:, None]
        some = hot.any(1).nonzero().flatten()
        those = hot.any(0).nonzero().flatten()
        if len(some) * len(those) <= 1:
            return best
        exact = self._products(index[some], others[those], torch.float64)
        torch.sub(self._half[columns][those], exact, out=exact).add_(self._half[rows][some, None])
        i, j = divmod(int(exact.argmax()), len(those))
        return max(best, self.distance(rows.start + int(some[i]), columns.start + int(those[j])))

    def _products(
        self, index: Tensor, others: Tensor, dtype: torch.dtype, left: Tensor | None = None
    ) -> Tensor:
        """``x . y`` of samples around the mean: `[len(index), len(others)]`."""
        if left is not None:
            # Fresh memory costs a page fault a page; a few numbers a sample make that dear.
            room = self._room[: len(left) * len(others)].view(len(left), len(others))
            return torch.mm(left, self._centred(others, slice(None), dtype).T, out=room)
        # Each product is summed on its own and then added: longer sums would round more.
        total = self._half.new_zeros((len(index), len(others)), dtype=dtype)
        for k in range(0, self.dim, _DEPTH):
            depth = slice(k, k + _DEPTH)
            total += self._centred(index, depth, dtype) @ self._centred(others, depth, dtype).T
        return total

    def _centred(self, index: Tensor, depth: slice, dtype: torch.dtype) -> Tensor:
        """Some samples (by their index in the data) less the mean, scaled: a new tensor."""
        x = self._rows[:, depth].index_select(0, index)
        centre = self._centre[depth]
        if self._narrow:
            return x.to(dtype).sub_(centre)
        return x.double().sub_(centre).mul_(self.scale).to(dtype)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The minimum, maximum and mean of each of the D numbers, float64."""
        low = torch.full((self.dim,), math.inf, dtype=torch.float64, device=self.device)
        high, total = -low, torch.zeros_like(low)
        for index in self._passes():
            rows = self._rows[int(index[0]) : int(index[-1]) + 1]
            least, most = rows.amin(0).double(), rows.amax(0).double()
            if not bool((least.isfinite() & most.isfinite()).all()):
                bad = int(index[0]) + int((~rows.isfinite()).any(1).nonzero()[0])
                raise ValueError(f"data: got NaN or infinity in sample {bad}, expected finite data")
            torch.minimum(low, least, out=low)
            torch.maximum(high, most, out=high)
            total += rows.sum(0, dtype=torch.float64)
        return low, high, total.div_(self.count)

    def _passes(self) -> Iterator[Tensor]:
        """All indices of the data, a few at a time."""
        return iter(torch.arange(self.count, device=self.device).split(max(1, _PASS // self.dim)))


def _rows(data: Tensor) -> Tensor:
    """Data `[N, ...]` as `[N, D]`, checked, without a copy where that is possible."""
    checks.instance("data", data, Tensor, "a tensor [N, ...]")
    if not data.dtype.is_floating_point and not data.dtype.is_complex:
        raise TypeError(
            f"data: got dtype {data.dtype}, expected floating-point data; data.float() converts "
            "it, and for bytes of images data.float() / 255 brings it to [0, 1]"
        )
    checks.score("data", data)
    if data.is_meta:
        raise ValueError("data: got a tensor on meta, expected one with values")
    if data.shape[0] < 2 or data[0].numel() == 0:
        raise ValueError(
            f"data: got shape {tuple(data.shape)}, expected [N, ...] with N at least 2 and at "
            "least one number in a sample"
        )
    return data.detach().reshape(len(data), -1)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 products with float32's rounding: not TF32, bfloat16 or an autocast's type."""
    modules: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    # torch before 2.9 has one setting for both, and later ones may refuse to read it.
    old = not all(hasattr(module, "fp32_precision") for module in modules)
    if old:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    else:
        modules = [m for m in modules if m.fp32_precision not in ("none", "ieee")]
        precisions = [m.fp32_precision for m in modules]
        for module in modules:
            module.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if old:
            torch.set_float32_matmul_precision(before)
        else:
            for module, precision in zip(modules, precisions, strict=True):
                module.fp32_precision = precision


def _bar(steps: range, progress: bool, words: str) -> Iterator[int]:
    if not progress:
        return iter(steps)
    from tqdm.auto import tqdm

    return iter(tqdm(steps, desc=words, unit="block"))
