"""The noise contract in Python: which random number is which.

Every random number of the library is a pure function of (seed, purpose, sample, draw, element)::

    word[0..3] = Philox4x32-10(key     = (seed_lo, seed_hi),
                               counter = (block, draw, sample_lo, purpose << 24 | sample_hi24))

with ``block = element // 4`` inside the flattened sample and word ``element % 4`` of the block.
Row r of a batch is sample ``first_sample + r`` or, with addresses, whatever its own says.
``csrc/noise.h`` says how words become normals. Device, backend, batch split, thread count and rank
are not arguments, so they cannot change a bit.

Philox is Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks

__all__ = [
    "Key", "NoiseKey", "Purpose", "addressed", "fresh_seed", "include", "resolve", "without_pieces",
]  # fmt: skip

# (seed as a signed 64-bit integer, purpose, draw, first_sample, addresses): a NoiseKey as kernels
# take it.
Key = tuple[Any, ...]


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


class NoiseKey(tuple[Any, ...]):
    """Names a batch of noise: row ``n`` is sample ``first_sample + n``; see also :meth:`rows`.

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
                None,
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

    @property
    def addresses(self) -> Tensor | None:
        """The packed addresses of rows, if there are any.

        int64 ``[B + 1, 2]``: ``(sample, draw << 32 | piece)`` of each row, and the largest of each.
        Kernels read them where they are: a captured CUDA graph follows
        ``key.addresses.copy_(other.addresses)``.
        """
        return self[4]

    def at(self, draw: int) -> NoiseKey:
        """The same stream at another draw (step)."""
        if type(draw) is not int or not 0 <= draw < 4294967296:
            draw = checks.unsigned("draw", draw, 32)
        seed, purpose, _, first, addresses = self
        return _new(NoiseKey, (seed, purpose, draw, first, addresses))

    def for_samples(self, first: int) -> NoiseKey:
        """The same stream for a batch from global sample ``first`` on, without addresses."""
        first = checks.unsigned("first_sample", first, 56)
        return _new(NoiseKey, (self[0], self[1], self[2], first, None))

    def for_purpose(self, purpose: int) -> NoiseKey:
        """The stream of another use of the same seed."""
        purpose = checks.unsigned("purpose", purpose, 8)
        return _new(NoiseKey, (self[0], purpose, self[2], self[3], self[4]))

    def rows(
        self, samples: Tensor, *, draws: Tensor | None = None, pieces: Tensor | None = None
    ) -> NoiseKey:
        """The same stream for rows that are any samples, in any order.

        Row r is the ``pieces[r]``-th run of D elements, D those of a row, of sample ``samples[r]``,
        at the key's draw plus ``draws[r]``. Rows of one address have the same noise. Permuting,
        dropping, merging or splitting rows with their addresses changes no bit of theirs.

        Args:
            samples: int64 ``[B]`` on the data's device, ``0 <= samples < 2**56``. Rows that are
                pieces of one sample need their `pieces`: without, they have the same noise.
            draws: int64 ``[B]``, at least 0, and with the key's draw below 2**32; default: 0.
            pieces: int64 ``[B]``, at least 0; ``(pieces + 1) ceil(D / 4) <= 2**32``; default: 0.

        Returns:
            A key for batches of B rows. Its first_sample is not used.

        Raises:
            TypeError: an argument is not an int64 tensor.
            ValueError: shapes or devices differ or, on a CPU, a value is out of range. On a GPU,
                where reading it would wait for the device, its row's noise is NaN.
        """
        return _new(NoiseKey, (*self[:4], _packed(samples, draws, pieces)))

    def name_of(self, row: int) -> str:
        """A row in words; waits for the device of its address."""
        if self[4] is None:
            return f"sample {self[3] + row}"
        return f"sample {int(self[4][row, 0])} (row {row})"

    def __eq__(self, other: object) -> bool:
        # Addresses by identity: their values may be on a GPU.
        if not isinstance(other, NoiseKey):
            return NotImplemented
        return tuple(self[:4]) == tuple(other[:4]) and self[4] is other[4]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((*self[:4], id(self[4])))

    def __repr__(self) -> str:
        rows = "" if self[4] is None else f".rows(<{len(self[4]) - 1} addresses>)"
        return (
            f"NoiseKey({self.seed}, purpose={self.purpose}, draw={self.draw}, "
            f"first_sample={self.first_sample}){rows}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, tuple(self)


def _restored(*fields: Any) -> NoiseKey:
    return _new(NoiseKey, fields)


def without_pieces(noise: NoiseKey) -> NoiseKey:
    """The key of the samples that rows are pieces of."""
    if noise.addresses is None:
        return noise
    sample, packed = noise.addresses.unbind(1)
    return _new(NoiseKey, (*noise[:4], torch.stack([sample, packed >> 32 << 32], 1)))


def _packed(samples: Tensor, draws: Tensor | None, pieces: Tensor | None) -> Tensor:
    """The addresses of rows as csrc/noise.h has them, and the largest of each field."""
    values = {"samples": (samples, 56), "draws": (draws, 32), "pieces": (pieces, 32)}
    fields = []
    # What was not looked at is marked: its rows are out of range, and on a CPU an error.
    here = isinstance(samples, Tensor) and samples.is_cpu
    here = here and not torch.compiler.is_dynamo_compiling()
    for name, (value, bits) in values.items():
        if value is None:
            value = torch.zeros_like(samples)
        checks.identities(name, value, samples)
        if here and value.numel():
            low, high = (int(end) for end in value.aminmax())
            checks.unsigned(name, low if low < 0 else high, bits)
        fields.append(value)
    sample, draw, piece = fields
    if not here:
        inside = (draw | piece) >> 32 == 0
        sample = torch.where(inside, sample, -1)
    sample, draw, piece = (torch.cat([f, f.new_zeros(1)]) for f in (sample, draw, piece))
    for field in (sample, draw, piece):
        # A negative number is the largest of all.
        field[-1] = torch.where(field.amin() < 0, -1, field.amax())
    return torch.stack([sample, draw << 32 | piece], 1)


_new: Any = tuple.__new__


def fresh_seed(generator: torch.Generator | None = None) -> int:
    """A 64-bit seed from a generator, or torch's default one, which ``torch.manual_seed`` rules."""
    device = "cpu" if generator is None else generator.device
    seed = torch.empty((), dtype=torch.int64, device=device)
    seed.random_(-(2**63), None, generator=generator)
    return int(seed) & (2**64 - 1)


def include() -> str:
    """The folder of the C++ and CUDA headers, for a compiler's -I.

    ``#include <score_kernels/noise.h>`` is the noise contract for kernels of your own: C++17, no
    libraries.

    Raises:
        FileNotFoundError: the package runs from sources that were not built.
    """
    # A folder of another name than this function, which its import would hide.
    folder = Path(__file__).parent / "headers"
    if not (folder / "score_kernels" / "noise.h").exists():
        raise FileNotFoundError(f"{folder}: no headers there, expected those that pip installs")
    return str(folder)


def resolve(
    noise: NoiseKey | None,
    seed: int | None,
    samples: Tensor | None = None,
    draws: Tensor | None = None,
    pieces: Tensor | None = None,
) -> NoiseKey:
    """The key of a loss: noise, or NoiseKey(seed), or a fresh seed's, with the rows' addresses.

    Raises:
        ValueError: noise is given beside a seed, or has addresses beside others.
        TypeError: noise is not a NoiseKey, or seed not an integer.
    """
    if noise is None:
        noise = NoiseKey(fresh_seed() if seed is None else seed)
    elif seed is not None:
        raise ValueError(f"seed: got {seed} beside noise, expected one of the two")
    checks.instance("noise", noise, NoiseKey, "a NoiseKey")
    return addressed(noise, samples, draws, pieces)


def addressed(
    noise: NoiseKey, samples: Tensor | None, draws: Tensor | None, pieces: Tensor | None
) -> NoiseKey:
    """`NoiseKey.rows` where any of these is given; without samples the rows' are the key's own."""
    fields = {"samples": samples, "draws": draws, "pieces": pieces}
    given = [(name, value) for name, value in fields.items() if value is not None]
    if not given:
        return noise
    name, like = given[0]
    if noise.addresses is not None or samples is not None and noise.first_sample:
        other = "first_sample" if noise.addresses is None else "a noise with addresses"
        raise ValueError(f"{name}: got {name} beside {other}, expected one of the two")
    if samples is None:
        checks.identities(name, like, like)
        samples = noise.first_sample + torch.arange(len(like), device=like.device)
    return noise.rows(samples, draws=draws, pieces=pieces)
