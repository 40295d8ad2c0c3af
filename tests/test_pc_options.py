"""Options that published loops need, against those loops in NumPy float64, fed the same noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_recurrences import FIRST, KEY, SEED, SHAPE, noise, score
from torch import Tensor

import score_kernels as sk
from score_kernels import ops
from score_kernels.noise import NoiseKey, Purpose

KEYED: dict[str, Any] = {"seed": SEED, "first_sample": FIRST}
SIGMAS = np.array([0.3, 0.7, 1.1, 2.0, 4.5])
BETAS = np.linspace(0.05, 0.4, 5)


def close(got: Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """Of N(0, I) plus noise."""
    return -x / (1 + sigma[:, None] ** 2)


class Published:
    """`get_pc_sampler` of score_sde_pytorch on N discrete levels: the predictors and correctors of
    VESDE (its smallest level is followed by noise 0) and of VPSDE."""

    def __init__(self, kind: str, predictor: str | None, corrector: str | None) -> None:
        self.ve, self.predictor, self.corrector = kind == "VE", predictor, corrector
        self.draws = itertools.count()
        self.alphas_bar = np.cumprod(1 - BETAS)

    def score(self, x: np.ndarray, i: int) -> tuple[np.ndarray, float]:
        """Of x itself at level i, and std there."""
        if self.ve:
            return score(x, SIGMAS[i]), SIGMAS[i]
        m, std = math.sqrt(self.alphas_bar[i]), math.sqrt(1 - self.alphas_bar[i])
        return score(x / m, std / m) / m, std

    def predict(self, x: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        (s, _), z = self.score(x, i), noise(next(self.draws))
        if self.ve:
            adjacent = SIGMAS[i - 1] if i else 0.0
            g = SIGMAS[i] ** 2 - adjacent**2
            std = math.sqrt(g) if self.predictor == "reverse_diffusion" else 1.0
            if self.predictor == "ancestral":
                std = math.sqrt(adjacent**2 * g / SIGMAS[i] ** 2)
            mean = x + g * s
        else:
            beta = BETAS[i]
            std = math.sqrt(beta)
            mean = (x + beta * s) / math.sqrt(1 - beta)
            if self.predictor == "reverse_diffusion":
                mean = x - (math.sqrt(1 - beta) * x - x - beta * s)
        return mean + std * z, mean

    def correct(self, x: np.ndarray, i: int, options: dict[str, Any]) -> np.ndarray:
        alpha, snr = 1.0 if self.ve else 1 - BETAS[i], options["snr"]
        for _ in range(options["corrector_steps"]):
            (s, std), z = self.score(x, i), noise(next(self.draws))
            if self.corrector == "ald":
                e: Any = 2 * alpha * (snr * std) ** 2
            else:
                norms = [np.linalg.norm(v, axis=1, keepdims=True) for v in (z, s)]
                above, below = (n.mean() for n in norms) if options["batch_mean"] else norms
                e = 2 * alpha * (snr * above / below) ** 2
                e = np.minimum(e, options.get("max_step") or np.inf)
            x = x + e * s + np.sqrt(2 * e) * z
        return x

    def run(self, x: np.ndarray, denoise: bool, **options: Any) -> np.ndarray:
        first, mean = options["corrector_first"], x
        for i in range(4, -1, -1):
            if self.corrector and first:
                x = mean = self.correct(x, i, options)
            # Without denoising the last level is where it ends.
            if self.predictor and (i or denoise):
                x, mean = self.predict(x, i)
            if self.corrector and not first and i:
                x = mean = self.correct(x, i - 1, options)
        if self.predictor is None and denoise:
            # The authors' has no last step then: Tweedie's mean of the data.
            s, std = self.score(x, 0)
            m = 1.0 if self.ve else math.sqrt(self.alphas_bar[0])
            return (x + std**2 * s) / m
        return mean if denoise else x


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("corrector", ["langevin", "mean", "bounded", "ald", None])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", None])
@pytest.mark.parametrize("kind", ["VE", "VP"])
def test_noise_levels_are_the_published_loop(
    kind: str, predictor: str | None, corrector: str | None, first: bool, denoise: bool
) -> None:
    """N times including the smallest, a corrector at each, and the last prediction's mean."""
    if corrector is None and predictor is None:
        return
    options: dict[str, Any] = {"snr": 0.3, "corrector_first": first, "corrector_steps": 2}
    options["batch_mean"] = corrector == "mean"
    if corrector == "bounded":
        # Of two factors alpha of VP, so that one limit of the norms' ratio is not enough.
        options["max_step"] = 0.12
    corrector = "langevin" if corrector in ("mean", "bounded") else corrector
    levels: Any = SIGMAS[::-1].tolist()
    if kind == "VP":
        levels = sk.DDPMSchedule.linear(5, BETAS[0], BETAS[-1])
    x = 3 * torch.randn(SHAPE, dtype=torch.float64)
    got = sk.predictor_corrector(
        score, x, levels, predictor=predictor, corrector=corrector, denoise=denoise, **options,
        **KEYED,
    )  # fmt: skip
    close(got, Published(kind, predictor, corrector).run(x.numpy(), denoise, **options))
    # Known elements are exact at the end.
    known, mask = torch.randn(5, dtype=torch.float64), torch.rand(SHAPE) < 0.4
    inpainted = sk.predictor_corrector(
        score, x, levels, predictor=predictor, corrector=corrector, denoise=denoise, **options,
        **KEYED, known=known, mask=mask,
    )  # fmt: skip
    assert torch.equal(inpainted[mask], known.expand(SHAPE)[mask])


