"""Train an NCSN on Fashion-MNIST and sample it in two ways.

samples.png: Algorithm 1 of Song and Ermon 2019 (arXiv 1907.05600) with the techniques of NCSNv2
(Song and Ermon 2020, arXiv 2006.09011). consistent.png: consistent annealed sampling
(Jolicoeur-Martineau et al. 2020, arXiv 2009.05475) of the same network, with a fifth of the calls.

    python examples/fashion_mnist.py --data FOLDER --out fashion-output

FOLDER holds the IDX files (train-images-idx3-ubyte, gzipped or not); nothing is downloaded. On
Debian they are the package dataset-fashion-mnist, in /usr/share/datasets/fashion-mnist. Some hours
on one CPU core; stop it at any time, the same command goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import score_kernels
from score_kernels.cli import data, plots
from score_kernels.networks import ConvScore
from score_kernels.training import checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or file of images")
    parser.add_argument("--out", type=Path, default=Path("fashion-output"))
    parser.add_argument("--steps", type=int, default=12_000, help="of training, 64 images each")
    parser.add_argument("--width", type=int, default=32, help="channels at full resolution")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    source = data.load(arguments.data, progress=True)
    images = source.scaled(torch.arange(len(source)))
    schedule = score_kernels.suggest_schedule(images, progress=True)
    print(source, schedule, sep="\n")

    torch.manual_seed(arguments.seed)
    net = ConvScore(images.shape[1], arguments.width, levels=3, data_std=float(images.std()))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    trainer = score_kernels.Trainer(
        net,
        schedule.sigmas,
        optimizer,
        batch_size=64,
        ema_warmup=True,
        clip_norm=1.0,
        warmup_steps=200,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps),
        precision="bfloat16",
        seed=arguments.seed,
    )
    started = time.perf_counter()
    losses = trainer.fit(
        source,
        arguments.steps,
        checkpoint=arguments.out / "checkpoint.pt",
        resume=True,
        save_every=250,
    )
    print(
        f"trained to a loss of {losses[-500:].mean():.2f} ({time.perf_counter() - started:.0f} s)"
    )
    plots.draw_losses(arguments.out / "loss.png", losses, zero_network=images[0].numel() / 2)

    checkpoint.load_weights(arguments.out / "checkpoint.pt", net.eval(), which="ema")
    shape, sigmas, seed = (arguments.samples, *source.shape), schedule.sigmas, arguments.seed
    # The least noise that consistent annealing can add is none, at eta = 1 - sigma_2 / sigma_1.
    eta = 1.5 * (1 - float(sigmas[1] / sigmas[0]))
    with torch.autocast("cpu", torch.bfloat16):
        sheets = {
            "samples.png": score_kernels.annealed_langevin(
                net,
                shape,
                sigmas,
                steps_per_level=schedule.steps_per_level,
                step_size=schedule.step_size,
                seed=seed,
                progress=True,
            ),
            "consistent.png": score_kernels.consistent_annealed(
                net,
                shape,
                sigmas,
                step_size=2 * eta * float(sigmas[-1]) ** 2,
                seed=seed,
                progress=True,
            ),
        }
    for name, samples in sheets.items():
        plots.save_sheet(arguments.out / name, samples)
    print(f"Written to {arguments.out}: {', '.join(sheets)}, loss.png, checkpoint.pt")


if __name__ == "__main__":
    main()
