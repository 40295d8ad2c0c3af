"""Every sampler against its paper's recurrence in NumPy float64, fed the same noise.

The score is elementwise and nonlinear, the data are not centred, and no sigma, mean or end is 0 or
1 where a factor could hide behind it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import score_kernels as sk
from score_kernels import ops, sampling
from score_kernels.diffusion.sde import VE, VP, DDPMSchedule, SubVP
from score_kernels.noise import NoiseKey, Purpose

SHAPE, SEED, FIRST = (6, 5), 5, 3
KEY = NoiseKey(SEED, first_sample=FIRST)


def score(y: Any, sigma: Any) -> Any:
    """Of data plus noise of sigma; for arrays and tensors."""
    sin = torch.sin if isinstance(y, Tensor) else np.sin
    if isinstance(sigma, Tensor):
        sigma = sigma[:, None].to(y.dtype)
    return (0.7 - y + 0.2 * sin(3 * y)) / (0.36 + sigma * sigma)


def noise(draw: int, purpose: int = Purpose.LANGEVIN) -> np.ndarray:
    return ops.normal(SHAPE, KEY.for_purpose(purpose).at(draw)).double().numpy()


@dataclass
class Step:
    """One step of a chain, ``x <- update(x, z)``, and m and std of the state after it."""

    update: Callable[[np.ndarray, np.ndarray], np.ndarray]
    mean: float
    std: float


@dataclass
class Case:
    """A sampler, its prior's deviation, m and std at the start, its steps, whether it denoises."""

    sampler: Callable[..., Tensor]
    prior: float
    start: tuple[float, float]
    steps: list[Step]
    denoises: bool = True

    def run(
        self,
        x: np.ndarray,
        denoise: bool,
        known: Any = None,
        mask: Any = False,
        *,
        known_noise: bool = True,
        end: Callable[[np.ndarray, float], np.ndarray] = lambda x, sigma: x,
    ) -> np.ndarray:
        """Known parts are at the state's level at the start and after every step, exact at the
        end (appendix B of arXiv 1907.05600). A step ends with end(x, sigma)."""
        mean, std = self.start
        if known is not None:
            x = np.where(mask, mean * known + known_noise * std * noise(0, Purpose.KNOWN), x)
        for t, step in enumerate(self.steps):
            z = noise(t)
            mean, std = step.mean, step.std
            x = step.update(x, z)
            if known is not None:
                x = np.where(mask, mean * known + known_noise * std * z, x)
            x = end(x, std / mean)
        if denoise:
            # Tweedie's mean of the data.
            x = x / mean + (std / mean) ** 2 * score(x / mean, std / mean)
            x = end(x if known is None else np.where(mask, known, x), 0.0)
        return x if known is None else np.where(mask, known, x)


def annealed(
    counts: tuple[int, ...] = (), temperature: float = 1.0, reference: float = 0.75
) -> Case:
    sigmas, alphas = (5.0, 2.0, 0.75), []
    for sigma, count in zip(sigmas, counts or (3, 3, 3), strict=True):
        alphas += count * [(sigma, 0.1 * sigma**2 / reference**2)]
    steps = [
        Step(lambda x, z, s=s, a=a: x + a / 2 * score(x, s) + math.sqrt(a * temperature) * z, 1, s)
        for s, a in alphas
    ]
    free = {"temperature": temperature, "reference_sigma": reference} if counts else {}
    sampler = partial(
        sk.annealed_langevin, sigmas=sigmas, steps_per_level=counts or 3, step_size=0.1, **free
    )
    return Case(sampler, 5.0, (1, 5.0), steps)


def langevin(sigma: float | None) -> Case:
    level = 1.5 if sigma is None else sigma
    step = Step(
        lambda x, z: x + 0.15 * score(x, level) + math.sqrt(0.3) * z, 1, 0 if sigma is None else 1.5
    )
    sampler = partial(sk.langevin, step_size=0.3, steps=4, sigma=sigma)
    if sigma is None:
        # Not given a level: the score is of x alone.
        def sampler(net: Any, x: Any, **options: Any) -> Tensor:
            return sk.langevin(lambda y: net(y, 1.5), x, step_size=0.3, steps=4, **options)

    return Case(sampler, 1.0, (1, step.std), 4 * [step], denoises=False)


