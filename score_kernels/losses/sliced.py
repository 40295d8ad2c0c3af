"""Sliced and exact score matching: objectives that need no noisy data, only a differentiable score.

Both estimate ``E[ tr(grad s) + 1/2 ||s||^2 ]`` (Hyvarinen 2005).
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose, resolve

__all__ = ["exact_score_loss", "sliced_score_loss"]

_METHODS = ("double_backward", "jvp", "finite_difference")
# One purpose a probe, from Purpose.SSM_PROBE on.
_MOST_PROBES = 64
# The method found for a score that cannot do the first one.
_found: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


class _NoDoubleBackward(Exception):
    """A network's gradient has no derivative."""


def exact_score_loss(
    score: Callable[..., Tensor], x: Tensor, sigma: Tensor | float | None = None
) -> Tensor:
    """Explicit score matching, ``mean over the batch of tr(grad s) + 1/2 ||s||^2``.

    Hyvarinen (2005), with the exact trace: one backward pass per element of a sample. For small
    samples, and as the truth in tests.

    Args:
        score: ``score(x)``, or ``score(x, sigma)`` with sigma ``[B]`` when sigma is given. Samples
            must not influence each other.
        x: ``[B, ...]`` float32 or float64, B at least 1.
        sigma: noise levels ``[B]`` float32, or one number for all.

    Returns:
        The loss, a tensor without dimensions; its gradient reaches the score's parameters and x.

    Raises:
        TypeError, ValueError: an argument, or what score returns, is of the wrong kind or shape.
    """
    call = _caller(score, x, sigma)
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        value = call(leaf)
        rows = value.reshape(x.shape[0], math.prod(x.shape[1:]))
        loss = 0.5 * rows.square().sum(1)
        for d in range(rows.shape[1]):
            (slope,) = torch.autograd.grad(rows[:, d].sum(), leaf, create_graph=True)
            loss = loss + slope.reshape(rows.shape)[:, d]
        mean = loss.mean()
    return mean if training else mean.detach()


def sliced_score_loss(
    score: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor | float | None = None,
    *,
    noise: NoiseKey | None = None,
    seed: int | None = None,
    probe: str = "rademacher",
    probes: int = 1,
    variance_reduced: bool = True,
    method: str = "auto",
    fd_step: float = 0.01,
    reduction: str = "mean",
) -> Tensor:
    """Sliced score matching, ``mean over batch and probes of v^T (grad s) v + 1/2 ||s||^2``.

    Song et al. (2019, arXiv 1905.07088); without variance reduction the second term is
    ``1/2 (v . s)^2``. E[v v^T] = I, so that both estimate the explicit objective.

    Methods, for the first term:

    - "double_backward": the gradient of ``v . s``, differentiated again in training.
    - "jvp": forward-mode differentiation along v.
    - "finite_difference": ``v . (s(x + h v) - s(x - h v)) / (2 h)`` (Pang et al. 2020, arXiv
      2007.03317); s becomes the mean of the two, which are one batch of 2 B except on a CPU. Its
      error is of the order of h^2.
    - "auto": double_backward; where the network's gradient has no derivative (flash attention),
      jvp, and where it has no forward mode either, finite_difference. It warns once per score.

    Args:
        score: ``score(x)``, or ``score(x, sigma)`` with sigma ``[B]`` when sigma is given. Samples
            must not influence each other.
        x: ``[B, ...]`` float32 or float64, B at least 1.
        sigma: noise levels ``[B]`` float32, or one number for all.
        noise: names the probes; give each training step its own, ``NoiseKey(seed).at(step)``. Its
            purpose is replaced by the loss's own.
        seed: shorthand for ``noise=NoiseKey(seed)``; with neither, a fresh seed is drawn.
        probe: "rademacher", "gaussian" or "sphere"; see :func:`score_kernels.ops.probe_dot`.
        probes: their number per sample, 1 to 64.
        variance_reduced: which second term.
        method: one of the above.
        fd_step: h of finite differences, in units of x, times sigma where sigma is given.
        reduction: "mean" or "sum" over the batch, or "none" for the ``[B]`` losses, each the mean
            over its probes.

    Returns:
        The loss; its gradient reaches the score's parameters and x.

    Raises:
        TypeError, ValueError: an argument, or what score returns, is of the wrong kind or shape.
        RuntimeError: the method cannot be done on this network, or finite differences got scores
            in half precision; the message names the way out.
    """
    call = _caller(score, x, sigma)
    noise = resolve(noise, seed)
    probes = checks.count("probes", probes, least=1)
    if probes > _MOST_PROBES:
        raise ValueError(f"probes: got {probes}, expected at most {_MOST_PROBES}")
    fd_step = checks.positive("fd_step", fd_step)
    if method not in ("auto", *_METHODS):
        raise ValueError(f"method: got {method!r}, expected auto, {', '.join(_METHODS)}")
    checks.reduction(reduction)
    keys = [noise.for_purpose(Purpose.SSM_PROBE + i) for i in range(probes)]

    def run(method: str) -> Tensor:
        if method == "double_backward":
            return _by_double_backward(call, x, keys, probe, variance_reduced)
        if method == "jvp":
            return _by_jvp(call, x, keys, probe, variance_reduced)
        return _by_differences(score, x, sigma, keys, probe, variance_reduced, fd_step)

    each = _first_that_works(run, score) if method == "auto" else _explained(run, method)
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def _first_that_works(run: Callable[[str], Tensor], score: Any) -> Tensor:
    known = _found.get(score)
    if known is not None:
        return run(known)
    try:
        return run("double_backward")
    except _NoDoubleBackward as missing:
        reason = str(missing)
    try:
        loss, method = run("jvp"), "jvp"
    except torch.cuda.OutOfMemoryError:
        raise
    # What torch raises where forward mode is missing: its functions the first, others' the second.
    except (NotImplementedError, RuntimeError) as missing_too:
        reason = f"{reason}; in forward mode: {missing_too}"
        loss, method = run("finite_difference"), "finite_difference"
    _found[score] = method
    warnings.warn(
        f"sliced_score_loss: the gradient of this score has no derivative ({reason}); "
        f"using method={method!r}",
        stacklevel=3,
    )
    return loss


