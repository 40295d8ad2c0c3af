"""What whole steps gain: sampling and training with an MLP, a small convolutional net and a U-Net.

    python -m benchmarks.end_to_end [--threads 1]

A sampling step is one call of the network and one update; a training step draws levels and
noise, and goes forward and backward. "Before" is the formula as one writes it in PyTorch,
"after" this library; the share is what is left of a step when the network alone is taken away,
median of interleaved rounds. A second table has training steps by sliced score matching, by its
three methods and as one writes it by double backward and torch.func.jvp, and their peak memory,
beside a denoising step of the same network.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from benchmarks.harness import Step, interleaved, peak_bytes
from score_kernels import NoiseKey, dsm_loss, geometric_sigmas, ops, sliced_score_loss
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


def medians(variants: dict[str, Step], rounds: int) -> dict[str, float]:
    """Milliseconds a call."""
    seconds = interleaved(variants, rounds)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def sampling(net: nn.Module, shape: tuple[int, ...]) -> dict[str, Step]:
    sigma, noise = torch.full(shape[:1], 0.5), NoiseKey(0)
    x, half, root = torch.randn(shape), ALPHA / 2, math.sqrt(ALPHA)
    state = x.clone()
    return {
        "network": lambda: net(x, sigma),
        "before": lambda: x + half * net(x, sigma) + root * torch.randn_like(x),
        "after": lambda: ops.langevin_step_(state, net(x, sigma), ALPHA, noise),
    }


def training(net: nn.Module, shape: tuple[int, ...]) -> dict[str, Step]:
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


def softplus_mlp() -> nn.Module:
    hidden = [nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus()]
    return nn.Sequential(*hidden, nn.Linear(128, 2))


def softplus_conv() -> nn.Module:
    first, second, last = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 32), (32, 32), (32, 1)))
    return nn.Sequential(first, nn.Softplus(), second, nn.Softplus(), last)


# Twice differentiable, without levels.
SMOOTH_NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 2-128-128-2": (softplus_mlp, (4096, 2)),
    "three convolutions": (softplus_conv, (64, 1, 28, 28)),
}


def sliced(net: nn.Module, shape: tuple[int, ...]) -> dict[str, Step]:
    x, noise, parameters = torch.randn(shape), NoiseKey(1), list(net.parameters())

    def objective(v: Tensor, s: Tensor, gradient: Tensor) -> Tensor:
        return ((v * gradient).flatten(1).sum(1) + 0.5 * s.square().flatten(1).sum(1)).mean()

    def double_by_hand() -> Tensor:
        leaf, v = x.detach().requires_grad_(), torch.randint_like(x, 2) * 2 - 1
        s = net(leaf)
        (gradient,) = torch.autograd.grad((v * s).sum(), leaf, create_graph=True)
        return objective(v, s, gradient)

    def jvp_by_hand() -> Tensor:
        v = torch.randint_like(x, 2) * 2 - 1
        return objective(v, *torch.func.jvp(net, (x,), (v,)))

    losses: dict[str, Callable[[], Tensor]] = {
        "denoising": lambda: dsm_loss(lambda y, sigma: net(y), x, [0.5], noise=noise),
        "double backward by hand": double_by_hand,
        "jvp by hand": jvp_by_hand,
    }
    for method in ("double_backward", "jvp", "finite_difference"):
        losses[method] = partial(sliced_score_loss, net, x, noise=noise, method=method)

    def step(loss: Callable[[], Tensor]) -> Any:
        return torch.autograd.grad(loss(), parameters)

    return {name: partial(step, loss) for name, loss in losses.items()}


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
    print("\n| network | batch | training step | milliseconds | / denoising | peak MiB |")
    print("|---|---|---|---|---|---|")
    for name, (make, shape) in SMOOTH_NETS.items():
        torch.manual_seed(0)
        variants = sliced(make(), shape)
        t = medians(variants, arguments.rounds)
        batch = " x ".join(map(str, shape))
        for variant, step in variants.items():
            figures = f"{t[variant]:.3g} | {t[variant] / t['denoising']:.1f}"
            peak = peak_bytes(step) / 2**20
            print(f"| {name} | {batch} | {variant} | {figures} | {peak:.1f} |")


if __name__ == "__main__":
    main()
