"""Materialised noise."""

from __future__ import annotations

import triton
import triton.language as tl

from score_kernels.backends.triton.noise import noise, piece_of_grid, tile

KEY = ["rows", "elements", "seed", "draw", "purpose", "first_sample"]


@triton.jit(do_not_specialize=KEY)
def fill_kernel(
    out,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    KIND: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    values = noise(seed, draw, purpose, first_sample, row, quad, KIND, PACKED)
    tl.store(out + offset, values, mask=mask)
