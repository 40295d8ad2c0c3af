"""Checks against what the numbers should be: statistics of the noise, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from score_kernels import ops
from score_kernels.cli.selfcheck.context import (
    ALPHA,
    CPU,
    DEVIATIONS,
    FP32_CHAIN,
    TEST_KEY,
    CheckContext,
    Finding,
    deviations,
    randn,
    within,
)
from score_kernels.losses import dsm_loss
from score_kernels.losses.sliced import exact_score_loss, sliced_score_loss
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.sampling import langevin


def _distribution(context: CheckContext) -> Finding:
    """Moments of the normals, and Kolmogorov and Smirnov's distance."""
    count = context.many(1_000_000)
    (z,) = context.run(lambda device: [ops.normal((count // 1000, 1000), TEST_KEY, device=device)])
    z = z.double().flatten().sort().values
    # E z^k and Var z^k = E z^2k - (E z^k)^2.
    found = [
        (float((z**k).mean()) - mean) * math.sqrt(count / variance)
        for k, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96))
    ]
    below, rank = torch.special.ndtr(z), torch.arange(count, device=CPU).double() / count
    distance = float(torch.maximum(below - rank, rank + 1 / count - below).max())
    # The first term of Kolmogorov's asymptotic distribution bounds it: p <= 2 exp(-2 n d^2).
    p = min(1, max(1e-300, 2 * math.exp(-2 * count * distance**2)))
    return deviations(*found, NormalDist().inv_cdf(p / 2))


def _correlations(context: CheckContext) -> Finding:
    rows, first = context.many(1000), TEST_KEY.first_sample
    keys = [TEST_KEY, TEST_KEY.at(TEST_KEY.draw + 1), TEST_KEY.for_purpose(TEST_KEY.purpose + 1)]
    keys.append(NoiseKey(TEST_KEY.seed + 1, purpose=2, draw=TEST_KEY.draw, first_sample=first))
    made = context.run(lambda device: [ops.normal((rows, 1000), k, device=device) for k in keys])
    z, *others = (t.double() for t in made)
    pairs = [(z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), *((z, other) for other in others)]
    return deviations(
        *(
            float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
            * a.numel() ** 0.5
            for a, b in pairs
        )
    )


def _langevin_variance(context: CheckContext) -> Finding:
    v, step, chains = 0.7, 1.0, context.many(200_000)

    def make(device: torch.device) -> list[Tensor]:
        # After 20 steps (1 - step / 2v)^20 < 1e-10 of the start remains.
        shape = (chains, 1)
        return [langevin(lambda x: -x / v, shape, step_size=step, steps=20, seed=4, device=device)]

    (x,) = context.run(make)
    variance, expected = float(x.double().square().mean()), v / (1 - step / (4 * v))
    tolerance = DEVIATIONS * expected * math.sqrt(2 / chains)
    return (
        abs(variance - expected) <= tolerance,
        f"{variance:.4f} of {chains:,} chains",
        f"{expected:.4f} +- {tolerance:.4f} ({ALPHA:.0e} for the whole run)",
    )


def _exact_score(context: CheckContext) -> Finding:
    v, rows, elements, sigmas = 0.7, context.many(20_000), 10, [2.0, 0.5, 0.1]
    labels, data = torch.arange(rows, device=CPU) % len(sigmas), TEST_KEY.for_purpose(Purpose.USER)

    def score(y: Tensor, sigma: Tensor) -> Tensor:
        return -y / (v + sigma**2).view(-1, 1)

    def make(device: torch.device) -> list[Tensor]:
        x, of = math.sqrt(v) * ops.normal((rows, elements), data, device=device), labels.to(device)
        return [dsm_loss(score, x, sigmas, noise=TEST_KEY, labels=of, reduction="none")]

    (losses,) = context.run(make)
    # The residual z + sigma score has the variance v / (v + sigma^2).
    level = torch.tensor(sigmas, dtype=torch.float64, device=CPU)[labels]
    chi_square = float((2 * losses.double() * (v + level**2) / v).sum())
    freedom = rows * elements
    return deviations((chi_square / freedom - 1) * math.sqrt(freedom / 2))


def _sliced(context: CheckContext) -> Finding:
    precision, points = torch.linspace(0.5, 1.5, 12, device=CPU), randn((64, 12), 6)

    def make(device: torch.device) -> list[Tensor]:
        x, p = points.to(device), precision.to(device).requires_grad_()

        def score(y: Tensor) -> Tensor:
            return -p * y

        # Signs slice a diagonal exactly, and differences of a linear score are exact at any step.
        losses = [exact_score_loss(score, x)]
        for method in ("double_backward", "jvp", "finite_difference"):
            loss = sliced_score_loss(score, x, noise=TEST_KEY, method=method, fd_step=0.5)
            losses.append(loss)
        return [t for loss in losses for t in (loss, *torch.autograd.grad(loss, p))]

    p, squares = precision.double(), points.double().square().mean(0)
    want = [(0.5 * p**2 * squares - p).sum(), p * squares - 1]
    return within((context.error_to(4 * want, make), FP32_CHAIN))


CHECKS: dict[str, Callable[[CheckContext], Finding]] = {
    "moments and distribution": _distribution,
    "correlations of neighbours": _correlations,
    "variance of Langevin dynamics": _langevin_variance,
    "denoising loss of the exact score": _exact_score,
    "sliced loss of a Gaussian": _sliced,
}
