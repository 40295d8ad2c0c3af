"""A diffusers network through every sampler: one UNet2DModel, trained a little as DDPM on digits.

    python examples/diffusers_network.py --out diffusers-output

Trains a small UNet2DModel to predict noise on scikit-learn's digits (about four minutes on two
cores, which is too short for good digits), takes it as a score by `score_of`, and samples it by
DDPM, DDIM, annealed Langevin dynamics, a predictor-corrector and Heun's method. Writes
diffusers.png, a row of digits for each sampler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

import score_kernels as sk
from digits import demo
from score_kernels.cli import plots
from score_kernels.diffusion.sde import VP
from score_kernels.integrations.diffusers import from_scheduler, score_of

SHAPE = (10, 1, 8, 8)


def learn(digits: Tensor, steps: int) -> tuple[UNet2DModel, DDPMScheduler]:
    """Epsilon prediction, which is denoising score matching with other names."""
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler()
    count = scheduler.config.num_train_timesteps

    def loss(net: torch.nn.Module, x: Tensor, sigmas: Tensor, noise: sk.NoiseKey) -> Tensor:
        shape, device = (len(x), 1), x.device
        draw = sk.ops.uniform(shape, noise.for_purpose(sk.noise.Purpose.USER), device=device)[:, 0]
        t = (draw * count).long().clamp(max=count - 1)
        abar = scheduler.alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
        z = sk.ops.normal(x.shape, noise, device=device)
        return (net(abar.sqrt() * x + (1 - abar).sqrt() * z, t).sample - z).square().mean()

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    trainer = sk.Trainer(
        net, [1.0], optimizer, loss=loss, batch_size=64, ema_decay=0.995, ema_warmup=True, seed=0
    )
    trainer.fit(digits, steps)
    return trainer.ema, scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("diffusers-output"))
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--calls", type=int, default=100, help="of the network, for each sampler")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    net, scheduler = learn(demo.load_digits().train, arguments.steps)
    score, chain, calls = score_of(net, scheduler), from_scheduler(scheduler), arguments.calls

    levels = sk.geometric_sigmas(20.0, 0.05, max(2, calls // 5))
    ratio = float(levels[0] / levels[1])
    size = sk.best_step_size(ratio, float(levels[-1]), 5)
    samplers: dict[str, Callable[[], Tensor]] = {
        "DDPM": lambda: sk.ddpm(score, SHAPE, chain, seed=0),
        "DDIM": lambda: sk.ddim(score, SHAPE, chain, steps=calls, seed=0),
        "annealed Langevin": lambda: sk.annealed_langevin(
            score, SHAPE, levels, steps_per_level=5, step_size=size, seed=0
        ),
        "predictor-corrector": lambda: sk.predictor_corrector(
            score, SHAPE, VP(), steps=max(25, calls // 2), snr=0.1, seed=0
        ),
        "Heun": lambda: sk.probability_flow(
            score, SHAPE, sk.edm_sigmas(20.0, 0.05, max(2, calls // 2)), seed=0
        ),
    }
    rows = []
    for name, sample in samplers.items():
        x = sample()
        print(f"{name}: pixels from {x.min():.2f} to {x.max():.2f}, mean {x.mean():.3f}")
        rows.append(x.clamp(-1, 1))
    plots.save_sheet(arguments.out / "diffusers.png", torch.cat(rows), SHAPE[0])
    print(f"Written to {arguments.out}: diffusers.png, rows: {', '.join(samplers)}")


if __name__ == "__main__":
    main()
