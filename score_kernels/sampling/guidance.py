"""Scores made of scores, and noise between noises."""

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
        A score ``(x, sigma)`` for any sampler.

    Raises:
        TypeError, ValueError: an argument or, when called, what score returns is of the wrong kind,
            or scale is not a finite number.
    """
    checks.function("score", score)
    scale = checks.number("scale", scale)
    cond, uncond = checks.keywords("cond", cond), checks.keywords("uncond", uncond)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        values = score(x, sigma, **cond), score(x, sigma, **uncond)
        for value in values:
            checks.score_like(x, value)
        return (1 + scale) * values[0] - scale * values[1]

    return guided


def slerp_noise(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Noise on the way from one noise to another: ``cos(w) a + sin(w) b``, ``w = pi/2 share``.

    Standard normals stay standard normals at every share, as they would not on a straight line.
    Starting points of samplers without noise of their own (DDIM, the probability flow).

    Args:
        a, b: two noises of one shape ``[...]``, of one standard deviation.
        shares: ``[K]``, from 0 (a itself) to 1 (b).

    Returns:
        ``[K, ...]``.

    Raises:
        TypeError, ValueError: a tensor is not one of floats, or the shapes or devices differ.
    """
    for name, value in (("a", a), ("b", b), ("shares", shares)):
        checks.score(name, value)
    if b.device != a.device:
        raise ValueError(f"b: got device {b.device}, expected that of a, {a.device}")
    if shares.is_meta and not a.is_meta:
        raise ValueError("shares: got a tensor on meta, expected one with values")
    if a.shape != b.shape or shares.dim() != 1:
        raise ValueError(
            f"b: got shape {tuple(b.shape)} and shares of {tuple(shares.shape)}, expected a's, "
            f"{tuple(a.shape)}, and [K]"
        )
    angle = (shares.to(a) * (torch.pi / 2)).view(-1, *[1] * a.dim())
    return angle.cos() * a + angle.sin() * b
