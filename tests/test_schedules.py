from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from score_kernels import geometric_sigmas


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
