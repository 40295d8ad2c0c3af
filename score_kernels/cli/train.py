"""The command ``train``: from files to a checkpoint."""

from __future__ import annotations

import math
import os
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import score_kernels
from score_kernels import checks
from score_kernels.cli import config, data, plots
from score_kernels.cli.config import Config
from score_kernels.cli.trained import about_of, draw_samples, network, sampler_of
from score_kernels.diffusion.sigmas import best_step_size, suggest_schedule, variance_ratio
from score_kernels.training import Trainer, checkpoint
from score_kernels.training.checkpoint import locked
from score_kernels.training.distributed import joined

__all__ = ["train"]

# Settings that a resumed training may have other values of.
_MAY_DIFFER = (
    *("data.path", "training.device", "training.save_every"),
    *("sampling.sampler", "sampling.calls", "sampling.count", "sampling.every"),
    *("noise.steps_per_level", "noise.step_size"),
)
_REPORT_EVERY = 50
# Steps of a training that are timed, and from how many on they are.
_TIMED, _WORTH_TIMING = 5, 100


def train(
    settings: Config,
    out: Path,
    *,
    resume: bool = False,
    start: Path | None = None,
    progress: bool = True,
) -> Trainer:
    """Train a network on files, and return its trainer.

    Written are ``checkpoint.pt``, ``config.toml`` (all settings), ``loss.png`` and, of images,
    sheets of samples of the averaged weights: ``samples-00001000.png``, ... with each checkpoint,
    a first one after a tenth of the steps to it, and ``samples.png`` at the end. For the network
    values are scaled to [-1, 1]. The first steps of a copy are timed, to say how long the training
    will take. Under torchrun the ranks share each batch (see :class:`score_kernels.Trainer`) and
    the first one writes; restarted by torchrun, training goes on from the checkpoint.

    Args:
        settings: see :mod:`score_kernels.cli.config`.
        out: the folder, made where it is missing.
        resume: go on from the checkpoint in it, with the bits of a training never stopped. Without
            the cosine the settings may have more steps than before.
        start: a checkpoint whose weights, and averaged ones, the training begins with, instead of
            random ones; optimizer, learning rate and steps begin anew, and `ema_warmup` is off.
        progress: whether to show progress bars (on stderr).

    Raises:
        BlockingIOError: another process is training in the folder.
        FileExistsError: there is a checkpoint in the folder and resume is False.
        ImportError: without Pillow or Matplotlib.
        OSError, ValueError: the data, the settings or the checkpoint cannot be used; the message
            names the file, and nothing is overwritten.
    """
    plots.require()
    path, training, sheet = out / "checkpoint.pt", settings.training, settings.sampling
    # After a rank has died torchrun starts all of them again, with the same command.
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with joined(training.device) as ranks:
        shown = progress and ranks.first
        state = checkpoint.read(path) if path.exists() else None
        about, done = (about_of(path, state), state["step"]) if state else (None, 0)
        if resume and not about and ranks.first:
            print(f"no checkpoint in {out}: starting at step 0")
        if about and not resume:
            hint = "go on from it with --resume, or name another --out"
            raise FileExistsError(f"{path} exists; {hint}")
        if settings.data.path is None:
            raise ValueError("data: got none, expected a path: --data PATH or path = in [data]")
        source = data.load(settings.data.path, key=settings.data.key, progress=shown)
        checks.device("device", training.device)
        if about and start is not None and "from" not in about:
            raise ValueError(f"from: got {start}, expected none: {path} was not begun with weights")
        about = about or _describe(settings, source, shown)
        _check_same(path, about, settings, source)
        if training.steps < done:
            raise ValueError(f"steps: got {training.steps}, expected at least {done}, those done")
        _set_sampling(about, settings)
        begun = {} if start is None or state else _weights(start, about)
        device = ranks.device(training.device)
        trainer = _trainer(settings, about, device)
        for name, weights in begun.items():
            checkpoint.restore(str(start), getattr(trainer, name), weights)
        with_sheets = sheet.count and len(source.shape) == 3
        between = sheet.every or training.save_every
        early = between // 10
        every = math.gcd(_REPORT_EVERY, *((between, early) if with_sheets else ()))
        # A network that answers 0 has half a unit of denoising loss for each number of a sample.
        zero_network = math.prod(source.shape) / 2 if training.loss == "dsm" else None

        def numbered(step: int) -> list[str]:
            due = step % between == 0 or step == early
            return [f"samples-{step:08d}.png"] if due else []

        def draw_sheet(*names: str) -> None:
            if names and with_sheets:
                options: dict[str, Any] = {"seed": training.seed, "progress": shown}
                try:
                    x = draw_samples(trainer.ema, about, sheet.count, **options)
                except FloatingPointError as error:
                    # The training goes on: later weights, or another step size, may do better.
                    print(f"{names[0]} is not drawn: {error}; see [sampling]")
                    return
                for name in names:
                    plots.save_sheet(out / name, x)

        def report(trainer: Trainer) -> None:
            # As often as the checkpoint: a picture costs as much as some steps of a small network.
            if trainer.step == training.steps or trainer.step % training.save_every < every:
                plots.draw_losses(out / "loss.png", trainer.losses, zero_network=zero_network)
            if trainer.step < training.steps:
                draw_sheet(*numbered(trainer.step))

        if (out / "manifest.json").exists():
            raise FileExistsError(f"{out}: holds samples; name another --out")
        out.mkdir(parents=True, exist_ok=True)
        with locked(out) if ranks.first else nullcontext():
            if ranks.first:
                print(f"{source}\n{about['schedule']['why']}")
                if trainer.warmup_steps < training.warmup_steps:
                    of_all = f"{trainer.warmup_steps} steps, a tenth of all"
                    print(f"warm-up: {of_all}, instead of {training.warmup_steps}")
                if done:
                    rate = "the cosine's" if training.cosine else "a constant"
                    print(f"resumes at step {done} of {training.steps}, at {rate} learning rate")
                if "from" in about and not done:
                    print(f"begins with the weights and averaged weights of {about['from']}")
                (out / "config.toml").write_text(config.to_toml(settings), encoding="utf-8")
            if training.steps - done >= _WORTH_TIMING:
                # Of a sheet a call of a sample takes a third of what it takes in a training step.
                drawn = sheet.count * sampler_of(about).calls / (3 * training.batch_size)
                steps = (training.steps - done) * (1 + (drawn / between if with_sheets else 0))
                seconds = steps * _seconds_a_step(settings, about, source, device)
                if ranks.first:
                    print(f"this will take about {_duration(seconds)} on {device}", flush=True)
            trainer.fit(
                source,
                training.steps,
                checkpoint=path,
                resume=resume,
                save_every=training.save_every,
                report_every=every,
                callback=report if ranks.first else None,
                progress=progress,
            )
            if ranks.first:
                if trainer.step:
                    draw_sheet("samples.png", *numbered(trainer.step))
                print(f"Trained to step {trainer.step}; written to {out}")
        return trainer


