"""What a checkpoint of ``train`` says about itself, and the network and samples it stands for."""

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

__all__ = ["draw_samples", "network", "read_about", "stored"]


def read_about(path: Path) -> dict[str, Any]:
    about = checkpoint.read(path).get("about")
    if not isinstance(about, dict) or not {"config", "data", "schedule"} <= about.keys():
        raise ValueError(f"checkpoint {path}: not written by score-kernels train")
    return about


def network(about: dict[str, Any]) -> nn.Module:
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


def draw_samples(
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


def stored(about: dict[str, Any]) -> data.Data:
    """The data's range and type, without the data."""
    described = about["data"]
    empty = torch.empty(0, *described["shape"], dtype=getattr(torch, described["dtype"]))
    return data.Data(empty, described["low"], described["high"], "a checkpoint")
