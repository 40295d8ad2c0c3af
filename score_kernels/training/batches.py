"""Which samples a step of training sees: a pure function of (seed, step), so none of it is saved.

The samples of all epochs make one endless sequence, each epoch a permutation of the data, and step
``t`` takes the ``batch_size`` of them from ``t * batch_size`` on. Every sample is seen once an
epoch, every batch is full, and an epoch may end inside a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose

__all__ = ["Batches", "permutation"]


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the data in an epoch: ``[count]`` int64, uniform over all orders."""
    key = NoiseKey(seed, purpose=Purpose.DATA_ORDER, draw=epoch)
    # Equal words, rare, are kept in the order of the data; made on the CPU for any device.
    return torch.argsort(ops.words((1, count), key, device="cpu")[0], stable=True)


class Batches:
    """Batches of a tensor, a :class:`score_kernels.cli.data.Data` or a map-style dataset, in order.

    Args:
        data: ``[N, ...]`` float32 or float64 tensor; or an object with ``__len__`` and
            ``scaled(rows)``; or a dataset whose items are samples, or tuples of a sample and its
            conditions.
        batch_size: samples a step.
        seed: decides the order.
        workers: processes that fetch a dataset's items.
        conditions: names of what follows the sample in a dataset's items.
        places: which of a batch's samples are wanted, as indices; default: all.

    Raises:
        TypeError: data is none of these.
        ValueError: data is empty or holds a value that is not finite.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        seed: int,
        workers: int,
        conditions: Sequence[str],
        places: Tensor | None = None,
    ) -> None:
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TypeError(
                f"data: got {type(data).__name__}, expected a tensor [N, ...] or a dataset with "
                "__len__ and __getitem__"
            )
        if isinstance(data, Tensor):
            _check_values(data)
        if not len(data):
            raise ValueError("data: got 0 samples, expected at least one")
        self.data = data
        self.count = len(data)
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.conditions = tuple(conditions)
        self.places = torch.arange(batch_size) if places is None else places
        self._epochs: dict[int, Tensor] = {}

    def epoch(self, step: int) -> int:
        """The epoch of the last sample before a step: as many epochs are complete."""
        return step * self.batch_size // self.count

    def rows(self, step: int) -> Tensor:
        """Indices of the samples wanted of a step."""
        at, last = step * self.batch_size, (step + 1) * self.batch_size
        parts: list[Tensor] = []
        while at < last:
            epoch, start = divmod(at, self.count)
            parts.append(self._order(epoch)[start : start + last - at])
            at += len(parts[-1])
        return torch.cat(parts)[self.places]

    def between(self, first: int, last: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(samples, conditions by name) of the steps from first to last - 1, on the CPU or where
        the data are. What torch's generator draws for a dataset's item, it draws at ``next``."""
        steps = range(first, last)
        if isinstance(self.data, Tensor):
            return ((self.data[self.rows(t).to(self.data.device)], {}) for t in steps)
        if hasattr(self.data, "scaled"):
            return ((self.data.scaled(self.rows(t)), {}) for t in steps)
        loader = DataLoader(
            self.data,
            batch_sampler=(self.rows(t).tolist() for t in steps),
            num_workers=self.workers,
            # Or it would draw from the generator that dropout and augmentation use.
            generator=torch.Generator().manual_seed(self.seed % 2**63),
        )
        return (self._named(item) for item in loader)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # A batch may span two epochs.
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = permutation(self.count, self.seed, epoch)
        return self._epochs[epoch]

    def _named(self, item: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x, *rest = item if isinstance(item, (tuple, list)) else (item,)
        if self.conditions and len(rest) != len(self.conditions):
            raise ValueError(
                f"conditions: got {len(self.conditions)} names, {list(self.conditions)}, and items "
                f"of {1 + len(rest)} parts, expected one name for each part after the sample"
            )
        checks.state("data", x)
        return x, dict(zip(self.conditions, rest, strict=False))


def _check_values(data: Tensor) -> None:
    if not data.dtype.is_floating_point:
        raise TypeError(
            f"data: got dtype {data.dtype}, expected torch.float32; for 8-bit images, "
            "data.float() / 127.5 - 1 is in [-1, 1]"
        )
    checks.state("data", data)
    # A piece at a time: no copy of the data's size.
    for first in range(0, len(data), 4096):
        finite = data[first : first + 4096].isfinite().flatten(1).all(1)
        if not finite.all():
            bad = first + int(finite.logical_not().nonzero()[0])
            raise ValueError(f"data: sample {bad} has a value that is not finite")