def _describe(settings: Config, source: data.Data, progress: bool) -> dict[str, Any]:
    """What `sample` needs and a resumed training compares; saved in the checkpoint."""
    x, noise = source.scaled(torch.arange(len(source))), vars(settings.noise)
    options = {key: value for key, value in noise.items() if key != "step_size"}
    schedule = suggest_schedule(x, progress=progress, **options)
    sigmas, step_size, why = schedule.sigmas.tolist(), schedule.step_size, schedule.why
    if noise["step_size"] is not None:
        step_size = noise["step_size"]
        why += f"\nstep_size given: {step_size:g} in place of {schedule.step_size:g}; "
        why += _left(sigmas, noise["steps_per_level"], step_size)
    return {
        "version": score_kernels.__version__,
        "config": config.to_dict(settings),
        "data": {
            **_identity(source),
            "dtype": str(source.values.dtype).removeprefix("torch."),
            "low": source.low,
            "high": source.high,
            # Around 0, as the networks want it.
            "std": float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel()),
        },
        "schedule": {
            "sigmas": sigmas,
            "steps_per_level": noise["steps_per_level"],
            "step_size": step_size,
            "why": why,
        },
        "warmup_steps": min(settings.training.warmup_steps, settings.training.steps // 10),
    }


def _set_sampling(about: dict[str, Any], settings: Config) -> None:
    """Give a training's description the settings of its samples, where a resume changes them."""
    schedule, noise, before = about["schedule"], settings.noise, about["config"]["noise"]
    about["config"] = config.to_dict(settings)
    names = ("steps_per_level", "step_size")
    if all(before.get(name) == getattr(noise, name) for name in names):
        return
    sigmas, why = schedule["sigmas"], "given"
    schedule["steps_per_level"], schedule["step_size"] = noise.steps_per_level, noise.step_size
    if noise.step_size is None:
        why = "technique 4"
        schedule["step_size"] = best_step_size(_ratio(sigmas), sigmas[-1], noise.steps_per_level)
    used = ", ".join(f"{name} {schedule[name]:g}" for name in names)
    left = _left(sigmas, schedule["steps_per_level"], schedule["step_size"])
    schedule["why"] += f"\nOn resuming: {used} ({why}); {left}"


