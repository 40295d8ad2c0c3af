"""Chains that diverge: what is reported, where they stop, and what checking costs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import score_kernels as sk
from score_kernels.diffusion.sde import VE

SIGMAS = sk.geometric_sigmas(10.0, 0.1, 40)
ROWS, STEPS = 5, 120


class Faulty:
    """-x / (1 + sigma^2), but at one call something else for one sample."""

    def __init__(self, call: int, row: int = 3, value: float = math.nan) -> None:
        self.call, self.row, self.value, self.calls = call, row, value, 0
        self.marks: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        score = -x / (1 + sigma.view(-1, 1) ** 2)
        # A call is recognised by its state, so that repeating it gives the same.
        if self.calls == self.call:
            self.marks.append(x.clone())
        self.calls += 1
        if self.marks and torch.equal(x, self.marks[0]):
            score[self.row, 1] = self.value
        return score


def sampler(score: Any, shape: Any = (ROWS, 3), **options: Any) -> Tensor:
    return sk.annealed_langevin(
        score, shape, SIGMAS, steps_per_level=3, step_size=1e-3, seed=1, **options
    )


@pytest.mark.parametrize("step", [0, 1, 49, 50, 51, 118, 119])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_level_step_and_sample_are_named(step: int, value: float) -> None:
    sigma = f"{float(SIGMAS[step // 3]):g}"
    message = (
        rf"x: sample {2**40 + 3} is not finite after step {step} \(level {step // 3}, sigma = "
        rf"{sigma}\): the score is not finite"
    )
    with pytest.raises(FloatingPointError, match=message.replace("+", r"\+")):
        sampler(Faulty(step, value=value), first_sample=2**40)


def test_a_resumed_chain_is_searched_from_where_it_was_resumed() -> None:
    with pytest.raises(FloatingPointError, match="not finite after step 25 "):
        sk.annealed_langevin(
            Faulty(5), torch.ones(ROWS, 3), SIGMAS, steps_per_level=3, step_size=1e-3, seed=1,
            first_step=20,
        )  # fmt: skip


def test_the_denoising_is_checked() -> None:
    where = r"after the denoising at the end \(level 39, sigma = 0.1\)"
    with pytest.raises(FloatingPointError, match=f"not finite {where}"):
        sampler(Faulty(STEPS))
    # One step a level: that of the last step is the last.
    with pytest.raises(FloatingPointError, match=r"not finite after step 39 \(level 39,"):
        sk.annealed_langevin(
            Faulty(39), (ROWS, 3), SIGMAS, steps_per_level=1, step_size=1e-3, seed=1
        )


def test_a_step_too_large_is_called_so() -> None:
    with pytest.raises(FloatingPointError, match="step 1[0-9]*.*: the step is too large"):
        sk.langevin(lambda x: -x, (2, 2), step_size=1e3, steps=40, seed=0)


@pytest.mark.parametrize("step", [0, 30, 80, 99, 100, 119, STEPS])
def test_stopping_gives_the_last_finite_state(step: int) -> None:
    states: list[Tensor] = []
    sampler(Faulty(10**9), callback=lambda p: states.append(p.x.clone()))
    words = f"stopped, with the state after {step} steps"
    with pytest.warns(RuntimeWarning, match=words) as said:
        x = sampler(Faulty(step), on_nan="stop")
    # Once, where the sampler is called.
    assert [warning.filename for warning in said] == [__file__]
    if step:
        assert torch.equal(x, states[step - 1])
    with pytest.warns(RuntimeWarning, match="is not finite after"):
        trajectory = sampler(Faulty(step), on_nan="stop", record_every=20)
    # The last state comes once.
    assert torch.equal(trajectory[-1], x) and len(trajectory) == max(1, -(-step // 20))
    for i, frame in enumerate(trajectory[:-1]):
        assert torch.equal(frame, states[20 * i + 19])


def test_ignoring_is_as_without_checking() -> None:
    x = sampler(Faulty(60), on_nan="ignore")
    assert x[3].isnan().any() and x[[0, 1, 2, 4]].isfinite().all()
    assert torch.equal(sampler(Faulty(10**9), on_nan="ignore"), sampler(Faulty(10**9)))


def test_a_score_that_is_not_deterministic_is_named() -> None:
    calls = [0]

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        calls[0] += 1
        return x * (math.nan if calls[0] == 70 else -1.0)

    with pytest.raises(
        FloatingPointError, match="steps 50 to 99, but finite when they were repeated"
    ):
        sampler(score)


@pytest.mark.parametrize(
    "make",
    [
        partial(sk.predictor_corrector, sde=VE(0.1, 10.0), steps=60),
        partial(sk.probability_flow, sigmas=SIGMAS),
        partial(sk.euler_maruyama, sde=VE(0.1, 10.0), steps=60),
    ],
)
def test_every_kind_of_step_is_repeated(make: Any) -> None:
    with pytest.raises(FloatingPointError, match="x: sample 3 is not finite after step .*level"):
        make(Faulty(41), (ROWS, 3), seed=2)


def test_checks_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the device: three in 120 steps, and one at each end."""
    waits = []
    for name in ("__bool__", "__float__", "item", "cpu"):
        wait = getattr(Tensor, name)

        def counted(t: Tensor, wait: Any = wait) -> Any:
            waits.append(1)
            return wait(t)

        monkeypatch.setattr(Tensor, name, counted)
    sampler(lambda x, sigma: -x)
    assert len(waits) == 4


def test_large_finite_numbers_are_finite() -> None:
    start = torch.full((2, 8), 3e38)
    assert sk.langevin(lambda x: 0 * x, start, step_size=1e-3, steps=3).isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_nan": "never"}, "on_nan: got 'never', expected one of 'raise', 'stop', 'ignore'"),
        (
            {
                "known": torch.tensor([math.inf, 0.0, 0.0]),
                "mask": torch.tensor([True, False, True]),
            },
            "known: not finite where mask is true",
        ),
    ],
)
def test_wrong_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(lambda x, sigma: -x, **options)


def test_a_start_that_is_not_finite_is_named() -> None:
    start = torch.zeros(4, 2)
    start[2, 1] = math.nan
    with pytest.raises(ValueError, match="shape_or_init: got sample 2 not finite"):
        sk.langevin(lambda x: -x, start, step_size=0.1, steps=3)


def test_a_resumed_chain_that_stops_has_its_own_frames() -> None:
    states: list[Tensor] = []
    sampler(Faulty(10**9), callback=lambda p: states.append(p.x.clone()))
    with pytest.warns(RuntimeWarning, match="stopped, with the state after 87 steps") as said:
        trajectory = sampler(
            Faulty(87 - 30), shape=states[29], first_step=30, on_nan="stop", record_every=10
        )
    # Once, and the frames after steps 40, 50, ... 80, and the last finite state.
    assert len(said) == 1 and len(trajectory) == 6
    for i, frame in enumerate(trajectory[:-1]):
        assert torch.equal(frame, states[39 + 10 * i])
    assert torch.equal(trajectory[-1], states[86])
