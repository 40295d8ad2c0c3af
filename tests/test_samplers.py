"""Every sampler of the family: closed forms, splits, resumes, inpainting, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tolerances
import torch
from scipy import stats
from torch import Tensor

import score_kernels as sk
from score_kernels import ops
from score_kernels.diffusion.sde import VE, VP, DDPMSchedule, SubVP
from score_kernels.noise import NoiseKey

LEVELS = sk.geometric_sigmas(50.0, 0.02, 800)
DDPM = DDPMSchedule.linear()
WIDE = VE(0.02, 50.0)
FLOW = partial(sk.edm_sigmas, 200.0, 0.02)
# eta of consistent annealing is at least 1 - g.
ETA = 1.5 * (1 - float(LEVELS[1] / LEVELS[0]))

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "annealed": partial(
        sk.annealed_langevin, sigmas=sk.geometric_sigmas(50, 0.02, 40), steps_per_level=100,
        step_size=0.02**2 * 0.3,
    ),
    "consistent": partial(
        sk.consistent_annealed, sigmas=LEVELS, step_size=2 * ETA * float(LEVELS[-1]) ** 2
    ),
    "euler VE": partial(sk.euler_maruyama, sde=WIDE, steps=500, end=0.0),
    "euler VP": partial(sk.euler_maruyama, sde=VP(), steps=500),
    "euler subVP": partial(sk.euler_maruyama, sde=SubVP(), steps=500),
    "PC reverse VE": partial(sk.predictor_corrector, sde=WIDE, steps=300, end=0.0, snr=0.1),
    "PC ancestral VE": partial(
        sk.predictor_corrector, sde=WIDE, steps=300, end=0.0, snr=0.1, predictor="ancestral",
        corrector_first=False,
    ),
    "PC reverse VP": partial(
        sk.predictor_corrector, sde=VP(), steps=300, snr=0.1, corrector="langevin"
    ),
    "PC ancestral VP": partial(
        sk.predictor_corrector, sde=VP(), steps=300, snr=0.1, predictor="ancestral",
        corrector="ald", corrector_steps=2,
    ),
    "PC subVP": partial(
        sk.predictor_corrector, sde=SubVP(), steps=300, snr=0.1, corrector="langevin",
        batch_mean=True,
    ),
    "C VE": partial(
        sk.predictor_corrector, sde=WIDE, steps=200, end=0.0, snr=0.15, predictor=None,
        corrector="langevin", corrector_steps=10,
    ),
    "ddpm": partial(sk.ddpm, schedule=DDPM),
    "ddpm large": partial(sk.ddpm, schedule=DDPM, variance="large"),
    "ddim 0": partial(sk.ddim, schedule=DDPM, steps=500),
    "ddim 0.5": partial(sk.ddim, schedule=DDPM, steps=500, eta=0.5),
    "heun": partial(sk.probability_flow, sigmas=FLOW(60)),
    "euler flow": partial(sk.probability_flow, sigmas=FLOW(400), method="euler"),
    "churn": partial(sk.probability_flow, sigmas=FLOW(100), churn=20.0),
}  # fmt: skip
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
# batch_mean=True couples the samples of a batch, by its definition.
each_uncoupled = pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "PC subVP"])
CHAINS, DIM = 800, 512


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def gaussian(x: Tensor, sigma: Tensor, mean: float = 0.7, variance: float = 0.36) -> Tensor:
    """Score of N(mean, variance) plus noise; elementwise, so no batch can change its bits."""
    return -(x - mean) / (variance + expand(sigma, x).square())


MODE = torch.zeros(DIM)
MODE[:2] = 5.0


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """0.2 N(-m, I) + 0.8 N(m, I) plus noise, in 512 dimensions; m has two fives."""
    variance = 1 + expand(sigma, x).square()
    share = torch.sigmoid(math.log(4) + 2 * (x @ MODE)[:, None] / variance)
    return ((2 * share - 1) * MODE - x) / variance


@each_sampler
def test_mean_and_variance_of_a_gaussian(name: str) -> None:
    """400 chains of 512 numbers: the mean to 0.008 and the variance to 3%, for steps of finite
    length and the corrector's norms, and chance (alpha)."""
    chains = CHAINS // 2
    x = SAMPLERS[name](gaussian, (chains, DIM), seed=3).double()
    z = stats.norm.isf(tolerances.ALPHA / 2)
    chance = z * 0.6 / math.sqrt(x.numel())
    print(f"{name}: mean {float(x.mean()):.4f} (0.7), variance {float(x.var()):.4f} (0.36)")
    assert abs(float(x.mean()) - 0.7) < 0.008 + chance
    assert abs(float(x.var()) / 0.36 - 1) < 0.03 + z * math.sqrt(2 / x.numel())
    # Numbers of a sample are independent: no covariance beyond chance, the largest of all pairs.
    correlation = torch.corrcoef(x.T)
    off = correlation[~torch.eye(DIM, dtype=torch.bool)].abs().max()
    assert off < stats.norm.isf(tolerances.ALPHA / (DIM * (DIM - 1))) / math.sqrt(chains)


