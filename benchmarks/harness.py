"""Interleaved timing: all variants take turns, so that a noisy neighbour disturbs all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Step", "captured", "interleaved", "peak_bytes"]

Step = Callable[[], Any]
_CPU = torch.device("cpu")
# Seconds that a round of a variant lasts at least: the clock's own cost does not count.
_ROUND = 1e-3


def interleaved(
    variants: dict[str, Step], rounds: int, device: torch.device = _CPU
) -> dict[str, list[float]]:
    """Seconds a call of every variant in every round."""
    calls = {name: _calls_per_round(step, device) for name, step in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            seconds[name].append(_timed(step, calls[name], device))
    return seconds


def captured(step: Step) -> Step:
    """The replay of a CUDA graph of a step, which has no share of the host's."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return lambda: graph.replay()


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


def _calls_per_round(step: Step, device: torch.device) -> int:
    for _ in range(3):
        step()
    return max(1, math.ceil(_ROUND / max(_timed(step, 1, device), 1e-9)))


def _timed(step: Step, calls: int, device: torch.device) -> float:
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