@pytest.mark.parametrize(("kind", "prior"), [("VE", 4.5), ("VP", 1.0)])
def test_noise_levels_start_from_their_prior(kind: str, prior: float) -> None:
    levels: Any = SIGMAS[::-1].copy()
    if kind == "VP":
        levels = sk.DDPMSchedule.linear(5, BETAS[0], BETAS[-1])
    options = {"snr": 0.16, "corrector_first": True, "corrector_steps": 1, "batch_mean": False}
    got = sk.predictor_corrector(score, SHAPE, levels, **KEYED)
    start = prior * noise(0, Purpose.PRIOR)
    want = Published(kind, "reverse_diffusion", "ald").run(start, True, **options)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_steps_and_end_are_those_of_a_diffusion_by_default() -> None:
    x, sde = torch.randn(2, 3), sk.VE(0.1, 5.0)

    def run(**options: Any) -> Tensor:
        return sk.predictor_corrector(score, x, sde, seed=1, **options)

    assert torch.equal(run(), run(steps=1000, end=1e-3, corrector="ald"))
    assert not torch.equal(run(steps=20), run(steps=20, end=0.3))


@pytest.mark.parametrize("batch_mean", [True, False])
def test_a_score_of_zero_takes_the_largest_step(batch_mean: bool) -> None:
    """MatterGen's corrector; without max_step nothing moves."""
    x = torch.randn(SHAPE, dtype=torch.float64)
    still: dict[str, Any] = {"predictor": None, "corrector": "langevin", "denoise": False, **KEYED}
    still["batch_mean"] = batch_mean

    def run(**options: Any) -> Tensor:
        return sk.predictor_corrector(
            lambda y, s: torch.zeros_like(y), x, SIGMAS[::-1], **still, **options
        )

    assert torch.equal(run(), x)
    want = x.numpy() + math.sqrt(2 * 0.3) * sum(noise(t) for t in range(5))
    close(run(max_step=0.3), want)


def test_a_score_that_is_not_finite_is_no_largest_step() -> None:
    with pytest.raises(FloatingPointError, match="score"):
        sk.predictor_corrector(
            lambda y, s: y * math.nan, SHAPE, SIGMAS[::-1], corrector="langevin", max_step=1.0
        )


def test_the_default_corrector_keeps_the_variance() -> None:
    """In few dimensions, where norms of a sample's own do not."""
    levels = sk.geometric_sigmas(50.0, 0.01, 150)

    def variance(**options: Any) -> float:
        x = sk.predictor_corrector(gaussian, (20_000, 4), levels, seed=3, **options)
        return float(x.square().mean())

    # 150 steps add 6% without a corrector.
    alone = variance(corrector=None)
    assert abs(variance() - 1) < abs(alone - 1) < 0.08
    assert abs(variance(corrector="langevin", batch_mean=True) - 1) < 0.08
    assert variance(corrector="langevin") > 1.5


@pytest.mark.parametrize("levels", [(5.0, 3.0, 0.2), (5.0, 4.9, 4.0)])
def test_consistent_annealing_chooses_a_step_for_each_level(levels: tuple[float, ...]) -> None:
    """The posterior's step, ancestral sampling, whatever the ratios."""
    x = 3 * torch.randn(SHAPE, dtype=torch.float64)
    want = x.numpy()
    for t, (now, then) in enumerate(itertools.pairwise(levels)):
        g = now**2 - then**2
        want = want + g * score(want, now) + math.sqrt(then**2 * g / now**2) * noise(t)
    close(sk.consistent_annealed(score, x, levels, denoise=False, **KEYED), want)