@pytest.mark.parametrize("name", ["annealed", "PC reverse VE", "ddpm", "heun"])
def test_mode_mass_and_moments_of_a_mixture(name: str) -> None:
    """0.8 in the larger mode, to 0.03 and chance; the mode's mean and variance in place."""
    x = SAMPLERS[name](mixture, (CHAINS, DIM), seed=5).double()
    larger = x @ MODE.double() > 0
    mass = float(larger.double().mean())
    chance = stats.norm.isf(tolerances.ALPHA / 2) * math.sqrt(0.16 / CHAINS)
    print(f"{name}: mass {mass:.4f} (0.8)")
    assert abs(mass - 0.8) < 0.03 + chance
    mode = x[larger]
    # The largest of 512 deviations of a mean over some 640 chains, and 0.03.
    largest = stats.norm.isf(tolerances.ALPHA / (2 * DIM)) / math.sqrt(len(mode))
    assert (mode.mean(0) - MODE).abs().max() < 0.03 + 1.02 * largest
    assert abs(float((mode - MODE).var()) - 1) < 0.04


@each_uncoupled
def test_splits_and_resumes_change_no_bit(name: str) -> None:
    sampler = partial(SAMPLERS[name], gaussian, seed=11)
    trajectory = sampler((8, 5), record_every=10)
    whole = sampler((8, 5))
    assert torch.equal(trajectory[-1], whole)
    parts = [sampler((n, 5), first_sample=f) for f, n in ((0, 3), (3, 4), (7, 1))]
    assert torch.equal(torch.cat(parts), whole)
    seen: list[int] = []
    assert torch.equal(
        sampler(trajectory[1], first_step=20, callback=lambda p: seen.append(p.step)), whole
    )
    assert seen[0] == 20 and seen == list(range(20, seen[-1] + 1))


@each_sampler
def test_a_batch_of_none(name: str) -> None:
    assert SAMPLERS[name](gaussian, (0, 5), seed=1).shape == (0, 5)


