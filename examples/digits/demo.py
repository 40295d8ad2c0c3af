"""The `demo` command: train an NCSN on real 8x8 digits, sample it, say how good the samples are.

The data are scikit-learn's 1797 handwritten digits, scaled from 0..16 to [-1, 1]; a third is held
out. The network learns by denoising score matching (Song and Ermon 2019, arXiv 1907.05600) with the
spacing of noise levels, the step size, the weight averaging and the last denoising step of NCSNv2
(Song and Ermon 2020, arXiv 2006.09011); annealed Langevin dynamics turns noise into digits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import score_kernels
from examples.digits import evaluation
from score_kernels.cli import plots
from score_kernels.diffusion.sigmas import geometric_sigmas
from score_kernels.losses import dsm_loss
from score_kernels.networks import ConvScore
from score_kernels.noise import NoiseKey
from score_kernels.sampling import annealed_langevin
from score_kernels.training import Trainer

__all__ = ["Recipe", "run"]

# Equal-sized random sets of training digits that the real-against-real figure is an average over.
_REAL_REPEATS = 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result but the seed.

    Distances and sigmas are in the data's units, where black is -1 and white 1. `sigma_max` drowns
    the digits (a pixel spreads by 0.75); their largest distance, 9.6, which technique 1 of NCSNv2
    takes, made the samples no better and the training longer. `sigma_min` is under one shade of
    grey (0.125). `levels` is technique 2 (overlap 0.5 in 64 dimensions) and `step_size` technique
    4: epsilon of `x <- x + (alpha/2) s + sqrt(alpha) z`, `alpha_i = step_size (sigma_i /
    sigma_min)^2`.
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


_QUICK = Recipe(width=8, resolutions=2, steps=40, levels=6, steps_per_level=2)


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


def run(
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    samples: int | None = None,
    threads: int | None = None,
    quick: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, sample, judge, print the figures, and write pictures and a report to a folder.

    Written to `out`: `samples.png` (samples beside real digits), `loss.png`, `chain.png` (some
    chains at five noise levels), `report.json`, and `report.html`, one page that holds it all.

    Args:
        out: the folder; made if it is not there.
        seed: decides the network's start, the batches and all noise.
        steps: training steps in place of the recipe's.
        samples: digits to sample, at least 2; as many as are held out (599) by default. The
            picture shows the first 100.
        threads: CPU threads while it runs; torch's setting by default.
        quick: a few seconds' run of a tiny network, to check that everything works. Its samples
            are not digits.
        progress: whether to show progress bars (on stderr).

    Returns:
        What `report.json` holds.

    Raises:
        ImportError: if scikit-learn or matplotlib are missing.
        ValueError: for a number of steps, samples or threads that is too small.
    """
    for name, value, least in (
        ("steps", steps, 1),
        ("samples", samples, 2),
        ("threads", threads, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    plots.require("demo")
    recipe = _QUICK if quick else Recipe()
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    digits = load_digits()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with _threads(threads):
        count = samples or (40 if quick else len(digits.held_out))
        net, curves = train(recipe, digits, seed=seed, progress=progress)
        trained = time.perf_counter()
        sampled, chain = sample(net, recipe, count, seed=seed, progress=progress)
        done = time.perf_counter()
        figures = judge(sampled, digits, seed=seed)
    report: dict[str, Any] = {
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
        **figures,
        "seconds": {"training": trained - started, "sampling": done - trained},
        "threads": threads or torch.get_num_threads(),
        "versions": {"score_kernels": score_kernels.__version__, "torch": torch.__version__},
    }
    report.draw_samples(out / "samples.png", sampled, digits.held_out)
    plots.draw_losses(
        out / "loss.png",
        curves.train,
        zero_network=report["loss"]["zero_network"],
        held_out=(curves.held_out_steps, curves.held_out),
    )
    report.draw_chain(out / "chain.png", chain)
    report["seconds"]["total"] = time.perf_counter() - started
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report.write_page(out, report)
    print(report.summary(report))
    print(f"Written to {out / 'report.html'} and the files beside it.")
    return report


def load_digits() -> Digits:
    """scikit-learn's digits, scaled to [-1, 1], a third of every class held out, always the same.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ImportError(
            "the demo needs scikit-learn for its data: pip install score-kernels[demo]"
        ) from error
    source = datasets.load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(source.target)
    train, held_out = model_selection.train_test_split(
        range(len(labels)), test_size=1 / 3, stratify=source.target, random_state=0
    )
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def train(
    recipe: Recipe, digits: Digits, *, seed: int, progress: bool = False
) -> tuple[nn.Module, Curves]:
    """Denoising score matching; returns the network with averaged weights, and the loss curves."""
    # Only the network's start is drawn from torch's global generator; leave that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ConvScore(
            1,
            recipe.width,
            levels=recipe.resolutions,
            data_std=recipe.data_std,
        )
    sigmas = _sigmas(recipe)
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    trainer = Trainer(
        net,
        sigmas,
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
    # The same noise every time, and none that training sees.
    noise = NoiseKey(seed).at(recipe.steps)

    def watch(trainer: Trainer) -> None:
        curves.held_out_steps.append(trainer.step)
        curves.held_out.append(_held_out_loss(trainer.ema, digits, sigmas, noise))

    losses = trainer.fit(
        digits.train,
        recipe.steps,
        report_every=max(1, recipe.steps // 15),
        callback=watch,
        progress=progress,
    )
    curves.train.extend(losses.tolist())
    return trainer.ema, curves


def sample(
    net: nn.Module, recipe: Recipe, count: int, *, seed: int, progress: bool = False
) -> tuple[Tensor, list[tuple[float, Tensor]]]:
    """Annealed Langevin dynamics from noise: digits `[count, 1, 8, 8]`, clipped to [-1, 1], and
    the first eight chains at the end of five noise levels and, as level 0, of the last step."""
    sigmas = _sigmas(recipe)
    film = annealed_langevin(
        net,
        (count, 1, 8, 8),
        sigmas,
        steps_per_level=recipe.steps_per_level,
        step_size=recipe.step_size,
        seed=seed,
        record_every=recipe.steps_per_level,
        progress=progress,
    )
    shown = [round(i * (recipe.levels - 1) / 4) for i in range(5)]
    x = film[-1].clamp(-1, 1)
    return x, [*((float(sigmas[i]), film[i, :8]) for i in shown), (0.0, x[:8])]


def judge(samples: Tensor, digits: Digits, *, seed: int) -> dict[str, Any]:
    """The figures: samples, real digits and noise, each compared with the held-out digits.

    Every Frechet distance has the same number of images on its left, `min(samples, held out)`, and
    the same held-out digits on its right, in the space of the principal axes that carry 95% of the
    training digits' variance; the real one is an average over random sets of training digits.
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(len(samples), len(digits.held_out))
    samples = samples[:count]
    pca = evaluation.fit_pca(digits.train, variance=0.95)
    shape = samples.shape
    spread = torch.randn(shape, generator=generator) * digits.train.std(0) + digits.train.mean(0)
    sets = {
        "samples": samples,
        "pixel_noise": spread.clamp(-1, 1),
        "uniform_noise": torch.rand(shape, generator=generator) * 2 - 1,
    }
    target = pca(digits.held_out)
    frechet: dict[str, float] = {
        name: evaluation.frechet_distance(pca(images), target) for name, images in sets.items()
    }
    real = [
        evaluation.frechet_distance(
            pca(digits.train[torch.randperm(len(digits.train), generator=generator)[:count]]),
            target,
        )
        for _ in range(_REAL_REPEATS)
    ]
    distances = {
        name: evaluation.nearest_distance(images, digits.train)
        for name, images in {"held_out": digits.held_out, **sets}.items()
    }
    reach = distances["held_out"].quantile(0.95)
    classifier = evaluation.fit_classifier(digits.train, digits.train_labels)
    classes = {
        name: evaluation.class_histogram(classifier, images, 10)
        for name, images in {"held_out": digits.held_out, **sets}.items()
    }
    return {
        "frechet": {
            **frechet,
            "real": sum(real) / len(real),
            "real_lowest": min(real),
            "real_highest": max(real),
            "real_sets": len(real),
            "images": count,
            "against": len(digits.held_out),
            "pca_dims": pca.dims,
        },
        "nearest_training_digit": {
            name: {
                "median": d.median().item(),
                "lowest": d.min().item(),
                "share_within_reach": (d <= reach).double().mean().item(),
            }
            for name, d in distances.items()
        },
        "classes": classes,
        "classifier_accuracy": _accuracy(classifier, digits),
    }


def _sigmas(recipe: Recipe) -> Tensor:
    return geometric_sigmas(recipe.sigma_max, recipe.sigma_min, recipe.levels)


@torch.no_grad()
def _held_out_loss(net: nn.Module, digits: Digits, sigmas: Tensor, noise: NoiseKey) -> float:
    # Every noise level equally often, which takes much of the estimate's spread away.
    labels = torch.arange(len(digits.held_out)) % len(sigmas)
    return dsm_loss(net, digits.held_out, sigmas, noise=noise, labels=labels).item()


def _accuracy(classifier: evaluation.Classifier, digits: Digits) -> float:
    predicted = torch.as_tensor(classifier.predict(digits.held_out.flatten(1).double().numpy()))
    return (predicted == digits.held_out_labels).double().mean().item()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