def _explained(run: Callable[[str], Tensor], method: str) -> Tensor:
    try:
        return run(method)
    except _NoDoubleBackward as error:
        raise RuntimeError(
            f"method: got 'double_backward', but the gradient of this score has no derivative "
            f"({error}); use method='finite_difference', 'jvp' or 'auto', or, for attention, "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        ) from None
    except NotImplementedError as error:
        if method != "jvp":
            raise
        raise RuntimeError(
            "method: got 'jvp', but this score has no forward-mode derivative; use "
            f"method='finite_difference' or 'auto' ({error})"
        ) from error


def _by_double_backward(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    keys: list[NoiseKey],
    probe: str,
    variance_reduced: bool,
) -> Tensor:
    training = torch.is_grad_enabled()
    losses = []
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        value = call(leaf)
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        ones = x.new_ones(x.shape[0], dtype=wide)
        for i, key in enumerate(keys):
            v = ops.probe_scale(ones, value.shape, key, probe=probe).to(value.dtype)
            (slope,) = torch.autograd.grad(
                value, leaf, v, create_graph=training, retain_graph=training or i + 1 < len(keys)
            )
            if training and i == 0:
                _require_derivative(slope)
            losses.append(_reduce(slope, value, key, probe, variance_reduced))
        each = _mean(losses)
    return each if training else each.detach()


def _by_jvp(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    keys: list[NoiseKey],
    probe: str,
    variance_reduced: bool,
) -> Tensor:
    ones = x.new_ones(x.shape[0])
    losses = []
    # torch stores a tangent with the strides of x: where elements of x share memory, so would its.
    x = x.contiguous()
    for key in keys:
        v = ops.probe_scale(ones, x.shape, key, probe=probe)
        value, slope = torch.func.jvp(call, (x,), (v,))[:2]
        losses.append(_reduce(slope, value, key, probe, variance_reduced))
    return _mean(losses)


def _by_differences(
    score: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor | float | None,
    keys: list[NoiseKey],
    probe: str,
    variance_reduced: bool,
    fd_step: float,
) -> Tensor:
    level = _levels(sigma, x)
    step = torch.full(x.shape[:1], fd_step, dtype=x.dtype, device=x.device)
    step = step if level is None else step * level.to(x.dtype)
    one = _caller(score, x, sigma)
    # On a CPU two batches of B stay in the cache longer than one of 2 B (1.7-2.4 times a denoising
    # step against 2.1-2.7); elsewhere fewer and larger kernels are better.
    both = None
    if x.device.type != "cpu":
        twice = None if level is None else torch.cat([level, level])
        both = _caller(score, torch.cat([x, x]), twice)
    losses = []
    for key in keys:
        pair = ops.fd_pair(x, step, key, probe=probe)
        above, below = map(one, pair.chunk(2)) if both is None else both(pair).chunk(2)
        if above.dtype.itemsize < 4:
            raise RuntimeError(
                f"method: finite differences got scores of {above.dtype}, whose rounding drowns "
                "the difference, expected torch.float32; leave autocast for the score or use "
                "method='double_backward' or 'jvp'"
            )
        losses.append(
            ops.fd_reduce(above, below, step, key, probe=probe, variance_reduced=variance_reduced)
        )
    return _mean(losses)


def _mean(losses: list[Tensor]) -> Tensor:
    """Over the probes."""
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)


def _reduce(
    slope: Tensor, value: Tensor, key: NoiseKey, probe: str, variance_reduced: bool
) -> Tensor:
    value = value.to(slope.dtype)
    return ops.ssm_reduce(slope, value, key, probe=probe, variance_reduced=variance_reduced)


def _require_derivative(gradient: Tensor) -> None:
    """Walk the gradient's own graph for a function that autograd could not differentiate."""
    seen, queue = set(), [gradient.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind in ("NotImplemented", "Error", "DelayedError"):
            raise _NoDoubleBackward(f"its graph has a node {kind}")
        queue += [following for following, _ in node.next_functions]


def _levels(sigma: Tensor | float | None, x: Tensor) -> Tensor | None:
    if sigma is None:
        return None
    if isinstance(sigma, Tensor):
        checks.per_sample("sigma", sigma, x)
        return sigma
    level = checks.noise_level("sigma", sigma)
    return torch.full(x.shape[:1], level, dtype=torch.float32, device=x.device)


def _caller(
    score: Callable[..., Tensor], x: Tensor, sigma: Tensor | float | None
) -> Callable[[Tensor], Tensor]:
    """score as a function of x alone, its result checked."""
    checks.function("score", score)
    checks.state("x", x)
    checks.noise_shape(x.shape)
    if not x.numel():
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one element")
    level = _levels(sigma, x)

    def call(y: Tensor) -> Tensor:
        value = score(y) if level is None else score(y, level)
        checks.score_like(y, value)
        return value

    return call
