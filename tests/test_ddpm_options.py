"""DDPM and DDIM over levels and timesteps of one's own, and DPM-Solver++, as what it converges to.

Pins are recurrences of the papers in NumPy float64, in DDPM's own scale, fed the same noise; those
of DPM-Solver++ are in test_recurrences.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from scipy import stats
from torch import Tensor

import score_kernels as sk
from score_kernels import ops
from score_kernels.diffusion.sde import levels_of
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.sampling import Progress

SHAPE, SEED, FIRST = (6, 5), 5, 3
KEY = NoiseKey(SEED, purpose=Purpose.LANGEVIN, first_sample=FIRST)
LEVELS = [7.0, 4.0, 2.5, 1.2, 0.9, 0.5, 0.2]
LINEAR = sk.DDPMSchedule.linear(30, 1e-3, 0.3)


def score(y: Any, sigma: Any) -> Any:
    """Of no centred data, elementwise and nonlinear; for arrays and tensors."""
    sin = torch.sin if isinstance(y, Tensor) else np.sin
    if isinstance(sigma, Tensor):
        sigma = sigma[:, None].to(y.dtype)
    return (0.7 - y + 0.2 * sin(3 * y)) / (0.36 + sigma * sigma)


def gaussian(y: Tensor, sigma: Tensor) -> Tensor:
    """Of N(0.7, 0.36) plus noise."""
    return (0.7 - y) / (0.36 + sigma[:, None].to(y.dtype) ** 2)


Update = Callable[[np.ndarray, np.ndarray, np.ndarray, float, float], np.ndarray]


def chain(y: np.ndarray, levels: Any, update: Update) -> np.ndarray:
    """Steps ``update(x, eps, z, abar, abar')`` in DDPM's scale, over levels down to no noise."""
    abar = [1 / (1 + sigma**2) for sigma in levels]
    for t, (now, then) in enumerate(pairwise([*abar, 1.0])):
        sigma = math.sqrt((1 - now) / now)
        z = ops.normal(SHAPE, KEY.at(t)).double().numpy()
        y = update(math.sqrt(now) * y, -sigma * score(y, sigma), z, now, then) / math.sqrt(then)
    return y


def ancestral(variance: str, x: Any, eps: Any, z: Any, now: float, then: float) -> Any:
    """Algorithm 2 of arXiv 2006.11239 and both of its variances."""
    beta = 1 - now / then
    v = beta if variance == "large" else (1 - then) / (1 - now) * beta
    mean = (x - beta / math.sqrt(1 - now) * eps) / math.sqrt(1 - beta)
    return mean + math.sqrt(v) * z if then < 1 else mean


def implicit(eta: float, x: Any, eps: Any, z: Any, now: float, then: float) -> Any:
    """Equations 12 and 16 of arXiv 2010.02502."""
    std = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    return math.sqrt(then) * x0 + math.sqrt(1 - then - std**2) * eps + std * z


# What is given as schedule, and its levels from the smallest.
SCHEDULES: dict[str, tuple[Any, list[float]]] = {
    "list": (LEVELS, LEVELS[::-1]),
    "tensor": (torch.tensor(LEVELS, dtype=torch.float64), LEVELS[::-1]),
    "array": (np.array(LEVELS), LEVELS[::-1]),
    "of sigmas": (sk.DDPMSchedule.from_sigmas(LEVELS), LEVELS[::-1]),
    "linear": (LINEAR, np.sqrt(1 / np.cumprod(1 - np.linspace(1e-3, 0.3, 30)) - 1).tolist()),
}
CHOSEN: list[Any] = [
    None, [6, 4, 3, 0], torch.tensor([5, 4, 1]), np.array([6, 0]), range(6, -1, -2), [3],
]  # fmt: skip
each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_choice = pytest.mark.parametrize("timesteps", CHOSEN, ids=range(len(CHOSEN)))


def check(sampler: Any, levels: list[float], update: Update) -> None:
    """From a state in float64 to 1e-6, and from the prior, N(0, 1) in x."""
    y = 3 * torch.randn(SHAPE, dtype=torch.float64)
    got = sampler(score, y, seed=SEED, first_sample=FIRST)
    np.testing.assert_allclose(got, chain(y.numpy(), levels, update), rtol=1e-6, atol=1e-6)
    got = sampler(score, SHAPE, seed=SEED, first_sample=FIRST)
    z = ops.normal(SHAPE, KEY.for_purpose(Purpose.PRIOR)).double().numpy()
    want = chain(math.hypot(1, levels[0]) * z, levels, update)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@each_schedule
@each_choice
@pytest.mark.parametrize(
    ("sampler", "update"),
    [
        (partial(sk.ddpm, variance="small"), partial(ancestral, "small")),
        (partial(sk.ddpm, variance="large"), partial(ancestral, "large")),
        (partial(sk.ddim, eta=0.0), partial(implicit, 0.0)),
        (partial(sk.ddim, eta=0.6), partial(implicit, 0.6)),
    ],
)
def test_over_levels_and_timesteps(name: str, timesteps: Any, sampler: Any, update: Any) -> None:
    schedule, levels = SCHEDULES[name]
    chosen = range(len(levels))[::-1] if timesteps is None else timesteps
    over = partial(sampler, schedule=schedule, timesteps=timesteps)
    check(over, [levels[t] for t in chosen], update)


@each_schedule
def test_steps_of_ddim_are_spaced_evenly(name: str) -> None:
    schedule, levels = SCHEDULES[name]
    for steps, spaced in ((3, (1, 0.5, 0)), (1, (1,))):
        chosen = [levels[round(share * (len(levels) - 1))] for share in spaced]
        if name == "linear" and steps == 3:
            # 14.5, to the nearest even.
            assert chosen[1] == levels[14]
        check(partial(sk.ddim, schedule=schedule, steps=steps), chosen, partial(implicit, 0.0))


@pytest.mark.parametrize(
    "schedule, calls",
    [(sk.DDPMSchedule.linear(), 50), (LINEAR, 30), (sk.geometric_sigmas(9.0, 0.1, 70), 70)],
    ids=["of a thousand", "of thirty", "levels"],
)
def test_the_number_of_steps_of_ddim_if_none_is_given(schedule: Any, calls: int) -> None:
    seen: list[int] = []
    sk.ddim(score, SHAPE, schedule, seed=1, callback=lambda p: seen.append(p.step))
    assert len(seen) == calls


@pytest.mark.parametrize("sampler", [sk.ddpm, partial(sk.ddpm, variance="large"), sk.ddim])
def test_levels_are_their_schedule(sampler: Any) -> None:
    """To the bit, in stream too."""
    schedule = sk.DDPMSchedule.from_sigmas(LEVELS)
    run = partial(sampler, score, (2, 5), seed=3)
    assert torch.equal(run(LEVELS), run(schedule))
    arguments = {"schedule": LEVELS, "timesteps": [5, 2, 0]}
    request = sk.sampling.Request(1, sampler, arguments)
    ((_, alone),) = sk.sampling.stream(score, [request], (5,), seed=3)
    assert torch.equal(alone, run(**arguments)[1])


@pytest.mark.parametrize(
    "sampler, levels",
    [
        (partial(sk.ddpm, timesteps=[5, 3, 0]), LEVELS),
        (partial(sk.ddim, timesteps=[5, 3, 0]), LEVELS),
        (sk.dpm_solver, [4.0, 1.2, 0.2]),
    ],
)
def test_known_parts_have_the_noise_of_the_levels_chosen(sampler: Any, levels: Any) -> None:
    """At each call, to 4% of 10,000 numbers; and exactly in the last state, recorded once."""
    seen: list[float] = []

    def watched(y: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float((y - 0.5).std() / sigma[0]))
        return gaussian(y, sigma)

    options: dict[str, Any] = {"known": torch.tensor(0.5), "mask": torch.tensor(True)}
    states = sampler(watched, (100, 100), levels, seed=1, record_every=1, **options)
    assert len(states) == 3 and (states[-1] == 0.5).all()
    assert len(seen) == 3 and max(abs(ratio - 1) for ratio in seen) < 0.04


def test_a_schedule_of_sigmas() -> None:
    schedule = sk.DDPMSchedule.from_sigmas(torch.tensor(LEVELS, dtype=torch.float64))
    assert schedule.sigmas.tolist() == LEVELS[::-1]
    np.testing.assert_allclose(schedule.alphas_bar, 1 / (1 + np.array(LEVELS[::-1]) ** 2))
    assert schedule.index(torch.tensor([0.1, 0.31, 0.32, 99.0])).tolist() == [0, 0, 1, 6]
    # As exact where abar is near 1, where sigmas of a rounded abar are not.
    small = sk.DDPMSchedule.from_sigmas([3e-7, 2.9e-7, 1e-7])
    assert small.sigmas.tolist() == [1e-7, 2.9e-7, 3e-7]
    assert small.index(torch.tensor([2.94e-7, 2.96e-7], dtype=torch.float64)).tolist() == [1, 2]
    assert levels_of(schedule) == levels_of(LEVELS) == LEVELS


# --- DPM-Solver++ -----------------------------------------------------------------------------

solver = partial(sk.dpm_solver, gaussian, sigmas=sk.geometric_sigmas(20.0, 0.05, 64), seed=9)


def test_its_error_falls_with_the_square_of_the_steps() -> None:
    """Against the flow of a Gaussian, whose distances from the mean shrink with its width, and the
    prediction at the last level: some four times at each doubling."""
    y, low, errors = 5 * torch.randn(50, 3, dtype=torch.float64), 0.2, []
    end = 0.7 + (y - 0.7) * math.sqrt((0.36 + low**2) / (0.36 + 5.0**2))
    exact = 0.7 + (end - 0.7) * 0.36 / (0.36 + low**2)
    for count in (41, 81, 161, 321):
        levels = np.exp(np.linspace(math.log(5.0), math.log(low), count))
        got = sk.dpm_solver(gaussian, y, levels, seed=1)
        errors.append(float((got - exact).abs().max()))
    print(f"DPM-Solver++(2M), steps doubled: {errors}")
    assert all(3.5 < a / b < 4.5 for a, b in pairwise(errors)) and errors[-1] < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_the_variance_at_every_level(eta: float) -> None:
    """That of data plus noise: 2%, for steps of finite length, and chance (alpha)."""
    levels = np.exp(np.linspace(math.log(40.0), math.log(0.02), 121)).tolist()
    x = 0.7 + math.hypot(40.0, 0.6) * ops.normal((2000, 16), NoiseKey(4))
    states = sk.dpm_solver(gaussian, x, levels, eta=eta, seed=3, record_every=1).double()
    chance = stats.norm.isf(tolerances.ALPHA / (2 * len(levels))) * math.sqrt(2 / x.numel())
    for sigma, state in zip([*levels[1:], 0.0], states, strict=True):
        ratio = float((state - 0.7).square().mean()) / (0.36 + sigma**2)
        assert abs(ratio - 1) < 0.02 + chance, (sigma, ratio)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_level_is_the_prediction(eta: float) -> None:
    y = torch.randn(SHAPE)
    want = y + 4 * gaussian(y, torch.full((6,), 2.0))
    torch.testing.assert_close(sk.dpm_solver(gaussian, y, [2.0], eta=eta, seed=1), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_is_split_recorded_and_resumed_to_the_bit(eta: float, dtype: torch.dtype) -> None:
    sampler = partial(
        sk.dpm_solver, lambda y, sigma: gaussian(y, sigma).to(dtype), sigmas=LEVELS, eta=eta, seed=9
    )
    whole = sampler((5, 3), first_sample=7)
    parts = [sampler((n, 3), first_sample=first) for first, n in ((7, 2), (9, 3))]
    assert torch.equal(torch.cat(parts), whole)
    states: list[Progress] = []
    sampler((5, 3), first_sample=7, callback=lambda p: states.append(copy.deepcopy(p)))
    recorded = sampler((5, 3), first_sample=7, record_every=1)
    assert torch.equal(recorded, torch.stack([state.x for state in states]))
    assert torch.equal(recorded[-1], whole) and len(states) == len(LEVELS)
    for done, state in enumerate(states, 1):
        assert state.aux["data"].dtype == torch.float32
        resumed = sampler(state.x, first_sample=7, first_step=done, aux=state.aux)
        assert torch.equal(resumed, whole)


def test_it_takes_a_schedule() -> None:
    """Its prior is DDPM's, N(0, 1) in x = m y; that of levels N(0, sigma_1^2)."""
    got, levels = sk.dpm_solver(score, SHAPE, LINEAR, seed=2), LINEAR.sigmas.flip(0)
    z = sk.ops.normal(SHAPE, sk.NoiseKey(2, purpose=sk.Purpose.PRIOR))
    first = levels[0].item()
    start = z * math.sqrt(1 + first**2)
    assert torch.equal(got, sk.dpm_solver(score, start, levels, seed=2))
    got = sk.dpm_solver(score, SHAPE, levels, seed=2)
    assert torch.equal(got, sk.dpm_solver(score, z * first, levels, seed=2))
    timesteps = torch.tensor([25, 12, 0])
    assert sk.dpm_solver(score, SHAPE, LINEAR.sigmas[timesteps], seed=2).isfinite().all()


@pytest.mark.parametrize("step", [0, 50, 55])
def test_its_predictions_are_repeated_with_the_state(step: int) -> None:
    states: list[Tensor] = []
    solver(shape_or_init=(5, 3), eta=1.0, callback=lambda p: states.append(p.x.clone()))
    calls = 0

    def faulty(y: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        value = gaussian(y, sigma)
        if float(sigma[0]) == float(sk.geometric_sigmas(20.0, 0.05, 64)[step]):
            calls += 1
            # After a replay without the last prediction the state would be another one.
            assert not step or torch.equal(y, states[step - 1])
            value[3, 1] = math.nan
        return value

    options: dict[str, Any] = {"sigmas": sk.geometric_sigmas(20.0, 0.05, 64), "eta": 1.0, "seed": 9}
    with pytest.raises(FloatingPointError, match=f"sample 3 is not finite after step {step} "):
        sk.dpm_solver(faulty, (5, 3), **options)
    assert calls == 2
    with pytest.warns(RuntimeWarning, match=f"stopped, with the state after {step} steps"):
        x = sk.dpm_solver(faulty, (5, 3), on_nan="stop", **options)
    assert not step or torch.equal(x, states[step - 1])


def test_it_inpaints() -> None:
    known, mask = torch.randn(5, 3), torch.tensor([True, False, False])
    for eta in (0.0, 1.0):
        x = solver(shape_or_init=(5, 3), eta=eta, known=known, mask=mask)
        assert torch.equal(x[:, 0], known[:, 0]) and x.isfinite().all()


CALL = partial(sk.ddim, score, (2, 5))
REFUSED: list[tuple[Any, str]] = [
    (lambda: sk.ddpm(score, (2, 5), "linear"), "schedule: got str 'linear', expected noise levels"),
    (lambda: CALL(sk.VP()), "schedule: got VP .*, expected noise levels or a score_kernels.DDPM"),
    (lambda: CALL([1.0, 2.0]), r"schedule: got schedule\[0\] = 1.0 and .*, expected strictly dec"),
    (lambda: CALL([]), "schedule: got none"),
    (lambda: CALL(LEVELS, steps=8), "steps: got 8, expected at most the number of levels, 7"),
    (lambda: CALL(LEVELS, steps=0), "steps: got 0, expected at least 1"),
    (lambda: CALL(LEVELS, steps=2.0), "steps: got float 2.0, expected an integer"),
    (lambda: CALL(LEVELS, steps=2, timesteps=[1, 0]), "timesteps: got them beside steps = 2"),
    (lambda: CALL(LEVELS, timesteps=[]), "timesteps: got none, expected strictly decreasing int"),
    (lambda: CALL(LEVELS, timesteps=3), "timesteps: got int 3, expected strictly decreasing inte"),
    (lambda: CALL(LEVELS, timesteps="10"), "timesteps: got '10', expected strictly decreasing"),
    (lambda: CALL(LEVELS, timesteps=torch.ones(2, 2)), r"timesteps: got a tensor of shape \(2, 2"),
    (lambda: CALL(LEVELS, timesteps=[1.5, 0]), r"timesteps\[0\]: got float 1.5, expected an int"),
    (lambda: CALL(LEVELS, timesteps=[3, -1]), r"timesteps\[1\]: got -1"),
    (lambda: CALL(LEVELS, timesteps=[7, 0]),
     r"timesteps: got timesteps\[0\] = 7, expected strictly decreasing integers from 6 to 0"),
    (lambda: sk.ddpm(score, (2, 5), LINEAR, timesteps=[9, 0, 4]),
     r"timesteps: got timesteps\[2\] = 4 after 0, expected .* from 29 to 0"),
    (lambda: sk.ddpm(score, (2, 5), LINEAR, timesteps=[4, 4]), r"timesteps\[1\] = 4 after 4"),
    (lambda: sk.DDPMSchedule.from_sigmas([1.0, 2.0]), r"sigmas: got sigmas\[0\] = 1.0 and sigmas"),
    (lambda: sk.DDPMSchedule.from_sigmas(3.0), "sigmas: got float 3.0"),
    (lambda: sk.DDPMSchedule.from_sigmas([1.0, 1e-9]), "sigmas: got levels down to 1e-09"),
    (lambda: sk.dpm_solver(score, (2, 5), LEVELS, eta=-1.0), "eta: got -1"),
    (lambda: sk.dpm_solver(score, (2, 5), 3.0), "sigmas: got float 3.0, expected noise levels or"),
    (lambda: sk.dpm_solver(score, (2, 5), [1.0, 1.0]), r"sigmas: got sigmas\[0\] = 1.0 and"),
    (lambda: sk.dpm_solver(score, torch.ones(2, 5), LEVELS, seed=1, first_step=2),
     "aux: got none with first_step 2"),
    (lambda: sk.dpm_solver(score, (2, 5), LEVELS, denoise=True), "dpm_solver: got an unexpected"),
]  # fmt: skip


@pytest.mark.parametrize("call, words", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()
