"""In-flight batching: every sample has the bits it has alone, and the batch is full."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import score_kernels as sk
from score_kernels.sampling import Request, stream

SIGMAS = sk.geometric_sigmas(5.0, 0.1, 7).tolist()
SCHEDULE = sk.DDPMSchedule.linear(steps=60)


def formula(x: Tensor, sigma: Tensor, center: Tensor | None = None) -> Tensor:
    """Elementwise, with a condition."""
    mean = 0.7 if center is None else center.view(-1, 1)
    return (mean - x) / (0.36 + sigma.view(-1, 1).square()) + 0.1 * torch.sin(x)


class Score:
    """Counts its calls and keeps the shapes it was given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.calls, self.shapes, self.dtype = 0, set(), dtype

    def __call__(self, x: Tensor, sigma: Tensor, center: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.shapes.add(tuple(x.shape))
        return formula(x, sigma, center).to(self.dtype)


def mixed(count: int, **more: Any) -> list[Request]:
    """Requests of every kind and length, in no order."""
    draw = random.Random(5)
    found = []
    for i in range(count):
        first, steps = draw.randrange(4), draw.randint(1, 9)
        sampler, arguments = draw.choice(
            [
                (sk.annealed_langevin, {"sigmas": SIGMAS[first:], "steps_per_level": steps,
                                        "step_size": 0.002, "denoise": draw.random() < 0.5}),
                (sk.langevin, {"step_size": 0.1, "steps": 7 * steps, "sigma": 0.5}),
                (sk.ddim, {"schedule": SCHEDULE, "steps": 6 * steps, "eta": draw.random()}),
                (sk.ddpm, {"schedule": SCHEDULE, "variance": "large"}),
                (sk.euler_maruyama, {"sde": sk.VP(), "steps": 6 * steps}),
                (sk.predictor_corrector, {"sde": sk.VE(), "steps": 3 * steps, "corrector": "ald"}),
            ]
        )  # fmt: skip
        conditions = {name: make(i) for name, make in more.items()}
        found.append(Request(2**40 + 977 * i, sampler, arguments, conditions))
    return found


def alone(request: Request, score: Callable[..., Tensor], seed: int) -> Tensor:
    conditions = {name: value[None] for name, value in request.conditions.items()}
    samples = torch.tensor([request.sample])
    arguments = {**request.arguments, "conditions": conditions, "samples": samples}
    return request.sampler(score, (1, 5), seed=seed, **arguments)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [False, True])
def test_each_sample_has_the_bits_it_has_alone(ordered: bool, dtype: torch.dtype) -> None:
    """200 requests over 16 slots: a sequence's calls are within 5% of steps / slots."""
    requests, score = mixed(200), Score(dtype)
    given = iter(requests) if ordered else requests
    made = dict(stream(score, given, (5,), seed=3, slots=16))
    assert score.shapes == {(16, 5)} and made.keys() == set(requests)
    single = Score(dtype)
    for request, x in made.items():
        assert torch.equal(x, alone(request, single, 3))
    least = single.calls / 16
    print(f"{score.calls} calls, at least {least:.1f}: {score.calls / least:.3f}")
    assert score.calls <= (1.05 if not ordered else 1.15) * least


