"""Interleaved timing: all variants take turns, so that a noisy neighbour disturbs all alike."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, Step

__all__ = ["Times", "calls_per_round", "floor", "measure", "timed"]

_CPU = torch.device("cpu")
# A round of a variant lasts at least this long, in seconds: the clock's own cost does not count.
_ROUND = 1e-3


@dataclass(frozen=True)
class Times:
    """Seconds a call: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Times]:
    """Times of every variant of a case, for one of its steps. On a GPU also of ours replayed from a
    captured graph, without the host's share."""
    variants = dict(case.variants)
    if device.type == "cuda":
        variants["ours, graph"] = _graph(case.variants["ours"])
    with torch.set_grad_enabled(case.op.startswith("dsm")):
        calls = {name: calls_per_round(step, device) for name, step in variants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, step in variants.items():
                seconds[name].append(timed(step, calls[name], device) / case.per)
    return {name: _percentiles(values) for name, values in seconds.items()}


def floor(case: Case, device: torch.device, rounds: int) -> float:
    """Seconds that the bytes of a step take at the device's own copying speed."""
    count = max(1, math.prod(case.shape) * case.bytes // 8)
    source, target = (torch.zeros(count, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(source)

    calls = calls_per_round(copy, device)
    return statistics.median(timed(copy, calls, device) for _ in range(rounds))


def timed(step: Step, calls: int, device: torch.device = _CPU) -> float:
    """Seconds a call, over so many calls in a row; on a GPU between two events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def calls_per_round(step: Step, device: torch.device = _CPU) -> int:
    """How many calls make a round, once the step has run a few times to warm up."""
    for _ in range(3):
        step()
    return max(1, math.ceil(_ROUND / max(timed(step, 1, device), 1e-9)))


def _graph(step: Step) -> Step:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return lambda: graph.replay()


def _percentiles(values: list[float]) -> Times:
    if len(values) == 1:
        return Times(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(values), cuts[7])
