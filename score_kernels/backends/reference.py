"""Every op in plain torch: the kernels' reference and fallback.

It gives the contract's bits without an fma: noise is computed in fp64 with every step rounded to
fp32, which csrc/noise.h's coefficients make exact, and the fp32 update emulates fma exactly. An
fp64 state is updated in plain fp64. Slow: some hundred torch operations a call, in chunks that
keep the temporaries small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from score_kernels.noise import Key

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# csrc/noise.h's polynomials, lowest order first.
LOG = (
    "-0x1p+1",
    "0x1.0002e2p+0",
    "-0x1.5528f8p-1",
    "0x1.fd80f6p-2",
    "-0x1.a3114ep-2",
    "0x1.82eb24p-2",
    "-0x1.f4fap-3",
)
COS = ("0x1p+0", "-0x1.3bd3bp+0", "0x1.03bd9ap-2", "-0x1.55020cp-6", "0x1.c2939ap-11")
SIN = ("0x1.921fb4p+0", "-0x1.4abba2p-1", "0x1.466504p-4", "-0x1.31fbf4p-8", "0x1.3912a8p-13")
TWO_LN2 = float.fromhex("-0x1.62e43p-23")

# What a table's step ends with: a number of csrc/args.h's End, with low and high.
End = tuple[int, float, float]
NO_END: End = (0, 0.0, 0.0)
CLAMP, WRAP = 1, 2
# A preconditioner's root is 0 below it: see gain_root in csrc/update.h.
SMALLEST_GAIN = 2.0**-100

# Blocks of four elements a chunk: some megabytes of temporaries.
_CHUNK = 1 << 15


class Reference:
    """Plain torch on any device, and the base of the other backends.

    A backend overrides what it has kernels for; for everything else it falls back to this. Tensors
    come checked by ``score_kernels.ops``: contiguous, on one device.
    """

    name = "reference"
    # Whether its steps can be part of a CUDA graph.
    capturable = False

    def unavailable(self) -> str | None:
        """Why the backend cannot be used on this machine, or None."""
        return None

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the backend cannot serve this device and dtype, or None."""
        return None

    def describe(self) -> str:
        """One line for ``score-kernels info``."""
        return "plain torch on any device, float32 and float64"

    def fill(self, out: Tensor, kind: str, key: Key) -> None:
        """Noise of a kind: "words" into int64, "normal", "uniform", "rademacher" into fp32."""
        # MPS has no fp64: its noise is made on the CPU and moved.
        home = torch.device("cpu") if out.device.type == "mps" else out.device
        rows, elements = out.shape[0], math.prod(out.shape[1:])
        blocks = -(-elements // 4)
        values = torch.empty((rows, blocks * 4), dtype=out.dtype, device=home)
        flat = values.view(-1, 4)
        sample, draw, first, inside = _counters(key, rows, blocks, home)
        for chunk in _chunks(rows * blocks, _CHUNK):
            index = torch.arange(chunk.start, chunk.stop, dtype=torch.int64, device=home)
            row = index // blocks
            words = _philox(first[row] + index % blocks, draw[row], sample[row], key)
            flat[chunk] = _MAPS[kind](words)
        values[~inside] = -1 if kind == "words" else math.nan
        out.copy_(values[:, :elements].reshape(out.shape))

    def affine_step(
        self, out: Tensor, x: Tensor, score: Tensor, a: float, b: float, c: float, key: Key
    ) -> None:
        """out = a x + b score + c z; out may be x, and the score overlap it; c = 0: no noise."""
        # Coefficients enter an fp32 kernel rounded to fp32, once.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.table_step(
            out, x, score, torch.tensor([[a, b, c]], dtype=dtype, device="cpu"), None, key
        )

    def table_step(
        self,
        out: Tensor,
        x: Tensor,
        score: Tensor,
        table: Tensor,
        step: Tensor | None,
        key: Key,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        precondition: Tensor | None = None,
        end: End = NO_END,
    ) -> None:
        """affine_step with (a, b, c) = table[step] and draw + step, read where the tensors are.

        table [lines, 3], step int64 without dimensions; without it the table has one line for all
        samples or one for each. With known, and mask (bool), the table has five columns, and out
        is table[., 3] known + table[., 4] z where mask is true, whatever x and score are there.
        precondition and end as in csrc/args.h's TableArgs.
        """
        if x.numel() == 0:
            return
        score, known = apart(out, score), None if known is None else apart(out, known, same=True)
        if precondition is not None:
            precondition = apart(out, precondition)
        home = torch.device("cpu") if x.device.type == "mps" else x.device
        lines = table.to(home).double()
        if step is not None:
            at = int(step)
            lines = lines[at : at + 1]
            key = (*key[:2], key[2] + at, *key[3:])
        z = _normal_like(x, key).to(home).view(-1) if bool((lines[:, 2::2] != 0).any()) else None
        # An fp64 state has an update in plain fp64.
        fma = _fma if x.dtype == torch.float32 else _plain_fma
        rounded = _round if x.dtype == torch.float32 else torch.Tensor.double
        kind, low, high = end
        # Numbers enter an fp32 kernel rounded to fp32.
        low, high = rounded(torch.tensor([low, high], dtype=torch.float64)).tolist()
        # What is wrapped is at most the last number below the period.
        below = 1 - 2.0 ** (-24 if x.dtype == torch.float32 else -53)
        limits = (low, high) if kind == CLAMP else (0.0, high * below)
        elements = x.numel() // x.shape[0]
        for chunk in _chunks(x.numel(), 4 * _CHUNK):
            row = torch.arange(chunk.start, chunk.stop, device=home) // elements
            # One line for all is not repeated.
            k = lines[row if len(lines) > 1 else slice(None)].unbind(1)

            def take(values: Tensor, chunk: slice = chunk) -> Tensor:
                return values.reshape(-1)[chunk].to(home).double()

            def noisy(value: Tensor, given: Tensor, scale: Tensor, chunk: slice = chunk) -> Tensor:
                # None where the given coefficient is 0, as in update.h.
                if z is None:
                    return value
                return torch.where(given == 0, value, fma(scale, z[chunk].double(), value))

            b, c = k[1], k[2]
            if precondition is not None:
                b = rounded(b * (gain := take(precondition)))
                root = torch.where(gain < SMALLEST_GAIN, 0.0, rounded(gain.sqrt()))
                c = rounded(c * root)
            value = noisy(fma(b, take(score), rounded(k[0] * take(x))), k[2], c)
            if known is not None and mask is not None:
                given = noisy(rounded(k[3] * take(known)), k[4], k[4])
                value = torch.where(mask.reshape(-1)[chunk].to(home), given, value)
            if kind == WRAP:
                value = fma(-rounded(value * low).floor(), torch.full_like(value, high), value)
            if kind != NO_END[0]:
                value = value.clamp(*limits)
            out.view(-1)[chunk] = value.to(x.dtype).to(x.device)

    def perturb(self, x: Tensor, sigma: Tensor, key: Key) -> Tensor:
        """x + sigma z; sigma [B] float32."""
        z = _normal_like(x, key)
        sigma = _per_sample(sigma, x)
        if x.dtype == torch.float64:
            return x + sigma.double() * z.double()
        home = "cpu" if x.device.type == "mps" else x.device
        result = _fma(sigma.to(home).double(), z.to(home).double(), x.to(home).double())
        return result.float().to(x.device)

    def dsm_loss(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, key: Key, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """[B] losses 1/2 weight sum (sigma score + z)^2 and, if asked for, their gradient by an
        fp32 score (else an empty tensor); sigma and weight [B] float32."""
        residual = _residual(score, sigma, key)
        factor = 0.5 if weight is None else 0.5 * weight
        loss = (
            factor * residual.square().flatten(1).sum(1)
            if score.dim() > 1
            else (factor * residual.square())
        )
        dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
        if not with_gradient:
            return loss.to(dtype), score.new_empty(0, dtype=dtype)
        scale = sigma if weight is None else sigma * weight
        return loss.to(dtype), (_per_sample(scale, score) * residual).to(dtype)

    def dsm_gradient(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, upstream: Tensor, key: Key
    ) -> Tensor:
        """upstream weight sigma (sigma score + z) in the score's dtype; upstream [B] float32."""
        scale = upstream * (sigma if weight is None else sigma * weight)
        return (_per_sample(scale, score) * _residual(score, sigma, key)).to(score.dtype)

    def probe_sums(
        self, kind: str, a: Tensor, b: Tensor | None, differences: bool, key: Key
    ) -> Tensor:
        """[4, B]: v.v, v.a, v.b (0 without b) and a.a over each sample, for a probe v of a kind,
        "normal" or "rademacher"; with differences, of (a + b) / 2 and a - b in place of a and b."""
        wide = torch.float32 if a.device.type == "mps" else torch.float64
        rows, elements = a.shape[0], math.prod(a.shape[1:])
        v = _noise_like(kind, a, key).to(wide).reshape(rows, elements)
        a2 = a.to(wide).reshape(rows, elements)
        b2 = torch.zeros_like(a2) if b is None else b.to(wide).reshape(rows, elements)
        if differences:
            a2, b2 = 0.5 * (a2 + b2), a2 - b2
        sums = torch.stack([(p * q).sum(1) for p, q in ((v, v), (v, a2), (v, b2), (a2, a2))])
        return sums.to(torch.float64 if a.dtype == torch.float64 else torch.float32)

    def probe_scale(self, kind: str, factor: Tensor, shape: tuple[int, ...], key: Key) -> Tensor:
        """factor v; factor [B] float32, or float64, which the result then has."""
        like = factor.new_empty(()).expand(shape)
        return _per_sample(factor, like) * _noise_like(kind, like, key).to(factor.dtype)

    def probe_shift(self, kind: str, x: Tensor, factor: Tensor, key: Key) -> Tensor:
        """[2, B, ...]: x + factor v and x - factor v; factor [B] of x's dtype."""
        shift = self.probe_scale(kind, factor, tuple(x.shape), key)
        return torch.stack([x + shift, x - shift])


backend = Reference()


def apart(out: Tensor, value: Tensor, same: bool = False) -> Tensor:
    """A tensor to read while `out` is written: itself, or a copy where the two overlap.

    Elements of `out` itself may be read before they are written, unless `same` says otherwise.
    """
    distance = value.data_ptr() - out.data_ptr()
    if distance == 0 and value.dtype == out.dtype and not same:
        return value
    return value.clone() if -value.nbytes < distance < out.nbytes else value


def _residual(score: Tensor, sigma: Tensor, key: Key) -> Tensor:
    """sigma score + z, in fp64 where the device has it."""
    dtype = torch.float32 if score.device.type == "mps" else torch.float64
    z = _normal_like(score, key).to(dtype)
    return _per_sample(sigma, score).to(dtype) * score.to(dtype) + z


def _normal_like(x: Tensor, key: Key) -> Tensor:
    return _noise_like("normal", x, key)


def _noise_like(kind: str, x: Tensor, key: Key) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    backend.fill(out, kind, key)
    return out


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to go with `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _counters(key: Key, rows: int, blocks: int, device: torch.device) -> tuple[Tensor, ...]:
    """Of each row: sample, draw, first block, and whether the contract's counter has them."""
    if key[4] is None:
        sample = key[3] + torch.arange(rows, dtype=torch.int64, device=device)
        zero = torch.zeros_like(sample)
        return sample, zero + key[2], zero, zero == 0
    sample, packed = key[4].to(device)[:-1].unbind(1)
    draw, first = (packed >> 32 & _MASK) + key[2], (packed & _MASK) * blocks
    last = first + blocks - 1
    fields = {
        "samples: got one out of range, expected 0 <= samples < 2**56": sample >> 24,
        "draws: got one that passes 2**32 with the key's draw, expected draw + draws < 2**32": draw,
        "pieces: got one out of range, expected (pieces + 1) ceil(D / 4) <= 2**32, rows being of D "
        "elements": last,
    }
    bad = {message: value >> 32 != 0 for message, value in fields.items()}
    for message, rows_of_it in bad.items() if device.type == "cpu" else ():
        if bool(rows_of_it.any()):
            raise ValueError(message)
    return sample, draw, first, ~torch.stack(list(bad.values())).any(0)


def _philox(block: Tensor, draw: Tensor, sample: Tensor, key: Key) -> Tensor:
    """Words [n, 4] of Philox4x32-10, int64. Products wrap at 64 bits, which keeps their bits."""
    seed, purpose = key[:2]
    c0, c1 = block, draw
    c2, c3 = sample & _MASK, sample >> 32 | purpose << 24
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _round(x: Tensor) -> Tensor:
    """To the nearest fp32, kept in fp64."""
    return x.float().double()


def _signed(words: Tensor) -> Tensor:
    """Words as int32 values, rounded to fp32."""
    return words.to(torch.int32).float().double()


def _horner(x: Tensor, coefficients: tuple[str, ...]) -> Tensor:
    value = torch.full_like(x, float.fromhex(coefficients[-1]))
    for c in coefficients[-2::-1]:
        # The fp64 product is exact, so that fused or not this is one fp64 rounding.
        value = _round(x * value + float.fromhex(c))
    return value


def _uniform(words: Tensor) -> Tensor:
    return _round(_round(words.double()) * 2**-32 + 2**-33)


def _rademacher(words: Tensor) -> Tensor:
    return 1.0 - 2.0 * (words >> 31).double()


def _normal(words: Tensor) -> Tensor:
    w0, w1 = words[:, 0::2], words[:, 1::2]
    bits = _uniform(w0).float().view(torch.int32)
    exponent = bits - 0x3F3504F3 & -0x800000
    f = (bits - exponent).view(torch.float32).double() - 1.0
    scaled = _round(exponent.double() * TWO_LN2 + 2**-44)
    radius = _round(torch.sqrt(_round(f * _horner(f, LOG) + scaled)))
    radius = radius * _rademacher(w1)
    g = _signed(w1 << 1 & _MASK) * 2**-31
    q = _round(g * g)
    z0 = radius * _horner(q, COS)
    z1 = radius * _round(g * _horner(q, SIN))
    return torch.stack((z0, z1), dim=-1).flatten(1).float()


_MAPS = {"words": lambda w: w, "normal": _normal, "uniform": _uniform, "rademacher": _rademacher}


def _plain_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * b + c


def _fma(a: float | Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of fp32 values held in fp64, rounded once to fp32 and kept in fp64.

    The fp64 product is exact; their sum is rounded to odd (Boldo and Melquiond, 2008), after which
    rounding to fp32 is as if it had been the only rounding.
    """
    product = a * b
    total = product + c
    # Knuth's two-sum: the exact error of the addition.
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    # An infinite sum has no error to speak of.
    inexact = (error != 0) & total.isfinite()
    odd = torch.where(inexact & even, bits + towards, bits)
    return _round(odd.view(torch.float64))
