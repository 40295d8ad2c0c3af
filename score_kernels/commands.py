"""The commands ``train`` and ``sample``: from files to a checkpoint, and to new images."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import score_kernels
from score_kernels import checkpoint, config, data, pictures
from score_kernels.config import Config
from score_kernels.networks import ConvScore, MLPScore
from score_kernels.sampling import annealed_langevin
from score_kernels.schedules import suggest_schedule
from score_kernels.training import Trainer

__all__ = ["sample", "train"]

CHECKPOINT = "checkpoint.pt"
# What may differ when a training is resumed, by section.
_MAY_DIFFER = {
    "data": {"path"},
    "training": {"device", "save_every"},
    "sampling": {"count", "every"},
}
# Images on a sheet of `sample`.
_ON_SHEET = 100
_REPORT_EVERY = 50


def train(settings: Config, out: Path, *, resume: bool = False, progress: bool = True) -> Trainer:
    """Train a network on files and write to a folder: ``checkpoint.pt``, ``config.toml`` (all
    settings), ``loss.png`` and ``samples.png`` (a sheet of samples of the averaged weights).

    Sizes, channels and ranges are the data's; for the network values are scaled to [-1, 1].

    Args:
        settings: see :mod:`score_kernels.config`.
        out: the folder, made if it is not there.
        resume: go on from the checkpoint in it, with the bits of a training never stopped.
        progress: whether to show progress bars (on stderr).

    Returns:
        The trainer, at the last step.

    Raises:
        FileExistsError: there is a checkpoint in the folder and resume is False.
        ImportError: without Pillow or Matplotlib.
        OSError, ValueError: the data, the settings or the checkpoint are not usable. The message
            names the file, and nothing is overwritten.
    """
    pictures.require()
    path = out / CHECKPOINT
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists; go on from it with --resume, or name another --out")
    earlier = _about(path) if path.exists() else None
    if settings.data.path is None:
        raise ValueError("data: got none, expected a path: --data PATH or path = in [data]")
    source = data.load(settings.data.path, key=settings.data.key, progress=progress)
    if earlier is None:
        about = _describe(settings, source, progress)
    else:
        about = earlier
        _check_same(path, earlier, settings, source)
    print(f"{source}\n{about['schedule']['why']}")
    trainer = _trainer(settings, about)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(config.to_toml(settings), encoding="utf-8")
    count, every = settings.sampling.count, settings.sampling.every
    drawn = [0]

    def draw(name: str) -> None:
        if count and len(source.shape) == 3:
            x = _samples(trainer.ema, about, count, seed=settings.training.seed, progress=progress)
            pictures.save_sheet(out / name, x)

    def watch(trainer: Trainer) -> None:
        # As often as the checkpoint: a picture costs as much as some steps of a small network.
        last = trainer.step == settings.training.steps
        if last or trainer.step - drawn[-1] >= settings.training.save_every:
            drawn.append(trainer.step)
            pictures.draw_losses(
                out / "loss.png", trainer.losses, zero_network=_zero_network(settings, source)
            )
        if every and trainer.step % every == 0:
            draw(f"samples-{trainer.step:08d}.png")

    trainer.fit(
        source,
        settings.training.steps,
        checkpoint=path,
        resume=resume,
        save_every=settings.training.save_every,
        report_every=math.gcd(_REPORT_EVERY, every) if every else _REPORT_EVERY,
        callback=watch,
        progress=progress,
    )
    draw("samples.png")
    print(f"Trained to step {trainer.step}; written to {out}")
    return trainer


def sample(
    path: Path,
    out: Path,
    *,
    count: int = 64,
    seed: int = 0,
    weights: str = "ema",
    batch_size: int = 64,
    first_sample: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> Tensor:
    """Sample a checkpoint of :func:`train` by annealed Langevin dynamics and write to a folder:
    ``samples.npz`` (array ``samples``, in the shape, range and type of the training data) and, of
    images, the sheet ``samples.png``.

    Sample n of a seed has the same noise whatever the count and the batch size.

    Args:
        path: the checkpoint.
        out: the folder, made if it is not there.
        count: number of samples.
        seed: names all noise.
        weights: ``"ema"``, the averaged ones, or ``"raw"``.
        batch_size: samples at a time.
        first_sample: index of the first one.
        device: where the network runs.
        overwrite: whether files in the folder may be replaced.
        progress: whether to show progress bars (on stderr).

    Returns:
        ``[count, ...]``, what the file holds.

    Raises:
        FileExistsError: ``samples.npz`` exists and overwrite is False.
        OSError, ValueError: the checkpoint is not usable or an argument out of range.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    target = out / "samples.npz"
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists; replace it with --overwrite, or name another --out"
        )
    about = _about(path)
    net = _network(about).to(device).eval()
    checkpoint.load_weights(path, net, which=weights)
    parts = []
    for first in tqdm(range(0, count, batch_size), desc="batches", disable=not progress):
        size = min(batch_size, count - first)
        parts.append(_samples(net, about, size, seed=seed, first=first_sample + first))
    scaled = torch.cat(parts)
    out.mkdir(parents=True, exist_ok=True)
    samples = _stored(about).unscale(scaled)
    temporary = target.with_name("samples.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, samples=samples.numpy())
    os.replace(temporary, target)
    if scaled.dim() == 4:
        pictures.save_sheet(out / "samples.png", scaled[:_ON_SHEET])
    print(f"{count} samples of the {weights} weights: {target}")
    return samples


def _describe(settings: Config, source: data.Data, progress: bool) -> dict[str, Any]:
    """What `sample` has to know, and a resumed training to compare; saved in the checkpoint."""
    x = source.scaled(torch.arange(len(source)))
    noise = settings.noise
    schedule = suggest_schedule(
        x,
        sigma_max=noise.sigma_max,
        sigma_min=noise.sigma_min,
        levels=noise.levels,
        steps_per_level=noise.steps_per_level,
        progress=progress,
    )
    step_size, why = schedule.step_size, schedule.why
    if noise.step_size is not None:
        step_size = noise.step_size
        why += f"\nstep_size given: {step_size:g} in place of {schedule.step_size:g}."
    return {
        "version": score_kernels.__version__,
        "config": config.to_dict(settings),
        "data": {
            "count": len(source),
            "shape": list(source.shape),
            "dtype": str(source.values.dtype).removeprefix("torch."),
            "low": source.low,
            "high": source.high,
            "crc32": _checksum(source.values),
            # Around 0, as the networks want it.
            "std": float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel()),
        },
        "schedule": {
            "sigmas": schedule.sigmas.tolist(),
            "steps_per_level": noise.steps_per_level,
            "step_size": step_size,
            "why": why,
        },
    }


