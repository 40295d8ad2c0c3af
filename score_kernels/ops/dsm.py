"""Denoising score matching: noisy data, and the loss of a score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import choose
from score_kernels.noise import Key, NoiseKey
from score_kernels.ops._dispatch import (
    KEY_SCHEMA,
    apply,
    check_key,
    dense,
    direct,
    is_compiling,
    new_like,
    refuse_vmap,
    register,
    state_dtype,
    transformed,
    wants_grad,
)
from score_kernels.ops._formulas import expand_like, sums, wide
from score_kernels.ops.random import normal

__all__ = ["dsm_loss_from_score", "perturb"]


def perturb(x: Tensor, sigma: Tensor, noise: NoiseKey) -> Tensor:
    """Noisy data ``x + sigma z``, with ``z = normal(x.shape, noise)`` made in the kernel.

    Args:
        x: ``[B, ...]`` float32, or float64 on the reference backend.
        sigma: ``[B]`` float32 on x's device, one noise level per sample, at least 0.
        noise: names the noise ``z``; see :class:`score_kernels.NoiseKey`.

    Returns:
        A new tensor like x. Differentiable in x and, by materialising the noise, in sigma.

    Raises:
        TypeError, ValueError: a dtype, shape or device is not one of the above.
    """
    checks.state("x", x)
    checks.per_sample("sigma", sigma, x)
    check_key(noise, "x", x)
    if direct(x, sigma):
        return _perturb(x, sigma, noise)
    refuse_vmap(x=x, sigma=sigma)
    if transformed() or wants_grad(sigma):
        return x + expand_like(sigma, x) * normal(x.shape, noise, dtype=x.dtype, device=x.device)
    return apply(_Perturb, x, sigma, noise)


def dsm_loss_from_score(
    score: Tensor, sigma: Tensor, noise: NoiseKey, *, weight: Tensor | None = None
) -> Tensor:
    """Per sample, ``1/2 weight || sigma score + z ||^2``, the sum running over its D elements.

    The denoising score matching loss (Vincent 2011; Song and Ermon 2019, arXiv 1907.05600) of a
    score taken at ``perturb(x, sigma, noise)``, weighted by lambda(sigma) = sigma^2; another
    lambda is ``weight = lambda(sigma) / sigma^2``. The noise is made again from its key, never
    stored, and ``1/sigma^2`` is never formed. Sums do not depend on the thread count.

    Args:
        score: ``[B, ...]`` float32, bfloat16, float16, or float64 on the reference backend.
        sigma: ``[B]`` float32 on the score's device.
        noise: the key that made the noisy data.
        weight: ``[B]`` float32 on the score's device, finite and at least 0 (its values are not
            read for a check); default: ones.

    Returns:
        ``[B]`` float32 (float64 for a float64 score). Differentiable in score any number of times
        and, by materialising the noise, in sigma and weight.

    Raises:
        TypeError, ValueError: a dtype, shape or device is not one of the above.
    """
    checks.score("score", score)
    checks.per_sample("sigma", sigma, score)
    if weight is not None:
        checks.per_sample("weight", weight, score)
    check_key(noise, "score", score)
    return dsm_losses(score, sigma, noise, weight, mean=False)


def dsm_losses(
    score: Tensor, sigma: Tensor, noise: NoiseKey, weight: Tensor | None, *, mean: bool
) -> Tensor:
    """:func:`dsm_loss_from_score` of checked arguments, or its mean, by a single autograd node."""
    if direct(score, sigma, weight):
        each = _dsm_loss(score, sigma, weight, False, noise)[0]
    elif transformed() or wants_grad(sigma, weight):
        refuse_vmap(sigma=sigma)
        each = 0.5 * sums(_residual(score, sigma, noise).square())
        each = each if weight is None else weight.to(each.dtype) * each
    else:
        return apply(_DsmLoss, score, sigma, weight, noise, mean)
    return each.mean() if mean else each


def _residual(score: Tensor, sigma: Tensor, noise: NoiseKey) -> Tensor:
    """sigma score + z in plain torch, for derivatives that the kernels do not have."""
    score = wide(score)
    z = normal(score.shape, noise, dtype=score.dtype, device=score.device)
    return expand_like(sigma, score) * score + z


class _Perturb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sigma: Tensor, noise: NoiseKey) -> Tensor:
        return _perturb_op(x, sigma, noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _DsmLoss(torch.autograd.Function):
    """On a CPU noise is arithmetic: a float32 gradient is made in the forward pass, kept instead of
    the noise and given away by the first backward. Elsewhere, and after that, it is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        score: Tensor,
        sigma: Tensor,
        weight: Tensor | None,
        noise: NoiseKey,
        mean: bool,
    ) -> Tensor:
        eager = not is_compiling()
        keep = eager and ctx.needs_input_grad[0] and score.is_cpu and score.dtype == torch.float32
        loss, gradient = _dsm_loss_op(score, sigma, weight, keep, noise)
        ctx.save_for_backward(score, sigma, weight)
        ctx.noise, ctx.mean, ctx.batch = noise, mean, score.shape[0]
        ctx.gradient = gradient if keep else None
        return loss.mean() if mean else loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The formula in plain torch has all further derivatives and batching rules.
        further = torch.is_grad_enabled() or transformed(grad)
        if ctx.mean:
            grad = grad / ctx.batch
        if ctx.gradient is not None and not further:
            gradient, ctx.gradient = ctx.gradient, None
            gradient.mul_(grad if ctx.mean else expand_like(grad, gradient))
            return gradient, None, None, None, None
        score, sigma, weight = ctx.saved_tensors
        # A tensor without dimensions would not promote sigma to float64.
        grad = grad.expand_as(sigma)
        if further:
            scale = grad * sigma if weight is None else grad * sigma * weight
            residual = _residual(score, sigma, ctx.noise)
            gradient = (expand_like(scale, residual) * residual).to(score.dtype)
        else:
            gradient = _dsm_gradient_op(score, sigma, weight, grad, ctx.noise)
        return gradient, None, None, None, None


