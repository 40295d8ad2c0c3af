"""Checks against constants, the reference backend, and the same work done in another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from score_kernels import ops
from score_kernels.backends import Backend, reference, use_backend
from score_kernels.backends.compiled import cuda, native
from score_kernels.cli.selfcheck.context import (
    CPU,
    FP32,
    FP32_CHAIN,
    GRADIENT,
    SCORES,
    TEST_KEY,
    CheckContext,
    Finding,
    Skipped,
    differences,
    elementwise,
    levels,
    randn,
    sums,
    within,
)
from score_kernels.losses import dsm_loss
from score_kernels.networks import MLPScore
from score_kernels.noise import NoiseKey
from score_kernels.sampling import annealed_langevin

_SHAPES = ((5, 3), (300, 2), (7, 130), (6, 4096 + 7), (8, 3, 32, 32))


def _kernels(context: CheckContext) -> Finding:
    if context.backend is reference.backend:
        compiled: Backend = cuda if context.device.type == "cuda" else native
        why = compiled.refuses(context.device, torch.float32)
        raise Skipped(f"the reference serves this device: {why or 'it is forced'}")
    isas = f": {', '.join(native.kernels.isas())}" if context.backend is native else ""
    return True, context.backend.name + isas, "compiled kernels"


# From tests/data/golden.json: shape, key, words and normals.
_GOLDEN = (
    (3, 4),
    NoiseKey(42, purpose=2, draw=7, first_sample=2**32 - 2),
    "83217877 1f2da65d 0a88e636 5b5eeb62 b68113ae 1a27248f "
    "c7beb6d8 d269ef70 296c2cae 24c4b360 0b8123c4 d47febd0",
    "0x1.ab21a4p-1 0x1.9a3de4p-1 0x1.9279dp+0 -0x1.fa28f4p+0 0x1.5160d4p-1 0x1.f85e98p-2 "
    "-0x1.3b08a6p-2 0x1.44793ep-1 0x1.2ec936p+0 0x1.7f782ap+0 -0x1.337a46p+0 0x1.17547cp+1",
)


def _golden(context: CheckContext) -> Finding:
    shape, key, words, normals = _GOLDEN
    want = [
        torch.tensor([int(word, 16) for word in words.split()]).view(shape),
        torch.tensor([float.fromhex(z) for z in normals.split()]).view(shape),
    ]
    return context.same(
        lambda device: [f(shape, key, device=device) for f in (ops.words, ops.normal)],
        lambda device: want,
    )


def _noise(context: CheckContext) -> Finding:
    count = context.many(250_000)
    shapes = [(count // 1000, 1000), (count // 2, 2), (count // 3, 3), (4, count // 4)]
    fills = (ops.normal, ops.words, ops.uniform, ops.rademacher)
    return context.same(lambda d: [f(s, TEST_KEY, device=d) for f in fills for s in shapes])


def _keys_and_sizes(context: CheckContext) -> Finding:
    keys = [
        NoiseKey(0),
        NoiseKey(2**64 - 1, purpose=255, draw=2**32 - 1, first_sample=2**56 - 5),
        *(TEST_KEY.at(draw) for draw in (0, 18, 2**31)),
        *(TEST_KEY.for_purpose(purpose) for purpose in (0, 3, 128)),
        *(TEST_KEY.for_samples(first) for first in (0, 2**32, 2**40 + 7)),
    ]
    shapes = [(0,), (0, 5), (3, 0), (9,), (1, 1), (7, 1), (90, 3), (6, 4), (5, 63), (3, 64)]
    shapes += [(2, 257), (2, 1023), (3, 4096 + 7), (2, 3, 5, 7), (16, 3, 32, 32), (3000, 2)]
    cases = [*product([(5, 130)], keys), *product(shapes, [TEST_KEY])]
    return context.same(lambda device: [t for case in cases for t in elementwise(device, *case)])


def _split(context: CheckContext) -> Finding:
    """Batches in parts, and the number of threads."""
    shapes = [(8, 1), (8, 3), (8, 257), (8, 4096 + 7), (16, 3, 32, 32)]
    shapes += [(context.many(20_000), 2), (3, context.many(50_003))]
    before = torch.get_num_threads()

    def make(device: torch.device, edges: Sequence[int | None], threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = [t for shape in shapes for t in sums(device, shape)]
        for shape in shapes:
            parts = [elementwise(device, shape, TEST_KEY, slice(*rows)) for rows in pairwise(edges)]
            out += map(torch.cat, zip(*parts, strict=True))
        return out

    try:
        return context.same(
            lambda device: make(device, (0, 3, None), 1) + make(device, (0, 1, 2, 5, None), 2),
            lambda device: 2 * make(device, (0, None), 2),
        )
    finally:
        torch.set_num_threads(before)


def _updates(context: CheckContext) -> Finding:
    """Coefficients of all samples, of each, and by a counter on the device; known elements."""

    def make(device: torch.device) -> list[Tensor]:
        out = []
        for shape, dtype in product(_SHAPES, SCORES):
            x, score = randn(shape, 1).to(device), (10 * randn(shape, 2)).to(device, dtype)
            out.append(ops.langevin_step(x, score, 0.37, TEST_KEY))
            out.append(ops.langevin_step_(x.clone(), score, 0.37, TEST_KEY))
            out.append(ops.affine_step_(x.clone(), score, 1.1, 0.3, 0.0, TEST_KEY))
            table = randn((shape[0], 5), 8)
            table[::2, 2], table[::3, 4] = 0, 0
            table, mask = table.to(device), (randn(shape, 7) > 0).to(device)
            known, step = randn(shape, 3).to(device), torch.tensor(0, device=device)
            for lines, counter in ((table, None), (table[:1], None), *4 * [(table, step)]):
                plain = lines[:, :3].contiguous()
                out.append(ops.table_step_(x.clone(), score, plain, counter, TEST_KEY))
                x = x.clone()
                ops.table_step_(x, score, lines, counter, TEST_KEY, known=known, mask=mask)
                out.append(x)
                step += counter is not None
        for dtype in SCORES[1:]:
            # Every finite number of 16 bits.
            score = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=CPU).view(dtype)
            score = score[score.isfinite()][None].to(device)
            x = torch.zeros_like(score, dtype=torch.float32)
            out.append(ops.affine_step_(x, score, 1.0, 1.0, 0.3, TEST_KEY))
        return out

    return context.same(make)


def _chain(context: CheckContext) -> Finding:
    def score(x: Tensor, sigma: Tensor) -> Tensor:
        # One rounding, the same on every device.
        return -x * sigma.view(-1, 1)

    def make(device: torch.device) -> list[Tensor]:
        sample = partial(annealed_langevin, score, sigmas=[1.0, 0.4, 0.1], steps_per_level=5)
        sample = partial(sample, step_size=0.01, seed=9, record_every=4, device=device)
        plain = [sample((rows, 37), first_sample=2**32 - 3) for rows in (8, 300)]
        known, mask = randn((37,), 4).to(device), (randn((37,), 5) > 0).to(device)
        return [*plain, sample((8, 37), known=known, mask=mask)]

    return context.same(make)


def _dsm(context: CheckContext) -> Finding:
    def losses(device: torch.device) -> list[Tensor]:
        out = []
        for shape, dtype in product(_SHAPES, SCORES):
            sigma, score = levels(shape[0]).to(device), randn(shape, 3).to(device, dtype)
            out.append(ops.dsm_loss_from_score(score, sigma, TEST_KEY))
            out.append(ops.dsm_loss_from_score(score, sigma.flip(0), TEST_KEY, weight=sigma))
        return out

    def gradients(device: torch.device, dtype: torch.dtype, exact: bool) -> list[Tensor]:
        out: list[Tensor] = []
        for shape in _SHAPES:
            score, sigma = randn(shape, 3).to(device, dtype), levels(shape[0]).to(device)
            leaf = (score.float() if exact else score).requires_grad_()
            loss = ops.dsm_loss_from_score(leaf, sigma, TEST_KEY, weight=sigma.flip(0))
            # The first gradient may have been made with the loss, the second is made anew.
            out += torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
            out += torch.autograd.grad(loss, leaf, sigma)
        return out

    errors = [(context.error(losses), FP32)]
    for dtype, bound in GRADIENT.items():
        got, want = (partial(gradients, dtype=dtype, exact=exact) for exact in (False, True))
        errors.append((context.error(got, want), bound))
    return within(*errors)


def _probes(context: CheckContext) -> Finding:
    def make(device: torch.device) -> list[Tensor]:
        out = []
        for shape, probe in product(_SHAPES, ("rademacher", "gaussian", "sphere")):
            x, step = randn(shape, 1).to(device), levels(shape[0]).to(device)
            out.append(ops.probe_scale(step, shape, TEST_KEY, probe=probe))
            out.append(ops.fd_pair(x, step, TEST_KEY, probe=probe))
            for dtype in SCORES:
                s, g = (randn(shape, seed).to(device, dtype) for seed in (3, 4))
                out.append(ops.probe_dot(s, TEST_KEY, probe=probe))
                for reduced in (True, False):
                    how: dict[str, Any] = {"probe": probe, "variance_reduced": reduced}
                    out.append(ops.ssm_reduce(g, s, TEST_KEY, **how))
                    out.append(ops.fd_reduce(g, s, step, TEST_KEY, **how))
        return out

    return within((context.error(make), FP32))


def _training(context: CheckContext) -> Finding:
    def make(device: torch.device) -> list[Tensor]:
        x = randn((64, 3, 8, 8), 5).to(device).requires_grad_()
        gain = torch.linspace(0.5, 1.5, 8, device=CPU).to(device).requires_grad_()

        def net(y: Tensor, sigma: Tensor) -> Tensor:
            return -gain * y / (1 + sigma.view(-1, 1, 1, 1) ** 2)

        loss = dsm_loss(net, x, [2.0, 0.5, 0.1], noise=TEST_KEY)
        return [loss, *torch.autograd.grad(loss, (gain, x))]

    return within((context.error(make), FP32_CHAIN))


def _repeats(context: CheckContext) -> Finding:
    shapes = [(context.many(64), 3, 32, 32), (context.many(20_000), 2), (3, context.many(100_003))]

    def make(device: torch.device, times: int) -> list[Tensor]:
        return [t for _ in range(times) for shape in shapes for t in sums(device, shape)]

    return context.same(partial(make, times=10), lambda device: 10 * make(device, 1))


def _cuda_graph(context: CheckContext) -> Finding:
    """Chains of a small network with random weights, captured and not."""
    context.require_gpu()
    if not context.backend.capturable:
        raise Skipped(f"{context.backend.name} serves this device, and cannot be captured")
    with torch.random.fork_rng(devices=[]):
        net = MLPScore(6, 32)
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(0.2 * randn(tuple(parameter.shape), seed))

    def make(device: torch.device, graph: bool) -> list[Tensor]:
        start = randn((32, 6), 7).to(device)
        sample = partial(annealed_langevin, net.to(device), start, [4.0, 1.0, 0.3, 0.1])
        sample = partial(sample, steps_per_level=4, step_size=1e-3, seed=9, cuda_graph=graph)
        return [sample(record_every=every) for every in (None, 3)]

    return context.same(partial(make, graph=True), partial(make, graph=False))


def _another_stream(context: CheckContext) -> Finding:
    context.require_gpu()
    shape = (64, 3, 32, 32)

    def make(device: torch.device, aside: bool) -> list[Tensor]:
        x, sigma = randn(shape, 1).to(device), levels(shape[0]).to(device)
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device) if aside else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Busy for milliseconds: what is not put on this stream comes too early, and is seen.
            busy = torch.zeros(2**24, device=device)
            for _ in range(200):
                busy.add_(1)
            y, level = 2 * x, 2 * sigma
            out = [
                ops.langevin_step(y, y, 0.37, TEST_KEY),
                ops.perturb(y, level, TEST_KEY),
                ops.dsm_loss_from_score(y, level, TEST_KEY),
                ops.ssm_reduce(y, y, TEST_KEY),
                ops.probe_scale(level, shape, TEST_KEY),
            ]
        current.wait_stream(stream)
        return out

    return context.same(partial(make, aside=True), partial(make, aside=False))


def _every_gpu(context: CheckContext) -> Finding:
    context.require_gpu()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if len(devices) == 1:
        raise Skipped("one GPU only")

    def make(device: torch.device) -> list[Tensor]:
        shapes = [(7, 130), (3, 4096 + 7), (16, 3, 32, 32)]
        found = [t for shape in shapes for t in elementwise(device, shape, TEST_KEY)]
        return found + [t for shape in shapes for t in sums(device, shape)]

    want = context.run(make)
    return differences({str(device): (CheckContext(device).run(make), want) for device in devices})


def _large(context: CheckContext) -> Finding:
    context.require_gpu()
    if context.quick:
        raise Skipped("left out of a quick run")
    if context.backend is reference.backend:
        raise Skipped("too slow on the reference, which serves this device")
    return large_batch(context.device, 15_790_321, 136)


def large_batch(device: torch.device, rows: int, elements: int) -> Finding:
    """Start, middle and end of one large fill and in-place step, and of the fill as one sample,
    against the reference; elements a multiple of 4."""
    part, after = 64, TEST_KEY.at(TEST_KEY.draw + 1)
    firsts = (0, rows // 2, rows - part)
    x = ops.normal((rows, elements), TEST_KEY, device=device)
    got = [x[first : first + part].to(CPU, copy=True) for first in firsts]
    ops.langevin_step_(x, x, 0.37, after)
    got += [x[first : first + part].cpu() for first in firsts]
    del x
    flat = ops.normal((1, rows * elements), TEST_KEY, device=device)[0]
    blocks = (0, rows * elements // 8, rows * elements // 4 - part)
    got += [flat[4 * block : 4 * (block + part)].cpu() for block in blocks]
    keys = [TEST_KEY.for_samples(TEST_KEY.first_sample + first) for first in firsts]
    with use_backend("reference"):
        want = [ops.normal((part, elements), key, device=CPU) for key in keys]
        for z, key in zip(want[:3], keys, strict=True):
            want.append(ops.langevin_step(z, z, 0.37, key.at(after.draw)))
    for first in blocks:
        block = torch.arange(first, first + part, device=CPU)
        key = TEST_KEY.rows(torch.full_like(block, TEST_KEY.first_sample), pieces=block)
        with use_backend("reference"):
            want.append(ops.normal((part, 4), key, device=CPU).flatten())
    return differences({str(device): (got, want)})


CHECKS: dict[str, Callable[[CheckContext], Finding]] = {
    "kernels": _kernels,
    "golden words and normals": _golden,
    "noise against the reference": _noise,
    "keys, sizes and alignments": _keys_and_sizes,
    "batches in parts, thread counts": _split,
    "updates, tables, known elements": _updates,
    "annealed chain": _chain,
    "denoising loss and gradient": _dsm,
    "probes, sliced and differences": _probes,
    "training through dsm_loss": _training,
    "ten runs of every reduction": _repeats,
    "CUDA graph": _cuda_graph,
    "another stream": _another_stream,
    "every GPU": _every_gpu,
    "more than 2**31 elements": _large,
}
