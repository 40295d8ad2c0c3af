"""What every sampler's steps can be given: limits, projections, preconditioners, noise first.

Against the recurrences of test_recurrences in NumPy float64, fed the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_recurrences
import torch
from scipy import stats
from test_recurrences import CASES, FIRST, SEED, SHAPE, noise, score
from tolerances import ALPHA
from tolerances import FLOAT32_SIGMA as ERROR
from torch import Tensor

import score_kernels as sk
from score_kernels.noise import NoiseKey

SEEDED: dict[str, Any] = {"seed": SEED, "first_sample": FIRST}
SEGMENTS = torch.tensor([1, 0, 1, 3, 1, 0])
# One case of each sampler, and of each way that a step is made.
NAMES = [
    *("annealed", "langevin at a level", "consistent", "flow", "churn euler", "ddpm small"),
    *("ddim 0.6", "dpm 0.4", "VP euler", "VE reverse_diffusion langevin", "VP ancestral ald"),
    "subVP None corrected langevin",
]


def turned(x: Any, sigma: Any) -> None:
    """A projection: the odd numbers of a row change places, and shrink with sigma."""
    x[:, 1::2] = np.array(x)[:, [3, 1]] if isinstance(x, np.ndarray) else x[:, [3, 1]]
    x /= 1 + 0.1 * sigma if isinstance(x, np.ndarray) else 1 + 0.1 * sigma[:, None].to(x.dtype)


def centred(x: np.ndarray) -> np.ndarray:
    return np.stack([x[i] - x[SEGMENTS == s].mean(0) for i, s in enumerate(SEGMENTS)])


def projected(x: np.ndarray, sigma: float) -> np.ndarray:
    x = x.copy()
    turned(x, sigma)
    return x


End = Callable[[np.ndarray, float], np.ndarray]
ENDS: dict[str, tuple[dict[str, Any], End]] = {
    "clamp": ({"clamp": (-0.8, 1.3)}, lambda x, _: x.clip(-0.8, 1.3)),
    "wrap": ({"wrap": 2.5}, lambda x, _: x % 2.5),
    "center": ({"center": SEGMENTS}, lambda x, _: centred(x)),
    "project": ({"project": turned}, projected),
    "all": (
        {"clamp": (-0.8, 1.3), "center": SEGMENTS, "project": turned},
        lambda x, sigma: projected(centred(x.clip(-0.8, 1.3)), sigma),
    ),
}


PAIRS = [(name, end) for name in NAMES for end in ENDS if (name, end) != ("dpm 0.4", "wrap")]


@pytest.mark.parametrize(("name", "end"), PAIRS)
def test_what_every_step_ends_with(name: str, end: str) -> None:
    """With denoising and known elements, clean and noisy, which come before it."""
    case, (options, apply) = CASES[name], ENDS[end]
    options = options | SEEDED | ({"denoise": True} if case.denoises else {})
    x = 3 * torch.randn(SHAPE, dtype=torch.float64)
    got = case.sampler(score, x, **options)
    want = case.run(x.numpy(), case.denoises, end=apply)
    np.testing.assert_allclose(got, want, rtol=ERROR, atol=ERROR)
    known, mask = torch.randn(5, dtype=torch.float64), torch.rand(SHAPE) < 0.4
    for known_noise in (True, False):
        options |= {"known": known, "mask": mask, "known_noise": known_noise}
        got = case.sampler(score, x, **options)
        given = known.numpy(), mask.numpy()
        want = case.run(x.numpy(), case.denoises, *given, known_noise=known_noise, end=apply)
        np.testing.assert_allclose(got, want, rtol=ERROR, atol=ERROR)


def shortened(s: np.ndarray, norm: Any, most: float) -> np.ndarray:
    return s * np.minimum(1, most / norm)


def over_segments(s: np.ndarray) -> np.ndarray:
    squares = [(s[SEGMENTS == number] ** 2).sum() for number in SEGMENTS]
    return np.sqrt(squares)[:, None]


# The data are limited to a range, or by a quantile of each row, at least 1.
def quantiled(x0: np.ndarray) -> np.ndarray:
    most = np.maximum(np.quantile(abs(x0), 0.7, axis=1, keepdims=True), 1)
    return x0.clip(-most, most) / most


def with_estimate(limit: Callable[[np.ndarray], np.ndarray]) -> Any:
    return lambda y, s, sigma: (limit(y + sigma**2 * s) - y) / sigma**2


LIMITS: dict[str, tuple[dict[str, Any], Any]] = {
    "row": (
        {"clip_score": 0.9},
        lambda y, s, sigma: shortened(s, np.sqrt((s**2).sum(1, keepdims=True)), 0.9),
    ),
    "last": ({"clip_score": 0.9, "clip_over": "last"}, None),
    "element": (
        {"clip_score": 0.3, "clip_over": "element"},
        lambda y, s, sigma: s.clip(-0.3, 0.3),
    ),
    "segments": (
        {"clip_score": 0.9, "clip_over": SEGMENTS},
        lambda y, s, sigma: shortened(s, over_segments(s), 0.9),
    ),
    "estimate": ({"clip_x0": (0.2, 0.9)}, with_estimate(lambda x0: x0.clip(0.2, 0.9))),
    "quantile": ({"clip_x0": 0.7}, with_estimate(quantiled)),
    "guidance": (
        {"guidance": lambda x, sigma, s: 0.3 * s + 0.1 * x},
        lambda y, s, sigma: 1.3 * s + 0.1 * y,
    ),
}
LIMITS["last"] = LIMITS["last"][0], LIMITS["row"][1]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_limits_of_the_score(monkeypatch: pytest.MonkeyPatch, name: str, limit: str) -> None:
    case, (options, apply) = CASES[name], LIMITS[limit]
    x = 3 * torch.randn(SHAPE, dtype=torch.float64)
    got = case.sampler(score, x, **options, **SEEDED)
    whole = test_recurrences.score
    monkeypatch.setattr(
        test_recurrences, "score", lambda y, sigma: apply(y, whole(y, sigma), sigma)
    )
    np.testing.assert_allclose(got, case.run(x.numpy(), case.denoises), rtol=ERROR, atol=ERROR)


def test_the_last_dimension_is_that_of_atoms() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    got = sk.langevin(
        lambda y: -y, x, step_size=0.5, steps=1, temperature=0, clip_score=0.4, clip_over="last"
    )
    norm = x.norm(dim=2, keepdim=True)
    torch.testing.assert_close(got, x - 0.25 * x * (0.4 / norm).clamp(max=1))
    zero = sk.langevin(lambda y: 0 * y, x, step_size=1, steps=1, temperature=0, clip_score=1)
    assert torch.equal(zero, x)


@pytest.mark.parametrize("options", [{"clip_score": 0.5}, {"clip_x0": 0.8}, {"clip_x0": (0, 0.2)}])
def test_states_of_numbers_and_of_no_rows(options: dict[str, Any]) -> None:
    def run(x: Any, **more: Any) -> Tensor:
        return sk.annealed_langevin(
            lambda y, sigma: -y / sigma.view(-1, *[1] * (y.dim() - 1)), x, LEVELS, seed=1,
            steps_per_level=1, step_size=0.1, **options, **more,
        )  # fmt: skip

    torch.testing.assert_close(run((5,)), run((5, 1))[:, 0])
    assert run((0, 3)).shape == (0, 3)


def test_a_score_beyond_float32_s_squares_is_shortened() -> None:
    x = torch.full((2, 4), 1e25)
    got = sk.langevin(lambda y: y, x, step_size=2, steps=1, temperature=0, clip_score=2e25)
    torch.testing.assert_close(got, 2 * x)
    got = sk.langevin(lambda y: 3 * y, x, step_size=2, steps=1, temperature=0, clip_score=2e25)
    torch.testing.assert_close(got, 2 * x)


def test_clean_known_elements_stay_where_noise_comes_first() -> None:
    known, mask, seen = torch.full((5,), 0.3), torch.arange(5) < 2, []

    def net(y: Tensor, sigma: Tensor) -> Tensor:
        seen.append(y[:, :2].clone())
        return -y / (1 + sigma[:, None] ** 2)

    options: dict[str, Any] = {"known": known, "mask": mask, "known_noise": False, "seed": 1}
    sk.annealed_langevin(
        net, SHAPE, LEVELS, steps_per_level=2, step_size=0.1, noise_first=True, **options
    )
    sk.probability_flow(net, SHAPE, LEVELS, method="euler", churn=5, **options)
    assert len(seen) == 10 and all((y == 0.3).all() for y in seen)


def test_a_half_precision_score_is_clipped_in_float32() -> None:
    x = torch.full((2, 300), 1e4)
    got = sk.langevin(lambda y: y.half(), x, step_size=2, steps=1, temperature=0, clip_score=3.0)
    torch.testing.assert_close(got - x, torch.full_like(x, 3 / math.sqrt(300)), rtol=1e-2, atol=0)


LEVELS, ALPHAS = (5.0, 2.0, 0.75), [4.0, 4.0, 0.64, 0.09, 0.09]
GAIN = torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0], dtype=torch.float64)


def annealed(x: Any, **options: Any) -> Tensor:
    return sk.annealed_langevin(
        score, x, LEVELS, steps_per_level=[2, 1, 2], step_size=0.09, **SEEDED, **options
    )


@pytest.mark.parametrize("by_level", [False, True])
def test_a_preconditioner(by_level: bool) -> None:
    def gain(sigma: float) -> Tensor:
        return GAIN * sigma if by_level else GAIN

    x = torch.randn(SHAPE, dtype=torch.float64)
    got = annealed(x, precondition=gain if by_level else GAIN, temperature=0.6)
    want, sigmas = x.numpy(), (5.0, 5.0, 2.0, 0.75, 0.75)
    for t, sigma in enumerate(sigmas):
        alpha, g = 0.09 * sigma**2 / 0.75**2, gain(sigma).numpy()
        want = want + alpha / 2 * g * score(want, sigma) + np.sqrt(0.6 * alpha * g) * noise(t)
    want = want + 0.75**2 * score(want, 0.75)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    plain = sk.langevin(
        lambda y: score(y, 2.0), x, step_size=0.3, steps=1, precondition=GAIN, **SEEDED
    )
    g = GAIN.numpy()
    want = x.numpy() + 0.15 * g * score(x.numpy(), 2.0) + np.sqrt(0.3 * g) * noise(0)
    np.testing.assert_allclose(plain, want, rtol=1e-6, atol=1e-6)


def test_the_variance_where_a_chain_settles() -> None:
    """Of N(0, v): temperature v / (1 - alpha G / (4 v)), which the chain starts with and keeps."""
    v, alpha, temperature, count = 0.5, 0.3, 0.6, 40_000
    gain = torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0])
    want = temperature * v / (1 - alpha * gain / (4 * v))
    start = want.sqrt() * sk.ops.normal((count, 5), NoiseKey(3))
    x = sk.langevin(
        lambda y: -y / v, start, step_size=alpha, steps=60, temperature=temperature,
        precondition=gain, seed=4,
    )  # fmt: skip
    sums = (x.double().square() / want).sum(0)
    p = 2 * np.minimum(stats.chi2.cdf(sums, count), stats.chi2.sf(sums, count))
    assert p.min() > ALPHA / len(gain)


def test_noise_first() -> None:
    x = torch.randn(SHAPE, dtype=torch.float64)
    want, states = x.numpy(), []
    for t, sigma in enumerate((5.0, 5.0, 2.0, 0.75, 0.75)):
        alpha = 0.09 * sigma**2 / 0.75**2
        noisy = want + math.sqrt(alpha) * noise(t)
        want = noisy + alpha / 2 * score(noisy, sigma)
        states.append(want)
    got = annealed(x, noise_first=True, denoise=False)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    # What is recorded has no noise of the step to come.
    recorded = annealed(x, noise_first=True, denoise=False, record_every=1)
    np.testing.assert_allclose(recorded, states, rtol=1e-6, atol=1e-6)
    denoised = want + 0.75**2 * score(want, 0.75)
    np.testing.assert_allclose(annealed(x, noise_first=True), denoised, rtol=1e-6, atol=1e-6)
    sizes = {"step_size": [0.3, 0.2], "noise_scale": [0.01, 0.3], "steps": 2}
    plain = sk.langevin(lambda y: score(y, 2.0), x, noise_first=True, **sizes, **SEEDED)
    want = x.numpy()
    for t, (size, scale) in enumerate(((0.3, 0.01), (0.2, 0.3))):
        want = want + scale * noise(t)
        want = (want + size / 2 * score(want, 2.0)).copy()
    np.testing.assert_allclose(plain, want, rtol=1e-6, atol=1e-6)


def test_noise_first_is_one_pass_a_step_with_the_bits_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from score_kernels.backends.compiled import native

    calls, step = [], native.affine_step
    monkeypatch.setattr(native, "affine_step", lambda *a: [calls.append(a), step(*a)])
    options: dict[str, Any] = {"noise_first": True, "denoise": False}
    fused = annealed(SHAPE, **options)
    assert len(calls) == 6
    for more in ({"record_every": 1}, {"clamp": (-math.inf, math.inf)}, {"project": lambda *_: 0}):
        got = annealed(SHAPE, **options, **more)
        assert torch.equal(got[-1] if "record_every" in more else got, fused)
    # Known elements, clamped in between.
    mask = torch.rand(SHAPE) < 0.5
    got = annealed(SHAPE, **options, known=torch.full((5,), 0.3), mask=mask, clamp=(-1, 1))
    assert (got[mask] == 0.3).all() and got.abs().max() <= 1


OPTIONS: dict[str, dict[str, Any]] = {
    **{name: options for name, (options, _) in ENDS.items() if name not in ("center", "all")},
    **{name: options for name, (options, _) in LIMITS.items() if name != "segments"},
}


# Less the one whose norms are a batch's, and what is refused.
ALONE = [
    (name, option)
    for name in NAMES
    for option in OPTIONS
    if name != "subVP None corrected langevin" and (name, option) != ("dpm 0.4", "wrap")
]


@pytest.mark.parametrize(("name", "option"), ALONE)
def test_split_resumed_and_recorded_to_the_bit(name: str, option: str) -> None:
    case, options = CASES[name], OPTIONS[option]
    x = torch.randn(SHAPE)
    options = options | {"known": torch.zeros(5), "mask": torch.arange(5) < 2, "seed": 5}
    options |= {"denoise": False} if case.denoises else {}
    whole = case.sampler(score, x, **options)
    parts = [
        case.sampler(score, x[rows], **options, first_sample=rows.start)
        for rows in (slice(0, 4), slice(4, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    states: list[Tensor] = []
    aux: list[dict[str, Tensor]] = []

    def note(progress: sk.Progress) -> None:
        states.append(progress.x.clone())
        aux.append({name: value.clone() for name, value in progress.aux.items()})

    case.sampler(score, x, **options, callback=note)
    recorded = case.sampler(score, x, **options, record_every=2)
    assert torch.equal(recorded[0], states[1]) and torch.equal(recorded[-1], whole)
    resumed = case.sampler(score, states[1], **options, first_step=2, aux=aux[1])
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("over", ["row", "last", "element"])
def test_complex_states_are_pairs(over: str) -> None:
    x = torch.randn(6, 3, dtype=torch.complex128)
    centre = torch.tensor([1 + 2j, 0.5, -1j], dtype=torch.complex128)
    known, mask = torch.tensor(2 - 1j), torch.tensor([True, False, False])
    seen: list[torch.dtype] = []

    def drift(y: Tensor, sigma: Tensor) -> Tensor:
        return (centre - y) / (1 + sigma[:, None].to(torch.float64) ** 2)

    def half(y: Tensor, sigma: Tensor, s: Tensor) -> Tensor:
        return 0.5 * s

    def project(y: Tensor, sigma: Tensor) -> None:
        seen.append(y.dtype)
        y.mul_(1j)

    options: dict[str, Any] = {"guidance": half, "project": project, "precondition": GAIN[:3]}
    options |= {"known": known, "mask": mask, "denoise": False, "clip_score": 0.8}
    options |= {"clip_over": over}
    got = sk.annealed_langevin(drift, x, [2.0, 1.0], steps_per_level=2, step_size=0.1, seed=5,
                               record_every=2, callback=lambda p: seen.append(p.x.dtype),
                               **options)  # fmt: skip
    assert got.dtype == torch.complex128 and got.shape == (3, 6, 3)
    assert set(seen) == {torch.complex128}

    def z(draw: int, purpose: int) -> np.ndarray:
        parts = sk.ops.normal((6, 3, 2), NoiseKey(5, purpose=purpose).at(draw)).double()
        return torch.view_as_complex(parts.contiguous()).numpy()

    want, where = x.numpy(), mask.numpy()
    want = np.where(where, 2 - 1j + 2 * z(0, sk.Purpose.KNOWN), want)
    for t, sigma in enumerate((2.0, 2.0, 1.0, 1.0)):
        s = 1.5 * (centre.numpy() - want) / (1 + sigma**2)
        norm = abs(s) if over == "element" else np.sqrt((abs(s) ** 2).sum(1, keepdims=True))
        s = s * np.minimum(1, 0.8 / norm)
        alpha, g, noise_of_step = 0.1 * sigma**2, GAIN[:3].numpy(), z(t, sk.Purpose.LANGEVIN)
        want = want + alpha / 2 * g * s + np.sqrt(alpha * g) * noise_of_step
        want = 1j * np.where(where, 2 - 1j + sigma * noise_of_step, want)
    np.testing.assert_allclose(got[1][:, 1:], want[:, 1:], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[2], np.where(where, 2 - 1j, want), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="score: got torch.float64 of shape"):
        sk.langevin(lambda y: y.real, x, step_size=0.1, steps=1)


def test_a_seed_from_a_generator() -> None:
    def run(generator: torch.Generator) -> Tensor:
        return sk.langevin(lambda y: -y, (3, 4), step_size=0.1, steps=2, generator=generator)

    generator = torch.Generator().manual_seed(7)
    first, second = run(generator), run(generator)
    assert torch.equal(run(generator.manual_seed(7)), first) and not torch.equal(first, second)
    before = torch.get_rng_state()
    run(generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_callback_that_returns_true_ends_the_chain() -> None:
    states = annealed(SHAPE, record_every=1, denoise=False)
    assert torch.equal(annealed(SHAPE, callback=lambda p: p.step == 2), states[2])
    short = annealed(SHAPE, callback=lambda p: p.step == 2, record_every=2)
    assert torch.equal(short, states[[1, 2]])
    short = annealed(SHAPE, callback=lambda p: p.step == 3, record_every=2)
    assert torch.equal(short, states[[1, 3]])
    short = annealed(SHAPE, callback=lambda p: np.bool_(p.step == 2))
    assert torch.equal(short, states[2])
    # Others than True do not; the state that a callback has changed may be returned.
    got = annealed(SHAPE, callback=lambda p: p.x[:2].mul_(1), project=lambda x, _: x.mul_(1))
    assert torch.equal(got, annealed(SHAPE))
    assert torch.equal(annealed(SHAPE, callback=lambda p: 1, denoise=False), states[-1])


def test_a_divergence_is_repeated_with_the_limits() -> None:
    """A clamp that hides an infinite state does so again; a projection's NaN is found."""
    grows = {"step_size": 10.0, "steps": 60}
    got = sk.langevin(lambda y: y**3, (2, 3), **grows, seed=1, clamp=(-5, 5))
    assert got.abs().max() <= 5

    def breaks(x: Tensor, sigma: Tensor) -> None:
        x[1, 2] /= (x[1, 2] != 0) & (len(calls) != 7)
        calls.append(1)

    calls: list[int] = []
    with pytest.raises(FloatingPointError, match="sample 1 is not finite|not deterministic"):
        sk.langevin(lambda y: -y, (2, 3), step_size=0.1, steps=20, seed=1, project=breaks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip_over": "last"}, "clip_over: got it without clip_score"),
        ({"clip_score": 1.0, "clip_over": "sample"}, "clip_over: got 'sample', expected"),
        ({"clip_score": 0.0}, "clip_score: got 0"),
        ({"clip_x0": (1, -1)}, r"clip_x0: got \(1, -1\), expected"),
        ({"clip_x0": 0.0}, "clip_x0: got 0.0, expected"),
        ({"clip_x0": 1.0}, "clip_x0: got 1.0, expected"),
        ({"clip_x0": 1.5}, "clip_x0: got 1.5, expected .low, high., or a quantile"),
        ({"known_noise": False}, "known_noise: got it without known"),
        ({"noise_first": True, "precondition": GAIN}, "noise_first: got True beside"),
        ({"precondition": -GAIN}, "precondition: got numbers below 0"),
        ({"precondition": torch.ones(7)}, r"precondition: got shape \(7,\)"),
        ({"generator": torch.Generator()}, "generator: got one beside a seed"),
        ({"generator": 3}, "generator: got int"),
        ({"center": torch.zeros(2, dtype=torch.int64)}, "center: got 2"),
        ({"clamp": (-1, None)}, r"clamp: got \(-1, None\), expected two numbers"),
        ({"precondition": [1.0]}, "precondition: got list"),
        ({"project": lambda x, sigma: x + 1}, "project: returned a new tensor"),
        ({"max_step": 1.0}, "got an unexpected keyword argument 'max_step', which predictor_corr"),
    ],
)
def test_options_that_are_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        annealed(SHAPE, **given)


