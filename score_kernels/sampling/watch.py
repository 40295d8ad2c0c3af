"""Chains that diverge: noticed without waiting for the device at every step, and located."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from score_kernels.sampling.steps import Steps

__all__ = ["Watch"]

# Steps from look to look. A look waits for the device, reads the state and copies it.
_EVERY = 50


class Watch:
    """Looks at the state of a chain now and then.

    An element that is not finite stays so, as an affine step has a x in it: nothing is missed. The
    steps since the last look are then done again from a copy of the state there, with the same
    noise, and looked at one by one.

    Attributes:
        done: steps done at the last state that was seen to be finite.
    """

    def __init__(self, steps: Steps, x: Tensor, done: int, stop: bool) -> None:
        self.steps = steps
        self.done = self.first = done
        self.stop = stop
        bad = _bad_rows(x)
        if len(bad):
            raise ValueError(
                f"shape_or_init: got a state that is not finite in {len(bad)} of {len(x)} samples, "
                f"the first of them sample {steps.first_sample + bad[0]}; expected finite numbers"
            )
        self.last = x.clone()

    def due(self, done: int) -> bool:
        return (done - self.first) % _EVERY == 0

    def finite(self, x: Tensor, done: int) -> bool:
        """Whether x is finite; if not, and the chain may stop, x is the last state that was.

        Raises:
            FloatingPointError: it is not, and the chain may not just stop.
        """
        if _all_finite(x):
            self.last.copy_(x)
            self.done = done
            return True
        message = self._found(self.last.clone(), done)
        if not self.stop:
            raise FloatingPointError(message)
        warnings.warn(
            f"{message}; stopped, with the state after {self.done} steps", RuntimeWarning, 4
        )
        x.copy_(self.last)
        return False

    def _found(self, x: Tensor, done: int) -> str:
        network, plan = self.steps.network, self.steps.plan
        score, calls = network.score, []

        def recorded(*arguments: Any, **conditions: Any) -> Tensor:
            value = score(*arguments, **conditions)
            calls.append(bool(value.isfinite().all()))
            return value

        network.score = recorded
        phases = [i for i, phase in enumerate(plan) for _ in range(phase.steps)]
        for t in range(self.done, done):
            size = float(x.abs().max())
            calls.clear()
            if t < len(phases):
                self.steps(x, t, phases[t])
            else:
                self.steps.end(x)
            bad = _bad_rows(x)
            if len(bad):
                break
        network.score = score
        between = f"steps {self.done} to {min(done, len(phases)) - 1}"
        if not len(bad):
            return (
                f"x: not finite after {between}, but finite when they were done again with the "
                "same noise: score gives other values for the same arguments"
            )
        index = phases[min(t, len(phases) - 1)]
        where = f"step {t}" if t < len(phases) else "the denoising at the end"
        sigma = plan[index].sigma
        level = "" if math.isnan(sigma) else f" (level {index}, sigma = {sigma:g})"
        why = (
            "the score is finite: the step is too large"
            if all(calls)
            else "score returned what is not finite"
        )
        return (
            f"x: sample {self.steps.first_sample + bad[0]} is not finite after {where}{level}, "
            f"{len(bad)} of {len(x)} samples in all; {why}, from a state of up to {size:g}"
        )


def _all_finite(x: Tensor) -> bool:
    """In one pass without temporaries, as a rule: what is not finite shows in the sum."""
    return math.isfinite(float(x.sum())) or bool(x.isfinite().all())


def _bad_rows(x: Tensor) -> list[int]:
    """The samples that are not finite."""
    if _all_finite(x):
        return []
    return x.isfinite().reshape(len(x), -1).all(1).logical_not().nonzero().flatten().tolist()
