"""The independent oracle: the noise contract in NumPy, sharing no code with the library.

Words are exact. Normals are the exact function of u and the angle in float64, which the library
must meet within tolerances.NORMAL; its own bits are pinned by data/golden.json.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

MASK = np.uint64(0xFFFFFFFF)
KNOWN_ANSWERS = [
    [int(word, 16) for word in line.split()]
    for line in (Path(__file__).parent / "data/philox4x32_10_kat.txt").read_text().splitlines()
    if not line.startswith("#")
]


def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Four words of Philox4x32-10 for arrays of counters."""
    c = [np.asarray(word, np.uint64) for word in counter]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & MASK, high0 ^ c[3] ^ np.uint64(k1), p0 & MASK]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def padded_words(
    rows: int, elements: int, seed: int, purpose: int, draw: int, first_sample: int
) -> np.ndarray:
    """[rows, elements rounded up to whole blocks] words of a batch."""
    addresses = [(first_sample + row, draw, 0) for row in range(rows)]
    return addressed_words(addresses, elements, seed, purpose)


def addressed_words(
    addresses: list[tuple[int, int, int]], elements: int, seed: int, purpose: int
) -> np.ndarray:
    """`padded_words` of rows that are (sample, draw, piece)."""
    blocks = -(-elements // 4)
    samples, draws, pieces = ([address[i] for address in addresses] for i in range(3))
    first = np.array([piece * blocks for piece in pieces], np.uint64)[:, None]
    block = first + np.arange(blocks, dtype=np.uint64)
    low = np.array([s % 2**32 for s in samples], np.uint64)[:, None] + 0 * block
    high = np.array([purpose << 24 | s >> 32 for s in samples], np.uint64)[:, None] + 0 * block
    draw = np.array(draws, np.uint64)[:, None] + 0 * block
    out = philox([block, draw, low, high], (seed % 2**32, seed >> 32))
    return np.stack(out, -1).reshape(len(addresses), -1)


def words(rows: int, elements: int, **key: int) -> np.ndarray:
    return padded_words(rows, elements, **key)[:, :elements].astype(np.int64)


def uniforms_of(word: np.ndarray) -> np.ndarray:
    """u = fma(float(w), 2^-32, 2^-33): both roundings are to fp32, the products are exact."""
    return (word.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)


def normals(rows: int, elements: int, **key: int) -> np.ndarray:
    """float64: sqrt(-2 ln u) (cos, sin) of the angle, from pairs of words."""
    w = padded_words(rows, elements, **key).reshape(rows, -1, 2)
    radius = np.sqrt(-2 * np.log(uniforms_of(w[..., 0]).astype(np.float64)))
    turned = (w[..., 1] << np.uint64(1)) & MASK
    half_turns = turned.astype(np.uint32).view(np.int32).astype(np.float64) * 2.0**-31
    angle = np.pi / 2 * half_turns + np.where(w[..., 1] >> np.uint64(31), np.pi, 0.0)
    z = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return z.reshape(rows, -1)[:, :elements]
