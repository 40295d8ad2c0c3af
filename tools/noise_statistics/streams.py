"""Which normals are taken: groups of eight blocks whose keys are neighbours in every field."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from score_kernels import NoiseKey, ops

# [rows, elements] float32 of a key.
Source = Callable[[int, int, NoiseKey], np.ndarray]

FIELDS = ("seeds", "draws", "purposes")
BLOCKS = 2 ** len(FIELDS)


def native(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    return ops.normal((rows, elements), key, device="cpu").numpy()


def replace(key: NoiseKey, **changes: int) -> NoiseKey:
    """The key with some fields changed."""
    names = ("seed", "purpose", "draw", "first_sample")
    return NoiseKey(**({name: getattr(key, name) for name in names} | changes))


@dataclass(frozen=True)
class Group:
    """Eight keys, all that two seeds, two draws and two purposes make, and keys far from the first.

    Attributes:
        rows, elements: the shape of the noise of each key.
        keys: by (seed, draw, purpose), each 0 or 1.
        far: by name, for comparison with keys[0, 0, 0].
    """

    rows: int
    elements: int
    keys: dict[tuple[int, ...], NoiseKey]
    far: dict[str, NoiseKey]


def group(index: int, seed: int, size: int) -> Group:
    """Group number index of a run that starts at seed; size normals a block, a power of two.

    Groups take different seeds, draws and samples, the purposes in turn, and few long samples,
    many short ones or something between.
    """
    rows = min((16, 1024, 65536)[index % 3], size // 16)
    base = NoiseKey(
        (seed + 2 * index) % 2**64,
        purpose=2 * index % 256,
        draw=2 * 1_000_003 * index % 2**32,
        first_sample=index << 18,
    )
    keys = {}
    for place in itertools.product((0, 1), repeat=len(FIELDS)):
        s, d, p = place
        keys[place] = replace(
            base, seed=(base.seed + s) % 2**64, draw=base.draw + d, purpose=base.purpose + p
        )
    # Flipping a low bit of the first sample would name the same samples in another order.
    sample_bit = 18 + index % 38
    far = {
        "samples 2^32 apart": base.for_samples(base.first_sample + 2**32),
        "samples one bit apart": base.for_samples(base.first_sample ^ 1 << sample_bit),
        "seeds one bit apart": replace(base, seed=base.seed ^ 1 << index % 64),
        "draws one bit apart": base.at(base.draw ^ 1 << index % 32),
        "purposes one bit apart": base.for_purpose(base.purpose ^ 1 << index % 8),
    }
    return Group(rows, size // rows, keys, far)
