from __future__ import annotations

import math
import random
import re
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
import tolerances
import torch
from scipy.integrate import quad
from scipy.special import log_ndtr
from torch import Tensor

from score_kernels import annealed_langevin
from score_kernels.diffusion import sigmas
from score_kernels.diffusion.sigmas import (
    best_step_size,
    edm_sigmas,
    geometric_sigmas,
    level_count,
    level_overlap,
    max_pairwise_distance,
    pairwise_distance_bounds,
    sigma_ratio,
    suggest_schedule,
    variance_ratio,
)


@pytest.mark.parametrize(
    "largest, smallest, levels", [(1.0, 0.01, 10), (50.0, 0.01, 232), (348.0, 0.01, 2311)]
)
def test_ratios_are_equal_and_ends_exact(largest: float, smallest: float, levels: int) -> None:
    sigmas = geometric_sigmas(largest, smallest, levels)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (levels,)
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([largest, smallest]))
    ratio = sigmas[:-1].double() / sigmas[1:].double()
    want = (largest / smallest) ** (1 / (levels - 1))
    torch.testing.assert_close(ratio, torch.full_like(ratio, want), rtol=1e-6, atol=0)


def test_one_level() -> None:
    assert geometric_sigmas(0.5, 0.5, 1).tolist() == [0.5]


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((1.0, 2.0, 5), ValueError, "sigma_min: got 2.0, expected less than"),
        ((1.0, 1.0, 5), ValueError, "sigma_min: got 1.0"),
        ((0.0, 1.0, 5), ValueError, "sigma_max: got 0.0"),
        ((1.0, -1.0, 5), ValueError, "sigma_min: got -1.0"),
        ((math.inf, 1.0, 5), ValueError, "sigma_max: got inf"),
        ((1.0, 0.1, 1), ValueError, "levels: got 1"),
        ((1.0, 0.1, 0), ValueError, "levels: got 0"),
        ((1.0, 0.1, 2.5), TypeError, "levels: got float 2.5"),
        (("1", 0.1, 2), TypeError, "sigma_max: got str"),
    ],
)
def test_wrong_inputs_are_named(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        geometric_sigmas(*arguments)


def test_the_published_cifar10_numbers() -> None:
    ratio = sigma_ratio(3072)
    assert ratio == pytest.approx(1.039796, abs=5e-7)
    assert level_count(50, 0.01, ratio) == 219
    released = 5000 ** (1 / 231)
    assert level_overlap(3072, released) == pytest.approx(0.567, abs=5e-4)
    step_size = best_step_size(released, 0.01, 5)
    assert step_size / 2 == pytest.approx(6.18e-6, abs=5e-9)
    assert variance_ratio(step_size, released, 0.01, 5) == pytest.approx(1.0555, abs=5e-5)


@pytest.mark.parametrize("dim", [1, 2, 4, 5, 64, 3072, 10**6])
@pytest.mark.parametrize("stretch", [0.0, 0.3, 1.0, 2.5])
def test_overlap_is_the_normal_integral(dim: int, stretch: float) -> None:
    ratio = 1 + stretch * 3 / math.sqrt(2 * dim)
    centre = math.sqrt(2 * dim) * (ratio - 1)
    # quad is given the middle of the bell, which it could miss in a wide interval.
    want, error = quad(
        lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
        centre - 3 * ratio,
        centre + 3 * ratio,
        points=[max(0.0, centre - 3 * ratio)],
        epsabs=1e-14,
        epsrel=1e-12,
    )
    assert level_overlap(dim, ratio) == pytest.approx(want, rel=1e-9, abs=10 * error)


def test_overlap_has_its_digits_in_the_tails() -> None:
    for dim, ratio in ((3072, 1.1), (3072, 1.3), (10**9, 1.0004), (7, 30.0)):
        low = math.sqrt(2 * dim) * (ratio - 1) - 3 * ratio
        # The upper limit is at least 6 farther out, where less than e^-18 of the tail is left.
        want = log_ndtr(-low)
        assert want < -7
        assert math.log(level_overlap(dim, ratio)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dim", [1, 3, 5, 3072, 10**9])
def test_overlap_at_the_ends(dim: int) -> None:
    assert level_overlap(dim, 1) == pytest.approx(math.erf(3 / math.sqrt(2)), rel=1e-15)
    assert level_overlap(dim, 1e308) == (1.0 if dim <= 4 else 0.0)
    for ratio in (1 + 1e-12, 1.001, 1.1, 2.0, 1e3, 1e100):
        assert 0 <= level_overlap(dim, ratio) <= 1


@pytest.mark.parametrize("dim", [5, 6, 13, 64, 784, 3072, 196_608, 10**6, 10**9])
@pytest.mark.parametrize("overlap", [1e-200, 1e-6, 0.1, 0.5, 0.567, 0.9, 0.997])
def test_ratio_and_overlap_are_inverse(dim: int, overlap: float) -> None:
    ratio = sigma_ratio(dim, overlap)
    assert ratio > 1
    # A ratio in float64 is off by up to 1.2e-16, and the logarithm of the overlap changes by no
    # more than sqrt(2 D) (b + 1) times as much, with the overlap about that of a normal's tail
    # beyond b <= 31.
    slack = 1e-12 + 3e-16 * math.sqrt(2 * dim) * 32
    assert level_overlap(dim, ratio) == pytest.approx(overlap, rel=32 * slack, abs=0)


@pytest.mark.parametrize("dim", [5, 6, 64, 3072])
def test_overlap_rises_and_then_falls(dim: int) -> None:
    grid = [level_overlap(dim, 1 + g) for g in torch.logspace(-6, 2, 4000).double().tolist()]
    top = grid.index(max(grid))
    assert all(a <= b * (1 + 1e-15) for a, b in pairwise(grid[: top + 1]))
    assert all(a >= b for a, b in pairwise(grid[top:]))


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_few_dimensions_set_no_limit(dim: int) -> None:
    assert min(level_overlap(dim, ratio) for ratio in (1.0, 1.5, 10.0, 1e6)) >= 0.9973
    with pytest.raises(ValueError, match=rf"dim: got {dim}.*0.9973 to 1.*1.668"):
        sigma_ratio(dim)


def test_level_count_is_the_nearest() -> None:
    for ratio, levels in ((1.668, 10), (1.0001, 46055), (99.0, 2), (1e6, 2)):
        assert level_count(1, 0.01, ratio) == levels
    for levels in (2, 3, 10, 232, 2311):
        exact = 1000 ** (1 / (levels - 1))
        assert level_count(5, 0.005, exact) == levels
        assert level_count(5, 0.005, exact ** (1 + 0.4 / levels)) == levels
        assert level_count(5, 0.005, exact ** (1 - 0.4 / levels)) == levels
    assert level_count(1e300, 1e-300, 10.0) == 601


def test_variance_ratio_is_that_of_a_chain() -> None:
    """The variance of a chain towards a single data point, step by step."""
    generator = random.Random(4)
    for _ in range(50):
        ratio, steps = 1 + generator.expovariate(3), generator.randint(1, 40)
        sigma_min, sigma = generator.uniform(0.001, 1), generator.uniform(0.001, 100)
        step_size = generator.uniform(0, 3.9) * sigma_min**2
        alpha = step_size * (sigma / sigma_min) ** 2
        variance = Decimal(ratio * sigma) ** 2
        for _ in range(steps):
            shrink = 1 - Decimal(alpha) / (2 * Decimal(sigma) ** 2)
            variance = shrink**2 * variance + Decimal(alpha)
        want = float(variance / Decimal(sigma) ** 2)
        assert variance_ratio(step_size, ratio, sigma_min, steps) == pytest.approx(want, rel=1e-10)


def test_variance_ratio_settles_at_the_stationary_variance() -> None:
    for alpha in (1e-6, 0.1, 1.0, 2.0, 3.9):
        got = variance_ratio(alpha, 7.0, 1.0, 10**9)
        assert got == pytest.approx(1 / (1 - alpha / 4), rel=1e-12)


def test_best_step_size_is_the_minimum() -> None:
    """No step size of a dense grid, at both ends too, comes closer."""
    ends = torch.logspace(-18, math.log10(0.5), 1500, dtype=torch.float64)
    grid = torch.cat([ends, 1 - ends.flip(0)])
    generator = random.Random(5)
    cases = [(1 + 10 ** generator.uniform(-6, 6), generator.randint(1, 10)) for _ in range(20)]
    cases += [
        (1 + 10 ** generator.uniform(-6, 1), 10 ** generator.randint(2, 6)) for _ in range(20)
    ]
    cases += [(1 + 1e-9, 1), (1e6, 1), (1 + 1e-9, 10**6), (1e6, 10**6), (1e50, 1), (1e50, 2**62)]
    for ratio, steps in cases:
        found = best_step_size(ratio, 0.01, steps)
        assert 0 < found <= 2e-4
        # (1 - eta)^(2 T) (ratio^2 - 1) + (1 - (1 - eta)^(2 T)) eta / (2 - eta), and its neighbours.
        eta = found / 2e-4
        tried = torch.cat([grid, eta * torch.linspace(0.999, 1.001, 201, dtype=torch.float64)])
        tried = torch.cat([torch.tensor([eta], dtype=torch.float64), tried[tried < 1]])
        kept = (2 * steps * torch.log1p(-tried)).exp()
        excess = kept * (ratio - 1) * (ratio + 1) + (1 - kept) * tried / (2 - tried)
        if ratio < 1e5:
            assert excess[0] <= excess[1:].min() * (1 + 1e-9) + 1e-15
        got = variance_ratio(found, ratio, 0.01, steps)
        assert got <= 1 + excess[1:].min().item() * (1 + 1e-9) + 1e-15 or ratio >= 1e5


def test_best_step_size_scales_with_the_smallest_level() -> None:
    for sigma_min in (1e-8, 0.3, 1e6):
        want = best_step_size(1.1, 1.0, 7) * sigma_min**2
        assert best_step_size(1.1, sigma_min, 7) == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize(
    "data",
    [
        torch.randn(300, 2),
        torch.randn(50, 1) * 1e-3 + 7,
        torch.rand(60, 3, 8, 8),
        torch.rand(60, 3, 8, 8).half() * 2 - 1,
        torch.randint(0, 256, (70, 1, 5, 5)).float() / 255,
        torch.randn(40, 7, dtype=torch.float64) * 1e8,
    ],
)
def test_suggested_schedules(data: Tensor) -> None:
    schedule = suggest_schedule(data)
    dim = data[0].numel()
    flat = data.double().reshape(len(data), -1)
    ends = schedule.sigmas[[0, -1]].tolist()
    data_range = (flat.amax(0) - flat.amin(0)).max().item()
    want = [max_pairwise_distance(data), 0.01 * data_range]
    # float32 levels.
    assert ends == pytest.approx(want, rel=tolerances.FP32_RELATIVE)
    ratio = (want[0] / want[1]) ** (1 / (len(schedule.sigmas) - 1))
    assert ratio <= 10 ** (2 / 9) * (1 + 1e-9)
    if dim >= 5 and sigma_ratio(dim) < 10 ** (2 / 9):
        assert len(schedule.sigmas) == level_count(*want, sigma_ratio(dim))
    assert schedule.steps_per_level == 5
    assert schedule.step_size == pytest.approx(best_step_size(ratio, want[1], 5), rel=1e-9)
    assert schedule.network_calls == 5 * len(schedule.sigmas)
    assert str(schedule) == schedule.why
    for words in ("arXiv 2006.09011", "exact", f"{schedule.step_size:.6g}", "1/100 of the range"):
        assert words in schedule.why
    assert max(map(len, schedule.why.splitlines())) <= 90
    x = annealed_langevin(
        lambda x, sigma: -x / sigma.view(-1, *[1] * (x.dim() - 1)) ** 2,
        (2, *data.shape[1:]),
        schedule.sigmas,
        steps_per_level=schedule.steps_per_level,
        step_size=schedule.step_size,
    )
    assert x.isfinite().all()


def test_images_in_the_unit_range_end_at_a_hundredth() -> None:
    data = torch.randint(0, 256, (400, 1, 6, 6)).float() / 255
    data[0], data[1] = 0, 1
    assert suggest_schedule(data).sigmas[-1] == pytest.approx(0.01, rel=tolerances.FP32_RELATIVE)
    assert suggest_schedule(2 * data - 1).sigmas[-1] == pytest.approx(
        0.02, rel=tolerances.FP32_RELATIVE
    )


def test_suggestions_follow_what_is_given() -> None:
    data = torch.rand(30, 3, 32, 32)
    schedule = suggest_schedule(data, sigma_max=50, sigma_min=0.01)
    assert len(schedule.sigmas) == 219 and schedule.why.count("given") == 2
    assert schedule.sigmas[[0, -1]].tolist() == pytest.approx(
        [50, 0.01], rel=tolerances.FP32_RELATIVE
    )
    fewer = suggest_schedule(data, sigma_max=50, sigma_min=0.01, overlap=0.1, steps_per_level=3)
    assert len(fewer.sigmas) == level_count(50, 0.01, sigma_ratio(3072, 0.1))
    assert fewer.steps_per_level == 3
    for calls, steps in ((1, 1), (219, 1), (437, 1), (438, 2), (2190, 10), (2408, 10)):
        budget = suggest_schedule(data, sigma_max=50, sigma_min=0.01, network_calls=calls)
        assert budget.steps_per_level == steps
        assert ("costs more" in budget.why) == (calls < 219)


def test_few_dimensions_take_as_many_levels_as_ncsn_and_no_more() -> None:
    data = torch.randn(20, 2)
    for steps in (3.0, 3.2, 3.5, 3.8, 7.3):
        # The ratio between levels is at most 10^(2/9).
        high = 0.01 * 10 ** (2 / 9 * steps)
        schedule = suggest_schedule(data, sigma_max=high, sigma_min=0.01)
        assert len(schedule.sigmas) == math.ceil(steps - 1e-6) + 1


def test_a_slow_distance_is_bounded_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(200, 6)
    exact = suggest_schedule(data)
    monkeypatch.setattr(sigmas, "_EXACT_OPERATIONS", 0)
    bounded = suggest_schedule(data)
    lower, upper = pairwise_distance_bounds(data)
    assert exact.sigmas[0] <= bounded.sigmas[0]
    assert bounded.sigmas[0].item() == pytest.approx(upper, rel=tolerances.FP32_RELATIVE)
    assert f"from {lower:.6g} to {upper:.6g}" in " ".join(bounded.why.split())


RATIOS = ((1.0, "ratio: got 1.0"), (0.5, "ratio: got 0.5"), (math.nan, "ratio: got nan"))


@pytest.mark.parametrize(
    "function, arguments, error, match",
    [
        (level_overlap, (0, 1.1), ValueError, "dim: got 0"),
        (level_overlap, (2.5, 1.1), TypeError, "dim: got float 2.5"),
        (level_overlap, (3, 0.9), ValueError, "ratio: got 0.9"),
        (level_overlap, (3, math.inf), ValueError, "ratio: got inf"),
        (sigma_ratio, (64, 0.0), ValueError, "overlap: got 0.0"),
        (sigma_ratio, (64, 0.9974), ValueError, "overlap: got 0.9974, expected above 0 and below"),
        (sigma_ratio, (64, 1.5), ValueError, "overlap: got 1.5"),
        (level_count, (1, 2, 1.1), ValueError, "sigma_min: got 2.0"),
        (level_count, (0, 2, 1.1), ValueError, "sigma_max: got 0"),
        *((level_count, (2, 1, ratio), ValueError, match) for ratio, match in RATIOS),
        *((best_step_size, (ratio, 1, 5), ValueError, match) for ratio, match in RATIOS),
        *((variance_ratio, (0.1, ratio, 1, 5), ValueError, match) for ratio, match in RATIOS),
        (best_step_size, (1.1, 0, 5), ValueError, "sigma_min: got 0"),
        (best_step_size, (1.1, 1, 0), ValueError, "steps_per_level: got 0"),
        (variance_ratio, (4.0, 1.1, 1, 5), ValueError, "step_size: got 4.0, expected less than 4"),
        (variance_ratio, (40.0, 1.1, 3, 5), ValueError, r"less than 4 sigma_min\^2 = 36.0:"),
        (variance_ratio, (0.0, 1.1, 1, 5), ValueError, "step_size: got 0.0"),
    ],
)
def test_wrong_numbers_are_named(
    function: Any, arguments: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        function(*arguments)


@pytest.mark.parametrize(
    "data, arguments, error, match",
    [
        (torch.ones(5, 3), {}, ValueError, "data: got 5 equal samples"),
        (torch.ones(1, 3), {}, ValueError, "data: got shape"),
        (torch.eye(9).long(), {}, TypeError, "data: got dtype torch.int64"),
        (
            torch.eye(9),
            {"sigma_max": 0.001},
            ValueError,
            "sigma_min: got 0.01, expected less than sigma_max = 0.001",
        ),
        (torch.eye(9), {"sigma_min": 3.0}, ValueError, "sigma_min: got 3.0, expected less than"),
        (torch.eye(9), {"sigma_min": 0}, ValueError, "sigma_min: got 0"),
        (torch.eye(9), {"overlap": 2}, ValueError, "overlap: got 2"),
        (torch.eye(3), {"overlap": -1}, ValueError, "overlap: got -1"),
        (torch.eye(9), {"steps_per_level": 0}, ValueError, "steps_per_level: got 0"),
        (torch.eye(9), {"network_calls": 0}, ValueError, "network_calls: got 0"),
        (
            torch.eye(9),
            {"network_calls": 9, "steps_per_level": 5},
            ValueError,
            "network_calls: got 9 beside steps_per_level = 5",
        ),
    ],
)
def test_wrong_suggestions_are_named(
    data: Tensor, arguments: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        suggest_schedule(data, **arguments)


def test_a_given_number_of_levels() -> None:
    data = torch.randn(50, 64)
    schedule = suggest_schedule(data, sigma_max=4.0, sigma_min=0.1, levels=7)
    assert torch.equal(schedule.sigmas, geometric_sigmas(4.0, 0.1, 7))
    ratio = 40 ** (1 / 6)
    assert schedule.step_size == pytest.approx(best_step_size(ratio, 0.1, 5), rel=1e-9)
    assert f"overlap by {level_overlap(64, ratio):.3g}" in " ".join(schedule.why.split())
    with pytest.raises(ValueError, match="levels: got 1"):
        suggest_schedule(data, levels=1)


def test_edm_sigmas() -> None:
    """Table 1 of arXiv 2206.00364 in words: ends exact, equal steps of the rho-th root."""
    levels = sigmas.edm_sigmas(80.0, 0.002, 18)
    torch.testing.assert_close(levels[[0, -1]], torch.tensor([80.0, 0.002]))
    roots = levels.double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17), rtol=1e-5, atol=0)
    assert torch.equal(sigmas.edm_sigmas(3.0, 1.0, 3, rho=1.0), torch.tensor([3.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match="sigma_min: got 3.0"):
        sigmas.edm_sigmas(2.0, 3.0)


def test_exact_distances_up_to_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(9, 5)
    for most, exact in ((9**2 * 5, True), (9**2 * 5 - 1, False)):
        monkeypatch.setattr(sigmas, "_EXACT_OPERATIONS", most)
        assert ("samples, exact" in suggest_schedule(data).why) == exact


def test_suggestions_say_what_they_are_for() -> None:
    schedule = suggest_schedule(torch.randn(9, 5, 2), sigma_max=3.0, sigma_min=0.3)
    why, steps = schedule.why, len(schedule.sigmas) * schedule.steps_per_level
    assert "for 9 samples of 5 x 2 numbers" in why
    assert re.search(rf"network calls +{steps} ", why)
    assert f"{schedule.step_size / 2:.6g} for x + alpha score" in why
    assert "samples of 1 numbers" in suggest_schedule(torch.randn(9)).why
    # Two schedules are compared as objects.
    assert schedule == schedule and schedule != suggest_schedule(torch.randn(9, 5))


def test_the_least_of_everything() -> None:
    assert geometric_sigmas(2.0, 1.0, 2).tolist() == [2.0, 1.0]
    assert edm_sigmas(2.0, 1.0, levels=2).tolist() == pytest.approx([2.0, 1.0])
    data = torch.randn(9, 4)
    assert "at most 1.668 as in NCSN" in suggest_schedule(data).why
    five = suggest_schedule(torch.randn(9, 5), sigma_max=3.0, sigma_min=0.3, levels=2)
    assert len(five.sigmas) == 2
    one = suggest_schedule(data, sigma_max=3.0, sigma_min=0.3, steps_per_level=1)
    assert one.steps_per_level == 1
    with pytest.raises(ValueError, match=r"less than 4 sigma_min\^2 = 16.0: "):
        variance_ratio(20.0, 1.5, 2.0, 3)
    # The nearest number of levels may be one short of NCSN's ratio.
    ratios = [
        float(s.sigmas[0] / s.sigmas[1])
        for high in torch.linspace(0.5, 9.0, 60).tolist()
        for s in [suggest_schedule(data, sigma_max=high, sigma_min=0.3)]
        if high > 0.3
    ]
    # Never above it, and with no more levels than that takes.
    assert max(ratios) <= 1.6682 and max(ratios) > 1.6
