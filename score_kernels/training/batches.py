"""The samples of a training step, a pure function of (seed, step).

The epochs, each a permutation of the data, make one endless sequence, and step ``t`` takes its
elements from ``t * batch_size`` on: every batch is full, and an epoch may end inside a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose

__all__ = ["Batches", "permutation"]


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the data in an epoch: ``[count]`` int64, uniform over all orders."""
    key = NoiseKey(seed, purpose=Purpose.DATA_ORDER, draw=epoch)
    # On the CPU whatever the device. The second words decide between samples with equal first ones.
    first, second = ops.words((1, 2 * count), key, device="cpu").view(2, count)
    return torch.argsort(first << 31 | second >> 1, stable=True)


@dataclass
class Batches:
    """Batches in order; arguments as :meth:`Trainer.fit`'s, `conditions` name the parts of items.

    Of each batch only the samples at the ascending `indices` are fetched.
    """

    data: Any
    batch_size: int
    seed: int
    workers: int
    conditions: Sequence[str]
    indices: Tensor

    def __post_init__(self) -> None:
        data = self.data
        indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        if not indexed or isinstance(data, IterableDataset):
            raise TypeError(
                f"data: got {type(data).__name__}, expected a tensor [N, ...] or a dataset with "
                "__len__ and __getitem__"
            )
        self.count = len(data)
        if not self.count:
            raise ValueError("data: got 0 samples, expected at least one")
        # A batch may span two epochs.
        self._order = lru_cache(maxsize=2)(partial(permutation, self.count, self.seed))
        if not isinstance(data, Tensor):
            return
        if not data.dtype.is_floating_point:
            raise TypeError(
                f"data: got dtype {data.dtype}, expected torch.float32; for 8-bit images, "
                "data.float() / 127.5 - 1 is in [-1, 1]"
            )
        checks.state("data", data)
        bad = data.isfinite().logical_not_().nonzero()
        if len(bad):
            raise ValueError(f"data: sample {int(bad[0, 0])} has a value that is not finite")

    def epoch(self, step: int) -> int:
        """The number of epochs that are complete before a step."""
        return step * self.batch_size // self.count

    def rows(self, step: int) -> Tensor:
        """Indices into the data of the samples wanted of a step."""
        positions = step * self.batch_size + self.indices
        epochs = positions // self.count
        parts = [
            self._order(epoch)[positions[epochs == epoch] % self.count]
            for epoch in epochs.unique().tolist()
        ]
        return torch.cat(parts)

    def between(
        self, first: int, last: int, loader_seed: int
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Samples and conditions of the steps from first to last - 1, where the data is.

        A dataset's item draws from torch's generator at ``next``, or in a worker from one with a
        seed made of `loader_seed`.
        """
        rows = (self.rows(step) for step in range(first, last))
        if isinstance(self.data, Tensor):
            return ((self.data[r.to(self.data.device)], {}) for r in rows)
        if hasattr(self.data, "scaled"):
            return ((self.data.scaled(r), {}) for r in rows)
        loader = DataLoader(
            self.data,
            batch_sampler=(r.tolist() for r in rows),
            num_workers=self.workers,
            # Or it would draw from the generator that dropout and augmentation use.
            generator=torch.Generator().manual_seed(loader_seed),
        )
        return map(self._named, loader)

    def _named(self, item: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x, *rest = item if isinstance(item, (tuple, list)) else (item,)
        if self.conditions and len(rest) != len(self.conditions):
            raise ValueError(
                f"conditions: got {len(self.conditions)} names, {list(self.conditions)}, and items "
                f"of {1 + len(rest)} parts, expected one name for each part after the sample"
            )
        checks.state("data", x)
        return x, dict(zip(self.conditions, rest, strict=False))
