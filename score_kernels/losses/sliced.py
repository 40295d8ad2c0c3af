"""Sliced and exact score matching, without noisy data.

Both estimate ``E[ tr(grad s) + 1/2 ||s||^2 ]`` (Hyvarinen 2005).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose, resolve
from score_kernels.ops._dispatch import refuse_vmap, state_dtype, version_of
from score_kernels.ops._formulas import reduce_losses

__all__ = ["exact_score_loss", "sliced_score_loss"]

_METHODS = ("auto", "double_backward", "jvp", "finite_difference")
# Scores, by id, whose gradient was found to have no derivative.
_no_double_backward: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class _NoDoubleBackward(RuntimeError):
    """The gradient of a score has no derivative."""


def exact_score_loss(
    score: Callable[..., Tensor], x: Tensor, sigma: Tensor | float | None = None
) -> Tensor:
    """Explicit score matching, ``mean over the batch of tr(grad s) + 1/2 ||s||^2``.

    Hyvarinen (2005), with the exact trace: one backward pass per element of a sample. For small
    samples, and as the truth in tests. Arguments, result and errors: :func:`sliced_score_loss`.
    """
    call = score_at(score, _check(score, x, sigma), {})
    refuse_inference()
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        rows = call(leaf).reshape(len(x), -1)
        loss = 0.5 * rows.square().sum(1)
        for d in range(rows.shape[1]):
            along = torch.zeros_like(rows)
            along[:, d] = 1
            column = vector_jacobian(call, leaf, rows, along, create_graph=True, retain=True)
            loss = loss + column.reshape(rows.shape)[:, d]
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
    samples: Tensor | None = None,
    draws: Tensor | None = None,
    pieces: Tensor | None = None,
    segments: Tensor | None = None,
    reduction: str = "mean",
    **conditions: Any,
) -> Tensor:
    """Sliced score matching, ``mean over batch and probes of v^T (grad s) v + 1/2 ||s||^2``.

    Song et al. (2019, arXiv 1905.07088); without variance reduction the second term is
    ``1/2 (v . s)^2``. E[v v^T] = I, so that both estimate the explicit objective.

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
        method: how the first term is computed.

            - "double_backward": the gradient of ``v . s``, differentiated again in training.
            - "jvp": forward-mode differentiation along v.
            - "finite_difference": ``v . (s(x + h v) - s(x - h v)) / (2 h)`` (Pang et al. 2020,
              arXiv 2007.03317), with an error of the order of h^2; the mean of the two takes the
              place of s. Both calls see the same state of torch's generators, and so the same
              dropout, except under ``torch.compile``.
            - "auto": double_backward, or finite_difference where the network's gradient has no
              derivative (flash attention). It warns once per score.
        fd_step: h of finite differences, in units of x, times sigma where sigma is given.
        samples, draws, pieces: what each row is; see :meth:`score_kernels.NoiseKey.rows`.
        segments: int64 ``[B]``, for packed batches: rows of one number, 0 to B - 1, are one sample,
            whose rows the score may mix, and whose loss is their sum. The mean is over the segments
            that have rows, and "none" gives one loss for each number, 0 without rows.
        reduction: "mean" or "sum" over the batch, or "none" for the ``[B]`` losses, each the mean
            over its probes.
        conditions: further keyword arguments of the score, such as classes.

    Returns:
        The loss; its gradient reaches the score's parameters and x.

    Raises:
        TypeError, ValueError: an argument, or what score returns, is of the wrong kind or shape.
        RuntimeError: this network lacks the derivative that the method needs, or finite differences
            got scores in half precision.
    """
    level = _check(score, x, sigma)
    refuse_vmap(x=x)
    noise = resolve(noise, seed, samples, draws, pieces)
    if segments is not None:
        checks.segments(segments, x)
    probes = checks.count("probes", probes, least=1)
    if probes > 64:
        raise ValueError(f"probes: got {probes}, expected at most 64")
    fd_step = checks.positive("fd_step", fd_step)
    checks.choice("method", method, _METHODS)
    checks.reduction(reduction)
    keys = [noise.for_purpose(Purpose.SSM_PROBE + i) for i in range(probes)]
    reduced = checks.flag("variance_reduced", variance_reduced)
    kind: dict[str, Any] = {"probe": probe, "variance_reduced": reduced}
    used = method
    if method == "auto":
        known = _no_double_backward.get(id(score)) is score
        used = "finite_difference" if known else "double_backward"
    losses = []
    if used != "finite_difference":
        try:
            losses = _by_derivative(score_at(score, level, conditions), x, keys, kind, used)
        except _NoDoubleBackward:
            if method != "auto":
                raise
            # Of an object that cannot be referred to weakly it is found out in every call.
            with suppress(TypeError):
                _no_double_backward[id(score)] = score
            warnings.warn(
                "sliced_score_loss: the gradient of this score has no derivative; using "
                "method='finite_difference'",
                stacklevel=2,
            )
    if not losses:
        call = score_at(score, level, conditions)
        losses = _by_finite_difference(call, x, level, fd_step, keys, kind)
    each = losses[0] if probes == 1 else torch.stack(losses).mean(0)
    return reduce_losses(each, reduction, segments)


def _by_derivative(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    keys: list[NoiseKey],
    kind: dict[str, Any],
    method: str,
) -> list[Tensor]:
    training, reverse = torch.is_grad_enabled(), method == "double_backward"
    if reverse:
        refuse_inference()
    losses = []
    with torch.set_grad_enabled(training or reverse):
        if reverse:
            x = x if x.requires_grad else x.detach().requires_grad_()
            value = like = call(x)
        else:
            # A tangent gets the strides of x, which must not overlap.
            x = like = x.contiguous()
        ones = x.new_ones(len(x), dtype=state_dtype(like))
        for key in keys:
            v = ops.probe_scale(ones, x.shape, key, probe=kind["probe"]).to(like.dtype)
            if reverse:
                grad = vector_jacobian(
                    call, x, value, v, create_graph=training, retain=training or key is not keys[-1]
                )
                if training and key is keys[0]:
                    _require_derivative(grad)
            else:
                value, grad = _jacobian_vector(call, x, v)
            losses.append(ops.ssm_reduce(grad, value.to(grad.dtype), key, **kind))
    return losses if training else [loss.detach() for loss in losses]


def vector_jacobian(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    value: Tensor,
    v: Tensor,
    *,
    create_graph: bool,
    retain: bool,
) -> Tensor:
    """``v^T grad s`` at x, value being ``call(x)``; 0 of a score that does not depend on x.

    Of a value without a graph, by which nothing can be said, it is ``(grad s) v``.
    """
    if not value.requires_grad:
        x = x.detach().contiguous()
        return _jacobian_vector(call, x, v.reshape(x.shape).to(x.dtype))[1]
    (grad,) = torch.autograd.grad(
        value,
        x,
        v,
        create_graph=create_graph,
        retain_graph=retain,
        materialize_grads=True,
    )
    return grad


def _jacobian_vector(
    call: Callable[[Tensor], Tensor], x: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """``call(x)`` and ``(grad s) v``, which is 0 of a score that does not depend on x."""
    try:
        return torch.func.jvp(call, (x,), (v,), strict=True)[:2]
    except RuntimeError as error:
        if "strict=True" not in str(error):
            raise
    value = call(x)
    if not torch.equal(call(x + 1), value):
        raise RuntimeError(
            "score: its value depends on x and has no derivative, as after detach(), .data or "
            "under inference_mode; expected a score that autograd can follow"
        )
    return value, torch.zeros_like(value)


def refuse_inference() -> None:
    """An error where nothing can be differentiated."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "score: called under torch.inference_mode(), which records no derivatives; expected "
            "torch.no_grad()"
        )


