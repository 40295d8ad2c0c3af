"""The raw words of the noise, for batteries of tests of random bits that read a pipe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from score_kernels import NoiseKey, ops

# Words of a chunk: 16 MiB as the int64 of ops.words.
CHUNK = 1 << 21
# Elements of one sample before the next one's; keys that are gone through for one sample.
ELEMENTS, STEPS = CHUNK, 1 << 10

Words = Iterator[np.ndarray]


def _numpy(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    return ops.words((rows, elements), key, device="cpu").numpy().astype("<u4")


def _elements(key: NoiseKey) -> Words:
    for sample in itertools.count(key.first_sample):
        yield _numpy(1, ELEMENTS, key.for_samples(sample)).ravel()


def _samples(key: NoiseKey) -> Words:
    rows = CHUNK // 4
    for first in itertools.count(key.first_sample, rows):
        yield _numpy(rows, 4, key.for_samples(first)).ravel()


def _stepped(key: NoiseKey, step: Callable[[NoiseKey, int], NoiseKey]) -> Words:
    """STEPS keys of one sample one after another, then those of the next sample."""
    rows = CHUNK // (4 * STEPS)
    for first in itertools.count(key.first_sample, rows):
        start = key.for_samples(first)
        yield np.stack([_numpy(rows, 4, step(start, i)) for i in range(STEPS)], 1).ravel()


def _draws(key: NoiseKey) -> Words:
    return _stepped(key, lambda start, i: start.at(start.draw + i))


def _seeds(key: NoiseKey) -> Words:
    return _stepped(
        key,
        lambda start, i: NoiseKey(
            (start.seed + i) % 2**64,
            purpose=start.purpose,
            draw=start.draw,
            first_sample=start.first_sample,
        ),
    )


# What runs fastest. All but the first take one block (4 words) of each counter: neighbouring words
# of the stream then come from neighbouring samples, draws or seeds, which is where a generator
# that mixes its counter badly is caught.
ORDERS: dict[str, Callable[[NoiseKey], Words]] = {
    "elements": _elements,
    "samples": _samples,
    "draws": _draws,
    "seeds": _seeds,
}


def write(out: BinaryIO, order: str, key: NoiseKey) -> None:
    """Write 32-bit little-endian words without end.

    Raises:
        BrokenPipeError: nobody reads them any more.
    """
    for chunk in ORDERS[order](key):
        out.write(chunk.data)
