"""The affine step x <- a x + b score + c z, as the chain fma(c, z, fma(b, score, a x))."""

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
def step_kernel(
    out,
    x,
    score,
    a,
    b,
    c,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    addresses,
    NOISE: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    after = combine(x, score, a, b, None, offset, mask, PACKED)
    if NOISE:
        counter = counters(first_sample, draw, addresses, row, rows, elements)
        z = noise(seed, purpose, counter, quad, addresses, "normal", PACKED)
        after = fma(like(z, c), z, after, PACKED)
    tl.store(out + offset, after, mask=mask)


@triton.jit(do_not_specialize=[*KEY, "lines", "low", "high"])
def table_kernel(
    out,
    x,
    score,
    table,
    step,
    lines: tl.int64,
    known,
    kept,
    gain,
    low: tl.float32,
    high: tl.float32,
    rows: tl.int64,
    elements: tl.int64,
    seed: tl.uint64,
    purpose: tl.uint32,
    draw: tl.uint32,
    first_sample: tl.uint64,
    addresses,
    PER_ROW: tl.constexpr,
    END: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """csrc/args.h's TableArgs; kept is its mask, gain its precondition."""
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    COLUMNS: tl.constexpr = 3 if known is None else 5
    if PER_ROW:
        line = table + COLUMNS * row.to(tl.int64)
        inside = row < rows
    elif step is not None:
        at = tl.load(step)
        line = table + COLUMNS * at
        inside = (at >= 0) & (at < lines)
        draw += at.to(tl.uint32)
    else:
        line = table
        inside = lines > 0
    a = tl.load(line, mask=inside, other=float("nan"))
    b = tl.load(line + 1, mask=inside, other=float("nan"))
    c = tl.load(line + 2, mask=inside, other=float("nan"))
    counter = counters(first_sample, draw, addresses, row, rows, elements)
    z = noise(seed, purpose, counter, quad, addresses, "normal", PACKED)
    if gain is not None:
        g = tl.load(gain + offset, mask=mask, other=0.0)
        # Below 2^-100 0, as everywhere.
        root = tl.where(g < 7.888609052210118e-31, 0.0, tl.sqrt_rn(g))
        after = combine(x, score, a, b, g, offset, mask, PACKED)
        after = tl.where(like(g, c) == 0, after, fma(like(g, c) * root, z, after, PACKED))
    else:
        after = noisy(c, z, combine(x, score, a, b, None, offset, mask, PACKED), PACKED)
    if known is not None:
        scale = tl.load(line + 3, mask=inside, other=float("nan"))
        noise_scale = tl.load(line + 4, mask=inside, other=float("nan"))
        given = tl.load(known + offset, mask=mask, other=0.0)
        given = noisy(noise_scale, z, mul(like(given, scale), given, PACKED), PACKED)
        after = tl.where(tl.load(kept + offset, mask=mask, other=0) != 0, given, after)
    if END == 2:
        periods = after * low
        # Triton's floor of a subnormal number is 0, below 0 too.
        whole = tl.floor(periods)
        whole = tl.where((periods < 0) & (whole == 0), -1.0, whole)
        rest = fma(-whole, like(after, high), after, PACKED)
        # 1 - 2^-24: the last number below the period.
        low, high = 0.0, high * 0.999999940395355
        after = rest
    if END != 0:
        # NaN stays.
        after = tl.where(low > after, low, after)
        after = tl.where(high < after, high, after)
    tl.store(out + offset, after, mask=mask)


@triton.jit
def combine(x, score, a, b, gain, offset, mask, PACKED: tl.constexpr):
    before = tl.load(x + offset, mask=mask, other=0.0)
    grad = tl.load(score + offset, mask=mask, other=0.0).to(tl.float32)
    factor = like(grad, b)
    if gain is not None:
        factor *= gain
    return fma(factor, grad, mul(like(before, a), before, PACKED), PACKED)


@triton.jit
def noisy(c, z, value, PACKED: tl.constexpr):
    """No noise is drawn at c = 0: a product with it could change the sign of a zero."""
    scale = like(z, c)
    return tl.where(scale == 0, value, fma(scale, z, value, PACKED))