def test_guidance_of_two_arguments_and_more_by_name_gets_two() -> None:
    def named(x: Tensor, sigma: Tensor, scale: float = 2.0, *rest: Any, **more: Any) -> Tensor:
        assert scale == 2.0 and not rest and not more
        return 0.1 * x

    plain = annealed(SHAPE, guidance=lambda x, sigma: 0.1 * x)
    assert torch.equal(annealed(SHAPE, guidance=named), plain)


def test_a_score_that_is_a_gradient_is_told_how() -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(-x.requires_grad_().square().sum(), x)[0]

    with pytest.raises(RuntimeError, match=r"score: .*torch.enable_grad\(\), or give the energy"):
        sk.langevin(gradient, SHAPE, step_size=0.1, steps=1)


def test_an_estimate_needs_a_level() -> None:
    with pytest.raises(ValueError, match="clip_x0: got it for a chain without sigma"):
        sk.langevin(lambda y: -y, SHAPE, step_size=0.1, steps=1, clip_x0=(0, 1))


def test_options_that_a_sampler_cannot_take() -> None:
    with pytest.raises(ValueError, match="wrap: got it with dpm_solver"):
        sk.dpm_solver(score, SHAPE, LEVELS, wrap=1.0)
    with pytest.raises(TypeError, match="precondition: got function .*, expected a tensor"):
        sk.langevin(lambda y: -y, SHAPE, step_size=0.1, steps=1, precondition=lambda s: GAIN)


def test_a_plan_has_steps_of_one_kernel() -> None:
    from score_kernels.sampling.engine import PLAN

    for options in ({"noise_first": True}, {"precondition": GAIN}):
        with pytest.raises(ValueError, match="for a plan"):
            sk.annealed_langevin(score, PLAN, LEVELS, steps_per_level=1, step_size=0.1, **options)
