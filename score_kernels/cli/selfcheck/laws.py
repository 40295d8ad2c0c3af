"""Checks against what the numbers should be: statistics of the noise, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from score_kernels import ops
from score_kernels.cli.selfcheck.kit import (
    ALPHA,
    CPU,
    DEVIATIONS,
    FP32_CHAIN,
    KEY,
    KOLMOGOROV,
    Finding,
    Kit,
    deviations,
    largest,
    randn,
    relative,
    within,
)
from score_kernels.losses import dsm_loss
from score_kernels.losses.sliced import exact_score_loss, sliced_score_loss
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.sampling import langevin


def _moments(kit: Kit) -> Finding:
    count = kit.many(1_000_000)
    (z,) = kit.run(lambda device: [ops.normal((count // 1000, 1000), KEY, device=device)])
    # E z^k and Var z^k = E z^2k - (E z^k)^2.
    laws = {1: (0, 1), 2: (1, 2), 4: (3, 96)}
    return deviations(
        *(
            (float((z.double() ** k).mean()) - mean) * math.sqrt(count / variance)
            for k, (mean, variance) in laws.items()
        )
    )


def _distribution(kit: Kit) -> Finding:
    count = kit.many(1_000_000)
    (z,) = kit.run(lambda device: [ops.normal((count // 1000, 1000), KEY, device=device)])
    below = torch.special.ndtr(z.double().flatten().sort().values)
    rank = torch.arange(count, dtype=torch.float64, device=CPU) / count
    distance = float(torch.maximum(below - rank, rank + 1 / count - below).max())
    figure = distance * math.sqrt(count)
    expected = f"at most {KOLMOGOROV:.2f} ({ALPHA:.0e} for the whole run)"
    return figure <= KOLMOGOROV, f"{figure:.2f} = sqrt(n) distance", expected


def _correlations(kit: Kit) -> Finding:
    rows = kit.many(1000)
    other_seed = NoiseKey(KEY.seed + 1, purpose=2, draw=17, first_sample=KEY.first_sample)
    keys = (KEY, KEY.at(KEY.draw + 1), KEY.for_purpose(KEY.purpose + 1), other_seed)
    z, *others = kit.run(lambda device: [ops.normal((rows, 1000), k, device=device) for k in keys])
    pairs = [(z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), *((z, other) for other in others)]
    return deviations(*(_correlation(a.double(), b.double()) for a, b in pairs))


def _correlation(a: Tensor, b: Tensor) -> float:
    """Of independent numbers, in deviations."""
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()) * a.numel() ** 0.5


def _langevin_variance(kit: Kit) -> Finding:
    v, step, chains = 0.7, 1.0, kit.many(200_000)

    def make(device: torch.device) -> list[Tensor]:
        # What is left of the start after 20 steps is (1 - step / 2v)^20 < 1e-10.
        options: dict[str, Any] = {"step_size": step, "steps": 20, "seed": 4, "device": device}
        return [langevin(lambda x: -x / v, (chains, 1), **options)]

    (x,) = kit.run(make)
    variance, expected = float(x.double().square().mean()), v / (1 - step / (4 * v))
    tolerance = DEVIATIONS * expected * math.sqrt(2 / chains)
    return (
        abs(variance - expected) <= tolerance,
        f"{variance:.4f} of {chains:,} chains",
        f"{expected:.4f} +- {tolerance:.4f} ({ALPHA:.0e} for the whole run)",
    )


def _exact_score(kit: Kit) -> Finding:
    v, rows, elements, sigmas = 0.7, kit.many(20_000), 10, [2.0, 0.5, 0.1]
    labels, data = torch.arange(rows, device=CPU) % len(sigmas), KEY.for_purpose(Purpose.USER)

    def make(device: torch.device) -> list[Tensor]:
        x = math.sqrt(v) * ops.normal((rows, elements), data, device=device)

        def score(y: Tensor, sigma: Tensor) -> Tensor:
            return -y / (v + sigma**2).view(-1, 1)

        return [dsm_loss(score, x, sigmas, noise=KEY, labels=labels.to(device), reduction="none")]

    (losses,) = kit.run(make)
    # The residual z + sigma score has the variance v / (v + sigma^2).
    level = torch.tensor(sigmas, dtype=torch.float64, device=CPU)[labels]
    chi_square = float((2 * losses.double() * (v + level**2) / v).sum())
    freedom = rows * elements
    return deviations((chi_square / freedom - 1) * math.sqrt(freedom / 2))


def _sliced(kit: Kit) -> Finding:
    precision = torch.linspace(0.5, 1.5, 12, device=CPU)
    points = randn((64, 12), 6)

    def make(device: torch.device) -> list[Tensor]:
        out = []
        x, p = points.to(device), precision.to(device).requires_grad_()

        def score(y: Tensor) -> Tensor:
            return -p * y

        # Signs slice a diagonal exactly, and differences of a linear score are exact at any step.
        losses = [
            sliced_score_loss(score, x, noise=KEY, method=method, fd_step=0.5)
            for method in ("double_backward", "jvp", "finite_difference")
        ]
        for loss in (exact_score_loss(score, x), *losses):
            out += [loss, *torch.autograd.grad(loss, p)]
        return out

    wide, squares = precision.double(), points.double().square().mean(0)
    want = [(0.5 * wide**2 * squares - wide).sum(), wide * squares - 1]
    return within(
        largest(
            relative(g, w)
            for values in kit.runs(make).values()
            for g, w in zip(values, 4 * want, strict=True)
        ),
        FP32_CHAIN,
    )


CHECKS: dict[str, Callable[[Kit], Finding]] = {
    "mean, variance, 4th moment": _moments,
    "Kolmogorov-Smirnov": _distribution,
    "correlations of neighbours": _correlations,
    "variance of Langevin dynamics": _langevin_variance,
    "denoising loss of the exact score": _exact_score,
    "sliced loss of a Gaussian": _sliced,
}
