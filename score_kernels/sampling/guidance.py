"""Scores made of scores, and noise between two noises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.sampling.engine import Score

__all__ = ["classifier_free", "slerp_noise"]


def classifier_free(
    score: Score, scale: float, *, cond: Mapping[str, Any], uncond: Mapping[str, Any]
) -> Score:
    """``(1 + scale) score(x, sigma, cond) - scale score(x, sigma, uncond)``.

    Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); two calls of the network.

    Args:
        score: ``score(x, sigma, **conditions)``.
        scale: w of the paper; 0 is the conditional score itself.
        cond, uncond: the keyword arguments with the condition and with none.

    Returns:
        A score ``(x, sigma, **conditions)`` for any sampler; conditions go to both calls, where
        `cond` and `uncond` go before them.
    """
    checks.function("score", score)
    scale = checks.number("scale", scale)
    cond, uncond = checks.keywords("cond", cond), checks.keywords("uncond", uncond)

    def guided(x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        with_condition = score(x, sigma, **{**conditions, **cond})
        without = score(x, sigma, **{**conditions, **uncond})
        checks.score_like(x, with_condition)
        checks.score_like(x, without)
        return (1 + scale) * with_condition - scale * without

    return guided


def slerp_noise(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Noise between two noises: ``cos(w) a + sin(w) b``, ``w = pi/2 share``.

    Standard normals stay standard normals at every share, as they would not on a straight line:
    starting points of samplers without noise of their own (DDIM, the probability flow).

    Args:
        a, b: two noises of one shape ``[...]``, of one standard deviation.
        shares: ``[K]``, from 0 (a itself) to 1 (b).

    Returns:
        ``[K, ...]``.
    """
    for name, value in (("a", a), ("b", b), ("shares", shares)):
        checks.score(name, value)
    if b.shape != a.shape or b.device != a.device:
        raise ValueError(
            f"b: got shape {tuple(b.shape)} on {b.device}, expected that of a, {tuple(a.shape)} on "
            f"{a.device}"
        )
    if shares.dim() != 1:
        raise ValueError(f"shares: got shape {tuple(shares.shape)}, expected [K]")
    angle = (shares.to(a) * (torch.pi / 2)).view(-1, *[1] * a.dim())
    return angle.cos() * a + angle.sin() * b
