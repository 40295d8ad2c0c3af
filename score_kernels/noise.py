"""The noise contract in Python: which random number is which.

Every random number of the library is a pure function of (seed, purpose, sample, draw, element)::

    word[0..3] = Philox4x32-10(key     = (seed_lo, seed_hi),
                               counter = (block, draw, sample_lo, purpose << 24 | sample_hi24))

with ``block = element // 4`` inside the flattened sample and word ``element % 4`` of the block.
``csrc/noise.h`` says how words become normals. Device, backend, batch split, thread count and rank
are not arguments, so they cannot change a bit.

Philox is Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import enum
from typing import Any

import torch

from score_kernels import checks

__all__ = ["Key", "NoiseKey", "Purpose", "fresh_seed", "resolve"]

# (seed as a signed 64-bit integer, purpose, draw, first_sample): a NoiseKey as kernels take it.
Key = tuple[int, ...]


class Purpose(enum.IntEnum):
    """Constants of the contract, so that uses of one seed are independent."""

    USER = 0
    PRIOR = 1
    LANGEVIN = 2
    DSM_LEVEL = 3
    DSM_NOISE = 4
    # The permutation of the data in an epoch: draw is the epoch, element the sample.
    DATA_ORDER = 5
    # What torch's own generators are seeded with at a step of training (dropout, augmentation).
    TORCH_SEED = 6
    # The noise of known elements at the start of inpainting; later they take the chain's own.
    KNOWN = 7
    # The probes of a trace along a path (log likelihood): draw is the probe.
    TRACE = 8
    # The samples that bounds of the largest distance start from: draw is 0.
    DISTANCE = 9
    # The first of 64: one per probe of a sample.
    SSM_PROBE = 64


class NoiseKey(tuple[int, int, int, int]):
    """Names a batch of noise: row ``n`` is sample ``first_sample + n``.

    Immutable and hashable. Each step of a loop takes a key of its own, ``key.at(step)``.
    Batches that share ``seed``, ``purpose`` and ``draw`` and whose samples overlap get the same
    noise for the samples they share; otherwise the noise is independent. For several tensors of one
    draw, move ``first_sample`` on by the rows of those before: ``key.for_samples(rows)``.

    Args:
        seed: 64 bits, ``0 <= seed < 2**64``.
        purpose: 8 bits, a :class:`Purpose`; 0 is free for users.
        draw: 32 bits, the step of a chain or of training.
        first_sample: 56 bits, the global index of the batch's first sample.

    Raises:
        TypeError: a field is not an integer.
        ValueError: a field is out of its range.
    """

    __slots__ = ()

    def __new__(
        cls, seed: int, *, purpose: int = 0, draw: int = 0, first_sample: int = 0
    ) -> NoiseKey:
        seed = checks.unsigned("seed", seed, 64)
        return _new(
            cls,
            (
                # Kernels and schemas have signed 64-bit integers.
                seed if seed < 2**63 else seed - 2**64,
                checks.unsigned("purpose", purpose, 8),
                checks.unsigned("draw", draw, 32),
                checks.unsigned("first_sample", first_sample, 56),
            ),
        )

    @property
    def seed(self) -> int:
        """The seed, unsigned."""
        return self[0] & (2**64 - 1)

    @property
    def purpose(self) -> int:
        """The use that the noise is for."""
        return self[1]

    @property
    def draw(self) -> int:
        """The step."""
        return self[2]

    @property
    def first_sample(self) -> int:
        """The global index of row 0."""
        return self[3]

    def at(self, draw: int) -> NoiseKey:
        """The same stream at another draw (step)."""
        if type(draw) is not int or not 0 <= draw < 4294967296:
            draw = checks.unsigned("draw", draw, 32)
        seed, purpose, _, first = self
        return _new(NoiseKey, (seed, purpose, draw, first))

    def for_samples(self, first: int) -> NoiseKey:
        """The same stream for a batch from global sample ``first`` on."""
        first = checks.unsigned("first_sample", first, 56)
        return _new(NoiseKey, (self[0], self[1], self[2], first))

    def for_purpose(self, purpose: int) -> NoiseKey:
        """The stream of another use of the same seed."""
        return _new(NoiseKey, (self[0], checks.unsigned("purpose", purpose, 8), self[2], self[3]))

    def __repr__(self) -> str:
        return (
            f"NoiseKey({self.seed}, purpose={self.purpose}, draw={self.draw}, "
            f"first_sample={self.first_sample})"
        )

    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, int]]:
        fields = {"purpose": self.purpose, "draw": self.draw, "first_sample": self.first_sample}
        return (self.seed,), fields


_new: Any = tuple.__new__


def fresh_seed() -> int:
    """A 64-bit seed from torch's default CPU generator, which ``torch.manual_seed`` rules."""
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return int(seed) & (2**64 - 1)


def resolve(noise: NoiseKey | None, seed: int | None) -> NoiseKey:
    """The key of a loss that takes either: noise, or NoiseKey(seed), or a fresh seed's.

    Raises:
        ValueError: both are given, or the seed is out of range.
        TypeError: noise is not a NoiseKey, or seed not an integer.
    """
    if noise is None:
        return NoiseKey(fresh_seed() if seed is None else seed)
    if seed is not None:
        raise ValueError(f"seed: got {seed} beside noise, expected one of the two")
    checks.instance("noise", noise, NoiseKey, "a NoiseKey")
    return noise
