"""An NCSN on real 8x8 digits: training, sampling, and how good the samples are.

The data are scikit-learn's 1797 handwritten digits, scaled from 0..16 to [-1, 1]; a third is held
out. The network learns by denoising score matching (Song and Ermon 2019, arXiv 1907.05600) with the
spacing of noise levels, the step size, the weight averaging and the last denoising step of NCSNv2
(Song and Ermon 2020, arXiv 2006.09011); annealed Langevin dynamics turns noise into digits.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn import datasets, model_selection
from torch import Tensor, nn

import score_kernels as sk
from score_kernels.cli import plots
from score_kernels.networks import ConvScore

from . import evaluation, report

# Equal-sized random sets of training digits that the real-against-real figure is an average over.
_REAL_REPEATS = 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result but the seed.

    Distances and sigmas are in the data's units, where black is -1 and white 1. At `sigma_max` the
    noise hides the digits (a pixel's standard deviation is 0.75); their largest distance, 9.6,
    which technique 1 of NCSNv2 takes, made the samples no better and the training longer.
    `sigma_min` is under one shade of grey (0.125). `levels` is technique 2 (overlap 0.5 in 64
    dimensions) and `step_size` technique 4: `x <- x + (alpha/2) s + sqrt(alpha) z` with
    `alpha_i = step_size (sigma_i / sigma_min)^2`.
    """

    width: int = 24
    resolutions: int = 3
    data_std: float = 0.75
    steps: int = 1800
    batch: int = 64
    learning_rate: float = 3e-3
    ema_decay: float = 0.999
    sigma_max: float = 4.0
    sigma_min: float = 0.1
    levels: int = 13
    steps_per_level: int = 10
    step_size: float = 0.0032

    @property
    def sigmas(self) -> Tensor:
        return sk.geometric_sigmas(self.sigma_max, self.sigma_min, self.levels)


