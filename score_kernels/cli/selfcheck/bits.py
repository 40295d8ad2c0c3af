"""Checks against constants, the reference backend, and the same work done in another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from score_kernels import ops
from score_kernels.backends import Backend, reference
from score_kernels.backends.compiled import cuda, native
from score_kernels.cli.selfcheck.kit import (
    CPU,
    FP32,
    FP32_CHAIN,
    GRADIENT,
    KEY,
    NORMAL,
    SCORES,
    Finding,
    Kit,
    NotHere,
    elementwise,
    largest,
    levels,
    randn,
    side_stream,
    sums,
    threads,
    within,
)
from score_kernels.losses import dsm_loss
from score_kernels.noise import NoiseKey
from score_kernels.sampling import annealed_langevin


def _kernels(kit: Kit) -> Finding:
    if kit.backend is reference.backend:
        compiled: Backend = cuda if kit.device.type == "cuda" else native
        why = compiled.refuses(kit.device, torch.float32)
        raise NotHere(f"the reference serves this device: {why or 'it is forced'}")
    isas = f": {', '.join(native.kernels.isas())}" if kit.backend is native else ""
    return True, kit.backend.name + isas, "compiled kernels"


# From tests/data/golden.json, cases 3 and 4: (shape, key), words and normals.
_GOLDEN: tuple[tuple[tuple[int, int], NoiseKey, str, str], ...] = (
    (
        (1, 4),
        NoiseKey(2**64 - 1, purpose=255, draw=2**32 - 1, first_sample=2**56 - 2),
        "2088c7b9 d4785e10 a463ee26 13c65e63",
        "-0x1.f4ca9ap-1 0x1.c7ba6ap+0 0x1.aa3e6cp-1 0x1.c1a03ap-2",
    ),
    (
        (3, 4),
        NoiseKey(42, purpose=2, draw=7, first_sample=2**32 - 2),
        "83217877 1f2da65d 0a88e636 5b5eeb62 b68113ae 1a27248f "
        "c7beb6d8 d269ef70 296c2cae 24c4b360 0b8123c4 d47febd0",
        "0x1.ab21a4p-1 0x1.9a3de4p-1 0x1.9279dp+0 -0x1.fa28f4p+0 0x1.5160d4p-1 0x1.f85e98p-2 "
        "-0x1.3b08a6p-2 0x1.44793ep-1 0x1.2ec936p+0 0x1.7f782ap+0 -0x1.337a46p+0 0x1.17547cp+1",
    ),
)


def _golden_words(kit: Kit) -> Finding:
    want = [torch.tensor([int(w, 16) for w in g[2].split()]).view(g[0]) for g in _GOLDEN]
    return kit.same(
        lambda device: [ops.words(g[0], g[1], device=device) for g in _GOLDEN], lambda device: want
    )


def _golden_normals(kit: Kit) -> Finding:
    want = [torch.tensor([float.fromhex(z) for z in g[3].split()]).view(g[0]) for g in _GOLDEN]
    return kit.same(
        lambda device: [ops.normal(g[0], g[1], device=device) for g in _GOLDEN], lambda device: want
    )


def _noise(kit: Kit) -> Finding:
    count = kit.many(250_000)
    shapes = [(count // 1000, 1000), (count // 2, 2), (count // 3, 3), (4, count // 4)]
    fills = (ops.normal, ops.words, ops.uniform, ops.rademacher)
    return kit.same(
        lambda device: [fill(shape, KEY, device=device) for fill in fills for shape in shapes]
    )


def _exact(kit: Kit) -> Finding:
    shape = (kit.many(1000), 1000)
    found = kit.runs(lambda device: [f(shape, KEY, device=device) for f in (ops.words, ops.normal)])
    return within(
        largest(float((z.double() - _normals_of(w)).abs().max()) for w, z in found.values()),
        NORMAL,
    )


def _normals_of(words: Tensor) -> Tensor:
    """csrc/noise.h's function of pairs of words in float64."""
    w0, w1 = words.view(-1, 2).unbind(1)
    u = (w0.float().double() * 2.0**-32 + 2.0**-33).float().double()
    turned = w1 << 1 & 0xFFFFFFFF
    angle = math.pi / 2 * (turned - (turned >> 31 << 32)) * 2.0**-31 + math.pi * (w1 >> 31)
    radius = (-2 * u.log()).sqrt()
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).view(words.shape)


def _keys(kit: Kit) -> Finding:
    keys = [
        NoiseKey(0),
        NoiseKey(2**64 - 1, purpose=255, draw=2**32 - 1, first_sample=2**56 - 5),
        *(KEY.at(draw) for draw in (0, 18, 2**31)),
        *(KEY.for_purpose(purpose) for purpose in (0, 3, 128)),
        *(KEY.for_samples(first) for first in (0, 2**32, 2**40 + 7)),
    ]
    return kit.same(lambda device: [t for k in keys for t in elementwise(device, (5, 130), k)])


