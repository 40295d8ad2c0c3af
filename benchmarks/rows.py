"""Rows with addresses beside consecutive ones, and beside a generator for each row."""

from __future__ import annotations

import math
import statistics

import torch

from benchmarks.harness import interleaved
from score_kernels import NoiseKey, ops

__all__ = ["rows"]

# Molecules, points of a plane, images.
SHAPES = ((4096, 3), (4096, 2), (64, 3, 32, 32))
# What is measured, and what it is compared with.
COLUMNS = {
    "normal": None, "normal there": "normal", "step": None, "step there": "step",
    "generators": "normal there",
}  # fmt: skip


def rows(device: torch.device, *, threads: list[int], rounds: int) -> None:
    """Print ns an element of `normal` and of a step in place, without and with addresses, and of
    a generator for each row, beside the plain one and beside `normal` with addresses."""
    print(f"{'ns an element':14} threads" + "".join(f"{name:>20}" for name in COLUMNS))
    for count in threads:
        torch.set_num_threads(count)
        for shape in SHAPES:
            ns = _measured(shape, device, rounds)
            line = f"{'x'.join(map(str, shape)):14} {count:7}"
            for name, base in COLUMNS.items():
                ratio = f" x{ns[name] / ns[base]:.2f}" if base else ""
                line += f"{f'{ns[name]:.3f}{ratio}':>20}"
            print(line, flush=True)


def _measured(shape: tuple[int, ...], device: torch.device, rounds: int) -> dict[str, float]:
    key, ids = NoiseKey(1), torch.randperm(shape[0], device=device)
    there = key.rows(ids, draws=ids % 7)
    x, score = torch.randn(2, *shape, device=device)
    generators = [torch.Generator(device).manual_seed(i) for i in range(shape[0])]

    def by_generators() -> None:
        for row, generator in zip(x, generators, strict=True):
            row.normal_(generator=generator)

    variants = {
        "normal": lambda: ops.normal(shape, key, device=device),
        "normal there": lambda: ops.normal(shape, there, device=device),
        "step": lambda: ops.langevin_step_(x, score, 1e-6, key),
        "step there": lambda: ops.langevin_step_(x, score, 1e-6, there),
        "generators": by_generators,
    }
    seconds = interleaved(variants, rounds, device)
    return {k: statistics.median(v) / math.prod(shape) * 1e9 for k, v in seconds.items()}
