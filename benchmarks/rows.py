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


def rows(device: torch.device, *, threads: list[int], rounds: int) -> None:
    """Print nanoseconds an element of `normal` and of a step in place, without and with addresses,
    and of torch.randn with a generator for each row."""
    print("ns an element, and times ours without addresses")
    print(f"{'shape':14} threads  normal  addressed       step  addressed       generators")
    for count in threads:
        torch.set_num_threads(count)
        for shape in SHAPES:
            key = NoiseKey(1)
            ids = torch.randperm(shape[0], device=device)
            there = key.rows(ids, draws=ids % 7)
            x, score = torch.randn(2, *shape, device=device)
            generators = [torch.Generator(device).manual_seed(i) for i in range(shape[0])]

            def by_generators() -> None:
                for row, generator in zip(x, generators, strict=True):  # noqa: B023
                    row.normal_(generator=generator)

            variants = {
                "normal": lambda: ops.normal(shape, key, device=device),  # noqa: B023
                "normal there": lambda: ops.normal(shape, there, device=device),  # noqa: B023
                "step": lambda: ops.langevin_step_(x, score, 1e-6, key),  # noqa: B023
                "step there": lambda: ops.langevin_step_(x, score, 1e-6, there),  # noqa: B023
                "generators": by_generators,
            }
            seconds = interleaved(variants, rounds, device)
            ns = {k: statistics.median(v) / math.prod(shape) * 1e9 for k, v in seconds.items()}
            times = {
                name: ns[name] / ns[base]
                for name, base in (
                    ("normal there", "normal"), ("step there", "step"), ("generators", "normal")
                )
            }  # fmt: skip
            print(
                f"{'x'.join(map(str, shape)):14} {count:7} {ns['normal']:7.3f} "
                f"{ns['normal there']:7.3f} x{times['normal there']:4.2f} {ns['step']:8.3f} "
                f"{ns['step there']:7.3f} x{times['step there']:4.2f} "
                f"{ns['generators']:9.1f} x{times['generators']:.0f}",
                flush=True,
            )