def _about(path: Path) -> dict[str, Any]:
    about = checkpoint.read(path).get("about")
    if not isinstance(about, dict) or not {"config", "data", "schedule"} <= about.keys():
        raise ValueError(f"checkpoint {path}: not written by score-kernels train")
    return about


def _check_same(path: Path, about: dict[str, Any], settings: Config, source: data.Data) -> None:
    """A resumed training has the settings and the data that it began with."""
    before, now = about["config"], config.to_dict(settings)
    free = {section: set(keys) for section, keys in _MAY_DIFFER.items()}
    if not settings.training.cosine:
        free["training"].add("steps")
    differ = [
        f"[{section}] {key} was {before[section].get(key)} and is {now[section].get(key)}"
        for section in now
        for key in sorted(before[section].keys() | now[section].keys())
        if key not in free.get(section, ()) and before[section].get(key) != now[section].get(key)
    ]
    values = source.values
    if (
        list(values.shape) != [about["data"]["count"], *about["data"]["shape"]]
        or _checksum(values) != about["data"]["crc32"]
    ):
        differ.append(f"the data, {source.source}, are not those it began with")
    if differ:
        raise ValueError(f"checkpoint {path}: cannot be resumed: {'; '.join(differ)}")


def _network(about: dict[str, Any]) -> nn.Module:
    settings = config.from_dict(
        {"network": about["config"]["network"]}, "of the checkpoint"
    ).network
    shape, std = about["data"]["shape"], about["data"]["std"]
    kind = settings.kind
    if kind == "auto":
        kind = "conv" if len(shape) == 3 else "mlp"
    if kind == "mlp":
        return MLPScore(math.prod(shape), settings.width, depth=settings.depth, data_std=std)
    if len(shape) != 3:
        raise ValueError(f"network kind: got conv for samples of shape {shape}, expected mlp")
    return ConvScore(shape[0], settings.width, levels=settings.depth, data_std=std)


def _trainer(settings: Config, about: dict[str, Any]) -> Trainer:
    training = settings.training
    # Only the network's start is drawn from torch's global generator; leave that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        net = _network(about)
    net.to(training.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=training.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    return Trainer(
        net,
        about["schedule"]["sigmas"],
        optimizer,
        loss=training.loss,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        ema_decay=training.ema_decay,
        ema_warmup=training.ema_warmup,
        clip_norm=training.clip_norm or None,
        warmup_steps=training.warmup_steps,
        scheduler=cosine(optimizer, training.steps) if training.cosine else None,
        precision=training.precision,
        seed=training.seed,
        about=about,
    )


def _samples(
    net: nn.Module,
    about: dict[str, Any],
    count: int,
    *,
    seed: int,
    first: int = 0,
    progress: bool = False,
) -> Tensor:
    """In [-1, 1] or near it, on the CPU."""
    schedule = about["schedule"]
    return annealed_langevin(
        net,
        (count, *about["data"]["shape"]),
        schedule["sigmas"],
        steps_per_level=schedule["steps_per_level"],
        step_size=schedule["step_size"],
        seed=seed,
        first_sample=first,
        device=next(net.parameters()).device,
        progress=progress,
    ).cpu()


def _stored(about: dict[str, Any]) -> data.Data:
    """The data's range and type, without the data."""
    described = about["data"]
    empty = torch.empty(0, *described["shape"], dtype=getattr(torch, described["dtype"]))
    return data.Data(empty, described["low"], described["high"], "a checkpoint")


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().numpy().data)


def _zero_network(settings: Config, source: data.Data) -> float | None:
    return math.prod(source.shape) / 2 if settings.training.loss == "dsm" else None