@each_uncoupled
def test_inpainting_keeps_what_is_known(name: str) -> None:
    sampler = partial(SAMPLERS[name], gaussian, seed=13)
    known = torch.randn(8, 3, 4)
    for mask in (
        torch.rand(8, 3, 4) < 0.5,
        torch.rand(3, 4) < 0.5,
        torch.tensor([True, False, False, True]),
        torch.ones(8, 3, 4, dtype=torch.bool),
        torch.zeros(8, 3, 4, dtype=torch.bool),
    ):
        hidden = known.where(mask, torch.nan)
        x = sampler((8, 3, 4), known=hidden, mask=mask)
        full = mask.expand(8, 3, 4)
        assert torch.equal(x[full], known[full]) and x.isfinite().all()
        one = sampler((1, 3, 4), known=hidden[5:6], mask=full[5:6], first_sample=5)
        assert torch.equal(one, x[5:6])


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("heun", "churn")])
def test_known_parts_have_the_noise_level_of_the_score(name: str) -> None:
    """800 chains of 64 known numbers: their standard deviation at every call, to chance (alpha).
    Heun's second call sees a step ahead, and churn has raised the noise of all. The first call at a
    level of several steps still sees the one before, in all parts."""
    calls: list[tuple[float, float]] = []

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((float(sigma[0]), float((x.double() - 0.5).square().mean().sqrt())))
        return gaussian(x, sigma)

    SAMPLERS[name](score, (CHAINS, 64), seed=6, known=torch.tensor(0.5), mask=torch.tensor(True))
    bound = stats.norm.isf(tolerances.ALPHA / (2 * len(calls))) / math.sqrt(2 * CHAINS * 64)
    before = calls[0][0]
    for sigma, found in calls:
        levels = (sigma, before) if name in ("annealed", "C VE") else (sigma,)
        assert min(abs(found / level - 1) for level in levels) <= bound + 1e-6
        before = sigma


def test_zeros_without_memory_are_zeros() -> None:
    """Such tensors come out of torch's derivatives; their data pointer is null."""
    none, mask = torch._efficientzerotensor((4, 3)), torch.tensor([True, False, True])

    def sample(score: Any, known: Tensor) -> Tensor:
        return sk.langevin(score, (4, 3), step_size=0.1, steps=5, seed=1, known=known, mask=mask)

    got, want = sample(lambda x: none, none), sample(torch.zeros_like, torch.zeros(4, 3))
    assert torch.equal(got, want) and not got[:, mask].any()


def test_inpainting_without_noise_levels_keeps_known_parts_exact_all_along() -> None:
    known, mask = torch.randn(3), torch.tensor([True, False, True])
    seen: list[Tensor] = []
    x = sk.langevin(
        lambda x: -x, (4, 3), step_size=0.1, steps=5, seed=1, known=known, mask=mask,
        callback=lambda p: seen.append(p.x.clone()),
    )  # fmt: skip
    assert len(seen) == 5 and x.isfinite().all()
    assert all(torch.equal(s[:, mask], known[mask].expand(4, 2)) for s in [*seen, x])


def test_the_unknown_part_follows_the_known_one() -> None:
    """Two numbers of correlation 0.9: given the first, the second is N(0.9 x, 0.19)."""
    inverse = {}

    def correlated(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        if level not in inverse:
            covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]]) + level**2 * torch.eye(2)
            inverse[level] = torch.linalg.inv(covariance)
        return -x @ inverse[level]

    x = sk.annealed_langevin(
        correlated, (20_000, 2), sk.geometric_sigmas(5.0, 0.05, 25), steps_per_level=40,
        step_size=0.05**2 * 0.15, seed=2, known=torch.tensor([1.5, 0.0]),
        mask=torch.tensor([True, False]),
    )  # fmt: skip
    # Alternating the two parts at finite noise is not exact: see docs/samplers.md.
    assert abs(float(x[:, 1].mean()) - 1.35) < 0.1
    assert abs(float(x[:, 1].var()) - 0.19) < 0.06


def test_consistent_annealing_leaves_exactly_the_next_level() -> None:
    """Data of one point: noise of sigma_i becomes noise of sigma_{i+1}, at every level."""
    sigmas = sk.geometric_sigmas(10.0, 0.1, 12)
    g = float(sigmas[1] / sigmas[0])
    levels = sigmas.double().tolist()
    # At the ends of the range all noise is that of the state, and none is added.
    for eta in (1.00001 * (1 - g), 0.5, 1.0, 0.99999 * (1 + g)):
        trajectory = sk.consistent_annealed(
            lambda x, s: -(x - 2) / expand(s, x).square(),
            (20_000, 2),
            sigmas,
            step_size=2 * eta * levels[-1] ** 2,
            denoise=False,
            seed=7,
            record_every=1,
        ).double()
        # The prior is not centred on the point: what is left of its mean shrinks by 1 - eta.
        for i, state in enumerate(trajectory[:11]):
            offset = -2 * (1 - eta) ** (i + 1)
            squares = float((state - 2 - offset).square().sum()) / levels[i + 1] ** 2
            p = 2 * min(stats.chi2.cdf(squares, 40_000), stats.chi2.sf(squares, 40_000))
            assert p > tolerances.ALPHA / 44, (eta, i, squares / 40_000)
    assert len(trajectory) == len(levels) - 1


