"""Chains: closed forms, the contract over splits and resumes, and every wrong input."""

from __future__ import annotations

import copy
import gc
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from scipy import stats
from torch import Tensor

import score_kernels
from score_kernels import annealed_langevin, geometric_sigmas, langevin, log_likelihood
from score_kernels.sampling import Progress
from score_kernels.sampling.engine import Chain, Phase, run

SIGMAS = geometric_sigmas(4.0, 0.1, 6)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The score of N(0, 1 + sigma^2)."""
    return -x / (1 + sigma**2).view(-1, *[1] * (x.dim() - 1))


def anneal(shape: Any, sigmas: Any = SIGMAS, **options: Any) -> Tensor:
    defaults = {"steps_per_level": 5, "step_size": 1e-3, "seed": 9}
    return annealed_langevin(gaussian, shape, sigmas, **{**defaults, **options})


@pytest.mark.parametrize("alpha", [0.3, 1.5])
def test_langevin_reaches_its_stationary_variance(alpha: float) -> None:
    """Target variance v = 0.7: the chain settles at v / (1 - alpha / (4 v)); twice the step, as
    ``x + alpha s + sqrt(2 alpha) z`` takes, would not."""
    v = 0.7
    chains = 200_000
    x = langevin(lambda x: -x / v, (chains, 1), step_size=alpha, steps=60, seed=4)
    # The chain is Gaussian and its memory after 60 steps is (1 - alpha/2v)^60 < 1e-6.
    expected = v / (1 - alpha / (4 * v))
    statistic = float(x.double().square().sum()) / expected
    p = 2 * min(stats.chi2.cdf(statistic, chains), stats.chi2.sf(statistic, chains))
    assert p > tolerances.ALPHA, (float(x.var()), expected)
    doubled = v / (1 - alpha / (2 * v)) if alpha < 2 * v else math.inf
    assert stats.chi2.cdf(float(x.double().square().sum()) / doubled, chains) < tolerances.ALPHA


MEANS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
LOG_WEIGHTS = torch.log(torch.tensor([0.2, 0.8]))


def toy_score(x: Tensor, sigma: Tensor) -> Tensor:
    """0.2 N((-5, -5), sigma^2 I) + 0.8 N((5, 5), sigma^2 I), exactly, by the logit of its modes."""
    variance = sigma.square()
    # log of the ratio of the two weighted densities: linear in x.
    logit = LOG_WEIGHTS[1] - LOG_WEIGHTS[0] + 10 * x.sum(1) / variance
    mean = MEANS[0] + torch.sigmoid(logit)[:, None] * (MEANS[1] - MEANS[0])
    return (mean - x) / variance[:, None]


def test_toy_mode_mass() -> None:
    """Figure 2 of the literature: annealing finds the weights of the modes, Langevin does not."""
    start = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(5)) * 16 - 8
    sigmas = torch.exp(torch.linspace(math.log(20), 0, 10))
    annealed = annealed_langevin(
        toy_score, start, sigmas, steps_per_level=100, step_size=0.1, seed=11, denoise=False
    )
    plain = langevin(toy_score, start[:20_000], step_size=0.1, steps=1000, sigma=1.0, seed=12)
    masses = [float((x.sum(1) > 0).double().mean()) for x in (annealed, plain)]
    print(f"mode mass: annealed {masses[0]:.4f}, plain {masses[1]:.4f}")
    assert abs(masses[0] - tolerances.TOY_ANNEALED) < tolerances.TOY_ANNEALED_TOLERANCE
    assert abs(masses[1] - tolerances.TOY_PLAIN) < tolerances.TOY_PLAIN_TOLERANCE


@pytest.mark.parametrize("shape", [(8, 3), (8, 1, 8, 8), (8,)])
def test_a_run_does_not_depend_on_its_batches(backend: str, shape: tuple[int, ...]) -> None:
    whole = anneal(shape, first_sample=2**32 - 3)
    for cuts in ((3, 5), (1,) * 8):
        pieces, first = [], 2**32 - 3
        for rows in cuts:
            pieces.append(anneal((rows, *shape[1:]), first_sample=first))
            first += rows
        assert torch.equal(torch.cat(pieces), whole)


def test_a_run_is_the_same_on_every_backend_and_thread_count() -> None:
    from conftest import BACKENDS, on_backend

    runs = []
    for name in BACKENDS:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with on_backend(name):
                runs.append(anneal((200, 3, 5, 5)))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("done", [1, 7, 10, 29, 30])
def test_resume_in_the_middle_gives_the_same_bits(backend: str, done: int) -> None:
    whole = anneal((4, 6))
    states = anneal((4, 6), record_every=1)
    assert torch.equal(anneal(states[done - 1], first_step=done), whole)


def test_an_inpainting_resumes_where_known_elements_are() -> None:
    """A score that couples elements sees what the known ones are."""

    def coupled(x: Tensor, sigma: Tensor) -> Tensor:
        return -(x + x.mean(1, keepdim=True)) / (1 + sigma**2)[:, None]

    options: dict[str, Any] = {"steps_per_level": 5, "step_size": 1e-3, "seed": 9}
    options |= {"known": torch.ones(6), "mask": torch.arange(6) < 3, "denoise": False}
    states: list[Tensor] = []
    whole = annealed_langevin(
        coupled, (4, 6), SIGMAS, callback=lambda p: states.append(p.x.clone()), **options
    )
    for done in (1, 6):
        resumed = annealed_langevin(coupled, states[done - 1], SIGMAS, first_step=done, **options)
        assert torch.equal(resumed, whole)


def test_langevin_resumes_too() -> None:
    options: dict[str, Any] = {"step_size": 0.1, "steps": 20, "seed": 1}
    states = langevin(lambda x: -x, (4, 6), record_every=5, **options)
    assert torch.equal(langevin(lambda x: -x, states[1], first_step=10, **options), states[-1])


def test_record_every_and_callback_see_the_same_chain() -> None:
    seen: list[tuple[int, int, float, Tensor]] = []

    def callback(progress: Progress) -> None:
        seen.append((progress.step, progress.level, progress.sigma, progress.x.clone()))

    trajectory = anneal((4, 6), record_every=7, callback=callback)
    assert trajectory.shape == (30 // 7 + 1, 4, 6) and trajectory.device.type == "cpu"
    assert [s[0] for s in seen] == list(range(30))
    assert [s[1] for s in seen] == [i // 5 for i in range(30)]
    assert [s[2] for s in seen] == [float(SIGMAS[i // 5]) for i in range(30)]
    for frame, step in zip(trajectory[:-1], range(6, 30, 7), strict=True):
        assert torch.equal(frame, seen[step][3])
    assert torch.equal(trajectory[-1], anneal((4, 6)))
    assert torch.equal(anneal(seen[16][3], first_step=17, record_every=7), trajectory[2:])


def test_the_score_gets_one_sigma_per_sample() -> None:
    calls: list[Tensor] = []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (5,) and sigma.dtype == torch.float32 and not torch.is_grad_enabled()
        calls.append(sigma.clone())
        return -x

    annealed_langevin(score, (5, 2), SIGMAS, steps_per_level=2, step_size=1e-3, seed=1)
    want = [*SIGMAS.repeat_interleave(2).tolist(), float(SIGMAS[-1])]
    assert [float(c[0]) for c in calls] == want and all((c == c[0]).all() for c in calls)


def test_nothing_is_allocated_per_step() -> None:
    """The state, each level's sigma and the callback's object are the same from step to step, and
    tensors in the world do not grow."""
    identities, levels, counts, out = set(), set(), [], torch.zeros(3, 4)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        identities.add(x.data_ptr())
        levels.add(id(sigma))
        return out

    def callback(progress: Progress) -> None:
        identities.add(id(progress))
        if progress.step in (3, 28):
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))

    annealed_langevin(
        score, (3, 4), SIGMAS, steps_per_level=5, step_size=1e-3, seed=1, callback=callback
    )
    assert len(identities) == 2 and len(levels) == len(SIGMAS) and counts[0] == counts[1]


def test_the_score_may_be_a_gradient_and_may_not_keep_a_stale_graph() -> None:
    """Energy-based scores: autograd inside the sampler, and a graph kept over a step is refused."""

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            energy = (leaf.square() / (2 * (1 + sigma**2))[:, None]).sum()
            return -torch.autograd.grad(energy, leaf)[0]

    got = annealed_langevin(score, (4, 6), SIGMAS, steps_per_level=5, step_size=1e-3, seed=9)
    torch.testing.assert_close(got, anneal((4, 6)), rtol=1e-4, atol=1e-4)
    weight, kept = torch.ones(6, requires_grad=True), []

    def careless(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            kept.append((x * weight).sum())
        return gaussian(x, sigma)

    annealed_langevin(careless, (4, 6), SIGMAS, steps_per_level=5, step_size=1e-3, seed=9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].backward()


def test_half_precision_scores_and_fp64_states() -> None:
    x = torch.randn(3, 5)
    for dtype in (torch.bfloat16, torch.float16):
        got = annealed_langevin(
            lambda x, s, d=dtype: gaussian(x, s).to(d),
            x,
            SIGMAS,
            steps_per_level=2,
            step_size=1e-3,
            seed=1,
        )
        assert got.dtype == torch.float32
    assert anneal(x.double()).dtype == torch.float64


def test_the_start_is_left_alone_and_the_prior_is_named() -> None:
    x = torch.randn(4, 5)
    before = x.clone()
    anneal(x)
    assert torch.equal(x, before)
    kept: list[Tensor] = []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append(x.clone())
        return torch.zeros_like(x)

    for init, low, high in (("normal", -20.0, 20.0), ("uniform", 0.0, 1.0)):
        kept.clear()
        annealed_langevin(
            score, (4000, 2), SIGMAS, steps_per_level=1, step_size=1e-3, seed=2, init=init
        )
        assert kept[0].min() >= low and kept[0].max() <= high
        if init == "normal":
            # N(0, sigma_1^2): chi-square of 8000 numbers.
            total = float(kept[0].double().square().sum()) / float(SIGMAS[0]) ** 2
            assert tolerances.ALPHA < stats.chi2.cdf(total, 8000) < 1 - tolerances.ALPHA


def test_torch_s_seed_rules_a_run_without_one() -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(anneal((2, 3), seed=None))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_score_that_marks_the_state_for_gradients_leaves_the_samples_without() -> None:
    def score(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x.requires_grad_()
            return -torch.autograd.grad(0.5 * x.square().sum(), x)[0]

    x = langevin(score, (2, 3), step_size=0.1, steps=3, seed=0)
    assert not x.requires_grad
    assert torch.equal(x, langevin(lambda x: -x, (2, 3), step_size=0.1, steps=3, seed=0))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_empty_batches(backend: str, shape: tuple[int, ...]) -> None:
    assert anneal(shape).shape == shape
    assert langevin(lambda x: -x, shape, step_size=0.1, steps=3).shape == shape


def test_progress_bar_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    anneal((2, 3), progress=True)
    # To its end, step by step.
    assert re.search(r"sampling: 100%.* (\d+)/\1 ", capsys.readouterr().err)
    anneal((2, 3))
    assert capsys.readouterr().err == ""
    log_likelihood(gaussian, torch.zeros(2, 3), SIGMAS)
    assert capsys.readouterr().err == ""
    log_likelihood(gaussian, torch.zeros(2, 3), SIGMAS, progress=True)
    assert "likelihood" in capsys.readouterr().err


def wrong_score(value: Any) -> Any:
    return lambda x, sigma: value(x)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"sigmas": [1.0, 2.0]}, ValueError, r"sigmas: got sigmas\[0\] = 1.0.*decreasing"),
        ({"sigmas": [1.0, 1.0]}, ValueError, "sigmas: .*strictly decreasing"),
        ({"sigmas": [1.0, -0.5]}, ValueError, r"sigmas\[1\]: got -0.5, expected a number above 0"),
        ({"sigmas": [1.0, 0.0]}, ValueError, r"sigmas\[1\]: got 0.0"),
        ({"sigmas": [math.nan]}, ValueError, r"sigmas\[0\]: got nan"),
        ({"sigmas": []}, ValueError, "sigmas: got none"),
        ({"sigmas": 1.0}, TypeError, "sigmas: got float 1.0"),
        ({"sigmas": torch.ones(2, 2)}, ValueError, r"sigmas: got a tensor of shape \(2, 2\)"),
        ({"sigmas": ["a"]}, TypeError, r"sigmas\[0\]: got str"),
        ({"steps_per_level": 0}, ValueError, "steps_per_level: got 0"),
        ({"steps_per_level": 2.5}, TypeError, "steps_per_level: got float"),
        ({"step_size": 0}, ValueError, "step_size: got 0"),
        ({"step_size": -1e-3}, ValueError, "step_size: got -0.001"),
        ({"step_size": math.nan}, ValueError, "step_size: got nan"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 2**64}, ValueError, "seed: got"),
        ({"seed": 1.0}, TypeError, "seed: got float"),
        ({"first_sample": -1}, ValueError, "first_sample: got -1"),
        ({"first_sample": 2**56 - 1}, ValueError, "first_sample: got .* for a batch of 2"),
        ({"steps_per_level": 2**31}, ValueError, "steps: got .*2\\*\\*32"),
        ({"init": "zeros"}, ValueError, "init: got 'zeros'"),
        ({"first_step": 31}, ValueError, "first_step: got 31, expected at most"),
        ({"first_step": -1}, ValueError, "first_step: got -1"),
        ({"first_step": 3}, ValueError, "first_step: got 3 with a shape"),
        ({"record_every": 0}, ValueError, "record_every: got 0"),
        ({"callback": 3}, TypeError, "callback: got int"),
        ({"shape": (2.0, 3)}, TypeError, "shape: got float"),
        ({"shape": 5}, TypeError, "shape: got int"),
        ({"shape": ()}, ValueError, r"shape: got \(\)"),
        ({"shape": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "shape_or_init: got dtype"),
        ({"shape": torch.zeros(2, 3).half()}, TypeError, "shape_or_init: got dtype torch.float16"),
        (
            {"shape": torch.zeros(2, 3), "device": "meta"},
            ValueError,
            "device: got str 'meta'.*it computes nothing",
        ),
        ({"score": wrong_score(lambda x: x[:1])}, ValueError, r"score: got shape \(1, 3\)"),
        ({"score": wrong_score(lambda x: x.double())}, TypeError, "score: got dtype torch.float64"),
        ({"score": wrong_score(lambda x: x.to("meta"))}, ValueError, "score: got device meta"),
        ({"score": wrong_score(lambda x: None)}, TypeError, "score: got NoneType None"),
        ({"score": 3}, TypeError, "score: got int 3"),
    ],
)
def test_wrong_inputs_are_named(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments = {
        "score": gaussian,
        "shape": (2, 3),
        "sigmas": SIGMAS,
        "steps_per_level": 5,
        "step_size": 1e-3,
        "seed": 1,
        **options,
    }
    score, shape, sigmas = (arguments.pop(k) for k in ("score", "shape", "sigmas"))
    with pytest.raises(error, match=match):
        annealed_langevin(score, shape, sigmas, **arguments)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"step_size": 0.0}, ValueError, "step_size: got 0.0"),
        ({"steps": -1}, ValueError, "steps: got -1"),
        ({"sigma": 0.0}, ValueError, "sigma: got 0.0"),
    ],
)
def test_langevin_names_wrong_inputs(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        langevin(lambda x: -x, (2, 3), **{"step_size": 0.1, "steps": 3, **options})


def test_an_unknown_keyword_names_the_sampler() -> None:
    with pytest.raises(TypeError, match="annealed_langevin: .* unexpected keyword argument 'sead'"):
        anneal((2, 3), sead=1)


class Constant(torch.nn.Module):
    """A score that costs three Python calls."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = torch.zeros(8, 8, dtype=dtype)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_eight_python_calls(dtype: torch.dtype) -> None:
    net = Constant(dtype)

    def python_calls(steps: int) -> int:
        calls = 0

        def count(frame: Any, event: str, _: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            annealed_langevin(
                net, (8, 8), SIGMAS, steps_per_level=steps, step_size=1e-3, seed=1, on_nan="ignore"
            )
        finally:
            sys.setprofile(None)
        return calls

    python_calls(1)
    assert python_calls(101) - python_calls(1) <= 8 * 100 * len(SIGMAS)


# --- auxiliary tensors ------------------------------------------------------------------------


@dataclass(frozen=True)
class LastScore:
    """The part of a two-step method that is the last step's score, times b."""

    b: float

    def __call__(self, chain: Chain, key: Any) -> tuple[Tensor, None]:
        score, last = chain.model(chain.x), chain.aux["score"]
        chain.backend.affine_step(chain.x, chain.x, last, 1.0, self.b, 0.0, key)
        last.copy_(score)
        return score, None


TWO_STEP_SIGMAS = geometric_sigmas(4.0, 0.1, 60).tolist()


def two_step(score: Any, shape: Any, noise: float = 0.1, **options: Any) -> Tensor:
    """The probability flow by the method of Adams and Bashforth, with some noise put back."""
    levels, plan, before = TWO_STEP_SIGMAS, [], None
    for sigma, following in pairwise(levels):
        h = sigma - following
        ratio = 0.0 if before is None else h / (2 * (before - sigma))
        back = LastScore(-h * ratio * (before or 0.0))
        b, c = h * (1 + ratio) * sigma, noise * following
        plan.append(Phase(sigma, 1.0, b, c, next_level=(following, 1.0), pre_step=back))
        before = sigma

    def init_aux(x: Tensor, key: score_kernels.NoiseKey) -> dict[str, Tensor]:
        return {"score": torch.zeros_like(x)}

    return run("two_step", score, shape, plan, levels[0], options, init_aux=init_aux)


def states_of(sampler: Callable[..., Tensor], **options: Any) -> list[Progress]:
    """The states after each step."""
    states: list[Progress] = []

    def callback(progress: Progress) -> None:
        states.append(copy.deepcopy(progress))

    sampler(callback=callback, **options)
    return states


def test_two_steps_are_more_accurate_than_one(backend: str) -> None:
    """Against the flow of a Gaussian, a quarter of the error of Euler's method."""
    x = torch.randn(50, 3) * 4
    levels = torch.tensor(TWO_STEP_SIGMAS)
    exact = x * ((1 + levels[-1] ** 2) / (1 + levels[0] ** 2)).sqrt()
    got = two_step(gaussian, x, noise=0.0, seed=1)
    euler = x.clone()
    for sigma, following in pairwise(TWO_STEP_SIGMAS):
        euler += (sigma - following) * sigma * gaussian(euler, torch.full((50,), sigma))
    assert 4 * (got - exact).abs().max() < (euler - exact).abs().max()


def test_auxiliary_tensors_are_split_resumed_and_recorded(backend: str) -> None:
    sampler = partial(two_step, gaussian, seed=9)
    whole = sampler((5, 3), first_sample=7)
    parts = [sampler((n, 3), first_sample=first) for first, n in ((7, 2), (9, 3))]
    assert torch.equal(torch.cat(parts), whole)
    states = states_of(sampler, shape=(5, 3), first_sample=7)
    recorded = sampler((5, 3), first_sample=7, record_every=1)
    assert torch.equal(recorded, torch.stack([state.x for state in states]))
    assert torch.equal(recorded[-1], whole)
    for done in range(1, 60) if backend.startswith("native") else (1, 59):
        state = states[done - 1]
        resumed = sampler(state.x, first_sample=7, first_step=done, aux=state.aux)
        assert torch.equal(resumed, whole)
    known, mask = torch.ones(3), torch.tensor([True, False, False])
    inpainted = states_of(sampler, shape=(5, 3), known=known, mask=mask)
    state = inpainted[29]
    resumed = sampler(state.x, first_step=30, aux=state.aux, known=known, mask=mask)
    assert torch.equal(resumed[:, 1:], inpainted[-1].x[:, 1:])


@pytest.mark.parametrize("step", [0, 50, 55])
def test_auxiliary_tensors_are_repeated_with_the_state(step: int) -> None:
    states = states_of(partial(two_step, gaussian, seed=9), shape=(5, 3))
    bad = states[step - 1].x if step else None

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        value = gaussian(x, sigma)
        if float(sigma[0]) == np.float32(TWO_STEP_SIGMAS[step]):
            # Elsewhere, as after a replay without the last score, it would stay finite.
            assert bad is None or torch.equal(x, bad)
            value[3, 1] = math.nan
        return value

    with pytest.raises(FloatingPointError, match=f"sample 3 is not finite after step {step} "):
        two_step(score, (5, 3), seed=9)
    with pytest.warns(RuntimeWarning, match=f"stopped, with the state after {step} steps"):
        x = two_step(score, (5, 3), seed=9, on_nan="stop")
    if step:
        assert torch.equal(x, states[step - 1].x)


def test_wrong_auxiliary_tensors_are_named() -> None:
    x = torch.randn(5, 3)
    for options, message in (
        ({"first_step": 3}, "aux: got none with first_step 3, expected Progress.aux"),
        ({"aux": {"momentum": x}}, r"aux: got \['momentum'\], expected \['score'\]"),
        ({"aux": {"score": x[:2]}}, r"aux\['score'\]: got shape \(2, 3\), expected \(5, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            two_step(gaussian, x, seed=9, **options)
    with pytest.raises(ValueError, match=r"aux: got \['score'\], expected \[\]"):
        anneal(x, aux={"score": x})


def test_states_on_their_own_device_and_the_most_steps() -> None:
    x = torch.randn(2, 1)
    run = partial(score_kernels.langevin, lambda y: -y, step_size=0.1, seed=1)
    assert torch.equal(run(x, steps=3, device="cpu"), run(x, steps=3))
    # One draw each: 32 bits.
    assert torch.equal(run(x, steps=2**32, first_step=2**32), x)
    with pytest.raises(ValueError, match="steps: got 4294967297"):
        run(x, steps=2**32 + 1)
    with pytest.raises(ValueError, match="first_sample: got .* for a batch of 2"):
        run(x, steps=3, first_sample=2**56 - 1)
