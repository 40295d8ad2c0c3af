"""Small calls, where only the host's share counts: 64 elements, ours against eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import score_kernels as sk
from benchmarks.cases import SMALL, case
from benchmarks.table import measure

__all__ = ["calls_per_step", "small"]

# Rows of the table, and which variant of which case is ours there.
ROWS = {
    "langevin_step_": ("langevin_step", "ours"),
    "langevin_step_, key.at(t)": ("langevin_step", "new key"),
    "normal": ("normal", "ours"),
    "uniform": ("uniform", "ours"),
    "rademacher": ("rademacher", "ours"),
    "perturb": ("perturb", "ours"),
    "dsm_loss_from_score": ("dsm loss", "ours"),
    "dsm_loss and gradient": ("dsm training step", "ours"),
    "probe_dot": ("probe_dot", "ours"),
    "probe_scale": ("probe_scale", "ours"),
    "ssm_reduce": ("ssm_reduce", "ours"),
    "annealed chain, a step": ("annealed chain", "ours"),
    "corrector chain, a step": ("corrector chain", "ours"),
    "DDIM chain, a step": ("ddim chain", "ours"),
    "flow chain (Heun), a step": ("probability_flow chain", "ours"),
}


def small(device: torch.device, *, threads: list[int], rounds: int) -> None:
    """Print microseconds a call, or a step of a chain whose score costs nothing, and how many
    Python functions a step of a chain calls."""
    print(f"{'microseconds, [1, 64] float32':30} threads     ours    eager  ours/eager")
    for count in threads:
        torch.set_num_threads(count)
        measured: dict[str, dict[str, float]] = {}
        for row, (name, ours) in ROWS.items():
            if name not in measured:
                rows = measure(case(name, SMALL, "float32", device), device, rounds, compiled=False)
                measured[name] = {r["variant"]: r["p50_us"] for r in rows}
            us, eager = measured[name][ours], measured[name]["eager"]
            print(f"{row:30} {count:7} {us:8.2f} {eager:8.2f} {us / eager:11.2f}", flush=True)
    print("\nPython calls a step of an annealed chain, those of its nn.Module score included:")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"  score in {str(dtype).removeprefix('torch.')}: {calls_per_step(dtype):.2f}")


class Shrink(nn.Module):
    """A score as networks are: a module, in its own dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x.to(self.dtype).neg()


def calls_per_step(dtype: torch.dtype) -> float:
    """Calls of Python functions in a step of annealed Langevin dynamics: what 100 more steps a
    level add, so that what a chain does once does not count."""
    score = Shrink(dtype)

    def chain(steps: int) -> Tensor:
        return sk.annealed_langevin(
            score, SMALL, [1.0, 0.5], steps_per_level=steps, step_size=1e-3, seed=0
        )

    chain(1)
    return (_calls(lambda: chain(200)) - _calls(lambda: chain(100))) / 200


def _calls(function: Callable[[], Any]) -> int:
    count = 0

    def profiler(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profiler)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count