def _perturb(x: Tensor, sigma: Tensor, key: Key) -> Tensor:
    return choose(x.device, x.dtype).perturb(dense(x), dense(sigma), key)


def _dsm_loss(
    score: Tensor, sigma: Tensor, weight: Tensor | None, with_gradient: bool, key: Key
) -> tuple[Tensor, Tensor]:
    backend = choose(score.device, state_dtype(score))
    weight = None if weight is None else dense(weight)
    return backend.dsm_loss(dense(score), dense(sigma), weight, key, with_gradient)


def _dsm_gradient(
    score: Tensor, sigma: Tensor, weight: Tensor | None, upstream: Tensor, key: Key
) -> Tensor:
    backend = choose(score.device, state_dtype(score))
    weight = None if weight is None else dense(weight)
    return backend.dsm_gradient(dense(score), dense(sigma), weight, dense(upstream), key)


def _fake_loss(
    score: Tensor, sigma: Tensor, weight: Tensor | None, with_gradient: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(score)
    shape = score.shape if with_gradient else (0,)
    return score.new_empty(score.shape[0], dtype=dtype), score.new_empty(shape, dtype=dtype)


_SCORE = "Tensor score, Tensor sigma, Tensor? weight"
_perturb_op = register(
    f"perturb(Tensor x, Tensor sigma, {KEY_SCHEMA}) -> Tensor", _perturb, new_like
)
_dsm_loss_op = register(
    f"dsm_loss({_SCORE}, bool with_gradient, {KEY_SCHEMA}) -> (Tensor, Tensor)",
    _dsm_loss,
    _fake_loss,
)
_dsm_gradient_op = register(
    f"dsm_gradient({_SCORE}, Tensor upstream, {KEY_SCHEMA}) -> Tensor", _dsm_gradient, new_like
)
