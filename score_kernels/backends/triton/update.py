"""The affine step x <- a x + b score + c z, as the chain fma(c, z, fma(b, score, a x))."""

from __future__ import annotations

import triton
import triton.language as tl

from score_kernels.backends.triton.fill import KEY
from score_kernels.backends.triton.noise import fma, like, mul, noise, piece_of_grid, tile


@triton.jit(do_not_specialize=[*KEY, "steps"])
def step_kernel(
    out,
    x,
    score,
    a,
    b,
    c,
    table,
    step,
    steps: tl.int64,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    NOISE: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    if table is not None:
        at = tl.load(step)
        inside = (at >= 0) & (at < steps)
        a = tl.load(table + 3 * at, mask=inside, other=float("nan"))
        b = tl.load(table + 3 * at + 1, mask=inside, other=float("nan"))
        c = tl.load(table + 3 * at + 2, mask=inside, other=float("nan"))
        draw += at.to(tl.uint32)
    before = tl.load(x + offset, mask=mask, other=0.0)
    slope = tl.load(score + offset, mask=mask, other=0.0).to(tl.float32)
    after = fma(like(slope, b), slope, mul(like(before, a), before, PACKED), PACKED)
    if NOISE:
        z = noise(seed, draw, purpose, first_sample, row, quad, "normal", PACKED)
        noisy = fma(like(z, c), z, after, PACKED)
        # No noise is drawn at c = 0: a product with it could change the sign of a zero.
        after = tl.where(c == 0, after, noisy) if table is not None else noisy
    tl.store(out + offset, after, mask=mask)
