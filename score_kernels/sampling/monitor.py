"""Chains that diverge: noticed without waiting for the device at every step, and located."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from score_kernels.sampling.engine import Chain, State

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
    """

    def __init__(self, chain: Chain, state: State, done: int, stop: bool) -> None:
        self.chain, self.done, self.stop = chain, done, stop
        self.first_sample = chain.key[-1]
        bad = _bad_rows(state)
        if bad:
            raise ValueError(
                f"shape_or_init: got a state that is not finite in {len(bad)} of {len(state.x)} "
                f"samples, the first of them sample {self.first_sample + bad[0]}; expected finite "
                "numbers"
            )
        self.last = state.clone()

    def finite(self, state: State, done: int) -> bool:
        """Whether the state is finite; if not, it is set back to the last one that was.

        Raises:
            FloatingPointError: it is not, and the chain is not one that just stops.
        """
        if _all_finite(state):
            # Where the chain ends nothing will be repeated.
            if done < self.chain.ends[-1]:
                self.last.copy_(state)
                self.done = done
            return True
        message = self._located(self.last.clone(), done)
        if not self.stop:
            raise FloatingPointError(message)
        warnings.warn(
            f"{message}; stopped, with the state after {self.done} steps", RuntimeWarning, 4
        )
        state.copy_(self.last)
        return False

    def _located(self, state: State, done: int) -> str:
        """Repeat the steps from the last finite state, and say where they diverge."""
        chain, model = self.chain, self.chain.model
        score, finite = model.score, True

        def watched(*arguments: Any, **conditions: Any) -> Tensor:
            nonlocal finite
            value = score(*arguments, **conditions)
            finite = finite and bool(value.isfinite().all())
            return value

        model.score = watched
        bad: list[int] = []
        for t in range(self.done, done):
            size = float(state.x.abs().max())
            finite = True
            chain.advance(state, t, t + 1)
            bad = _bad_rows(state)
            if bad:
                break
        model.score = score
        if not bad:
            return (
                f"x: not finite after steps {self.done} to {min(done, chain.steps) - 1}, but "
                "finite when they were repeated with the same noise: score returns other values "
                "for the same arguments"
            )
        where = f"step {t}" if t < chain.steps else "the denoising at the end"
        level = chain.phase_of(min(t, chain.steps - 1))
        sigma = chain.plan[level].sigma
        if not math.isnan(sigma):
            where += f" (level {level}, sigma = {sigma:g})"
        why = "the score is finite: the step is too large" if finite else "the score is not finite"
        return (
            f"x: sample {self.first_sample + bad[0]} is not finite after {where}, "
            f"{len(bad)} of {len(state.x)} samples in all; {why}, from a state of up to {size:g}"
        )


def _all_finite(state: State) -> bool:
    """In one pass without temporaries, as a rule: what is not finite shows in the sum."""
    return all(
        math.isfinite(float(value.sum())) or bool(value.isfinite().all())
        for value in (state.x, *state.aux.values())
    )


def _bad_rows(state: State) -> list[int]:
    """The samples that are not finite."""
    if _all_finite(state):
        return []
    rows = len(state.x)
    bad = [~value.isfinite().reshape(rows, -1).all(1) for value in (state.x, *state.aux.values())]
    return sum(bad[1:], bad[0]).nonzero().flatten().tolist()