def langevin_of_steps(temperature: float, noise_scale: Any) -> Case:
    """A step size a step, and noise of its own."""
    sizes, steps = [0.4, 0.3, 0.1], []
    for t, size in enumerate(sizes):
        scale = math.sqrt(size) if noise_scale is None else np.broadcast_to(noise_scale, 3)[t]
        factor = math.sqrt(temperature) * scale
        steps.append(Step(lambda x, z, h=size, c=factor: x + h / 2 * score(x, 1.5) + c * z, 1, 1.5))
    options = {"temperature": temperature, "noise_scale": noise_scale, "sigma": 1.5}
    sampler = partial(sk.langevin, step_size=np.array(sizes), steps=3, **options)
    return Case(sampler, 1.0, (1, 1.5), steps, denoises=False)


def consistent() -> Case:
    """Algorithm 1 of arXiv 2009.05475, epsilon = step_size / 2."""
    sigmas, epsilon, steps = (5.0, 3.0, 2.0), 1.8, []
    for now, then in itertools.pairwise(sigmas):
        eta, gamma = epsilon / 2.0**2, then / now
        beta = math.sqrt(1 - ((1 - eta) / gamma) ** 2)

        def update(x: Any, z: Any, now: float = now, then: float = then, b: float = beta) -> Any:
            return x + epsilon * now**2 / 2.0**2 * score(x, now) + b * then * z

        steps.append(Step(update, 1, then))
    sampler = partial(sk.consistent_annealed, sigmas=sigmas, step_size=2 * epsilon)
    return Case(sampler, 5.0, (1, 5.0), steps)


def flow(
    method: str, churn: float, churn_noise: float, churn_range: tuple[float, float] = (0, 99)
) -> Case:
    """Algorithms 1 and 2 of arXiv 2206.00364."""
    sigmas, steps = (5.0, 2.0, 0.75, 0.25), []
    for now, then in itertools.pairwise([*sigmas, 0.0]):
        low, high = churn_range
        gamma = min(churn / 4, math.sqrt(2) - 1) if low <= now <= high else 0

        def update(x: Any, z: Any, t: float = now, then: float = then, g: float = gamma) -> Any:
            raised = t + g * t
            x = x + math.sqrt(raised**2 - t**2) * churn_noise * z
            slope = -raised * score(x, raised)
            ahead = x + (then - raised) * slope
            if method == "euler" or not then:
                return ahead
            return x + (then - raised) * (slope - then * score(ahead, then)) / 2

        steps.append(Step(update, 1, then))
    options = {"churn": churn, "churn_noise": churn_noise, "churn_range": churn_range}
    sampler = partial(sk.probability_flow, sigmas=sigmas, method=method, **options)
    return Case(sampler, 5.0, (1, 5.0), steps, denoises=False)


