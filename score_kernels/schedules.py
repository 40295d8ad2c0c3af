"""Noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from score_kernels import _check

__all__ = ["geometric_sigmas"]


def geometric_sigmas(sigma_max: float, sigma_min: float, levels: int) -> Tensor:
    """Noise levels in a geometric progression, ``sigma_1 = sigma_max > ... > sigma_L = sigma_min``.

    The schedule of NCSN (Song and Ermon 2019, arXiv 1907.05600). Computed in float64.

    Args:
        sigma_max: standard deviation of the largest noise, in units of the data.
        sigma_min: of the smallest, ``0 < sigma_min < sigma_max``.
        levels: their number L, at least 2 (or 1 with ``sigma_min == sigma_max``).

    Returns:
        ``[L]`` float32, decreasing.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    sigma_max = _check.positive("sigma_max", sigma_max)
    sigma_min = _check.positive("sigma_min", sigma_min)
    levels = _check.count("levels", levels, least=1)
    if levels == 1:
        if sigma_min != sigma_max:
            raise ValueError(
                f"levels: got 1 with sigma_max = {sigma_max} and sigma_min = "
                f"{sigma_min}, expected at least 2 levels between different sigmas"
            )
        return torch.tensor([sigma_max])
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min: got {sigma_min}, expected less than sigma_max = {sigma_max}")
    logs = torch.linspace(math.log(sigma_max), math.log(sigma_min), levels, dtype=torch.float64)
    return logs.exp().float()
