"""Interleaved timing: every round times all variants in turn, so that a noisy neighbour disturbs
all alike. pytest-benchmark times ours; the others are timed while it sets a round up."""

from __future__ import annotations

import math
import statistics
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Step
from benchmarks.timing import calls_per_round, timed

ROUNDS = 31


def peak_bytes(step: Step) -> int:
    """The most bytes that torch held at once during a step, on top of what was there before."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    if kept is None or not events:
        raise RuntimeError("step: returned nothing or allocated nothing, expected results to hold")
    return most


def compare(
    benchmark: Any,
    variants: dict[str, Step],
    ours: str,
    ratios: dict[str, tuple[str, str]],
    *,
    shape: tuple[int, ...],
    threads: int,
) -> None:
    """Time `variants` on tensors of `shape` and leave the row of the table in extra_info: ns per
    element of each, and the quotients of pairs of them."""
    calls = {name: calls_per_round(step) for name, step in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants if name != ours}

    def time_the_others() -> None:
        for name in seconds:
            seconds[name].append(timed(variants[name], calls[name]))

    def round_of_ours() -> None:
        for _ in range(calls[ours]):
            variants[ours]()

    benchmark.pedantic(round_of_ours, setup=time_the_others, rounds=ROUNDS, warmup_rounds=1)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    median[ours] = benchmark.stats.stats.median / calls[ours]
    elements = math.prod(shape)
    benchmark.extra_info.update(
        shape="x".join(map(str, shape)),
        threads=threads,
        ns={name: median[name] / elements * 1e9 for name in variants},
        ratios={name: median[a] / median[b] for name, (a, b) in ratios.items()},
        us=median[ours] * 1e6,
    )
