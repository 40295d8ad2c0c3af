"""Training objectives of score networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from score_kernels import _check, ops
from score_kernels.noise import NoiseKey, Purpose, fresh_seed

__all__ = ["dsm_loss"]


def dsm_loss(
    net: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Any,
    *,
    noise: NoiseKey | None = None,
    seed: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Denoising score matching over noise levels, each weighted by sigma^2.

    ``mean over the batch of 1/2 || sigma net(x + sigma z, sigma) + z ||^2``, the sum running over
    the D elements of a sample (Vincent 2011; Song and Ermon 2019, arXiv 1907.05600, equations 5
    and 6 with lambda(sigma) = sigma^2). ``1/sigma^2`` is never formed. The zero network has D/2.

    Args:
        net: the score network, ``net(x, sigma)`` with x ``[B, ...]`` and sigma ``[B]`` float32;
            returns x's shape.
        x: ``[B, ...]`` clean data, float32 or float64, B at least 1.
        sigmas: the noise levels, strictly decreasing: ``[L]`` tensor or a sequence.
        noise: names the noise; give each training step its own, ``NoiseKey(seed).at(step)``. Its
            purpose is replaced by the loss's own.
        seed: shorthand for ``noise=NoiseKey(seed)``; with neither, a fresh seed is drawn from
            torch's default generator.
        labels: ``[B]`` int64, the level of each sample; default: drawn uniformly, by ``noise``.

    Returns:
        The loss, a tensor without dimensions; its gradient reaches net's parameters and x.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: both noise and seed are given, sigmas do not decrease, labels are out of range
            or the network returns another shape.
    """
    _check.state("x", x)
    levels = _check.noise_levels(sigmas)
    batch = x.shape[0]
    if not batch:
        raise ValueError("x: got a batch of 0, expected at least one sample")
    noise = _key(noise, seed)
    table = torch.tensor(levels, dtype=torch.float32).to(x.device)
    if labels is None:
        # floor(word * L / 2^32), exact in 64-bit integers.
        words = ops.words((batch, 1), noise.for_purpose(Purpose.DSM_LEVEL), device=x.device)
        labels = words[:, 0] * len(levels) >> 32
    else:
        _check_labels(labels, x, len(levels))
    sigma = table[labels]
    spread = sigma.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    z = ops.normal(x.shape, noise.for_purpose(Purpose.DSM_NOISE), dtype=x.dtype, device=x.device)
    score = net(x + spread * z, sigma)
    _check.score_like(x, score, "net")
    return 0.5 * (spread * score + z).square().sum() / batch


def _key(noise: NoiseKey | None, seed: int | None) -> NoiseKey:
    if noise is None:
        return NoiseKey(fresh_seed() if seed is None else seed)
    if seed is not None:
        raise ValueError(f"seed: got {seed} beside noise, expected one of the two")
    _check.instance("noise", noise, NoiseKey, "a NoiseKey")
    return noise


def _check_labels(labels: Any, x: Tensor, levels: int) -> None:
    _check.instance("labels", labels, Tensor, "a tensor of level indices")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected torch.int64")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected [B] = {tuple(x.shape[:1])}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels: got device {labels.device}, expected that of x, {x.device}")
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= levels:
        raise ValueError(f"labels: got values from {low} to {high}, expected 0 to {levels - 1}")
