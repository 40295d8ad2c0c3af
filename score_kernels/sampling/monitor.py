"""Finds and locates the divergence of a chain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from score_kernels.sampling.engine import Chain

__all__ = ["CHECK_EVERY", "DivergenceMonitor"]

# Steps from check to check. A check waits for the device, reads the state and copies it.
CHECK_EVERY = 50


class DivergenceMonitor:
    """Checks now and then that the state of a chain is finite.

    An element that is not finite stays so, as an affine step has a x in it: none is missed. The
    steps since the last check are then repeated from a copy of the state there, with the same
    noise, and checked one by one.

    Attributes:
        done: steps done at the last state that was seen to be finite.
        stopped: whether the chain has ended there.
    """

    def __init__(self, chain: Chain, done: int, stop: bool) -> None:
        self.chain, self.done, self.stop, self.stopped = chain, done, stop, False
        row = _first_bad_row(chain.tensors)
        if row is not None:
            raise ValueError(
                f"shape_or_init: got {chain.key.name_of(row)} not finite, expected finite numbers"
            )
        self.last = [value.clone() for value in chain.tensors]

    def finite(self, done: int, by_callback: bool = False) -> bool:
        """Whether the state is finite; if not, it is set back to the last one that was.

        With `by_callback` a callback has changed the state after the last step.

        Raises:
            FloatingPointError: it is not, and the chain is not one that just stops.
        """
        row = _first_bad_row(self.chain.tensors)
        if row is None:
            # Where the chain ends nothing will be repeated.
            if done < self.chain.ends[-1]:
                _copy(self.last, self.chain.tensors)
                self.done = done
            return True
        message = self._located(done, row if by_callback else None)
        if not self.stop:
            raise FloatingPointError(message)
        message += f"; stopped, with the state after {self.done} steps"
        warnings.warn(message, RuntimeWarning, 4)
        # The replay has moved it on to the last finite one.
        _copy(self.chain.tensors, self.last)
        self.stopped = True
        return False

    def _located(self, done: int, changed: int | None) -> str:
        """Repeat the steps from the last finite state, and say where they diverge.

        `changed` is the first bad row, where a callback has changed the state after the last step.
        """
        chain, score, finite = self.chain, self.chain.model.score, True

        def watched(*arguments: Any, **conditions: Any) -> Tensor:
            nonlocal finite
            value = score(*arguments, **conditions)
            finite = finite and bool(value.isfinite().all())
            return value

        _copy(chain.tensors, self.last)
        chain.model.score, first = watched, self.done
        for t in range(first, done):
            finite = True
            chain.advance(t, t + 1)
            row = _first_bad_row(chain.tensors)
            if row is not None:
                break
            if self.stop:
                _copy(self.last, chain.tensors)
                self.done = t + 1
        else:
            if changed is not None:
                sample = chain.key.name_of(changed)
                return f"x: {sample} is not finite after the callback of step {done - 1}"
            return (
                f"x: not finite after steps {first} to {min(done, chain.steps) - 1}, but "
                "finite when they were repeated with the same noise: score is not deterministic"
            )
        where = f"step {t}" if t < chain.steps else "the denoising at the end"
        level = chain.phase_of(min(t, chain.steps - 1))
        sigma = chain.plan[level].sigma
        if not math.isnan(sigma):
            where += f" (level {level}, sigma = {sigma:g})"
        why = "the step is too large" if finite else "the score is not finite"
        return f"x: {chain.key.name_of(row)} is not finite after {where}: {why}"


def _first_bad_row(tensors: Sequence[Tensor]) -> int | None:
    """The first sample that is not finite in one of the tensors."""
    # In one pass without temporaries, as a rule: what is not finite shows in the sum.
    if all(math.isfinite(float(v.sum())) or bool(v.isfinite().all()) for v in tensors):
        return None
    finite = [value.isfinite().reshape(len(value), -1).all(1) for value in tensors]
    return int(torch.stack(finite).all(0).int().argmin())


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
