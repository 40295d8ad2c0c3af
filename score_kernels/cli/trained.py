"""The network and the samples of a checkpoint that ``train`` wrote."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from score_kernels import checks
from score_kernels.cli import config
from score_kernels.cli.data import Data
from score_kernels.cli.samplers import Sampler, choose
from score_kernels.diffusion.sigmas import Schedule
from score_kernels.networks import ConvScore, MLPScore
from score_kernels.training import checkpoint

__all__ = ["Trained", "about_of", "draw_samples", "load", "network", "read_about", "sampler_of"]


@dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """A network that ``score-kernels train`` has trained.

    See :func:`load`.

    Attributes:
        net: the network in eval mode.
        schedule: noise levels, steps and step size.
        data: no samples, but their shape, type and range, and `unscale`.
        about: the settings of the training, its data and schedule, as in the checkpoint.
        checksum: the sha256 of the file.
    """

    net: nn.Module
    schedule: Schedule
    data: Data
    about: dict[str, Any]
    checksum: str

    def __repr__(self) -> str:
        return (
            f"Trained({type(self.net).__name__}, {len(self.schedule.sigmas)} levels, {self.data})"
        )


def load(
    path: str | os.PathLike[str], *, weights: str = "ema", device: torch.device | str = "cpu"
) -> Trained:
    """The network, noise levels and units of a ``score-kernels train``'s checkpoint.

    Eight samples, in the units of the data and clamped to their range::

        t = load("run/checkpoint.pt")
        s = t.schedule
        x = annealed_langevin(
            t.net, (8, *t.data.shape), s.sigmas, steps_per_level=s.steps_per_level,
            step_size=s.step_size,
        )
        t.data.unscale(x)

    Args:
        path: the file.
        weights: "ema", the averaged ones, or "raw", those of the last step.
        device: of the network.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is damaged, or of another program;
            see :func:`score_kernels.training.checkpoint.load_weights` for those of a `Trainer`.
    """
    checks.device("device", device)
    with checkpoint.opened(path) as file:
        checksum = hashlib.sha256(file.read()).hexdigest()
        state = checkpoint.parse(path, file)
    about = about_of(path, state)
    net = network(about)
    checkpoint.restore(path, net, checkpoint.weights_of(path, state, weights))
    found, levels = about["data"], about["schedule"]
    schedule = Schedule(
        torch.tensor(levels["sigmas"], dtype=torch.float32, device="cpu"),
        *(levels[key] for key in ("steps_per_level", "step_size", "why")),
    )
    values = torch.empty(0, *found["shape"], dtype=getattr(torch, found["dtype"]), device="cpu")
    data = Data(values, found["low"], found["high"], str(path))
    return Trained(net.eval().to(device), schedule, data, about, checksum)


def read_about(path: Path) -> dict[str, Any]:
    """The settings (config), data and noise levels (schedule) of a training."""
    return about_of(path, checkpoint.read(path))


def about_of(path: str | os.PathLike[str], state: dict[str, Any]) -> dict[str, Any]:
    """:func:`read_about` of a checkpoint that was read."""
    about = state.get("about")
    if not isinstance(about, dict) or "schedule" not in about:
        raise ValueError(
            f"checkpoint {path}: not written by score-kernels train; the weights of another "
            "Trainer's are read by score_kernels.training.checkpoint.load_weights"
        )
    return about


def network(about: dict[str, Any]) -> nn.Module:
    """The untrained network."""
    tables = {"network": about["config"]["network"]}
    settings = config.from_dict(tables, "of the checkpoint").network
    shape, std = about["data"]["shape"], about["data"]["std"]
    images = len(shape) == 3
    if settings.kind == "mlp" or (settings.kind == "auto" and not images):
        return MLPScore(math.prod(shape), settings.width, depth=settings.depth, data_std=std)
    if not images:
        raise ValueError(f"network kind: got conv for samples of shape {shape}, expected mlp")
    return ConvScore(shape[0], settings.width, levels=settings.depth, data_std=std)


def sampler_of(
    about: dict[str, Any], sampler: str | None = None, calls: int | None = None
) -> Sampler:
    """The sampler of the training's settings, or another one with its own number of calls."""
    tables = {"sampling": about["config"].get("sampling", {})}
    settings = config.from_dict(tables, "of the checkpoint").sampling
    if sampler is None:
        sampler, calls = settings.sampler, settings.calls if calls is None else calls
    return choose(about["schedule"], sampler, calls)


def draw_samples(
    net: nn.Module,
    about: dict[str, Any],
    count: int,
    sampler: Sampler | None = None,
    **options: Any,
) -> Tensor:
    """Samples in [-1, 1] or near it, on the CPU.

    By the sampler of the training's settings, or the given one; options are those of all samplers.
    """
    shape, device = (count, *about["data"]["shape"]), next(net.parameters()).device
    sampler = sampler or sampler_of(about)
    return sampler.draw(net, shape, device=device, **options).cpu()
