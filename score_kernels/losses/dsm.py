"""Denoising score matching: noisy data, a network and the fused loss."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose, resolve, without_pieces
from score_kernels.ops._dispatch import modes_active, refuse_vmap, transforms_active, version_of
from score_kernels.ops._formulas import are_first, first_rows, reduce_losses
from score_kernels.ops.dsm import dsm_losses

__all__ = ["dsm_loss"]

# As plain integers, which a key takes faster than members of an enumeration.
_LEVEL, _NOISE = int(Purpose.DSM_LEVEL), int(Purpose.DSM_NOISE)
# The sigmas of the last call, their version and values then, and their table: a schedule of
# thousands is checked once.
_checked: tuple[weakref.ref[Tensor], int, Tensor, Tensor] | None = None


def dsm_loss(
    net: Callable[..., Tensor],
    x: Tensor,
    sigmas: Any = None,
    *,
    sigma: Tensor | None = None,
    noise: NoiseKey | None = None,
    seed: int | None = None,
    labels: Tensor | None = None,
    weighting: float | Tensor = 2.0,
    samples: Tensor | None = None,
    draws: Tensor | None = None,
    pieces: Tensor | None = None,
    segments: Tensor | None = None,
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
        sigma: in their place the noise level of each sample, ``[B]`` float32, as of a diffusion at
            random times: ``sde.sigma(t)``. If log sigma is uniform the default weighting is the
            likelihood's: the mean loss times ``2 log(sigma_max / sigma_min)`` is, up to a constant,
            a bound of the Kullback-Leibler divergence (Song et al. 2021, arXiv 2101.09258). For
            another density q of sigma the weighting is ``1 / (sigma q(sigma))``, and the factor 2.
        noise: names the noise; give each training step its own, ``NoiseKey(seed).at(step)``. Its
            purpose is replaced by the loss's own.
        seed: shorthand for ``noise=NoiseKey(seed)``; with neither, a fresh seed is drawn from
            torch's default generator.
        labels: ``[B]`` int64, the level of each sample; default: drawn uniformly, by ``noise``, one
            for all pieces of a sample or all rows of a segment. On a GPU, where a check would wait,
            the loss of a label out of range is nan.
        weighting: p of ``lambda(sigma) = sigma^p`` ("anneal power"), or a tensor ``[B]`` float32
            of the factors ``lambda(sigma) / sigma^2`` themselves, finite and at least 0.
        samples, draws, pieces: what each row is; see :meth:`score_kernels.NoiseKey.rows`.
        segments: int64 ``[B]``, for packed batches: rows of one number, 0 to B - 1, are one sample:
            they have the level of the first of them, and its loss is their sum. The mean is over
            the segments that have rows, and "none" gives one loss for each number, 0 without rows.
        reduction: "mean" or "sum" over the batch, or "none" for the ``[B]`` losses.
        return_per_level: return ``(loss, table)`` with the table ``[L]`` of each level's mean
            loss in this batch, without gradient, nan where a level has no sample.
        conditions: further keyword arguments of the network, such as classes, of other names than
            these here; a network that has such a name is wrapped: ``partial(net, segments=...)``.

    Returns:
        The loss; its gradient reaches net's parameters and x.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: both noise and seed are given, sigmas do not decrease, labels are out of range,
            or the network returns another shape. ``torch.compile`` looks at no tensor's values.
    """
    checks.function("net", net)
    checks.state("x", x)
    checks.reduction(reduction)
    batch = x.shape[0]
    if not batch:
        raise ValueError("x: got a batch of 0, expected at least one sample")
    refuse_vmap(x=x)
    noise = resolve(noise, seed, samples, draws, pieces)
    if segments is not None:
        checks.segments(segments, x)
    if sigma is not None:
        for name, value in (("sigmas", sigmas), ("labels", labels)):
            if value is not None:
                raise ValueError(f"sigma: got it beside {name}, expected one of the two")
        if return_per_level:
            raise ValueError("return_per_level: got True with sigma, expected it with sigmas")
        checks.per_sample("sigma", sigma, x)
        _check_sigma(sigma, segments)
    else:
        table = _table(sigmas, x.device)
        labels, sigma = _levels_of_rows(table, labels, x, noise, segments)
    if isinstance(weighting, Tensor):
        checks.per_sample("weighting", weighting, x)
        weight: Tensor | None = weighting
    else:
        power = checks.number("weighting", weighting)
        # An exponent in a tensor, which torch.compile does not compile anew for each value.
        weight = None if power == 2.0 else sigma ** (sigma.new_ones(()) * (power - 2.0))
    mean = reduction == "mean" and not return_per_level and segments is None
    each = denoising_losses(net, x, sigma, noise, weight, conditions, mean=mean)
    if mean:
        return each
    loss = reduce_losses(each, reduction, segments)
    if not return_per_level:
        return loss
    assert labels is not None
    sums, counts = each.new_zeros(2, len(table))
    sums.index_add_(0, labels, each.detach())
    samples_of_rows = torch.ones_like(each) if segments is None else are_first(segments).to(each)
    counts.index_add_(0, labels, samples_of_rows)
    return loss, sums / counts


