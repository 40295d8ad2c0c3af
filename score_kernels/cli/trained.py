"""The contents of a checkpoint of ``train``, and the network and samples that they describe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from score_kernels.cli import config, data
from score_kernels.networks import ConvScore, MLPScore
from score_kernels.sampling import annealed_langevin
from score_kernels.training import checkpoint

__all__ = ["draw_samples", "empty_data", "network", "read_about"]


def read_about(path: Path) -> dict[str, Any]:
    """The settings, data and noise levels of a training, from its checkpoint."""
    about = checkpoint.read(path).get("about")
    if not isinstance(about, dict) or not {"config", "data", "schedule"} <= about.keys():
        raise ValueError(f"checkpoint {path}: not written by score-kernels train")
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


def draw_samples(
    net: nn.Module,
    about: dict[str, Any],
    count: int,
    *,
    seed: int,
    first: int = 0,
    progress: bool = False,
) -> Tensor:
    """Samples of annealed Langevin dynamics, in [-1, 1] or near it, on the CPU."""
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


def empty_data(about: dict[str, Any]) -> data.Data:
    """The range and type of the training data, without samples."""
    found = about["data"]
    values = torch.empty(0, *found["shape"], dtype=getattr(torch, found["dtype"]))
    return data.Data(values, found["low"], found["high"], "a checkpoint")
