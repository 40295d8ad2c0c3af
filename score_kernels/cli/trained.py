"""The network and the samples of a checkpoint that ``train`` wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from score_kernels.cli import config
from score_kernels.networks import ConvScore, MLPScore
from score_kernels.sampling import annealed_langevin
from score_kernels.training import checkpoint

__all__ = ["draw_samples", "network", "read_about"]


def read_about(path: Path) -> dict[str, Any]:
    """The settings (config), data and noise levels (schedule) of a training."""
    about = checkpoint.read(path).get("about")
    if not isinstance(about, dict) or "schedule" not in about:
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


def draw_samples(net: nn.Module, about: dict[str, Any], count: int, **options: Any) -> Tensor:
    """Samples of annealed Langevin dynamics, in [-1, 1] or near it, on the CPU.

    Options are those of :func:`score_kernels.annealed_langevin`.
    """
    shape, device = (count, *about["data"]["shape"]), next(net.parameters()).device
    schedule = {key: value for key, value in about["schedule"].items() if key != "why"}
    return annealed_langevin(net, shape, **schedule, device=device, **options).cpu()