def test_the_range_of_a_step_size_is_that_of_all_levels() -> None:
    # Ratios 0.8, 0.5, 0.75: eta from 0.5 to 1.5 of 2 x 1.5^2.
    levels = (5.0, 4.0, 2.0, 1.5)
    for wrong in (2.2, 6.8):
        with pytest.raises(
            ValueError,
            match=f"step_size: got {wrong}, expected from 2.25 to 6.75 for these levels, or None",
        ):
            sk.consistent_annealed(score, SHAPE, levels, step_size=wrong)
    for right in (2.25, 6.75):
        assert sk.consistent_annealed(score, SHAPE, levels, step_size=right).isfinite().all()


@pytest.mark.parametrize("method", ["heun", "euler"])
@pytest.mark.parametrize("gamma", [0.3, [0.8, 0.8, 0.0, 0.1], None])
def test_the_flow_of_scaled_steps_and_gammas(method: str, gamma: Any) -> None:
    """AlphaFold 3's sampler (its algorithm 18), and the same factor in Heun's method."""
    levels, scale = (5.0, 2.0, 0.75, 0.25), 1.4
    x = 3 * torch.randn(SHAPE, dtype=torch.float64)
    want = x.numpy()
    gammas = np.broadcast_to(0.0 if gamma is None else gamma, 4)
    for t, (now, then) in enumerate(itertools.pairwise([*levels, 0.0])):
        raised = now * (1 + gammas[t])
        want = want + 1.2 * math.sqrt(raised**2 - now**2) * noise(t)
        denoised = want + raised**2 * score(want, raised)
        delta = (want - denoised) / raised
        ahead = want + scale * (then - raised) * delta
        if method == "heun" and then:
            delta = (delta - then * score(ahead, then)) / 2
            ahead = want + scale * (then - raised) * delta
        want = ahead
    got = sk.probability_flow(
        score, x, levels, method=method, gamma=gamma, churn_noise=1.2, step_scale=scale, **KEYED
    )
    close(got, want)


def test_gamma_is_within_the_range_of_churn() -> None:
    levels, x = [5.0, 2.0, 0.75], torch.randn(SHAPE)
    some = sk.probability_flow(score, x, levels, gamma=0.3, churn_range=(1.0, 3.0), **KEYED)
    each = sk.probability_flow(score, x, levels, gamma=torch.tensor([0.0, 0.3, 0.0]), **KEYED)
    np.testing.assert_allclose(some, each, rtol=1e-6, atol=1e-6)


def test_a_schedule_is_its_levels() -> None:
    schedule, x = sk.DDPMSchedule.linear(9, 0.02, 0.4), torch.randn(SHAPE)
    levels = schedule.sigmas.flip(0)
    for sigmas in (schedule, levels):
        flows = [sk.probability_flow(score, x, sigmas, seed=1)]
        flows.append(sk.log_likelihood(score, x, sigmas, seed=1))
        if sigmas is schedule:
            want = flows
    assert all(map(torch.equal, flows, want))
    # The prior of a schedule is N(0, 1) in x = m y.
    z = sk.ops.normal(SHAPE, NoiseKey(1, purpose=sk.Purpose.PRIOR))
    start = z * math.sqrt(1 + levels[0].item() ** 2)
    got = sk.probability_flow(score, SHAPE, schedule, seed=1)
    assert torch.equal(got, sk.probability_flow(score, start, levels, seed=1))


def test_random_rotations() -> None:
    key = NoiseKey(7, draw=3)
    rotations = sk.random_rotation(20_000, key, dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotations)
    torch.testing.assert_close(rotations @ rotations.mT, identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(20_000).double())
    # Of the Haar measure: E R = 0, E R_ij R_kl = delta_ik delta_jl / 3, E tr(R)^2 = 1 and, what
    # distinguishes it from other measures with those, E tr(R)^3 = 1, E tr(R)^4 = 3.
    flat = rotations.view(-1, 9)
    assert flat.mean(0).abs().max() < 5 / math.sqrt(3 * 20_000)
    torch.testing.assert_close(flat.T @ flat / 20_000, torch.eye(9).double() / 3, rtol=0, atol=0.02)
    trace = rotations.diagonal(dim1=1, dim2=2).sum(1)
    for power, moment in ((2, 1), (3, 1), (4, 3)):
        values = trace**power
        assert abs(float(values.mean()) - moment) < 5 * float(values.std()) / math.sqrt(20_000)
    # Turning by a rotation, from either side, changes no distribution: the entries are alike.
    turn = rotations[0]
    for turned in (turn @ rotations, rotations @ turn):
        fourth = (turned**4).mean(0)
        assert (fourth - 0.2).abs().max() < 0.02


