"""Sliced score matching: sums over a probe v that is made in the kernel, and the probe scaled."""

from __future__ import annotations

import triton
import triton.language as tl

from score_kernels.backends.triton.noise import (
    KEY,
    counters,
    fma,
    length_of,
    like,
    mul,
    noise,
    piece_of_grid,
    span,
    tile,
)


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit(do_not_specialize=KEY)
def sums_kernel(
    partial,
    a,
    b,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    addresses,
    KIND: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    ITERATIONS: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """partial [4, rows, pieces]: v.v, v.a, v.b (0 without b) and a.a of each piece; with
    DIFFERENCES of (a + b) / 2 and a - b in place of a and b."""
    piece = piece_of_grid()
    pieces = tl.cdiv(elements, 4 * Q * ITERATIONS)
    vv = tl.zeros((R, 4 * Q), tl.float32)
    va = tl.zeros((R, 4 * Q), tl.float32)
    vb = tl.zeros((R, 4 * Q), tl.float32)
    aa = tl.zeros((R, 4 * Q), tl.float32)
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    counter = counters(first_sample, draw, addresses, row, rows, elements)
    for iteration in tl.static_range(ITERATIONS):
        _, quad, offset, mask = tile(rows, elements, piece, R, Q, WHOLE, iteration, ITERATIONS)
        v = noise(seed, purpose, counter, quad, addresses, KIND, PACKED)
        if KIND != "rademacher":
            v = tl.where(mask, v, 0.0)
            vv = fma(v, v, vv, PACKED)
        p = tl.load(a + offset, mask=mask, other=0.0).to(tl.float32)
        if b is not None:
            q = tl.load(b + offset, mask=mask, other=0.0).to(tl.float32)
            if DIFFERENCES:
                above, below = p, q
                p = 0.5 * (above + below)
                q = above - below
            vb = fma(v, q, vb, PACKED)
        va = fma(v, p, va, PACKED)
        aa = fma(p, p, aa, PACKED)
    row = tl.program_id(0) * R + tl.arange(0, R)
    at = partial + row.to(tl.int64) * pieces + piece
    mask = row < tl.where(piece < pieces, rows, 0)
    stride = rows.to(tl.int64) * pieces
    # One reduction, so that all sums keep the layout of what is loaded.
    if KIND == "rademacher":
        # The squares of signs are ones, fewer than 2^24 in a piece: fp32 has their number exactly.
        vv = span(elements, piece, 4 * Q * ITERATIONS, WHOLE)[1].to(tl.float32)
        va, vb, aa = tl.reduce((va, vb, aa), 1, add_three)
    else:
        vv, va, vb, aa = tl.reduce((vv, va, vb, aa), 1, add_four)
    tl.store(at, vv, mask=mask)
    tl.store(at + stride, va, mask=mask)
    tl.store(at + 2 * stride, vb, mask=mask)
    tl.store(at + 3 * stride, aa, mask=mask)


@triton.jit(do_not_specialize=KEY)
def scale_kernel(
    out,
    x,
    factor,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    addresses,
    KIND: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """factor v or, with x, the pair x + factor v, x - factor v."""
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    counter = counters(first_sample, draw, addresses, row, rows, elements)
    size = tl.load(factor + row, mask=row < rows, other=0.0)
    v = noise(seed, purpose, counter, quad, addresses, KIND, PACKED)
    if x is None:
        tl.store(out + offset, mul(like(v, size), v, PACKED), mask=mask)
    else:
        middle = tl.load(x + offset, mask=mask, other=0.0)
        tl.store(out + offset, fma(like(v, size), v, middle, PACKED), mask=mask)
        below = out + rows.to(tl.int64) * length_of(elements, WHOLE)
        tl.store(below + offset, fma(like(v, -size), v, middle, PACKED), mask=mask)
