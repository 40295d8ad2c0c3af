"""csrc/noise.h in Triton: the contract's words, and normals as the same IEEE operations.

Tiles are [rows, quads], a quad being the four elements of one Philox block. Launches pin fp fusion
off, so that a multiplication and an addition stay two operations; what is fused is written fma.
"""

from __future__ import annotations

import triton
import triton.language as tl

from score_kernels.backends import reference

# Arguments that change from call to call: specialising on them would compile a kernel anew.
KEY = ["rows", "elements", "seed", "draw", "purpose", "first_sample"]


def _constants(coefficients: tuple[str, ...]) -> list[tl.constexpr]:
    return [tl.constexpr(float.fromhex(c)) for c in coefficients]


_L0, _L1, _L2, _L3, _L4, _L5, _L6 = _constants(reference.LOG)
_C0, _C1, _C2, _C3, _C4 = _constants(reference.COS)
_S0, _S1, _S2, _S3, _S4 = _constants(reference.SIN)
_TWO_LN2 = tl.constexpr(reference.TWO_LN2)

# fma, and a product, of two elements at a time, as sm_100 has them.
_FMA = tl.constexpr(
    "{.reg .b64 x, y, z, r; mov.b64 x, {$2, $3}; mov.b64 y, {$4, $5}; mov.b64 z, {$6, $7};"
    " fma.rn.f32x2 r, x, y, z; mov.b64 {$0, $1}, r;}"
)
_MUL = tl.constexpr(
    "{.reg .b64 x, y, r; mov.b64 x, {$2, $3}; mov.b64 y, {$4, $5};"
    " mul.rn.f32x2 r, x, y; mov.b64 {$0, $1}, r;}"
)


@triton.jit
def like(x, value):
    """A number in the shape of x, fp32."""
    return tl.full(x.shape, 0.0, tl.float32) + value


