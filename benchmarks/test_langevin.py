"""The Langevin step against what a PyTorch user would write. Prints ns per element and ratios.

    make bench

One run interleaves all variants round by round, so that a noisy neighbour disturbs all alike:

eager      x + a/2 s + sqrt(a) randn_like(x)
compiled   torch.compile of the same
by hand    the best to be had in plain PyTorch: in place, with a noise buffer that is reused
step       ops.langevin_step, a new tensor
in place   ops.langevin_step_ (timed by pytest-benchmark itself)
floor      torch.add(x, s, alpha=a/2, out=o): the memory traffic without noise
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from score_kernels import NoiseKey, ops

SHAPES = [(64, 3, 32, 32), (256, 3, 32, 32), (64, 3, 128, 128), (4096, 2), (1, 64)]
ALPHA = 1e-4
ROUNDS = 31
# A round lasts at least this long, in seconds, so that the clock's own cost does not count.
ROUND = 1e-3


def calls_per_round(step: Callable[[], Any]) -> int:
    for _ in range(3):
        step()
    start = time.perf_counter()
    step()
    return max(1, math.ceil(ROUND / (time.perf_counter() - start)))


def timed(step: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_langevin_step(benchmark: Any, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    # Inductor writes the number of threads into its code.
    torch._dynamo.reset()
    x, score, noise = torch.randn(shape), torch.randn(shape), NoiseKey(1)
    state, buffer, out = x.clone(), torch.empty(shape), torch.empty(shape)
    half, root = ALPHA / 2, math.sqrt(ALPHA)

    def eager(x: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        return x + half * score + root * torch.randn_like(x)

    compiled = torch.compile(eager)
    others: dict[str, Callable[[], Any]] = {
        "eager": lambda: eager(x, score),
        "compiled": lambda: compiled(x, score),
        "by hand": lambda: state.add_(score, alpha=half).add_(buffer.normal_(), alpha=root),
        "step": lambda: ops.langevin_step(x, score, ALPHA, noise),
        "floor": lambda: torch.add(x, score, alpha=half, out=out),
    }
    calls = {name: calls_per_round(step) for name, step in others.items()}
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def time_the_others() -> None:
        for name, step in others.items():
            seconds[name].append(timed(step, calls[name]))

    def in_place() -> None:
        for _ in range(repeat):
            ops.langevin_step_(state, score, ALPHA, noise)

    repeat = 1
    repeat = calls_per_round(in_place)
    with torch.no_grad():
        benchmark.pedantic(in_place, setup=time_the_others, rounds=ROUNDS, warmup_rounds=1)
    elements = math.prod(shape)
    ns = {name: statistics.median(s) / elements * 1e9 for name, s in seconds.items()}
    ns["in place"] = benchmark.stats.stats.median / repeat / elements * 1e9
    order = ("floor", "eager", "compiled", "by hand", "step", "in place")
    benchmark.extra_info.update(
        shape="x".join(map(str, shape)),
        threads=threads,
        elements=elements,
        ns={name: ns[name] for name in order},
    )
