"""Checks that need a GPU: graphs, streams, several devices, large batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from score_kernels import ops
from score_kernels.backends import reference, use_backend
from score_kernels.cli.selfcheck.kit import (
    CPU,
    KEY,
    Finding,
    Kit,
    NotHere,
    differences,
    elementwise,
    levels,
    randn,
    require_gpu,
    side_stream,
    sums,
)
from score_kernels.networks import MLPScore
from score_kernels.sampling import annealed_langevin


def _graph(kit: Kit) -> Finding:
    require_gpu(kit)
    if not kit.backend.capturable:
        raise NotHere(f"{kit.backend.name} serves this device, and cannot be captured")
    got, want = (_network_chains(kit.device, graph=graph) for graph in (True, False))
    return differences({kit.backend.name: (got, want)})


def _network_chains(device: torch.device, graph: bool) -> list[Tensor]:
    """Chains of a small network with random weights."""
    with torch.random.fork_rng(devices=[]):
        net = MLPScore(6, 32)
    with torch.no_grad():
        for seed, parameter in enumerate(net.parameters()):
            parameter.copy_(0.2 * randn(tuple(parameter.shape), seed))
    net.to(device)
    start = randn((32, 6), 7).to(device)
    sample = partial(annealed_langevin, net, start, [4.0, 1.0, 0.3, 0.1], cuda_graph=graph)
    runs = (sample(steps_per_level=4, step_size=1e-3, seed=9, record_every=n) for n in (None, 3))
    return [x.cpu() for x in runs]


def _another_stream(kit: Kit) -> Finding:
    require_gpu(kit)
    shape = (64, 3, 32, 32)

    def make(device: torch.device, aside: bool) -> list[Tensor]:
        x, sigma = randn(shape, 1).to(device), levels(shape[0]).to(device)
        with side_stream(device) if aside else nullcontext():
            y, level = 2 * x, 2 * sigma
            return [
                ops.langevin_step(y, y, 0.37, KEY),
                ops.perturb(y, level, KEY),
                ops.dsm_loss_from_score(y, level, KEY),
                ops.ssm_reduce(y, y, KEY),
                ops.probe_scale(level, shape, KEY),
            ]

    return kit.same(partial(make, aside=True), partial(make, aside=False))


def _every_gpu(kit: Kit) -> Finding:
    require_gpu(kit)
    count = torch.cuda.device_count()
    if count == 1:
        raise NotHere("one GPU only")

    def make(device: torch.device) -> list[Tensor]:
        shapes = [(7, 130), (3, 4096 + 7), (16, 3, 32, 32)]
        found = [t for shape in shapes for t in elementwise(device, shape, KEY)]
        return found + [t for shape in shapes for t in sums(device, shape)]

    want, devices = kit.run(make), [torch.device("cuda", i) for i in range(count)]
    return differences({str(device): (Kit(device).run(make), want) for device in devices})


def _large(kit: Kit) -> Finding:
    require_gpu(kit)
    if kit.backend is reference.backend:
        raise NotHere("too slow on the reference, which serves this device")
    if kit.quick:
        raise NotHere("left out of a quick run")
    torch.cuda.empty_cache()
    rows, elements = 15_790_321, 136
    needed, free = 4 * rows * elements + 2**30, torch.cuda.mem_get_info(kit.device)[0]
    if free < needed:
        raise NotHere(f"needs {needed / 2**30:.0f} GiB of free memory, has {free / 2**30:.1f}")
    return large_batch(kit.device, rows, elements)


def large_batch(device: torch.device, rows: int, elements: int) -> Finding:
    """Start, middle and end of one large fill and in-place step, and of the fill as one sample,
    against the reference; elements a multiple of 4."""
    part, after = 64, KEY.at(KEY.draw + 1)
    firsts, places = (0, rows // 2, rows - part), [0, rows * elements // 8 * 4]
    places.append(rows * elements - 4 * part)
    x = ops.normal((rows, elements), KEY, device=device)
    got = [x[first : first + part].to(CPU, copy=True) for first in firsts]
    ops.langevin_step_(x, x, 0.37, after)
    got += [x[first : first + part].cpu() for first in firsts]
    del x
    flat = ops.normal((1, rows * elements), KEY, device=device)[0]
    got += [flat[place : place + 4 * part].cpu() for place in places]
    want, samples = [], [KEY.first_sample + first for first in firsts]
    with use_backend("reference"):
        want += [ops.normal((part, elements), KEY.for_samples(n), device=CPU) for n in samples]
        for z, n in zip(want[:3], samples, strict=True):
            want.append(ops.langevin_step(z, z, 0.37, after.for_samples(n)))
    for place in places:
        # No op makes a piece of a sample.
        block = torch.arange(place // 4, place // 4 + part, device=CPU)
        sample = torch.full_like(block, KEY.first_sample)
        want.append(reference._normal(reference._philox(block, sample, KEY)).flatten())
    return differences({str(device): (got, want)})


CHECKS: dict[str, Callable[[Kit], Finding]] = {
    "CUDA graph": _graph,
    "another stream": _another_stream,
    "every GPU": _every_gpu,
    "more than 2**31 elements": _large,
}