def _sizes(kit: Kit) -> Finding:
    shapes = [(0,), (0, 5), (3, 0), (9,), (1, 1), (7, 1), (90, 3), (6, 4), (5, 63), (3, 64)]
    shapes += [(2, 257), (2, 1023), (3, 4096 + 7), (2, 3, 5, 7), (16, 3, 32, 32), (3000, 2)]
    return kit.same(lambda device: [t for s in shapes for t in elementwise(device, s, KEY)])


def _split(kit: Kit) -> Finding:
    shapes = [(8, 1), (8, 3), (8, 4), (8, 257), (8, 4096 + 7), (8, 3, 32, 32)]

    def make(device: torch.device, edges: Sequence[int]) -> list[Tensor]:
        pieces = [
            [t for shape in shapes for t in elementwise(device, shape, KEY, slice(*rows))]
            for rows in pairwise(edges)
        ]
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    return kit.same(
        lambda device: make(device, (0, 3, 8)) + make(device, range(9)),
        lambda device: 2 * make(device, (0, 8)),
    )


def _thread_counts(kit: Kit) -> Finding:
    if kit.device.type != "cpu":
        raise NotHere("for CPUs only")

    def make(device: torch.device, count: int) -> list[Tensor]:
        shapes = [(16, 3, 32, 32), (20_000, 2), (9_001, 3), (3, 50_003)]
        with threads(count):
            found = [t for s in shapes for t in elementwise(device, s, KEY)]
            return found + [t for s in shapes for t in sums(device, s)]

    return kit.same(partial(make, count=1), partial(make, count=max(2, torch.get_num_threads())))


_PARITY = ((5, 3), (300, 2), (7, 130), (6, 4096 + 7), (8, 3, 32, 32))


def _updates(kit: Kit) -> Finding:
    def make(device: torch.device) -> list[Tensor]:
        out = []
        for shape, dtype in product(_PARITY, SCORES):
            x, score = randn(shape, 1).to(device), (10 * randn(shape, 2)).to(device, dtype)
            out.append(ops.langevin_step(x, score, 0.37, KEY))
            out.append(ops.langevin_step_(x.clone(), score, 0.37, KEY))
            out.append(ops.affine_step_(x.clone(), score, 0.9, -0.3, 0.7, KEY))
            out.append(ops.affine_step_(x.clone(), score, 1.1, 0.3, 0.0, KEY))
        for dtype in SCORES[1:]:
            # Every finite number of 16 bits.
            score = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=CPU).view(dtype)
            score = score[score.isfinite()][None].to(device)
            out.append(ops.affine_step_(torch.zeros_like(score).float(), score, 1.0, 1.0, 0.3, KEY))
        return out

    return kit.same(make)


def _loss(kit: Kit) -> Finding:
    def make(device: torch.device) -> list[Tensor]:
        out = []
        for shape, dtype in product(_PARITY, SCORES):
            rows, score = levels(shape[0]).to(device), randn(shape, 3).to(device, dtype)
            out.append(ops.dsm_loss_from_score(score, rows, KEY))
            out.append(ops.dsm_loss_from_score(score, rows.flip(0), KEY, weight=rows))
        return out

    return within(kit.error(make), FP32)


def _gradient(kit: Kit) -> Finding:
    def make(device: torch.device, dtype: torch.dtype, exact: bool) -> list[Tensor]:
        out: list[Tensor] = []
        for shape in _PARITY:
            score = randn(shape, 3).to(device, dtype)
            leaf = (score.float() if exact else score).requires_grad_()
            rows = levels(shape[0]).to(device)
            loss = ops.dsm_loss_from_score(leaf, rows, KEY, weight=rows.flip(0))
            # The first gradient may have been made with the loss, the second is made anew.
            out += torch.autograd.grad(loss, leaf, rows, retain_graph=True)
            out += torch.autograd.grad(loss, leaf, rows)
        return out

    errors = {}
    for dtype in SCORES:
        got, want = (partial(make, dtype=dtype, exact=exact) for exact in (False, True))
        errors[dtype] = kit.error(got, want)
    return (
        all(error <= GRADIENT[dtype] for dtype, error in errors.items()),
        ", ".join(f"{error:.1e}" for error in errors.values()),
        "at most " + ", ".join(f"{bound:.1e}" for bound in GRADIENT.values()),
    )


def _probes(kit: Kit) -> Finding:
    def make(device: torch.device) -> list[Tensor]:
        out = []
        for shape, probe in product(_PARITY, ("rademacher", "gaussian", "sphere")):
            x, rows = randn(shape, 1).to(device), levels(shape[0]).to(device)
            out.append(ops.probe_scale(rows, shape, KEY, probe=probe))
            out.append(ops.fd_pair(x, rows, KEY, probe=probe))
            for dtype in SCORES:
                s, g = (randn(shape, seed).to(device, dtype) for seed in (3, 4))
                out.append(ops.probe_dot(s, KEY, probe=probe))
                for reduced in (True, False):
                    how: dict[str, Any] = {"probe": probe, "variance_reduced": reduced}
                    out.append(ops.ssm_reduce(g, s, KEY, **how))
                    out.append(ops.fd_reduce(g, s, rows, KEY, **how))
        return out

    return within(kit.error(make), FP32)