@triton.jit
def fma(x, y, z, PACKED: tl.constexpr):
    if PACKED:
        return tl.inline_asm_elementwise(
            _FMA, "=r,=r,r,r,r,r,r,r", [x, y, z], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return tl.fma(x, y, z)


@triton.jit
def mul(x, y, PACKED: tl.constexpr):
    if PACKED:
        return tl.inline_asm_elementwise(
            _MUL, "=r,=r,r,r,r,r", [x, y], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x * y


@triton.jit
def horner(x, c0, c1, c2, c3, c4, PACKED: tl.constexpr):
    """Lowest order first, one fma a term."""
    value = fma(x, like(x, c4), like(x, c3), PACKED)
    value = fma(x, value, like(x, c2), PACKED)
    value = fma(x, value, like(x, c1), PACKED)
    return fma(x, value, like(x, c0), PACKED)


@triton.jit
def multiply(x, FACTOR: tl.constexpr):
    """The low and the high word of a product."""
    product = x.to(tl.uint64) * FACTOR
    return product.to(tl.uint32), (product >> 32).to(tl.uint32)


@triton.jit
def counters(first_sample, draw, addresses, row, rows, elements):
    """Of rows [R, 1]: sample, draw, first quad, and whether their addresses are in range."""
    if addresses is None:
        return first_sample.to(tl.uint64) + row.to(tl.uint64), draw, 0, True
    else:
        at = addresses + 2 * row.to(tl.int64)
        sample = tl.load(at, mask=row < rows, other=0).to(tl.uint64, bitcast=True)
        packed = tl.load(at + 1, mask=row < rows, other=0).to(tl.uint64, bitcast=True)
        # In 32 bits where that is enough: the last quad of a row, the piece, both draws.
        last = ((elements.to(tl.uint64) - 1) >> 2).to(tl.uint32)
        piece = packed.to(tl.uint32)
        first = piece.to(tl.uint64) * last.to(tl.uint64) + piece
        moved = draw.to(tl.uint32) + (packed >> 32).to(tl.uint32)
        high = (sample >> 56).to(tl.uint32) | ((first + last) >> 32).to(tl.uint32)
        inside = (high == 0) & (moved >= draw.to(tl.uint32))
        return sample, moved, first.to(tl.uint32), inside


@triton.jit
def checked(value, other, inside, addresses):
    """A constant, and another one for rows whose address is out of range."""
    if addresses is None:
        return value
    else:
        return tl.where(inside, value, other)


@triton.jit
def words(seed, draw, purpose, sample, quad):
    """Philox4x32-10: the four words of quads [R, Q] of samples [R, 1]."""
    seed = seed.to(tl.uint64)
    c0 = quad.to(tl.uint32)
    c1 = draw.to(tl.uint32)
    c2 = sample.to(tl.uint32)
    c3 = (purpose.to(tl.uint32) << 24) | ((sample >> 32).to(tl.uint32) & 0xFFFFFF)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = multiply(c0, 0xD2511F53)
        low1, high1 = multiply(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def side_by_side(q0, q1, q2, q3):
    """The elements [R, 4 Q] of quads given as four tiles [R, Q]."""
    quads = tl.join(tl.join(q0, q2), tl.join(q1, q3))
    return tl.reshape(quads, (q0.shape[0], 4 * q0.shape[1]))


@triton.jit
def uniform(word, half):
    return tl.fma(word.to(tl.float32), like(word, 2.0**-32), like(word, half))


@triton.jit
def rademacher(word, one):
    return ((word & 0x80000000) | one).to(tl.float32, bitcast=True)


@triton.jit
def square_root(x, PACKED: tl.constexpr):
    """A reciprocal root and one Markstein step, which is what sqrt.rn is made of on a GPU."""
    y = tl.rsqrt(x)
    g = mul(x, y, PACKED)
    h = mul(y, like(y, 0.5), PACKED)
    return fma(fma(-g, g, x, PACKED), h, g, PACKED)


@triton.jit
def box_muller(w0, w1, least, PACKED: tl.constexpr):
    u = fma(w0.to(tl.float32), like(w0, 2.0**-32), like(w0, 2.0**-33), PACKED)
    bits = u.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & 0xFF800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    k = exponent.to(tl.int32, bitcast=True).to(tl.float32)
    scaled = fma(k, like(k, _TWO_LN2), like(k, least), PACKED)
    p = horner(f, _L2, _L3, _L4, _L5, _L6, PACKED)
    p = fma(f, fma(f, p, like(f, _L1), PACKED), like(f, _L0), PACKED)
    r = square_root(fma(f, p, scaled, PACKED), PACKED)
    r = (r.to(tl.uint32, bitcast=True) ^ (w1 & 0x80000000)).to(tl.float32, bitcast=True)
    turn = (w1 << 1).to(tl.int32, bitcast=True).to(tl.float32)
    g = mul(turn, like(turn, 2.0**-31), PACKED)
    q = mul(g, g, PACKED)
    cosine = horner(q, _C0, _C1, _C2, _C3, _C4, PACKED)
    sine = mul(g, horner(q, _S0, _S1, _S2, _S3, _S4, PACKED), PACKED)
    return mul(r, cosine, PACKED), mul(r, sine, PACKED)


@triton.jit
def noise(
    seed,
    purpose,
    counter,
    quad,
    addresses,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A tile [R, 4 Q] of "normal", "uniform", "rademacher" or, as int64, "words".

    Rows whose address is out of range are NaN, or -1: by a constant of the map, which costs nothing
    an element.
    """
    sample, draw, first, inside = counter
    w0, w1, w2, w3 = words(seed, draw, purpose, sample, quad + first)
    if KIND == "normal":
        least = checked(2.0**-44, float("nan"), inside, addresses)
        z0, z1 = box_muller(w0, w1, least, PACKED)
        z2, z3 = box_muller(w2, w3, least, PACKED)
        return side_by_side(z0, z1, z2, z3)
    elif KIND == "uniform":
        half = checked(2.0**-33, float("nan"), inside, addresses)
        return side_by_side(
            uniform(w0, half), uniform(w1, half), uniform(w2, half), uniform(w3, half)
        )
    elif KIND == "rademacher":
        one = checked(0x3F800000, 0x7FC00000, inside, addresses)
        return side_by_side(
            rademacher(w0, one), rademacher(w1, one), rademacher(w2, one), rademacher(w3, one)
        )
    else:
        values = side_by_side(w0, w1, w2, w3).to(tl.int64)
        return checked(values, -1, inside, addresses)


@triton.jit
def length_of(elements, WHOLE: tl.constexpr):
    """Elements of a row; of whole quads, in a form from which the compiler sees the factor 4."""
    length = elements.to(tl.int64)
    if WHOLE:
        length = (length // 4) * 4
    return length


@triton.jit
def span(elements, piece, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """(first element, elements of a row) of a piece of SIZE elements; the count is 0 past the row's
    end, int32, and a multiple of 4 as far as the compiler sees where rows are of whole quads."""
    first = piece.to(tl.int64) * SIZE
    left = tl.maximum(tl.minimum(length_of(elements, WHOLE) - first, SIZE), 0).to(tl.int32)
    if WHOLE:
        left = (left // 4) * 4
    return first, left


@triton.jit
def tile(
    rows,
    elements,
    piece,
    R: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    iteration: tl.constexpr = 0,
    ITERATIONS: tl.constexpr = 1,
):
    """row [R, 1], quad [1, Q], offset [R, 4 Q], mask: this program's rows at one of the
    ITERATIONS tiles of Q quads of a piece.

    WHOLE: rows are of whole quads, which lets four elements be read and written at once.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    quad = piece * (Q * ITERATIONS) + iteration * Q + tl.arange(0, Q)[None, :]
    # What has 64 bits is the same for a whole row; 32 are enough within a piece.
    first, left = span(elements, piece, 4 * Q * ITERATIONS, WHOLE)
    within = iteration * (4 * Q) + tl.arange(0, 4 * Q)[None, :]
    offset = row.to(tl.int64) * length_of(elements, WHOLE) + first + within
    return row, quad, offset, (row < rows) & (within < left)


@triton.jit
def piece_of_grid():
    """Pieces of a row run over the grid's second and third axis, each of which is short."""
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit(do_not_specialize=KEY)
def fill_kernel(
    out,
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
    row, quad, offset, mask = tile(rows, elements, piece_of_grid(), R, Q, WHOLE)
    counter = counters(first_sample, draw, addresses, row, rows, elements)
    values = noise(seed, purpose, counter, quad, addresses, KIND, PACKED)
    tl.store(out + offset, values, mask=mask)