QUICK = Recipe(width=8, resolutions=2, steps=40, levels=6, steps_per_level=2)


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` in [-1, 1] and labels `[N]`, for training and held out."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class Curves:
    """The loss at every training step, and on the held-out digits at some of them."""

    train: list[float]
    held_out_steps: list[int]
    held_out: list[float]


def run(out: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Train, sample, judge, print the figures, and write pictures and a report to a folder.

    Args:
        out: the folder, made if it is not there.
        seed: decides the network's start, the batches and all noise.
        quick: a few seconds' run of a tiny network, to check that everything works. Its samples
            are not digits.

    Returns:
        What `report.json` holds.
    """
    recipe, digits = QUICK if quick else Recipe(), load_digits()
    out.mkdir(parents=True, exist_ok=True)
    count = 40 if quick else len(digits.held_out)
    started = time.perf_counter()
    net, curves = train(recipe, digits, seed=seed)
    trained = time.perf_counter()
    samples, chain = sample(net, recipe, count, seed=seed)
    sampled = time.perf_counter()
    figures: dict[str, Any] = {
        "seed": seed,
        "quick": quick,
        "samples": count,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in net.parameters()),
        "data": {"train": len(digits.train), "held_out": len(digits.held_out), "range": [-1, 1]},
        "loss": {
            "zero_network": digits.train[0].numel() / 2,
            "train_last": sum(curves.train[-50:]) / len(curves.train[-50:]),
            "held_out_last": curves.held_out[-1],
        },
        **judge(samples, digits, seed=seed),
        "seconds": {"training": trained - started, "sampling": sampled - trained},
        "threads": torch.get_num_threads(),
        "versions": {"score_kernels": sk.__version__, "torch": torch.__version__},
    }
    report.draw_samples(out / "samples.png", samples, digits.held_out)
    plots.draw_losses(
        out / "loss.png",
        curves.train,
        zero_network=figures["loss"]["zero_network"],
        held_out=(curves.held_out_steps, curves.held_out),
    )
    report.draw_chain(out / "chain.png", chain)
    (out / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    report.write_page(out, figures)
    print(report.summary(figures))
    print(f"Written to {out / 'report.html'} and the files beside it.")
    return figures


def load_digits() -> Digits:
    """scikit-learn's digits in [-1, 1], always the same third of every class held out."""
    source = datasets.load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(source.target)
    train, held_out = model_selection.train_test_split(
        range(len(labels)), test_size=1 / 3, stratify=source.target, random_state=0
    )
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def train(recipe: Recipe, digits: Digits, *, seed: int) -> tuple[nn.Module, Curves]:
    """Denoising score matching; returns the network with averaged weights, and the loss curves."""
    torch.manual_seed(seed)
    net = ConvScore(1, recipe.width, levels=recipe.resolutions, data_std=recipe.data_std)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    trainer = sk.Trainer(
        net,
        recipe.sigmas,
        optimizer,
        batch_size=recipe.batch,
        ema_decay=recipe.ema_decay,
        ema_warmup=True,
        clip_norm=1.0,
        warmup_steps=100,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps),
        seed=seed,
    )
    curves = Curves([], [], [])
    # Every noise level equally often, and the same noise every time, which training never sees:
    # the estimate varies less.
    labels = torch.arange(len(digits.held_out)) % recipe.levels
    noise = sk.NoiseKey(seed).at(recipe.steps)

    @torch.no_grad()
    def held_out_loss(trainer: sk.Trainer) -> None:
        loss = sk.dsm_loss(trainer.ema, digits.held_out, recipe.sigmas, noise=noise, labels=labels)
        curves.held_out_steps.append(trainer.step)
        curves.held_out.append(loss.item())

    losses = trainer.fit(
        digits.train,
        recipe.steps,
        report_every=max(1, recipe.steps // 15),
        callback=held_out_loss,
        progress=True,
    )
    curves.train.extend(losses.tolist())
    return trainer.ema, curves


def sample(
    net: nn.Module, recipe: Recipe, count: int, *, seed: int
) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """Annealed Langevin dynamics from noise: digits `[count, 1, 8, 8]`, clipped to [-1, 1], and
    the first eight chains at the end of five noise levels and, as level 0, of the last step."""
    trajectory = sk.annealed_langevin(
        net,
        (count, 1, 8, 8),
        recipe.sigmas,
        steps_per_level=recipe.steps_per_level,
        step_size=recipe.step_size,
        seed=seed,
        record_every=recipe.steps_per_level,
        progress=True,
    )
    shown = [round(i * (recipe.levels - 1) / 4) for i in range(5)]
    x = trajectory[-1].clamp(-1, 1)
    return x, [*((float(recipe.sigmas[i]), trajectory[i, :8]) for i in shown), (0.0, x[:8])]


def judge(samples: Tensor, digits: Digits, *, seed: int) -> dict[str, Any]:
    """The figures: samples, real digits and noise, each compared with the held-out digits.

    Every Frechet distance has as many images on its left as there are samples, and the same
    held-out digits on its right, in the space of the principal axes that carry 95% of the training
    digits' variance; the real one is an average over random sets of training digits.
    """
    generator = torch.Generator().manual_seed(seed)
    pca = evaluation.fit_pca(digits.train, variance=0.95)
    pixels = torch.randn(samples.shape, generator=generator)
    sets = {
        "samples": samples,
        "pixel_noise": (pixels * digits.train.std(0) + digits.train.mean(0)).clamp(-1, 1),
        "uniform_noise": torch.rand(samples.shape, generator=generator) * 2 - 1,
    }

    def frechet(images: Tensor) -> float:
        return evaluation.frechet_distance(pca(images), pca(digits.held_out))

    real = [
        frechet(
            digits.train[torch.randperm(len(digits.train), generator=generator)[: len(samples)]]
        )
        for _ in range(_REAL_REPEATS)
    ]
    judged = {"held_out": digits.held_out, **sets}
    distances = {
        name: evaluation.nearest_distance(images, digits.train) for name, images in judged.items()
    }
    reach = distances["held_out"].quantile(0.95)
    classifier = evaluation.fit_classifier(digits.train, digits.train_labels)
    classes = {name: evaluation.classify(classifier, images) for name, images in judged.items()}
    right = classes["held_out"] == digits.held_out_labels
    return {
        "frechet": {
            **{name: frechet(images) for name, images in sets.items()},
            "real": sum(real) / len(real),
            "real_lowest": min(real),
            "real_highest": max(real),
            "real_sets": len(real),
            "images": len(samples),
            "against": len(digits.held_out),
            "pca_dims": pca.axes.shape[1],
        },
        "nearest_training_digit": {
            name: {
                "median": d.median().item(),
                "lowest": d.min().item(),
                "share_within_reach": (d <= reach).double().mean().item(),
            }
            for name, d in distances.items()
        },
        "classes": {name: found.bincount(minlength=10).tolist() for name, found in classes.items()},
        "classifier_accuracy": right.double().mean().item(),
    }