def _ratio(sigmas: list[float]) -> float:
    return (sigmas[0] / sigmas[-1]) ** (1 / (len(sigmas) - 1))


def _left(sigmas: list[float], steps: int, step_size: float) -> str:
    """How levels end; a ValueError for a step size with which chains diverge."""
    left = variance_ratio(step_size, _ratio(sigmas), sigmas[-1], steps)
    return f"levels end with {left:.4g} times the variance of their noise."


def _weights(start: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The weights to begin with, by name of the trainer's network; noted in `about`."""
    state = checkpoint.read(start)
    before, own = about_of(start, state), about["config"]["network"]
    differ = [
        f"[network] {key} was {value} and is {own[key]}"
        for key, value in before["config"]["network"].items()
        if own[key] != value
    ]
    if differ:
        raise ValueError(f"checkpoint {start}: of another network: {'; '.join(differ)}")
    # What the network's input is scaled with.
    about["data"]["std"] = before["data"]["std"]
    about["from"] = f"{start}, step {state['step']}"
    return {"net": state["net"], "ema": state["ema"]}


def _seconds_a_step(
    settings: Config, about: dict[str, Any], source: data.Data, device: torch.device
) -> float:
    """Timed on a copy of the network, which is not used; the very first steps take longer."""
    trainer = _trainer(settings, about, device)
    times: list[float] = []
    trainer.fit(
        source,
        2 * _TIMED,
        report_every=_TIMED,
        callback=lambda _: times.append(time.perf_counter()),
        progress=False,
    )
    return (times[1] - times[0]) / _TIMED


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _identity(source: data.Data) -> dict[str, Any]:
    crc32 = zlib.crc32(source.values.numpy().data)
    return {"count": len(source), "shape": list(source.shape), "crc32": crc32}


def _check_same(path: Path, about: dict[str, Any], settings: Config, source: data.Data) -> None:
    """A resumed training has the settings and the data that it began with."""
    free = _MAY_DIFFER if settings.training.cosine else (*_MAY_DIFFER, "training.steps")
    differ = []
    for section, table in config.to_dict(settings).items():
        before = about["config"][section]
        for key in sorted(before.keys() | table.keys()):
            if f"{section}.{key}" not in free and before.get(key) != table.get(key):
                differ.append(f"[{section}] {key} was {before.get(key)} and is {table.get(key)}")
    if about["data"] | _identity(source) != about["data"]:
        differ.append(f"the data, {source.source}, are not those it began with")
    if differ:
        words = "; expected what it began with"
        if any(text.startswith("[training] steps ") for text in differ):
            words += "; give --steps to go on as planned. The cosine ends there: for more steps "
            words += f"begin with these weights, --from {path} --out ANOTHER"
        raise ValueError(f"checkpoint {path}: cannot be resumed: {'; '.join(differ)}{words}")


def _trainer(settings: Config, about: dict[str, Any], device: torch.device) -> Trainer:
    not_its = ("device", "save_every", "steps", "learning_rate", "cosine")
    training = settings.training
    options = {key: value for key, value in vars(training).items() if key not in not_its}
    # The initial weights alone are drawn from torch's global generator: leave that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        net = network(about).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=training.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    options["scheduler"] = cosine(optimizer, training.steps) if training.cosine else None
    options["clip_norm"] = training.clip_norm or None
    # Or the averaged weights that a training began with would be forgotten at once.
    options["ema_warmup"] = training.ema_warmup and "from" not in about
    # That of the start: a resumed training may have more steps.
    options["warmup_steps"] = about.get("warmup_steps", training.warmup_steps)
    return Trainer(net, about["schedule"]["sigmas"], optimizer, about=about, **options)