def test_conditions_belong_to_their_request() -> None:
    requests = mixed(30, center=lambda i: torch.tensor(0.1 * i))
    score = Score()
    for request, x in stream(score, requests, (5,), seed=4, slots=7):
        mine = {"center": torch.tensor(0.1 * ((request.sample - 2**40) // 977))}
        plain = Request(request.sample, request.sampler, request.arguments)
        assert torch.equal(x, alone(plain, partial(score, center=mine["center"][None]), 4))


def test_requests_come_when_they_come() -> None:
    """None: nothing for now. A finished sample is given out before a later request is asked for."""
    requests, taken, made = mixed(5), [], []

    def arriving() -> Iterator[Request | None]:
        for request in requests:
            yield None
            yield None
            taken.append(request)
            yield request

    for request, x in stream(Score(), arriving(), (5,), seed=1, slots=2):
        made.append(request)
        assert torch.equal(x, alone(request, Score(), 1)) and len(taken) <= len(made) + 1
    assert set(made) == set(requests)
    assert not list(stream(Score(), [], (5,), seed=1))


def test_it_runs_in_inference_mode_and_with_a_compiled_score() -> None:
    requests = mixed(6)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(formula, backend=frames)
    with torch.inference_mode():
        made = dict(stream(compiled, requests, (5,), seed=2, slots=4))
    assert frames.frame_count == 1
    for request, x in made.items():
        torch.testing.assert_close(x, alone(request, Score(), 2), rtol=1e-5, atol=1e-5)


PLAIN = {"step_size": 0.1, "steps": 4, "sigma": 1.0}


def test_a_bad_request_ends_alone() -> None:
    """Its error comes from next(); the others go on, also those in flight."""
    good = [Request(i, sk.langevin, PLAIN) for i in range(5)]
    bad = [
        Request(-2, sk.langevin, PLAIN),
        Request(70, sk.langevin, {**PLAIN, "step_size": 1e38}),
        Request(71, sk.langevin, PLAIN, {"center": torch.tensor(1.0)}),
    ]
    mixed = [good[0], bad[0], good[1], bad[1], good[2], bad[2], *good[3:]]
    running, made, errors = stream(Score(), iter(mixed), (5,), seed=1, slots=2), [], []
    while True:
        try:
            request, x = next(running)
        except StopIteration:
            break
        except (ValueError, FloatingPointError) as error:
            errors.append(str(error))
            continue
        made.append(request)
        assert torch.equal(x, alone(request, Score(), 1))
    assert set(made) == set(good)
    for words in ("request -2: sample: got -2", "sample 70 is not", "request 71: got conditions"):
        assert any(error.startswith(words) or words in error for error in errors)


def test_conditions_of_a_request_are_like_the_first_s() -> None:
    """Or one would be sampled with what another brought."""
    center = torch.tensor(1.0)
    for other in ({}, {"center": center.long()}, {"center": center[None]}, {"shift": center}):
        requests = [Request(1, sk.langevin, PLAIN, {"center": center})]
        requests += [Request(2, sk.langevin, PLAIN, other)]
        with pytest.raises(ValueError, match="request 2: got conditions"):
            list(stream(Score(), iter(requests), (5,), seed=1, slots=2))


def test_conditions_with_gradients_and_of_inference_mode() -> None:
    with torch.inference_mode():
        center = torch.tensor(0.3)
    for value in (torch.nn.Parameter(torch.tensor(0.3)), center):
        requests = [Request(i, sk.langevin, PLAIN, {"center": value}) for i in range(4)]
        running = stream(Score(), iter(requests), (5,), seed=1, slots=1)
        with torch.inference_mode():
            next(running)
        rest = list(running)
        assert len(rest) == 3 and not any(x.requires_grad for _, x in rest)


def test_a_source_without_requests_is_asked_once_a_step() -> None:
    """The batch goes on meanwhile; one that is asked until it has a request would wait for ever."""
    (request,), score = mixed(1), Score()

    def arriving() -> Iterator[Request | None]:
        yield request
        asked = 0
        while score.calls < 4:
            assert asked <= score.calls
            asked += 1
            yield None

    ((_, x),) = stream(score, arriving(), (5,), seed=1, slots=2)
    assert torch.equal(x, alone(request, Score(), 1))


def test_a_request_stays_as_it_is() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        mixed(1)[0].sample = 3  # type: ignore[misc]


def test_no_steps_are_the_prior() -> None:
    request = Request(7, sk.langevin, {**PLAIN, "steps": 0})
    ((_, x),) = stream(Score(), [request], (5,), seed=1, slots=2)
    assert torch.equal(x, alone(request, Score(), 1))


@pytest.mark.parametrize(
    ("requests", "kind", "words"),
    [
        ([3], TypeError, "requests: got int 3, expected requests or None"),
        ([Request(1, sk.probability_flow, {"sigmas": SIGMAS})], ValueError, "are not one call"),
        ([Request(1, sk.langevin, {"step_size": 0.1, "steps": 2})], ValueError, "expected sigma"),
        ([Request(1, lambda *_: 4)], TypeError, "request 1: sampler: got int 4"),
        ([Request(1, "ddim")], TypeError, "request 1: sampler: got str 'ddim', expected a f"),
        ([Request(1, sk.ddim, ())], TypeError, "request 1: arguments: got tuple"),
        (Request(1, sk.ddim), TypeError, "requests: got Request"),
        ([Request(1, sk.langevin, {"step_size": 0.1, "steps": 2, "sigma": 1.0, "seed": 5})],
         ValueError, "arguments: got 'seed', expected the sampler's own"),
        ([Request(-1, sk.langevin, {"step_size": 0.1, "steps": 2, "sigma": 1.0})], ValueError,
         "sample: got -1"),
        ([Request(2**56, sk.langevin, {"step_size": 0.1, "steps": 2, "sigma": 1.0})], ValueError,
         "sample: got 72057594037927936"),
        ([Request(1, sk.langevin, {"step_size": 0.1, "steps": 2, "sigma": 1.0}, {"center": 3})],
         TypeError, r"conditions\['center'\]: got int 3"),
        ([Request(8, sk.langevin, {"step_size": 1e38, "steps": 9, "sigma": 1.0})],
         FloatingPointError, "x: sample 8 is not finite"),
    ],
)  # fmt: skip
def test_what_is_refused(requests: list[Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        list(stream(Score(), requests, (5,), seed=1, slots=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": 0}, "slots: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"device": "nowhere"}, "device"),
    ],
)
def test_arguments_are_checked_before_the_first_sample(change: dict[str, Any], words: str) -> None:
    make: Callable[..., Any] = stream
    with pytest.raises(ValueError, match=words):
        make(Score(), [], (5,), **{"seed": 1, **change})
