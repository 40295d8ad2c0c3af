"""What whole steps gain: sampling and training with an MLP, a small convolutional net and a U-Net.

    python -m benchmarks.end_to_end [--threads 1]

A sampling step is one call of the network and one update; a training step draws levels and
noise, and goes forward and backward. "Before" is the formula as one writes it in PyTorch,
"after" this library; the share is what is left of a step when the network alone is taken away,
median of interleaved rounds. Prints a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from benchmarks.timing import calls_per_round, timed
from score_kernels import NoiseKey, dsm_loss, geometric_sigmas, ops
from score_kernels.networks import ConvScore, MLPScore

SIGMAS = geometric_sigmas(10.0, 0.1, 10)
ALPHA = 1e-4


class UNet(nn.Module):
    """A U-Net of diffusers with attention, 14 million weights, as a score."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet2DModel(
            sample_size=32,
            block_out_channels=(64, 128, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.net(x, 100 * sigma.log()).sample / sigma.view(-1, 1, 1, 1)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 2-128-128-2": (lambda: MLPScore(2, 128), (512, 2)),
    "small conv net": (lambda: ConvScore(1, 16, levels=2), (64, 1, 28, 28)),
    "U-Net": (UNet, (4, 3, 32, 32)),
}


def medians(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds a call."""
    calls = {name: calls_per_round(step) for name, step in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            seconds[name].append(timed(step, calls[name]))
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def sampling(net: nn.Module, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    sigma, noise = torch.full(shape[:1], 0.5), NoiseKey(0)
    x, half, root = torch.randn(shape), ALPHA / 2, math.sqrt(ALPHA)
    state = x.clone()
    return {
        "network": lambda: net(x, sigma),
        "before": lambda: x + half * net(x, sigma) + root * torch.randn_like(x),
        "after": lambda: ops.langevin_step_(state, net(x, sigma), ALPHA, noise),
    }


def training(net: nn.Module, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    x, noise = torch.randn(shape), NoiseKey(0)
    parameters = list(net.parameters())

    def network() -> Any:
        sigma = torch.full(shape[:1], 0.5)
        return torch.autograd.grad(net(x, sigma).sum(), parameters)

    def before() -> Any:
        sigma = SIGMAS[torch.randint(len(SIGMAS), shape[:1])]
        wide = sigma.view(-1, *[1] * (len(shape) - 1))
        z = torch.randn_like(x)
        each = 0.5 * (wide * net(x + wide * z, sigma) + z) ** 2
        return torch.autograd.grad(each.flatten(1).sum(1).mean(), parameters)

    def after() -> Any:
        return torch.autograd.grad(dsm_loss(net, x, SIGMAS, noise=noise), parameters)

    return {"network": network, "before": before, "after": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, milliseconds a step\n")
    print("| network | batch | step | network alone | before | after | share before | after |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (make, shape) in NETS.items():
        torch.manual_seed(0)
        net = make()
        for kind, variants in (("sampling", sampling), ("training", training)):
            with torch.set_grad_enabled(kind == "training"):
                t = medians(variants(net, shape), arguments.rounds)
            shares = [max(0.0, 1 - t["network"] / t[k]) for k in ("before", "after")]
            times = " | ".join(f"{t[k]:.3g}" for k in ("network", "before", "after"))
            batch = " x ".join(map(str, shape))
            print(f"| {name} | {batch} | {kind} | {times} | {shares[0]:.0%} | {shares[1]:.0%} |")


if __name__ == "__main__":
    main()
