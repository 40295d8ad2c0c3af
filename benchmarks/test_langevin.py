"""The Langevin step against what a PyTorch user would write.

floor      torch.add(x, s, alpha=a/2, out=o): the memory traffic without noise
eager      x + a/2 s + sqrt(a) randn_like(x)
compiled   torch.compile of the same
by hand    the best to be had in plain PyTorch: in place, with a noise buffer that is reused
step       ops.langevin_step: a new tensor, as eager and compiled make one
in place   ops.langevin_step_
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.harness import compare
from score_kernels import NoiseKey, ops

SHAPES = [(64, 3, 32, 32), (256, 3, 32, 32), (64, 3, 128, 128), (4096, 2), (1, 64)]
ALPHA = 1e-4


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
    with torch.no_grad():
        compare(
            benchmark,
            {
                "floor": lambda: torch.add(x, score, alpha=half, out=out),
                "eager": lambda: eager(x, score),
                "compiled": lambda: compiled(x, score),
                "by hand": lambda: state.add_(score, alpha=half).add_(buffer.normal_(), alpha=root),
                "step": lambda: ops.langevin_step(x, score, ALPHA, noise),
                "in place": lambda: ops.langevin_step_(state, score, ALPHA, noise),
            },
            "in place",
            {
                "eager/step": ("eager", "step"),
                "comp./step": ("compiled", "step"),
                "hand/place": ("by hand", "in place"),
                "place/floor": ("in place", "floor"),
            },
            shape=shape,
            threads=threads,
        )