def test_ddim_without_noise_is_the_probability_flow_in_the_limit() -> None:
    """The difference of the end points halves with the steps: both are of the same flow."""
    start = math.sqrt(1 + float(DDPMSchedule.linear(4000, 2.5e-5, 5e-3).sigmas[-1]) ** 2)
    x = start * ops.normal((64, 3), NoiseKey(1))
    errors = []
    for steps in (1000, 2000, 4000):
        schedule = DDPMSchedule.linear(steps, 0.1 / steps, 20 / steps)
        levels = schedule.sigmas.flip(0)
        scaled = x * float(levels[0]) / start
        got = sk.ddim(gaussian, scaled, schedule, steps=steps, seed=0)
        # The flow of a Gaussian in closed form: distances from the mean shrink with the width.
        first = math.sqrt(0.36 + float(levels[0]) ** 2)
        want = 0.7 + (scaled.double() - 0.7) * 0.6 / first
        errors.append(float((got - want).norm() / want.norm()))
        heun = sk.probability_flow(gaussian, scaled, levels, seed=0)
        assert float((heun - want).norm() / want.norm()) < 2e-4
    print(f"DDIM(0) against the flow, steps doubled: {errors}")
    assert errors[2] < 2e-3 and 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2]


def test_log_likelihood_of_a_gaussian() -> None:
    """Correlated, so that the trace has an estimate's error; exact within its standard error."""
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    covariance = root @ root.T / 6 + 0.3 * torch.eye(6, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return -((x @ vectors) / (values + sigma[:, None].double() ** 2)) @ vectors.T

    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = x @ torch.linalg.cholesky(covariance).T
    sigmas = sk.geometric_sigmas(200.0, 0.01, 150)
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(6, dtype=torch.float64), covariance + 1e-4 * torch.eye(6)
    ).log_prob(x)
    error = sk.log_likelihood(score, x, sigmas, seed=5) - exact
    standard = float(error.std()) / math.sqrt(len(x))
    # 0.01 nats for the steps of the integration.
    assert abs(float(error.mean())) < stats.norm.isf(tolerances.ALPHA / 2) * standard + 0.01
    part = sk.log_likelihood(score, x[7:9], sigmas, seed=5, first_sample=7)
    torch.testing.assert_close(part, (error + exact)[7:9])


def test_a_score_of_zero_is_not_corrected() -> None:
    """There is nothing to weigh the noise against."""
    x = torch.randn(6, 50)
    still = sk.predictor_corrector(
        lambda x, s: torch.zeros_like(x), x, WIDE, steps=2, predictor=None, corrector="langevin",
        denoise=False, seed=3,
    )  # fmt: skip
    assert torch.equal(still, x)


