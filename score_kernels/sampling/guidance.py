"""Scores made of scores, noise between two noises, and random rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey
from score_kernels.sampling.model import Score

__all__ = ["classifier_free", "random_rotation", "slerp_noise"]


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


def random_rotation(
    count: int,
    noise: NoiseKey,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rotations of space, uniform over all: ``R = I + 2 w [v] + 2 [v]^2``.

    ``(w, v)`` are four standard normals over their norm, a uniform unit quaternion (Shoemake 1992,
    "Uniform random rotations"), and ``[v]`` is the matrix of the cross product with v. For networks
    of points in space that are not equivariant: points ``[B, N, 3]`` turn by ``x @ R.mT``.

    Args:
        count: B.
        noise: names the normals: row r's rotation depends on its sample alone, and as
            ``noise.rows(samples)`` has it. Its `draw` is the step of a chain.
        device, dtype: as in :func:`score_kernels.ops.normal`.

    Returns:
        ``[B, 3, 3]``, orthogonal with determinant 1, to rounding.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    count = checks.count("count", count, least=0)
    # Rounded at the end alone.
    wide = dtype if dtype not in (torch.float16, torch.bfloat16) else torch.float32
    w, x, y, z = ops.normal((count, 4), noise, dtype=wide, device=device).unbind(1)
    # Of four zeros, I.
    s = 2 / (w * w + x * x + y * y + z * z).clamp_min(1e-30)
    rows = [
        1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y),
        s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x),
        s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, 1).view(-1, 3, 3).to(dtype)
