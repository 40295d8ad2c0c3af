"""Two dimensions, two pictures: where a learned score is wrong, and what annealing is for.

    python examples/toy.py --out toy-output

The data are 0.2 N((-5, -5), I) + 0.8 N((5, 5), I), as in Song and Ermon 2019, arXiv 1907.05600.
`toy-scores.png` (their figure 2): the data's score beside that of a network trained by sliced score
matching, and its error where data are dense and where they are not. `toy-samples.png` (their figure
3): exact samples, Langevin dynamics and annealed Langevin dynamics with exact scores, and annealed
Langevin dynamics with a learned score, each with the share of its samples in the larger mode.
Two to three minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import score_kernels
from score_kernels import NoiseKey, annealed_langevin, geometric_sigmas, langevin
from score_kernels.cli import plots
from score_kernels.networks import MLPScore

MEANS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
LOG_WEIGHTS = torch.log(torch.tensor([0.2, 0.8]))
# The annealed chain of the figure: the components' deviation goes from 20 to 1.
SIGMAS = torch.exp(torch.linspace(math.log(20), 0, 10))


def log_terms(x: Tensor, std: Tensor) -> Tensor:
    """Log densities `[B, 2]` of the two weighted components of standard deviation `std` `[B]`."""
    squares = (x[:, None] - MEANS).square().sum(2)
    return LOG_WEIGHTS - squares / (2 * std[:, None] ** 2) - (2 * math.pi * std[:, None] ** 2).log()


def exact_score(x: Tensor, std: Tensor) -> Tensor:
    """Score of the mixture whose components have standard deviation `std` `[B]`."""
    share = log_terms(x, std).softmax(1)
    return (share @ MEANS.to(x.dtype) - x) / std[:, None] ** 2


def draw(count: int, seed: int) -> Tensor:
    """Exact samples `[count, 2]` of the data."""
    generator = torch.Generator().manual_seed(seed)
    mode = (torch.rand(count, generator=generator) < 0.8).long()
    return MEANS[mode] + torch.randn(count, 2, generator=generator)


def mass(x: Tensor) -> float:
    """Share of the samples that are on the side of the mode at (5, 5)."""
    return float((x.sum(1) > 0).double().mean())


def learn_plain(steps: int, seed: int) -> MLPScore:
    """A network that knows no noise: sliced score matching of the data as they are."""
    torch.manual_seed(seed)
    net = MLPScore(2, 128, depth=2, activation="softplus", conditional=False)

    def sliced(net: torch.nn.Module, x: Tensor, sigmas: Tensor, noise: NoiseKey) -> Tensor:
        return score_kernels.sliced_score_loss(net, x, 1.0, noise=noise)

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    trainer = score_kernels.Trainer(net, [1.0], optimizer, loss=sliced, batch_size=128, seed=seed)
    trainer.fit(draw(100_000, seed), steps)
    return net


def learn_levels(steps: int, seed: int) -> tuple[torch.nn.Module, Tensor]:
    """A network for all noise levels, by denoising score matching; and the levels."""
    torch.manual_seed(seed)
    net = MLPScore(2, 128, depth=3, data_std=5.0)
    sigmas = geometric_sigmas(20.0, 0.3, 12)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    trainer = score_kernels.Trainer(
        net,
        sigmas,
        optimizer,
        batch_size=512,
        ema_warmup=True,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        seed=seed,
    )
    trainer.fit(draw(100_000, seed), steps)
    return trainer.ema, sigmas


def scores_picture(path: Path, net: MLPScore) -> dict[str, float]:
    """Draws it; returns the mean error of the learned score under the data and under the square."""
    line = torch.linspace(-8, 8, 17)
    points = torch.cartesian_prod(line, line)
    fine = torch.linspace(-8, 8, 161)
    dense = torch.cartesian_prod(fine, fine)
    ones = torch.ones(len(dense))
    with torch.no_grad():
        arrows = [exact_score(points, ones[: len(points)]), net(points, ones[: len(points)])]
        error = (net(dense, ones) - exact_score(dense, ones)).norm(dim=1)
    density = log_terms(dense, ones).logsumexp(1).exp()

    plot = plots.figure(14, 4.6)
    axes = plot.subplots(1, 3)
    titles = ("score of the data", "learned by sliced score matching")
    for left, title, field in zip(axes, titles, arrows, strict=False):
        left.quiver(*points.T, *field.T, color=plots.BLUE, angles="xy")
        left.contour(fine, fine, density.view(161, 161).T, levels=5, cmap="Oranges")
        left.set_title(title)
    shown = axes[2].pcolormesh(fine, fine, error.view(161, 161).T, cmap="viridis", vmin=0, vmax=10)
    axes[2].contour(fine, fine, density.view(161, 161).T, levels=5, colors="white", linewidths=0.7)
    axes[2].set_title("length of the difference (lines: density of the data)")
    plot.colorbar(shown, ax=axes[2], extend="max")
    for each in axes:
        each.set_aspect("equal")
    plot.savefig(path, format="png")
    return {
        "under the data": float((error * density).sum() / density.sum()),
        "over the square": float(error.mean()),
    }


def samples_picture(path: Path, sets: dict[str, Tensor]) -> None:
    plot = plots.figure(3.6 * len(sets), 4.4)
    for axes, (title, x) in zip(plot.subplots(1, len(sets)), sets.items(), strict=True):
        shown = x[:1280]
        axes.scatter(*shown.T, s=3, color=plots.BLUE, alpha=0.5, linewidths=0)
        axes.set(xlim=(-9, 9), ylim=(-9, 9), aspect="equal")
        axes.set_title(f"{title}\n{mass(x):.3f} in the mode at (5, 5)", fontsize=11)
    plot.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("toy-output"))
    parser.add_argument("--steps", type=int, default=10_000, help="of training, each network")
    parser.add_argument("--chains", type=int, default=100_000, help="1280 of them are drawn")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seed, chains = arguments.seed, arguments.chains

    errors = scores_picture(arguments.out / "toy-scores.png", learn_plain(arguments.steps, seed))
    net, sigmas = learn_levels(arguments.steps, seed)
    start = torch.rand(chains, 2, generator=torch.Generator().manual_seed(seed)) * 16 - 8
    steps = dict(steps_per_level=100, step_size=0.1, denoise=False, seed=seed, progress=True)
    sets = {
        "data": draw(chains, seed + 1),
        "Langevin, exact score": langevin(
            exact_score, start, step_size=0.1, steps=1000, sigma=1.0, seed=seed, progress=True
        ),
        "annealed, exact scores": annealed_langevin(exact_score, start, SIGMAS, **steps),
        "annealed, learned scores": annealed_langevin(
            net,
            start[: max(1280, chains // 10)],
            sigmas,
            **{**steps, "step_size": 0.1 * float(sigmas[-1]) ** 2},
        ),
    }
    samples_picture(arguments.out / "toy-samples.png", sets)
    for title, x in sets.items():
        print(f"{title:26} {len(x):7} samples, mass of the mode at (5, 5): {mass(x):.4f}")
    for where, error in errors.items():
        print(f"mean error of the learned score {where}: {error:.3f}")
    print(f"Written to {arguments.out}: toy-scores.png, toy-samples.png")


if __name__ == "__main__":
    main()