def _levels_of_rows(
    table: Tensor, labels: Tensor | None, x: Tensor, noise: NoiseKey, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The label and the noise level of each row, drawn or checked."""
    last = table.shape[0] - 1
    if labels is None:
        labels = draw_labels(x.shape[0], last + 1, noise, x.device)
        if segments is not None:
            labels = labels.index_select(0, first_rows(segments))
        return labels, table.index_select(0, labels)
    checks.per_sample("labels", labels, x, torch.int64)
    if labels.is_cpu and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high > last:
            raise ValueError(f"labels: got values from {low} to {high}, expected 0 to {last}")
        _check_segments("labels", labels, segments)
    given, labels = labels, labels.clamp(0, last)
    return labels, table.index_select(0, labels).where(labels == given, math.nan)


def _check_sigma(sigma: Tensor, segments: Tensor | None) -> None:
    if not sigma.is_cpu or torch.compiler.is_compiling():
        return
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise ValueError("sigma: got numbers of at most 0 or not finite, expected noise levels")
    _check_segments("sigma", sigma, segments)


def _check_segments(name: str, values: Tensor, segments: Tensor | None) -> None:
    if segments is not None and bool((values[first_rows(segments)] != values).any()):
        raise ValueError(f"{name}: got several levels in a segment, expected one")


def draw_labels(batch: int, levels: int, noise: NoiseKey, device: torch.device) -> Tensor:
    """The noise level of each sample of a batch, uniform: ``[B]`` int64."""
    words = ops.words((batch,), without_pieces(noise.for_purpose(_LEVEL)), device=device)
    # floor(word * L / 2^32), exact in 64-bit integers.
    return words.mul_(levels).bitwise_right_shift_(32)


def denoising_losses(
    net: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    noise: NoiseKey,
    weight: Tensor | None,
    conditions: dict[str, Any],
    *,
    mean: bool = False,
) -> Tensor:
    """The ``[B]`` losses of :func:`dsm_loss` at given noise levels, or their mean, unchecked."""
    key = noise.for_purpose(_NOISE)
    noisy, version = ops.perturb(x, sigma, key), version_of(sigma)
    try:
        score = net(noisy, sigma, **conditions)
    except TypeError as error:
        checks.takes_sigma("net", net, error)
        raise
    if version_of(sigma) != version:
        raise checks.changed("net", "sigma")
    checks.score_like(x, score, "net")
    return dsm_losses(score, sigma, key, weight, mean=mean)


def _table(sigmas: Any, device: torch.device) -> Tensor:
    """The noise levels as float32 on x's device, checked."""
    global _checked
    tensor = isinstance(sigmas, Tensor)
    if tensor and torch.compiler.is_compiling():
        return sigmas.to(device, torch.float32)
    # Read once: another thread may replace it.
    if tensor and (checked := _checked) is not None:
        source, version, seen, table = checked
        # By value where that does not wait: NumPy changes tensors behind torch's back.
        if seen.is_cpu and sigmas.is_cpu:
            same = seen.dtype == sigmas.dtype and torch.equal(seen, sigmas)
        else:
            same = version == version_of(sigmas) and source() is sigmas
        if same and table.device == device:
            return table
    table = torch.tensor(checks.noise_levels(sigmas), dtype=torch.float32, device=device)
    # Tensors made under a transform or a mode do not outlive it.
    if isinstance(sigmas, Tensor) and not (transforms_active() or modes_active()):
        _checked = weakref.ref(sigmas), version_of(sigmas), sigmas.detach().clone(), table
    return table
