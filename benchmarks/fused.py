"""Whole chains around a fused score, beside the same chains in PyTorch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import score_kernels as sk
from benchmarks.harness import Step, interleaved

__all__ = ["fused", "lattice", "network", "toy"]

Score = Callable[..., Tensor]
SIGMAS = sk.geometric_sigmas(20.0, 1.0, 10)
COLUMNS = ("fused", "step by step", "by hand", "compiled")


def toy(x: Tensor, sigma: Tensor) -> Tensor:
    """The tutorial's mixture of 4/5 at (5, 5) and 1/5 at (-5, -5), with variance sigma^2."""
    v = (sigma * sigma)[:, None]
    return (5 * torch.tanh(math.log(2) + 5 * x.sum(1, keepdim=True) / v) - x) / v


def lattice(x: Tensor, hopping: float = 0.25, coupling: float = 0.02) -> Tensor:
    """The action of phi^4 on a periodic square lattice, in lattice units: rows of its sites."""
    side = math.isqrt(x.shape[1])
    phi = x.view(-1, side, side)
    near = phi.roll(1, 1) + phi.roll(1, 2)
    site = -2 * hopping * phi * near + (1 - 2 * coupling) * phi**2 + coupling * phi**4
    return site.sum((1, 2))


def network(device: torch.device) -> Score:
    """Of two hidden layers of 128, with a random start, as a score of points of the plane."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)]
    net = nn.Sequential(*layers).requires_grad_(False).to(device)
    return lambda x, sigma: (net(x / 10) - x) / (sigma * sigma)[:, None]


def by_hand(score: Score, x: Tensor, steps: int) -> None:
    """The shortest loop of PyTorch: in place, into buffers made once."""
    noise = torch.empty_like(x)
    for sigma in SIGMAS.tolist():
        alpha, level = 0.1 * sigma**2, x.new_full((len(x),), sigma)
        for _ in range(steps):
            x.add_(score(x, level), alpha=alpha / 2).add_(noise.normal_(), alpha=math.sqrt(alpha))


@dataclass
class Case:
    name: str
    score: Score
    shape: tuple[int, int]
    # Of a level; fewer where PyTorch takes its time.
    fused_steps: int
    steps: int
    energy: bool = False


def cases(device: torch.device) -> list[Case]:
    net = network(device)
    return [
        Case("toy", toy, (1280, 2), 100, 10),
        Case("toy", toy, (100_000, 2), 10, 2),
        Case("phi^4, 16 x 16", lattice, (1000, 256), 5, 1, energy=True),
        Case("network 2-128-128-2", net, (512, 2), 10, 10),
        Case("network 2-128-128-2", net, (4096, 2), 5, 2),
    ]


def fused(device: torch.device, *, threads: list[int], rounds: int) -> None:
    """Print us a step of a fused chain, of the sampler with the score in PyTorch, of a loop by hand
    and of that with a compiled score, each also as a multiple of the first."""
    print(f"{'us a step':22} {'rows':>7} threads" + "".join(f"{name:>20}" for name in COLUMNS))
    for count in threads:
        torch.set_num_threads(count)
        for case in cases(device):
            seconds = interleaved(variants(case, device), rounds, device)
            us = {k: statistics.median(v) * 1e6 / 10 for k, v in seconds.items()}
            us = {k: v / (case.fused_steps if k == "fused" else case.steps) for k, v in us.items()}
            line = f"{case.name:22} {case.shape[0]:7} {count:7}"
            for name in COLUMNS:
                line += f"{f'{us[name]:.2f} x{us[name] / us[COLUMNS[0]]:.1f}':>20}"
            print(line, flush=True)


def variants(case: Case, device: torch.device) -> dict[str, Step]:
    x = torch.randn(case.shape, device=device)
    kind = "energy" if case.energy else "score"
    score = sk.fused.score(case.score, case.shape[1], kind=kind)
    # The plain function of the score, which is no fused one.
    plain: Score = score.function

    def chain(of: Score, steps: int) -> Tensor:
        if case.energy:
            return sk.langevin(of, x, step_size=0.01, steps=10 * steps, seed=0, on_nan="ignore")
        options = {"steps_per_level": steps, "step_size": 0.1, "seed": 0, "on_nan": "ignore"}
        return sk.annealed_langevin(of, x, SIGMAS, denoise=False, **options)

    def loop(of: Score) -> None:
        with torch.no_grad():
            by_hand((lambda x, _: of(x)) if case.energy else of, x.clone(), case.steps)

    made = (
        partial(chain, score, case.fused_steps),
        partial(chain, lambda *a: plain(*a), case.steps),
        partial(loop, plain),
        partial(loop, torch.compile(plain)),
    )
    return dict(zip(COLUMNS, made, strict=True))
