"""Training objectives of score networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose, resolve
from score_kernels.ops._dispatch import PLAIN, modes_active, transforms_active

__all__ = ["dsm_loss"]

# The levels of the last call, as they came and as a table: a schedule of thousands is not looked
# through at every step of a training.
_checked: tuple[Tensor, Tensor] | None = None


def dsm_loss(
    net: Callable[..., Tensor],
    x: Tensor,
    sigmas: Any,
    *,
    noise: NoiseKey | None = None,
    seed: int | None = None,
    labels: Tensor | None = None,
    weighting: float | Tensor = 2.0,
    reduction: str = "mean",
    return_per_level: bool = False,
    **conditions: Any,
) -> Any:
    """Denoising score matching over noise levels.

    Per sample ``lambda(sigma) / (2 sigma^2) || sigma net(x + sigma z, sigma) + z ||^2``, the sum
    running over its D elements (Vincent 2011; Song and Ermon 2019, arXiv 1907.05600, equations 5
    and 6). ``1/sigma^2`` is never formed. With the default weighting the zero network has D/2.

    Args:
        net: the score network, ``net(x, sigma)`` with x ``[B, ...]`` and sigma ``[B]`` float32;
            returns x's shape in float32, bfloat16 or float16.
        x: ``[B, ...]`` clean data, float32 or float64, B at least 1.
        sigmas: the noise levels, strictly decreasing: ``[L]`` tensor or a sequence.
        noise: names the noise; give each training step its own, ``NoiseKey(seed).at(step)``. Its
            purpose is replaced by the loss's own.
        seed: shorthand for ``noise=NoiseKey(seed)``; with neither, a fresh seed is drawn from
            torch's default generator.
        labels: ``[B]`` int64, the level of each sample; default: drawn uniformly, by ``noise``.
        weighting: p of ``lambda(sigma) = sigma^p`` ("anneal power"), or a tensor ``[B]`` float32
            of the factors ``lambda(sigma) / sigma^2`` themselves, finite and at least 0.
        reduction: "mean" or "sum" over the batch, or "none" for the ``[B]`` losses.
        return_per_level: return ``(loss, table)`` with the table ``[L]`` of each level's mean
            loss in this batch, without gradient, nan where a level has no sample.
        conditions: further keyword arguments of the network, such as classes.

    Returns:
        The loss; its gradient reaches net's parameters and x.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: both noise and seed are given, sigmas do not decrease, labels are out of range,
            a weight is not finite, or the network returns another shape. Under ``torch.compile``
            the values of tensors are not looked at.
    """
    checks.function("net", net)
    checks.flag("return_per_level", return_per_level)
    checks.state("x", x)
    table = _table(sigmas, x)
    levels = table.shape[0]
    checks.reduction(reduction)
    batch = x.shape[0]
    if not batch:
        raise ValueError("x: got a batch of 0, expected at least one sample")
    noise = resolve(noise, seed)
    if labels is None:
        labels = draw_labels(batch, levels, noise, x.device)
    else:
        _check_labels(labels, x, levels)
    sigma = table[labels]
    weight = _weight(weighting, sigma, x)
    each = denoising_losses(net, x, sigma, noise, weight, conditions)
    loss = each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()
    return (loss, per_level(each.detach(), labels, levels)) if return_per_level else loss


def draw_labels(batch: int, levels: int, noise: NoiseKey, device: torch.device) -> Tensor:
    """The noise level of each sample of a batch, uniform: ``[B]`` int64."""
    # floor(word * L / 2^32), exact in 64-bit integers.
    words = ops.words((batch, 1), noise.for_purpose(Purpose.DSM_LEVEL), device=device)
    return words[:, 0] * levels >> 32


def denoising_losses(
    net: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    noise: NoiseKey,
    weight: Tensor | None,
    conditions: dict[str, Any],
) -> Tensor:
    """The ``[B]`` losses of :func:`dsm_loss` at given noise levels, unchecked."""
    key = noise.for_purpose(Purpose.DSM_NOISE)
    score = net(ops.perturb(x, sigma, key), sigma, **conditions)
    checks.score_like(x, score, "net")
    return ops.dsm_loss_from_score(score, sigma, key, weight=weight)


def _table(sigmas: Any, x: Tensor) -> Tensor:
    """The noise levels as float32 on x's device, checked."""
    global _checked
    if not isinstance(sigmas, Tensor):
        return torch.tensor(checks.noise_levels(sigmas), dtype=torch.float32).to(x.device)
    if torch.compiler.is_compiling():
        return sigmas.to(x.device, torch.float32)
    # Tensors made under a transform or a mode are not for later calls.
    lasting = type(sigmas) in PLAIN and not (transforms_active() or modes_active())
    # Read once: another thread may replace it.
    known = _checked
    if lasting and known is not None:
        before, table = known
        same = sigmas.dtype == before.dtype and sigmas.device == before.device
        if same and table.device == x.device and torch.equal(sigmas, before):
            return table
    table = torch.tensor(checks.noise_levels(sigmas), dtype=torch.float32).to(x.device)
    if lasting:
        _checked = sigmas.detach().clone(), table
    return table


def _weight(weighting: float | Tensor, sigma: Tensor, x: Tensor) -> Tensor | None:
    """lambda(sigma) / sigma^2 per sample, None for ones."""
    if not isinstance(weighting, Tensor):
        power = checks.number("weighting", weighting)
        return None if power == 2.0 else sigma ** (power - 2.0)
    checks.per_sample("weighting", weighting, x)
    if not torch.compiler.is_compiling():
        low, high = (float(v) for v in torch.aminmax(weighting.detach()))
        if not (low >= 0 and high < math.inf):
            raise ValueError(
                f"weighting: got values from {low} to {high}, expected finite ones of at least 0"
            )
    return weighting


def per_level(each: Tensor, labels: Tensor, levels: int) -> Tensor:
    """Each level's mean loss ``[L]``, nan where a level has no sample."""
    total, count = (
        torch.zeros(levels, dtype=each.dtype, device=each.device).index_add_(0, labels, v)
        for v in (each, torch.ones_like(each))
    )
    return total / count


def _check_labels(labels: Any, x: Tensor, levels: int) -> None:
    checks.instance("labels", labels, Tensor, "a tensor of level indices")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected torch.int64")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected [B] = {tuple(x.shape[:1])}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels: got device {labels.device}, expected that of x, {x.device}")
    if torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= levels:
        raise ValueError(f"labels: got values from {low} to {high}, expected 0 to {levels - 1}")