def test_conditions_guidance_and_classifier_free() -> None:
    def labelled(x: Tensor, sigma: Tensor, *, mean: float | None = None) -> Tensor:
        return gaussian(x, sigma, mean=0.0 if mean is None else mean)

    run = partial(SAMPLERS["heun"], seed=1)
    x = run(labelled, (500, 4), conditions={"mean": 3.0})
    assert torch.equal(x, run(lambda x, s: gaussian(x, s, mean=3.0), (500, 4)))
    # Observing each number with noise of variance 0.36 at 2: the posterior's mean is halfway.
    x = run(
        lambda x, s: gaussian(x, s, mean=0.0),
        (4000, 4),
        # log N(2; E[x0 | x], ...) of a Gaussian: its gradient in closed form.
        guidance=lambda x, s: (
            (2 - 0.36 * x / (0.36 + expand(s, x) ** 2))
            * 0.36 / (0.36 + expand(s, x) ** 2)
            / (0.36 + 0.36 * expand(s, x) ** 2 / (0.36 + expand(s, x) ** 2))
        ),
    )  # fmt: skip
    assert abs(float(x.mean()) - 1.0) < 0.02 and abs(float(x.var()) / 0.18 - 1) < 0.05
    free = sk.classifier_free(labelled, 1.0, cond={"mean": 3.0}, uncond={})
    at, sigma = torch.randn(3, 4), torch.rand(3) + 0.1
    want = 2 * gaussian(at, sigma, mean=3.0) - gaussian(at, sigma, mean=0.0)
    torch.testing.assert_close(free(at, sigma), want)


def test_slerp_keeps_the_noise_s_variance() -> None:
    a, b = (ops.normal((20_000,), NoiseKey(seed)) for seed in (1, 2))
    path = sk.slerp_noise(a, b, torch.linspace(0, 1, 5))
    assert torch.equal(path[0], a)
    torch.testing.assert_close(path[4], b, atol=1e-6, rtol=0)
    for x in path.double():
        p = stats.chi2.cdf(float(x.square().sum()), 20_000)
        assert 2 * min(p, 1 - p) > tolerances.ALPHA / 5
    with pytest.raises(ValueError, match="b: got shape"):
        sk.slerp_noise(a, b[:5], torch.zeros(2))
    for name, wrong in (("a", (3, b, a)), ("b", (a, 3, a)), ("shares", (a, b, 0.5))):
        with pytest.raises(TypeError, match=f"{name}: got"):
            sk.slerp_noise(*wrong)


def test_the_least_that_samplers_take() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(sk.langevin(lambda x: -x, x, step_size=0.1, steps=0, seed=1), x)
    for predictor in ("reverse_diffusion", None):
        got = sk.predictor_corrector(gaussian, x, WIDE, steps=1, predictor=predictor, seed=1)
        assert got.isfinite().all()
    assert sk.log_likelihood(gaussian, x, [2.0, 1.0], seed=1).isfinite().all()
    # At the ends of the range of its step sizes all noise of the next level is the state's.
    for step_size in (1.0, 3.0):
        options: dict[str, Any] = {"step_size": step_size, "denoise": False}
        got = sk.consistent_annealed(gaussian, x, [2.0, 1.0], seed=1, **options)
        want = x + step_size / 2 * 4 * gaussian(x, torch.full((3,), 2.0))
        torch.testing.assert_close(got, want)


