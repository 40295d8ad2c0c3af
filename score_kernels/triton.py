"""The noise contract as device functions of Triton, for kernels of your own.

Each gives the noise of some blocks of four elements, in the order of the elements::

    from score_kernels import triton as skt

    z = skt.normal(seed, purpose, draw, sample, block)

Args:
    seed, purpose, draw: those of a :class:`score_kernels.NoiseKey`.
    sample: the index of the elements' sample, or ``[R, 1]`` of R rows.
    block: the index of each block in its sample, the first element's divided by four: ``[Q]``, or
        ``[1, Q]`` for rows.

Returns:
    ``[4 Q]`` or ``[R, 4 Q]``: the elements ``4 block[0], ..., 4 block[0] + 3, 4 block[1], ...``,
    float32 (words: uint32) and the bits of :func:`score_kernels.ops.normal` and its like.

Launch with ``enable_fp_fusion=False``: else the last product of the noise may be fused with a sum
of the kernel, and is then not rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from score_kernels.backends.triton import noise as _noise

__all__ = ["normal", "rademacher", "uniform", "words"]


@triton.jit
def words(seed, purpose, draw, sample, block):
    """The contract's 32-bit words, uint32."""
    w0, w1, w2, w3 = _words(seed, purpose, draw, sample, block)
    return _in_order(w0, w1, w2, w3)


@triton.jit
def normal(seed, purpose, draw, sample, block):
    """Standard normals."""
    w0, w1, w2, w3 = _words(seed, purpose, draw, sample, block)
    z0, z1 = _noise.box_muller(w0, w1, 2.0**-44, False)
    z2, z3 = _noise.box_muller(w2, w3, 2.0**-44, False)
    return _in_order(z0, z1, z2, z3)


@triton.jit
def uniform(seed, purpose, draw, sample, block):
    """Uniform in (0, 1]."""
    w0, w1, w2, w3 = _words(seed, purpose, draw, sample, block)
    u0, u1 = _noise.uniform(w0, 2.0**-33), _noise.uniform(w1, 2.0**-33)
    u2, u3 = _noise.uniform(w2, 2.0**-33), _noise.uniform(w3, 2.0**-33)
    return _in_order(u0, u1, u2, u3)


@triton.jit
def rademacher(seed, purpose, draw, sample, block):
    """Random signs, -1 or 1."""
    w0, w1, w2, w3 = _words(seed, purpose, draw, sample, block)
    v0, v1 = _noise.rademacher(w0, 0x3F800000), _noise.rademacher(w1, 0x3F800000)
    v2, v3 = _noise.rademacher(w2, 0x3F800000), _noise.rademacher(w3, 0x3F800000)
    return _in_order(v0, v1, v2, v3)


@triton.jit
def _words(seed, purpose, draw, sample, block):
    # Integers that are literals, or 1 at the launch, are constants without a type.
    zero = tl.full((), 0, tl.uint64)
    return _noise.words(zero + seed, zero + draw, zero + purpose, zero + sample, zero + block)


@triton.jit
def _in_order(v0, v1, v2, v3):
    values = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    if len(v0.shape) == 1:
        return tl.reshape(values, (4 * v0.shape[0],))
    else:
        return tl.reshape(values, (v0.shape[0], 4 * v0.shape[1]))
