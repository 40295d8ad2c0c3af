"""The largest distance against float64 differences of all pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import peak_bytes
from score_kernels import NoiseKey, Purpose, ops
from score_kernels.diffusion import distance
from score_kernels.diffusion.distance import max_pairwise_distance, pairwise_distance_bounds
from score_kernels.diffusion.sigmas import suggest_schedule

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def truth(data: Tensor) -> float:
    """The largest distance by differences in float64, of data whose squares fit."""
    x = data.detach().double().reshape(len(data), -1)
    return max((x[i + 1 :] - x[i]).norm(dim=1).max().item() for i in range(len(x) - 1))


# What the docstring promises, and float64 rounding.
ACCURACY, ROUNDING = 1e-5, 1e-12


def check(data: Tensor) -> None:
    got, want = max_pairwise_distance(data), truth(data)
    assert want * (1 - ACCURACY) <= got <= want * (1 + ROUNDING)


@pytest.fixture(params=["small blocks", "ordinary blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small blocks":
        monkeypatch.setattr(distance, "_SIDE", 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2,), (2, 1), (3, 7), (65, 2), (90, 3, 5, 7), (77, 1), (31, 33), (60, 129)]
)
def test_is_the_float64_distance(blocks: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scale = torch.rand(shape[:1] + (1,) * (len(shape) - 1))
    for data in (
        torch.randn(shape),
        torch.rand(shape),
        torch.randn(shape) * scale,
        1e4 + torch.randn(shape),
        -300 + 1e-3 * torch.randn(shape),
    ):
        check(data.to(dtype))


@pytest.mark.parametrize("shape", [(2500, 17), (1100, 300), (60, 9001)])
def test_many_blocks_of_the_real_size(shape: tuple[int, int]) -> None:
    check(torch.randn(shape))
    check(torch.rand(shape, dtype=torch.float64) - 1e5)


def test_low_dimensions_with_many_samples() -> None:
    angle = torch.rand(4001, dtype=torch.float64) * 2 * math.pi
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    check(circle)
    check(circle.float() + 7)


def test_ties(blocks: None) -> None:
    """Every pair, or every pair across, is as far apart as any other."""
    check(torch.eye(100))
    check(torch.eye(50).repeat(3, 1))
    check(torch.cat([torch.zeros(70, 5), torch.ones(50, 5)])[torch.randperm(120)])
    check(torch.randint(0, 2, (150, 9)).float())
    check(torch.linspace(0, 1, 100)[:, None].expand(100, 6))


def test_differences_far_below_float32(blocks: None) -> None:
    """float64 data whose samples are equal in float32."""
    check(1 + 1e-11 * torch.rand(90, 7, dtype=torch.float64))


@pytest.mark.parametrize("samples", [2, 5, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_samples_are_at_distance_zero(samples: int, dtype: torch.dtype) -> None:
    data = torch.randn(3, 4).to(dtype).expand(samples, 3, 4)
    assert max_pairwise_distance(data) == 0.0
    assert pairwise_distance_bounds(data) == (0.0, 0.0)


@pytest.mark.parametrize(
    "dtype, power",
    [
        (torch.float64, 900),
        (torch.float64, -900),
        (torch.float32, 120),
        (torch.float32, -120),
        (torch.float16, 13),
        (torch.float16, -13),
    ],
)
def test_very_large_and_very_small_values(dtype: torch.dtype, power: int) -> None:
    data = torch.rand(50, 33).to(dtype)
    scaled = data * 2.0**power
    # A power of two, but float16 rounds where it has no smaller exponents.
    back = scaled.double() * 2.0**-power
    want = truth(back) * 2.0**power
    assert max_pairwise_distance(scaled) == pytest.approx(want, rel=ACCURACY, abs=0)
    lower, upper = pairwise_distance_bounds(scaled, points=3)
    assert lower * (1 - ROUNDING) <= want <= upper


def test_values_of_very_different_size() -> None:
    """A number that is large and the same everywhere hides nothing."""
    data = torch.rand(40, 5) * 1e-30
    data[:, 2] = 1e30
    check(data.double() * 1e30)
    want = truth(data.double() * 1e30) * 1e-30
    assert max_pairwise_distance(data) == pytest.approx(want, rel=1e-12)


def test_views_and_gradients(blocks: None) -> None:
    data = torch.randn(60, 4, 6)
    check(data.transpose(1, 2))
    check(data[::3, :, 1::2])
    check(data.permute(2, 0, 1))
    check(data.clone().requires_grad_())
    with torch.inference_mode():
        check(data)


def test_other_precision_settings_do_not_matter_and_stay() -> None:
    # On a sphere, where many pairs are nearly as far apart as the farthest.
    data = nn.functional.normalize(torch.randn(1000, 3), dim=1)
    want = max_pairwise_distance(data)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert max_pairwise_distance(data) == want
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_does_not_grow_with_the_square() -> None:
    """Neither with N x N, nor by a float32 or float64 copy of the data."""
    held = {}
    for samples in (10_000, 30_000):
        data = torch.rand(samples, 256).half() * torch.rand(samples, 1).half() ** 8
        held[samples] = peak_bytes(lambda data=data: torch.tensor(max_pairwise_distance(data)))
    print(held)
    # A float32 copy of the larger would be 31 MB.
    assert held[30_000] < 20e6
    # Norms, order and the like: some numbers a sample.
    assert held[30_000] - held[10_000] < 20_000 * 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, points", [((2, 3), 1), ((90, 5), 1), ((90, 5), 7), ((70, 200), 80)]
)
def test_bounds_hold(blocks: None, shape: tuple[int, int], points: int, dtype: torch.dtype) -> None:
    for seed in range(5):
        data = (torch.randn(shape) * torch.rand(shape[0], 1) + 10 * seed).to(dtype)
        lower, upper = pairwise_distance_bounds(data, points=points, seed=seed)
        x = data.double()
        drawn = (
            ops.words((1, len(x)), NoiseKey(seed, purpose=Purpose.DISTANCE))
            .flatten()
            .argsort()[:points]
        )
        reach = torch.stack([(x - x[i]).norm(dim=1).max() for i in drawn])
        assert reach.max().item() <= lower * (1 + ROUNDING)
        assert lower <= truth(data) * (1 + ROUNDING) <= upper
        assert upper <= 2 * reach.min().item() * (1 + 2e-9)
        if points >= len(x):
            assert lower == pytest.approx(truth(data), rel=ROUNDING)


def test_bounds_are_reproducible_and_sweep() -> None:
    # On a sphere the sweeps end at different pairs.
    sphere = torch.nn.functional.normalize(
        torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    )
    found = [pairwise_distance_bounds(sphere, seed=seed, points=1) for seed in range(4)]
    assert found[3] == pairwise_distance_bounds(sphere, seed=3, points=1)
    assert len(set(found)) > 1
    # More points to start from find a larger distance.
    assert pairwise_distance_bounds(sphere, seed=1, points=64)[0] > found[1][0]
    data = torch.randn(300, 12)
    # One far pair, and no luck needed to find it.
    data[17], data[130] = 40.0, -41.0
    lower, upper = pairwise_distance_bounds(data, points=1)
    assert lower == pytest.approx(81 * math.sqrt(12), rel=1e-12) and lower <= upper


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    data = torch.randn(20, 3)
    max_pairwise_distance(data)
    pairwise_distance_bounds(data)
    assert capsys.readouterr().err == ""
    max_pairwise_distance(data, progress=True)
    assert "largest distance" in capsys.readouterr().err
    pairwise_distance_bounds(data, progress=True)
    assert "100%" in capsys.readouterr().err
    suggest_schedule(data)
    assert capsys.readouterr().err == ""
    suggest_schedule(data, progress=True)
    assert "largest distance" in capsys.readouterr().err


def bad(value: float) -> Tensor:
    data = torch.zeros(500, 3)
    data[321, 1] = value
    data[400, 0] = value
    return data


@pytest.mark.parametrize("function", [max_pairwise_distance, pairwise_distance_bounds])
@pytest.mark.parametrize(
    "data, error, match",
    [
        (bad(math.nan), ValueError, "data: got NaN or infinity in sample 321"),
        (bad(math.inf), ValueError, "data: got NaN or infinity in sample 321"),
        (bad(-math.inf).half(), ValueError, "sample 321"),
        (torch.zeros(1, 3), ValueError, r"data: got shape \(1, 3\), expected \[N, ...\] with N"),
        (torch.zeros(0, 3), ValueError, r"data: got shape \(0, 3\)"),
        (torch.zeros(3, 0), ValueError, r"data: got shape \(3, 0\)"),
        (torch.zeros(()), ValueError, "data: got a tensor without dimensions"),
        (torch.zeros(3, 2, dtype=torch.uint8), TypeError, r"data: got dtype torch.uint8.*/ 255"),
        (torch.zeros(3, 2, dtype=torch.complex64), TypeError, "data: got dtype torch.complex64"),
        ([[0.0], [1.0]], TypeError, "data: got list"),
        ({1.0, 2.0}, TypeError, "data: got set"),
    ],
)
def test_wrong_data_is_named(function: Any, data: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        function(data)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"points": 0}, ValueError, "points: got 0"),
        ({"points": 1.5}, TypeError, "points: got float 1.5"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_wrong_numbers_are_named(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pairwise_distance_bounds(torch.eye(3), **arguments)


def test_a_pair_farther_by_a_hair_in_a_later_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "_SIDE", 1)
    data = torch.tensor([[0.0], [1.0], [-5e-5]], dtype=torch.float64)
    assert max_pairwise_distance(data) == pytest.approx(1.00005, rel=1e-12)


def test_bounds_of_two_opposite_clusters_meet() -> None:
    """The sum of the two largest distances from the center is the largest distance."""
    data = torch.tensor([[-1.0], [1.0]]).repeat(10, 1)
    lower, upper = pairwise_distance_bounds(data, points=3)
    assert lower == 2 and upper == pytest.approx(2, rel=1e-8)


def test_a_range_beyond_float64_is_named() -> None:
    with pytest.raises(ValueError, match="a range beyond float64"):
        max_pairwise_distance(torch.tensor([[-1.5e308], [1.5e308]], dtype=torch.float64))


def test_samples_longer_than_a_block() -> None:
    check(torch.randn(3, 20_000))