REFUSED: list[tuple[Any, str]] = [
    (lambda: sk.consistent_annealed(gaussian, (2, 3), [5.0, 3.0], step_size=1.0),
     "step_size: got 1, expected from 7.2 to 28.8 for these levels, or None"),
    (lambda: sk.consistent_annealed(gaussian, (2, 3), [5.0, 3.0, 2.4], step_size=1.0),
     "step_size: got 1, expected from 4.608 to 18.432 for these levels, or None"),
    (lambda: sk.euler_maruyama(gaussian, (2, 3), WIDE, end=1.0), "end: got 1.0"),
    (lambda: sk.predictor_corrector(gaussian, (2, 3), VP(1.0, 2.0), steps=1, end=0.5),
     "steps: got 1, in which beta h reaches 1; expected it below 1, at least 2 steps"),
    (lambda: sk.probability_flow(gaussian, (2, 3), LEVELS, churn_range=(1.0, 2.0, 3.0)),
     "churn_range: got"),
    (lambda: sk.probability_flow(gaussian, (2, 3), LEVELS, churn_range=1.0), "churn_range: got 1"),
    (lambda: sk.consistent_annealed(gaussian, (2, 3), LEVELS, step_size=1e-6), "step_size: got"),
    (lambda: sk.consistent_annealed(gaussian, (2, 3), [1.0], step_size=1), "sigmas: got 1 noise"),
    (lambda: sk.euler_maruyama(gaussian, (2, 3), VP(), end=0.0), "end: got 0.0"),
    (lambda: sk.euler_maruyama(gaussian, (2, 3), "VP"), "sde: got str"),
    (lambda: sk.predictor_corrector(gaussian, (2, 3), SubVP(), predictor="ancestral"),
     "expected one of 'euler_maruyama', 'reverse_diffusion' for SubVP"),
    (lambda: sk.predictor_corrector(gaussian, (2, 3), VP(), corrector="mala"), "corrector: got"),
    (lambda: sk.predictor_corrector(gaussian, (2, 3), VP(), predictor=None, corrector=None),
     "predictor: got None beside"),
    (lambda: sk.ddpm(gaussian, (2, 3), DDPM, variance="learned"), "variance: got 'learned'"),
    (
        lambda: sk.annealed_langevin(
            gaussian, (2, 3), LEVELS, steps_per_level=[1, 2], step_size=0.1
        ),
        "steps_per_level: got 2 numbers, expected one, or [0-9]+",
    ),
    (
        lambda: sk.annealed_langevin(
            gaussian, (2, 3), [2.0, 1.0], steps_per_level=[0, 0], step_size=0.1
        ),
        "steps_per_level: got 0 for every level",
    ),
    (
        lambda: sk.langevin(gaussian, (2, 3), step_size=[0.1, 0.2], steps=3, sigma=1.0),
        "step_size: got 2 numbers, expected one, or 3",
    ),
    (
        lambda: sk.langevin(gaussian, (2, 3), step_size=torch.tensor(0.1), steps=3),
        "step_size: got a tensor of shape .*, expected a number; call .item",
    ),
    (
        lambda: sk.langevin(gaussian, (2, 3), step_size=0.1, steps=3, temperature=-1.0),
        "temperature: got -1",
    ),
    (lambda: sk.ddpm(gaussian, (2, 3), WIDE), "schedule: got"),
    (lambda: sk.ddim(gaussian, (2, 3), DDPM, steps=1001), "steps: got 1001, expected at most"),
    (lambda: sk.ddim(gaussian, (2, 3), DDPM, eta=1.5), "eta: got 1.5"),
    (lambda: sk.probability_flow(gaussian, (2, 3), LEVELS, method="rk4"), "method: got 'rk4'"),
    (lambda: sk.log_likelihood(gaussian, torch.ones(2, 3), [1.0]), "sigmas: got 1 noise level"),
    (lambda: sk.log_likelihood(gaussian, torch.ones(2, 3), LEVELS, probes=0), "probes: got 0"),
    (lambda: sk.log_likelihood(gaussian, torch.ones(0, 3), LEVELS), r"x: got shape \(0, 3\)"),
    (lambda: sk.predictor_corrector(gaussian, (2, 3), VP(), steps=5),
     "steps: got 5, in which beta h reaches 4; expected it below 1, at least 20 steps"),
    (lambda: SAMPLERS["heun"](gaussian, (2, 3), known=torch.ones(2, 3)), "mask: got NoneType"),
    (lambda: SAMPLERS["heun"](gaussian, (2, 3), known=torch.ones(2, 3), mask=torch.ones(2, 3)),
     "mask: got dtype torch.float32"),
    (lambda: SAMPLERS["heun"](gaussian, (2, 3), known=torch.ones(2, 4),
                              mask=torch.ones(2, 3, dtype=torch.bool)), "known: got shape"),
    (lambda: SAMPLERS["heun"](gaussian, (2, 3), guidance=lambda x, s: x[:1]), "guidance: got"),
]  # fmt: skip


@pytest.mark.parametrize("call, words", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()