def test_a_rotation_is_of_the_four_normals_of_its_sample() -> None:
    q = ops.normal((6, 4), KEY).double()
    w, v = (q / q.norm(dim=1, keepdim=True)).split([1, 3], 1)
    points = torch.randn(6, 2, 3, dtype=torch.float64)
    v = v[:, None].expand_as(points)
    # q p q*, as quaternions turn points.
    cross = torch.linalg.cross(v, points)
    want = points + 2 * w[:, None] * cross + 2 * torch.linalg.cross(v, cross)
    rotations = sk.random_rotation(6, KEY, dtype=torch.float64)
    torch.testing.assert_close(points @ rotations.mT, want)
    samples = torch.tensor([8, 3, 5, 8])
    picked = sk.random_rotation(4, NoiseKey(SEED).rows(samples), dtype=torch.float64)
    assert torch.equal(picked, rotations[samples - FIRST])
    assert torch.equal(
        sk.random_rotation(2, KEY.for_samples(FIRST + 2)), sk.random_rotation(6, KEY)[2:4]
    )
    half = sk.random_rotation(6, KEY, dtype=torch.float16, device="cpu")
    torch.testing.assert_close(half.double(), rotations, rtol=0, atol=2**-11 + 1e-6)
    assert sk.random_rotation(0, KEY).shape == (0, 3, 3)
    assert sk.random_rotation(2, KEY, device="meta").is_meta


LEVELS = SIGMAS[::-1]
WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, "steps: got 5 beside noise levels, expected none",
     lambda: sk.predictor_corrector(score, SHAPE, LEVELS, steps=5)),
    (ValueError, "end: got 0.1 beside noise levels, expected none",
     lambda: sk.predictor_corrector(score, SHAPE, sk.DDPMSchedule.linear(9), end=0.1)),
    (ValueError, "sde: got 1 noise level, expected at least 2",
     lambda: sk.predictor_corrector(score, SHAPE, [1.0])),
    (ValueError, r"sde: got sde\[0\] = 0.3 and .* expected strictly decreasing",
     lambda: sk.predictor_corrector(score, SHAPE, SIGMAS)),
    (TypeError, "sde: got str 'VE', expected a diffusion",
     lambda: sk.predictor_corrector(score, SHAPE, "VE")),
    (ValueError, "predictor: got 'euler_maruyama', expected .* for noise levels, or None",
     lambda: sk.predictor_corrector(score, SHAPE, LEVELS, predictor="euler_maruyama")),
    (ValueError, "max_step: got it beside corrector 'ald', expected 'langevin'",
     lambda: sk.predictor_corrector(score, SHAPE, LEVELS, max_step=1.0)),
    (ValueError, "batch_mean: got it beside corrector None, expected 'langevin'",
     lambda: sk.predictor_corrector(score, SHAPE, LEVELS, corrector=None, batch_mean=True)),
    (ValueError, "segments: got it beside corrector 'ald', expected 'langevin'",
     lambda: sk.predictor_corrector(score, SHAPE, LEVELS, segments=torch.zeros(6).long())),
    (ValueError, "max_step: got 0.0, expected a number above 0",
     lambda: sk.predictor_corrector(score, SHAPE, LEVELS, corrector="langevin", max_step=0)),
    (ValueError, "gamma: got it beside churn 2.0, expected one of the two",
     lambda: sk.probability_flow(score, SHAPE, LEVELS, churn=2, gamma=0.1)),
    (ValueError, "gamma: got 2 numbers, expected one, or 5",
     lambda: sk.probability_flow(score, SHAPE, LEVELS, gamma=[0.1, 0.2])),
    (ValueError, r"gamma\[1\]: got -0.2, expected a number of at least 0",
     lambda: sk.probability_flow(score, SHAPE, LEVELS, gamma=[0.1, -0.2, 0, 0, 0])),
    (ValueError, "step_scale: got 0.0, expected a number above 0",
     lambda: sk.probability_flow(score, SHAPE, LEVELS, step_scale=0)),
    (TypeError, "sigmas: got VE .*, expected noise levels or a score_kernels.DDPMSchedule",
     lambda: sk.probability_flow(score, SHAPE, sk.VE())),
    (ValueError, "count: got -1", lambda: sk.random_rotation(-1, KEY)),
    (TypeError, "noise: got int 3, expected a NoiseKey", lambda: sk.random_rotation(1, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), WRONG)
def test_what_is_refused(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
