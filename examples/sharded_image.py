"""One image over several processes, each with a part of its rows: the bits of one process.

    torchrun --standalone --nproc-per-node 2 examples/sharded_image.py --out sharded-output

Denoises a picture y = x + noise by sampling the posterior of a smooth x,
``log p(x | y) = -1/2 sum (x - y)^2 / sigma^2 - 1/2 lambda sum (differences of neighbours)^2``, with
Langevin dynamics. Each step needs one row of pixels from the process above and one from below. A
process holds a piece of one sample, and its noise is that piece's. Without torchrun it does the
same on one process. Writes sample.pt, the last state, and image.png: y, a sample and the mean.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import score_kernels as sk
from score_kernels.cli import plots
from score_kernels.training.distributed import Ranks, joined

SIDE, SIGMA, SMOOTHNESS = 64, 0.5, 20.0


def picture() -> Tensor:
    """Two discs on a slope, [SIDE, SIDE]."""
    across = torch.linspace(-1, 1, SIDE)
    i, j = torch.meshgrid(across, across, indexing="ij")
    discs = ((i + 0.3) ** 2 + j**2 < 0.15).float() - ((i - 0.5) ** 2 + (j - 0.4) ** 2 < 0.1).float()
    return 0.8 * discs + 0.2 * i


def rows_beside(mine: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The row of pixels above mine and the one below; at the picture's edges, mine once more."""
    edges = [torch.empty(2, SIDE) for _ in range(ranks.size)]
    if ranks.size > 1:
        dist.all_gather(edges, mine[[0, -1]].contiguous())
    above = mine[:1] if ranks.first else edges[ranks.rank - 1][1:]
    below = edges[ranks.rank + 1][:1] if ranks.rank < ranks.size - 1 else mine[-1:]
    return above, below


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sharded-output"))
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with joined("cpu") as ranks:
        denoise(arguments.out, arguments.steps, ranks)


def denoise(out: Path, steps: int, ranks: Ranks) -> None:
    """This process's part of a chain, and in the first one the pictures."""
    if SIDE % ranks.size:
        raise SystemExit(f"got {ranks.size} processes, expected a number that divides {SIDE}")
    clean = picture()
    noisy = clean + SIGMA * sk.ops.normal((1, SIDE * SIDE), sk.NoiseKey(1)).view(SIDE, SIDE)
    share = SIDE // ranks.size
    y = noisy[ranks.rank * share :][:share]

    def score(x: Tensor) -> Tensor:
        mine = x.view(share, SIDE)
        above, below = rows_beside(mine, ranks)
        tall = torch.cat([above, mine, below])
        wide = torch.cat([mine[:, :1], mine, mine[:, -1:]], 1)
        curvature = (tall[:-2] + tall[2:]) + (wide[:, :-2] + wide[:, 2:]) - 4 * mine
        return ((y - mine) / SIGMA**2 + SMOOTHNESS * curvature).view_as(x)

    mean, kept = torch.zeros(1, share * SIDE), 0

    def average(progress: sk.sampling.Progress) -> None:
        nonlocal kept
        if progress.step >= steps // 4:
            kept += 1
            mean.add_((progress.x - mean) / kept)

    x = sk.langevin(
        score,
        (1, share * SIDE),
        # The sharpest direction has the precision 1 / sigma^2 + 8 lambda.
        step_size=1 / (1 / SIGMA**2 + 8 * SMOOTHNESS),
        steps=steps,
        seed=0,
        samples=torch.tensor([0]),
        pieces=torch.tensor([ranks.rank]),
        callback=average,
    )
    sample, average_of_all = (
        torch.cat(ranks.all_gather(part)).view(SIDE, SIDE) for part in (x, mean)
    )
    if ranks.first:
        torch.save(sample, out / "sample.pt")
        images = torch.stack([noisy, sample, average_of_all])[:, None]
        plots.save_sheet(out / "image.png", images.clamp(-1, 1))
        errors = [math.sqrt(float((image[0] - clean).square().mean())) for image in images]
        print(f"{ranks.size} processes; error of y {errors[0]:.3f}, of the mean {errors[2]:.3f}")
        print(f"Written to {out}: sample.pt, image.png")


if __name__ == "__main__":
    main()