def _training(kit: Kit) -> Finding:
    def make(device: torch.device) -> list[Tensor]:
        x = randn((64, 3, 8, 8), 5).to(device).requires_grad_()
        gain = torch.linspace(0.5, 1.5, 8, device=CPU).to(device).requires_grad_()

        def net(y: Tensor, sigma: Tensor) -> Tensor:
            return -gain * y / (1 + sigma.view(-1, 1, 1, 1) ** 2)

        loss = dsm_loss(net, x, [2.0, 0.5, 0.1], noise=KEY)
        return [loss, *torch.autograd.grad(loss, (gain, x))]

    return within(kit.error(make), FP32_CHAIN)


def _repeats(kit: Kit) -> Finding:
    shapes = [(kit.many(64), 3, 32, 32), (kit.many(20_000), 2), (3, kit.many(100_003))]

    def make(device: torch.device) -> list[Tensor]:
        return [t for shape in shapes for t in sums(device, shape)]

    def ten(device: torch.device) -> list[Tensor]:
        out: list[Tensor] = []
        for i in range(10):
            if i % 2:
                with side_stream(device):
                    out += make(device)
            else:
                out += make(device)
        return out

    return kit.same(ten, lambda device: 10 * make(device))


def _table(kit: Kit) -> Finding:
    coefficients = torch.tensor(
        [[1.0, 0.05, 0.3], [0.9, -0.2, 0.7], [1.1, 0.01, 1e-3], [1.0, 0.4, 0.0]], device=CPU
    )

    def make(device: torch.device, by_table: bool) -> list[Tensor]:
        out, table = [], coefficients.to(device)
        for shape, dtype in product(((7, 130), (3, 257)), SCORES):
            x, score = randn(shape, 1).to(device), randn(shape, 2).to(device, dtype)
            step = torch.zeros((), dtype=torch.int64, device=device)
            for t, (a, b, c) in enumerate(coefficients.tolist()):
                if by_table:
                    ops.table_step_(x, score, table, step, KEY)
                    step += 1
                else:
                    ops.affine_step_(x, score, a, b, c, KEY.at(KEY.draw + t))
            out.append(x)
        return out

    return kit.same(partial(make, by_table=True), partial(make, by_table=False))


def _lines(kit: Kit) -> Finding:
    def make(device: torch.device) -> list[Tensor]:
        out = []
        for shape, dtype in product(_PARITY, SCORES):
            lines = randn((shape[0], 5), 8)
            lines[::2, 2], lines[::3, 4] = 0, 0
            lines, mask = lines.to(device), (randn(shape, 7) > 0).to(device)
            score, known = randn(shape, 2).to(device, dtype), randn(shape, 3).to(device)
            for of_all in (False, True):
                five = lines[:1] if of_all else lines
                x = randn(shape, 1).to(device)
                ops.table_step_(x, score, five[:, :3].contiguous(), None, KEY)
                out.append(x.clone())
                ops.table_step_(x, score, five, None, KEY, known=known, mask=mask)
                out.append(x)
        return out

    return kit.same(make)


def _chain(kit: Kit) -> Finding:
    def score(x: Tensor, sigma: Tensor) -> Tensor:
        # One rounding, the same on every device.
        return -x * sigma.view(-1, 1)

    def make(device: torch.device) -> list[Tensor]:
        sample = partial(annealed_langevin, score, sigmas=[1.0, 0.4, 0.1], steps_per_level=5)
        sample = partial(sample, step_size=0.01, seed=9, record_every=4, device=device)
        plain = [sample((rows, 37), first_sample=2**32 - 3) for rows in (8, 300)]
        known, mask = randn((37,), 4).to(device), (randn((37,), 5) > 0).to(device)
        return [*plain, sample((8, 37), known=known, mask=mask)]

    return kit.same(make)


CHECKS: dict[str, Callable[[Kit], Finding]] = {
    "kernels": _kernels,
    "golden words": _golden_words,
    "golden normals": _golden_normals,
    "noise against the reference": _noise,
    "normals against the exact function": _exact,
    "seeds, purposes, draws, samples": _keys,
    "sizes and alignments": _sizes,
    "batches in pieces": _split,
    "thread counts": _thread_counts,
    "updates, scores of 3 dtypes": _updates,
    "denoising loss": _loss,
    "its gradient, fp32, bf16, fp16": _gradient,
    "probes, sliced and differences": _probes,
    "training through dsm_loss": _training,
    "ten runs of every reduction": _repeats,
    "steps from a table": _table,
    "steps by lines, known elements": _lines,
    "annealed chain": _chain,
}
