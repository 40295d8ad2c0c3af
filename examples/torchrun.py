"""Training and sampling on several processes, with the digits: nothing changes but the command.

    torchrun --standalone --nproc-per-node 2 examples/torchrun.py --out torchrun-output

Every process takes its share of each batch, and of the samples; noise is keyed by the sample's
index in the batch and by its global index, so that losses are those of one process (to the order of
sums) and so is every digit's noise. `python examples/torchrun.py` does the same on one. Writes
checkpoint.pt and, from the first process, samples.png.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import score_kernels as sk
from digits import demo
from score_kernels.cli import plots
from score_kernels.networks import ConvScore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("torchrun-output"))
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--samples", type=int, default=48)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    digits, recipe = demo.load_digits(), demo.Recipe()
    sigmas = recipe.sigmas
    torch.manual_seed(0)
    net = ConvScore(1, 16, levels=2, data_std=recipe.data_std)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    trainer = sk.Trainer(net, sigmas, optimizer, batch_size=64, ema_warmup=True, seed=0)
    losses = trainer.fit(
        digits.train, arguments.steps, checkpoint=arguments.out / "checkpoint.pt", resume=True
    )

    ranks = trainer.ranks
    share = -(-arguments.samples // ranks.size)
    x = sk.annealed_langevin(
        trainer.ema,
        (share, 1, 8, 8),
        sigmas,
        steps_per_level=recipe.steps_per_level,
        step_size=recipe.step_size,
        seed=0,
        first_sample=ranks.rank * share,
    )
    all_of_them = torch.cat(ranks.all_gather(x))[: arguments.samples]
    if ranks.first:
        plots.save_sheet(arguments.out / "samples.png", all_of_them.clamp(-1, 1))
        last = float(losses[-50:].mean())
        print(f"{ranks.size} processes, {trainer.step} steps, loss {last:.2f}")
        print(f"Written to {arguments.out}: checkpoint.pt, samples.png")
    if several:
        # No process leaves while another one still talks to it.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
