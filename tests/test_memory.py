"""Peak extra memory of a denoising training step from a given score, in tensors the size of x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Careful
from benchmarks.harness import peak_bytes
from score_kernels import NoiseKey, ops

SHAPE = (16, 3, 64, 64)


class InPlace(Careful):
    """The least memory by hand: the noise becomes the residual and then the gradient."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
        residual = z.addcmul_(score, sigma)
        ctx.save_for_backward(residual, sigma)
        flat = residual.flatten(1)
        return 0.5 * torch.linalg.vecdot(flat, flat)


def test_noisy_input_and_gradient_are_all_that_is_held() -> None:
    x, score = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    sigma, key = torch.rand(SHAPE[0]) + 0.1, NoiseKey(1)
    wide = sigma.view(-1, 1, 1, 1)

    def eager() -> tuple[Tensor, Tensor]:
        z = torch.randn_like(x)
        noisy = x + wide * z
        loss = (0.5 * (wide * score + z) ** 2).flatten(1).sum(1).mean()
        return noisy, torch.autograd.grad(loss, score)[0]

    def ours() -> tuple[Tensor, Tensor]:
        noisy = ops.perturb(x, sigma, key)
        loss = ops.dsm_loss_from_score(score, sigma, key).mean()
        return noisy, torch.autograd.grad(loss, score)[0]

    def by_hand(function: type[torch.autograd.Function]) -> tuple[Tensor, Tensor]:
        z = torch.randn_like(x)
        noisy = torch.addcmul(x, z, wide)
        loss = function.apply(score, wide, z).mean()
        return noisy, torch.autograd.grad(loss, score)[0]

    size = x.numel() * x.element_size()
    held = {
        "eager": peak_bytes(eager) / size,
        "careful": peak_bytes(lambda: by_hand(Careful)) / size,
        "in place": peak_bytes(lambda: by_hand(InPlace)) / size,
        "ours": peak_bytes(ours) / size,
    }
    print(f"x-sized tensors held at most: {held}")
    # The [B] losses and their gradients are the rest.
    assert 2.0 <= held["ours"] < 2.01
    assert held["eager"] > held["careful"] > held["in place"] > 2.9
