"""A score as kernels take it: at a noise level, guided, limited, checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from score_kernels import checks
from score_kernels.ops._formulas import expand_like, rows_of, segment_sums

__all__ = ["Score", "ScoreModel"]

Score = Callable[..., Tensor]


class ScoreModel:
    """A score at a noise level, as kernels take it: guided, checked, contiguous."""

    def __init__(
        self,
        score: Score,
        x: Tensor,
        conditions: Mapping[str, Any] | None = None,
        guidance: Callable[..., Tensor] | None = None,
        pairs: bool = False,
    ) -> None:
        checks.function("score", score)
        if guidance is not None:
            checks.function("guidance", guidance)
        self.score, self.guidance = score, guidance
        self.sees_score = guidance is not None and _required(guidance) == 3
        # Whether x holds the parts of complex numbers, which the caller's functions take.
        self.pairs = pairs
        # What a score goes through before a kernel takes it: (x, score) -> score.
        self.limits: list[Callable[[Tensor, Tensor], Tensor]] = []
        self.conditions = checks.keywords("conditions", {} if conditions is None else conditions)
        # The noise levels ``[B]`` of a plan, each one number in memory.
        self.sigmas: dict[float, Tensor] = {}
        self.sigma = x.new_empty(x.shape[0], dtype=torch.float32)
        self.level: tuple[float, float] | None = None
        # Whether the score takes sigma, and what x is multiplied by (a tensor in a CUDA graph).
        self.pass_sigma = True
        self.scale: float | Tensor | None = None
        self.shape, self.device = x.shape, x.device
        # The dtype of scores that kernels can read as they are.
        self.dtype: torch.dtype | None = None

    def set_level(self, sigma: float, mean: float = 1.0) -> None:
        """Move to a noise level, if the model is not there yet."""
        if self.level != (sigma, mean):
            self.level = sigma, mean
            self.pass_sigma = not math.isnan(sigma)
            self.sigma = self.level_of(sigma)
            self.scale = None if mean == 1.0 else 1 / mean

    def level_of(self, sigma: float) -> Tensor:
        """A noise level as functions take it, ``[B]``."""
        level = self.sigmas.get(sigma)
        return torch.full_like(self.sigma, sigma) if level is None else level

    def __call__(self, x: Tensor) -> Tensor:
        """The score at x."""
        seen = scaled = x if self.scale is None else x * self.scale
        if self.pairs:
            seen = torch.view_as_complex(scaled)
        version, level = seen._version, self.sigma._version
        given = (seen, self.sigma) if self.pass_sigma else (seen,)
        try:
            value = self.score(*given, **self.conditions)
        except TypeError as error:
            if self.pass_sigma:
                checks.takes_sigma("score", self.score, error)
            raise
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise RuntimeError(
                    f"score: {error}; samplers call it without gradients: enable them inside, by "
                    "torch.enable_grad(), or give the energy: score_kernels.as_score(E, "
                    "kind='energy')"
                ) from error
            raise
        if self.guidance is not None:
            self._check(seen, value)
            more = (value,) if self.sees_score else ()
            added = self.guidance(seen, self.sigma, *more)
            self._check(seen, added, "guidance")
            value = value + added
        if self.sigma._version != level:
            raise checks.changed("score", "sigma")
        if seen._version != version:
            raise checks.changed("score", "x")
        if self.pairs:
            self._check(seen, value)
            value = torch.view_as_real(value.resolve_conj())
        for limit in self.limits:
            checks.score_like(x, value)
            value = limit(scaled, value)
        # Checked in full only where it is not like the last one.
        if (
            type(value) is Tensor
            and value.dtype is self.dtype
            and value.shape == self.shape
            and value.device == self.device
            and value.is_contiguous()
        ):
            return value
        checks.score_like(x, value)
        # What torch's derivatives may give: zeros without memory, and lazy negations.
        score = torch.zeros_like(x) if value._is_zerotensor() else value.resolve_neg().contiguous()
        self.dtype = value.dtype if score is value else None
        return score

    def _check(self, x: Tensor, value: Any, name: str = "score") -> None:
        if not self.pairs:
            return checks.score_like(x, value, name)
        checks.instance(name, value, Tensor, "a tensor")
        if value.shape != x.shape or value.dtype != x.dtype:
            raise ValueError(
                f"{name}: got {value.dtype} of shape {tuple(value.shape)}, expected {x.dtype} of "
                f"that of x, {tuple(x.shape)}"
            )

    def clip(self, most: Any, over: Any) -> None:
        """Shorten scores whose norm is above `most`; see `Options`."""
        if most is None:
            if over != "row":
                raise ValueError("clip_over: got it without clip_score, expected it beside it")
            return
        most = checks.positive("clip_score", most)
        if isinstance(over, Tensor):
            checks.segments(over, self.sigma, "clip_over")
        else:
            checks.choice("clip_over", over, ("row", "last", "element"), ", or segments [B]")
        self.limits.append(lambda _, score: _clipped(score, most, over, self.pairs))

    def clip_estimate(self, limits: Any) -> None:
        """Limit the estimate of the data, x + sigma^2 score; see `Options`."""
        if limits is None:
            return
        if isinstance(limits, (Sequence, Tensor, np.ndarray)):
            limits = checks.limits("clip_x0", limits)
        elif not 0 < checks.number("clip_x0", limits) < 1:
            raise ValueError(
                f"clip_x0: got {limits!r}, expected (low, high), or a quantile inside (0, 1)"
            )

        def limited(x: Tensor, score: Tensor) -> Tensor:
            if not self.pass_sigma:
                raise ValueError("clip_x0: got it for a chain without sigma, expected one with it")
            sigma = expand_like(self.sigma, x).to(x.dtype)
            estimate = x + sigma * (sigma * score)
            if isinstance(limits, tuple):
                estimate = estimate.clamp(*limits)
            elif x.numel():
                most = expand_like(_quantile(rows_of(estimate).abs(), limits).clamp(min=1), x)
                estimate = estimate.clamp(-most, most) / most
            return (estimate - x) / sigma / sigma

        self.limits.append(limited)


def _quantile(x: Tensor, q: float) -> Tensor:
    """As torch.quantile of each row, which has a largest size."""
    at = q * (x.shape[1] - 1)
    low = x.kthvalue(math.floor(at) + 1, dim=1).values
    high = x.kthvalue(math.ceil(at) + 1, dim=1).values
    return low.lerp(high, at - math.floor(at))


def _clipped(score: Tensor, most: float, over: str | Tensor, pairs: bool) -> Tensor:
    # In float64: squares of large numbers leave the range of others.
    def norm(x: Tensor, dim: Any) -> Tensor:
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64)

    if isinstance(over, Tensor):
        squares = segment_sums(norm(rows_of(score), 1)[:, 0].square(), over)
        length = expand_like(squares.index_select(0, over).sqrt(), score.double())
    elif over == "row":
        length = expand_like(norm(rows_of(score), 1)[:, 0], score.double())
    else:
        # Pairs are one number.
        dims = {"element": (-1,) if pairs else (), "last": (-2, -1) if pairs else (-1,)}[over]
        length = norm(score, dims) if dims else score.double().abs()
    return (score * (most / length).clamp(max=1)).to(
        torch.promote_types(score.dtype, torch.float32)
    )


def _required(function: Callable[..., Any]) -> int:
    """How many arguments by position a function must be given; -1 where Python cannot tell."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(called).parameters.values()
    except ValueError:
        return -1
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)
