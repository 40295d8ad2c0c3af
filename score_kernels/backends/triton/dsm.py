"""Denoising score matching: noisy data, sums of squared residuals, the gradient by the score."""

from __future__ import annotations

import triton
import triton.language as tl

from score_kernels.backends.triton.noise import (
    KEY,
    counters,
    fma,
    like,
    mul,
    noise,
    piece_of_grid,
    tile,
)


@triton.jit(do_not_specialize=KEY)
def perturb_kernel(
    out,
    x,
    sigma,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    addresses,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    counter = counters(first_sample, draw, addresses, row, rows, elements)
    level = tl.load(sigma + row, mask=row < rows, other=0.0)
    z = noise(seed, purpose, counter, quad, addresses, "normal", PACKED)
    before = tl.load(x + offset, mask=mask, other=0.0)
    tl.store(out + offset, fma(like(z, level), z, before, PACKED), mask=mask)


@triton.jit(do_not_specialize=KEY)
def squares_kernel(
    partial,
    score,
    sigma,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    addresses,
    ITERATIONS: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """partial [rows, pieces]: sums of (sigma score + z)^2 over the ITERATIONS tiles of a piece."""
    piece = piece_of_grid()
    pieces = tl.cdiv(elements, 4 * Q * ITERATIONS)
    sums = tl.zeros((R, 4 * Q), tl.float32)
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    counter = counters(first_sample, draw, addresses, row, rows, elements)
    level = tl.load(sigma + row, mask=row < rows, other=0.0)
    for iteration in tl.static_range(ITERATIONS):
        _, quad, offset, mask = tile(rows, elements, piece, R, Q, WHOLE, iteration, ITERATIONS)
        z = noise(seed, purpose, counter, quad, addresses, "normal", PACKED)
        grad = tl.load(score + offset, mask=mask, other=0.0).to(tl.float32)
        residual = tl.where(mask, fma(like(grad, level), grad, z, PACKED), 0.0)
        sums = fma(residual, residual, sums, PACKED)
    row = tl.program_id(0) * R + tl.arange(0, R)
    at = partial + row.to(tl.int64) * pieces + piece
    tl.store(at, tl.sum(sums, 1), mask=row < tl.where(piece < pieces, rows, 0))


@triton.jit(do_not_specialize=KEY)
def gradient_kernel(
    gradient,
    score,
    sigma,
    scale,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    addresses,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """scale (sigma score + z) in the score's dtype."""
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    counter = counters(first_sample, draw, addresses, row, rows, elements)
    level = tl.load(sigma + row, mask=row < rows, other=0.0)
    factor = tl.load(scale + row, mask=row < rows, other=0.0)
    z = noise(seed, purpose, counter, quad, addresses, "normal", PACKED)
    grad = tl.load(score + offset, mask=mask, other=0.0).to(tl.float32)
    residual = fma(like(grad, level), grad, z, PACKED)
    values = mul(like(residual, factor), residual, PACKED)
    tl.store(gradient + offset, values.to(gradient.dtype.element_ty), mask=mask)