def _require_derivative(gradient: Tensor) -> None:
    """Search a gradient's graph for a function that autograd cannot differentiate."""
    seen, queue = set(), [gradient.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ in ("NotImplemented", "Error", "DelayedError"):
            raise _NoDoubleBackward(
                "method: got 'double_backward', but the gradient of this score has no derivative; "
                "use method='finite_difference', 'jvp' or 'auto', or, for attention, "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        queue += [following for following, _ in node.next_functions]


def _by_finite_difference(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    level: Tensor | None,
    fd_step: float,
    keys: list[NoiseKey],
    kind: dict[str, Any],
) -> list[Tensor]:
    # Not torch.full, which torch.compile compiles anew for each value.
    step = x.new_ones(x.shape[:1]) * fd_step
    if level is not None:
        step = step * level.to(x.dtype)
    losses = []
    for key in keys:
        # Two calls and not one of 2 B samples: dropout must be the same in both.
        ahead, behind = ops.fd_pair(x, step, key, probe=kind["probe"]).chunk(2)
        rewind = _generators(x.device)
        above = call(ahead)
        rewind()
        below = call(behind)
        if above.dtype.itemsize < 4:
            raise RuntimeError(
                f"method: finite differences got scores of {above.dtype}, whose rounding drowns "
                "the difference, expected torch.float32; leave autocast for the score or use "
                "method='double_backward' or 'jvp'"
            )
        losses.append(ops.fd_reduce(above, below, step, key, **kind))
    return losses


def _generators(device: torch.device) -> Callable[[], None]:
    """A function that sets torch's generators back to where they are now."""
    if torch.compiler.is_compiling():
        return lambda: None
    on_cpu = partial(torch.set_rng_state, torch.get_rng_state())
    if device.type != "cuda":
        return on_cpu
    on_gpu = partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
    return lambda: (on_cpu(), on_gpu()) and None


def score_at(
    score: Callable[..., Tensor], level: Tensor | None, conditions: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The score at given noise levels as a function of x alone, its result checked."""

    def call(y: Tensor) -> Tensor:
        version = version_of(y)
        try:
            value = score(y, **conditions) if level is None else score(y, level, **conditions)
        except TypeError as error:
            if level is not None:
                checks.takes_sigma("score", score, error)
            raise
        except RuntimeError as error:
            if "in-place operation" not in str(error):
                raise
            raise checks.changed("score", "x") from error
        if version_of(y) != version:
            raise checks.changed("score", "x")
        checks.score_like(y, value)
        return value

    return call


def _check(score: Any, x: Any, sigma: Any) -> Tensor | None:
    """Checks the arguments of both losses. Returns the noise levels ``[B]``."""
    checks.function("score", score)
    checks.state("x", x)
    if not x.numel():
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one element")
    if isinstance(sigma, Tensor):
        checks.per_sample("sigma", sigma, x)
    elif sigma is not None:
        level = checks.noise_level("sigma", sigma)
        sigma = torch.ones(x.shape[:1], dtype=torch.float32, device=x.device) * level
    return sigma