def chain_of_ddpm(timesteps: list[int], eta: float, variance: str = "small") -> list[Step]:
    """Equations 12 and 16 of arXiv 2010.02502, in x and seen in y = x / sqrt(abar)."""
    abar, steps = np.cumprod(1 - np.linspace(1e-3, 0.3, 30)), []
    for i, j in itertools.pairwise([*timesteps, -1]):
        now, then = abar[i], abar[j] if j >= 0 else 1.0

        def update(y: Any, z: Any, now: float = now, then: float = then) -> Any:
            sigma = math.sqrt((1 - now) / now)
            x, epsilon = y * math.sqrt(now), -sigma * score(y, sigma)
            deviation = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
            x0 = (x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
            mean = math.sqrt(then) * x0 + math.sqrt(1 - then - deviation**2) * epsilon
            if variance == "large" and then < 1:
                deviation = math.sqrt(1 - now / then)
            return (mean + deviation * z) / math.sqrt(then)

        steps.append(Step(update, 1, math.sqrt((1 - then) / then)))
    return steps


def ddpm(variance: str) -> Case:
    sigma = math.sqrt(1 / np.prod(1 - np.linspace(1e-3, 0.3, 30)) - 1)
    schedule = DDPMSchedule.linear(30, 1e-3, 0.3)
    sampler = partial(sk.ddpm, schedule=schedule, variance=variance)
    steps = chain_of_ddpm(list(range(29, -1, -1)), 1.0, variance)
    return Case(sampler, math.hypot(1, sigma), (1, sigma), steps, denoises=False)


def ddim(eta: float, steps: int, timesteps: list[int]) -> Case:
    """Timesteps as arXiv 2010.02502 spaces them, rounded to the nearest."""
    case = ddpm("small")
    schedule = DDPMSchedule.linear(30, 1e-3, 0.3)
    sampler = partial(sk.ddim, schedule=schedule, steps=steps, eta=eta)
    return Case(sampler, case.prior, case.start, chain_of_ddpm(timesteps, eta), denoises=False)


def dpm(eta: float) -> Case:
    """Algorithm 2 of arXiv 2211.01095 and, for eta = 1, its SDE-DPM-Solver++(2M): alpha = 1."""
    sigmas, steps, before = (5.0, 2.0, 0.75, 0.25), [], {}
    for i, (now, then) in enumerate(itertools.pairwise([*sigmas, 0.0])):

        def update(x: Any, z: Any, i: int = i, now: float = now, then: float = then) -> Any:
            data = before[i] = x + now**2 * score(x, now)
            if not then:
                return data
            h, d = math.log(now / then), data
            if i:
                r = math.log(sigmas[i - 1] / now) / h
                d = (1 + 1 / (2 * r)) * data - before[i - 1] / (2 * r)
            if eta == 0:
                return then / now * x - (math.exp(-h) - 1) * d
            kept, gone = then / now * math.exp(-eta * h), 1 - math.exp(-(1 + eta) * h)
            return kept * x + gone * d + then * math.sqrt(1 - math.exp(-2 * eta * h)) * z

        steps.append(Step(update, 1, then))
    sampler = partial(sk.dpm_solver, sigmas=sigmas, eta=eta)
    return Case(sampler, 5.0, (1, 5.0), steps, denoises=False)


RANGES = {"VE": (0.1, 5.0), "VP": (0.3, 9.0), "subVP": (0.3, 9.0)}
DIFFUSIONS = {"VE": VE(0.1, 5.0), "VP": VP(0.3, 9.0), "subVP": SubVP(0.3, 9.0)}


def diffusion(
    kind: str,
    predictor: str | None,
    corrector: str | None,
    *,
    first: bool = True,
    mean: bool = False,
    repeats: int = 1,
) -> Case:
    """Algorithms 2 to 5 of arXiv 2011.13456."""
    n, end, snr = 10, 0.2, 0.3
    h = (1 - end) / n
    ve, subvp, (low, high) = kind == "VE", kind == "subVP", RANGES[kind]

    def state(t: float) -> tuple[float, float]:
        if ve:
            return 1.0, low * (high / low) ** t
        m = math.exp(-0.5 * (low * t + 0.5 * (high - low) * t * t))
        return m, 1 - m * m if subvp else math.sqrt(1 - m * m)

    def at(x: np.ndarray, t: float) -> np.ndarray:
        """The score of x itself."""
        m, std = state(t)
        return score(x / m, std / m) / m

    def correct(x: np.ndarray, z: np.ndarray, t: float, beta: float) -> np.ndarray:
        s, alpha = at(x, t), 1.0 if ve else 1 - beta
        if corrector == "ald":
            e: Any = 2 * alpha * (snr * state(t)[1]) ** 2
        else:
            norms = [np.sqrt((v**2).sum(1, keepdims=True)) for v in (z, s)]
            z_norm, s_norm = (v.mean() for v in norms) if mean else norms
            e = 2 * alpha * (snr * z_norm / s_norm) ** 2
        return x + e * s + np.sqrt(2 * e) * z

    def predict(x: np.ndarray, z: np.ndarray, now: float, then: float, beta: float) -> np.ndarray:
        s, (m, std), below = at(x, now), state(now), state(then)[1]
        if ve and predictor != "euler_maruyama":
            g = std**2 - below**2
            tail = below * math.sqrt(g) / std if predictor == "ancestral" else math.sqrt(g)
            return x + g * s + tail * z
        if predictor == "ancestral":
            return (x + beta * s) / math.sqrt(1 - beta) + math.sqrt(beta) * z
        if predictor == "reverse_diffusion" and not subvp:
            return (2 - math.sqrt(1 - beta)) * x + beta * s + math.sqrt(beta) * z
        rate = 2 * math.log(high / low) * std**2 * h if ve else beta
        g = rate * (1 - m**4) if subvp else rate
        return x + beta / 2 * x + g * s + math.sqrt(g) * z

    steps = []
    for now, then in itertools.pairwise(np.linspace(1, end, n + 1)):
        beta = 0.0 if ve else h * (low + (high - low) * now)
        corrected = now if first else then
        corrections = [Step(partial(correct, t=corrected, beta=beta), *state(corrected))]
        corrections *= repeats if corrector else 0
        steps += corrections if first else []
        if predictor:
            steps.append(Step(partial(predict, now=now, then=then, beta=beta), *state(then)))
        steps += [] if first else corrections
    options: dict[str, Any] = {"predictor": predictor, "corrector": corrector, "snr": snr}
    options |= {"corrector_first": first, "batch_mean": mean, "corrector_steps": repeats}
    sampler = partial(sk.predictor_corrector, sde=DIFFUSIONS[kind], steps=n, end=end, **options)
    # Without a predictor and corrected afterwards, the first step sees the second time.
    start = state(1) if first or predictor else state(1 - h)
    return Case(sampler, high if ve else 1.0, start, steps)


CASES: dict[str, Case] = {
    "annealed": annealed(),
    "annealed, levels at will": annealed((2, 0, 3), 0.4, 0.5),
    "annealed without noise": annealed((1, 2, 1), 0.0, 0.75),
    "langevin": langevin(None),
    "langevin, a size a step": langevin_of_steps(0.7, None),
    "langevin, a noise scale": langevin_of_steps(1.0, 0.01),
    "langevin, scales a step": langevin_of_steps(2.0, [0.5, 0.0, 0.2]),
    "langevin at a level": langevin(1.5),
    "consistent": consistent(),
    "flow": flow("heun", 0, 1),
    "flow euler": flow("euler", 0, 1),
    "churn": flow("heun", 1.2, 1.3, (0.5, 3)),
    "churn euler": flow("euler", 1.2, 0.7),
    "churn at its largest": flow("heun", 9, 1, (2.0, 2.0)),
    "ddpm small": ddpm("small"),
    "ddpm large": ddpm("large"),
    "ddim 0": ddim(0, 7, [29, 24, 19, 14, 10, 5, 0]),
    "ddim 0.6": ddim(0.6, 7, [29, 24, 19, 14, 10, 5, 0]),
    "ddim 1": ddim(1, 4, [29, 19, 10, 0]),
    "ddim of one step": ddim(0.6, 1, [29]),
    "dpm 0": dpm(0),
    "dpm 0.4": dpm(0.4),
    "dpm 1": dpm(1),
    **{
        f"{name} {predictor} {corrector}": diffusion(name, predictor, corrector)
        for name in DIFFUSIONS
        for predictor in ("reverse_diffusion", "ancestral", "euler_maruyama", None)
        for corrector in ("langevin", "ald", None)
        if (predictor or corrector) and (name, predictor) != ("subVP", "ancestral")
    },
    **{
        f"{name} {predictor} corrected {corrector}": diffusion(
            name, predictor, corrector, first=False, mean=corrector == "langevin", repeats=2
        )
        for name in DIFFUSIONS
        for predictor in ("reverse_diffusion", None)
        for corrector in ("langevin", "ald")
    },
}
for name, sde in DIFFUSIONS.items():
    CASES[f"{name} euler"] = diffusion(name, "euler_maruyama", None)
    CASES[f"{name} euler"].sampler = partial(sk.euler_maruyama, sde=sde, steps=10, end=0.2)


@pytest.mark.parametrize("name", CASES)
def test_a_chain_is_its_paper_s(name: str) -> None:
    """From a state in float64, with and without denoising, whole and inpainted."""
    case = CASES[name]
    x = 3 * torch.randn(SHAPE, dtype=torch.float64)
    known, mask = torch.randn(5, dtype=torch.float64), torch.rand(SHAPE) < 0.4
    for denoise in (True, False) if case.denoises else (False,):
        options: dict[str, Any] = {"seed": SEED, "first_sample": FIRST}
        options |= {"denoise": denoise} if case.denoises else {}
        got = case.sampler(score, x, **options)
        np.testing.assert_allclose(got, case.run(x.numpy(), denoise), rtol=1e-6, atol=1e-6)
        got = case.sampler(score, x, known=known, mask=mask, **options)
        want = case.run(x.numpy(), denoise, known.numpy(), mask.numpy())
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_chain_starts_from_its_prior(name: str) -> None:
    """From a shape, and so in float32."""
    case = CASES[name]
    got = case.sampler(score, SHAPE, seed=SEED, first_sample=FIRST)
    want = case.run(case.prior * noise(0, Purpose.PRIOR), case.denoises)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_a_uniform_prior() -> None:
    case = CASES["annealed"]
    got = case.sampler(score, SHAPE, seed=SEED, first_sample=FIRST, init="uniform", denoise=False)
    x = ops.uniform(SHAPE, KEY.for_purpose(Purpose.PRIOR)).double().numpy()
    np.testing.assert_allclose(got, case.run(x, denoise=False), rtol=1e-5, atol=1e-5)


def test_guidance_is_added_to_the_score_at_the_same_point() -> None:
    """VP, whose score is not called at the state itself."""
    case, x = CASES["VP reverse_diffusion langevin"], torch.randn(SHAPE, dtype=torch.float64)

    def half(y: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * score(y, sigma)

    options: dict[str, Any] = {"seed": SEED, "first_sample": FIRST}
    got = case.sampler(half, x, guidance=half, **options)
    np.testing.assert_allclose(got, case.run(x.numpy(), True), rtol=1e-6, atol=1e-6)
    both = sk.classifier_free(
        lambda y, sigma, k, scale: k * scale * score(y, sigma),
        0.3,
        cond={"k": 2.0},
        uncond={"k": 3.0},
    )
    # 1.3 x 2 - 0.3 x 3 = 1.7.
    options["conditions"] = {"scale": 1 / 1.7}
    np.testing.assert_allclose(case.sampler(both, x, **options), got, rtol=1e-6, atol=1e-6)


def derivative(y: np.ndarray, sigma: float) -> np.ndarray:
    """Of the score, elementwise."""
    return (-1 + 0.6 * np.cos(3 * y)) / (0.36 + sigma * sigma)


@pytest.mark.parametrize("prior_std", [None, 3.0])
@pytest.mark.parametrize(("probe", "probes"), [("rademacher", 1), ("gaussian", 3), ("sphere", 2)])
def test_the_log_likelihood_is_its_integral_by_heun(
    probe: str, probes: int, prior_std: float | None
) -> None:
    """Equation 39 of arXiv 2011.13456 along dy = -sigma score dsigma, in log sigma."""
    sigmas = (4.0, 1.5, 0.5)
    y = torch.randn(SHAPE, dtype=torch.float64).numpy()
    got = sk.log_likelihood(
        score, torch.from_numpy(y), sigmas, probes=probes, probe=probe, prior_std=prior_std,
        seed=SEED, first_sample=FIRST,
    )  # fmt: skip
    z = np.stack([noise(i, Purpose.TRACE) for i in range(probes)])
    squares = z**2
    if probe == "rademacher":
        squares = np.ones_like(z)
    elif probe == "sphere":
        squares *= 5 / squares.sum(2, keepdims=True)

    def slopes(y: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """Of y and of log p in log sigma."""
        trace = (squares * derivative(y, sigma)).sum(2).mean(0)
        return -(sigma**2) * score(y, sigma), -(sigma**2) * trace

    total = np.zeros(6)
    for now, then in itertools.pairwise(sigmas[::-1]):
        h = math.log(then / now)
        dy, dlogp = slopes(y, now)
        ahead_dy, ahead_dlogp = slopes(y + h * dy, then)
        y = y + h * (dy + ahead_dy) / 2
        total += h * (dlogp + ahead_dlogp) / 2
    std = prior_std or 4.0
    total += (-((y / std) ** 2) / 2 - math.log(std) - math.log(2 * math.pi) / 2).sum(1)
    np.testing.assert_allclose(got, total, rtol=1e-6, atol=1e-6)


def test_every_sampler_is_here() -> None:
    functions = {name for name, value in vars(sampling).items() if inspect.isfunction(value)}
    samplers = {
        f for f in functions if "shape_or_init" in inspect.signature(vars(sampling)[f]).parameters
    }
    cases = [case.sampler for case in CASES.values() if isinstance(case.sampler, partial)]
    assert {case.func.__name__ for case in cases} == samplers
