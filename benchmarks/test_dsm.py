"""Denoising score matching from a given score: noisy input, loss, gradient by the score.

eager      the formula as one writes it
compiled   torch.compile of it, its own generator
fallback   torch.compile of it with PyTorch's generator (inductor's fallback_random)
careful    a hand-written autograd.Function that keeps one residual and scales it in place
ours       ops.perturb and ops.dsm_loss_from_score
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import compare
from score_kernels import NoiseKey, ops

SHAPES = [(256, 3, 32, 32), (64, 3, 128, 128)]


class Careful(torch.autograd.Function):
    """Keeps one residual and scales it in place."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
        residual = torch.addcmul(z, score, sigma)
        ctx.save_for_backward(residual, sigma)
        return 0.5 * residual.square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        residual, sigma = ctx.saved_tensors
        return residual.mul_(sigma * grad.view(-1, 1, 1, 1)), None, None


class InPlace(Careful):
    """The least memory by hand: the noise becomes the residual and then the gradient."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
        residual = z.addcmul_(score, sigma)
        ctx.save_for_backward(residual, sigma)
        flat = residual.flatten(1)
        return 0.5 * torch.linalg.vecdot(flat, flat)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_dsm(benchmark: Any, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    x, score, noise = torch.randn(shape), torch.randn(shape, requires_grad=True), NoiseKey(1)
    sigma = torch.rand(shape[0]) + 0.1
    wide = sigma.view(-1, 1, 1, 1)

    def formula(x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.randn_like(x)
        return x + wide * z, (0.5 * (wide * score + z) ** 2).flatten(1).sum(1).mean()

    def careful() -> tuple[Tensor, Tensor]:
        z = torch.randn_like(x)
        return torch.addcmul(x, z, wide), Careful.apply(score, wide, z).mean()

    def ours() -> tuple[Tensor, Tensor]:
        return ops.perturb(x, sigma, noise), ops.dsm_loss_from_score(score, sigma, noise).mean()

    compiled = torch.compile(formula)
    fallback = torch.compile(formula, options={"fallback_random": True})

    def step(forward: Any, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        noisy, loss = forward(*arguments)
        return noisy, torch.autograd.grad(loss, score)[0]

    compare(
        benchmark,
        {
            "eager": lambda: step(formula, x, score),
            "compiled": lambda: step(compiled, x, score),
            "fallback": lambda: step(fallback, x, score),
            "careful": lambda: step(careful),
            "ours": lambda: step(ours),
        },
        "ours",
        {
            "eager/ours": ("eager", "ours"),
            "comp./ours": ("compiled", "ours"),
            "fallb./ours": ("fallback", "ours"),
            "careful/ours": ("careful", "ours"),
        },
        shape=shape,
        threads=threads,
    )
