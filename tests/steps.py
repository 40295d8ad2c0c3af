"""Tables of coefficients and masks for steps that are not the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from score_kernels.backends.reference import CLAMP, NO_END, WRAP, End


def lines_and_masks(shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Lines of each sample and of all, without and with a mask; some add no noise."""
    rows = shape[0]
    for mask in (None, torch.rand(shape) < 0.5):
        lines = torch.randn(rows, 3 if mask is None else 5)
        lines[::2, 2] = 0
        if mask is not None:
            lines[::3, 4] = 0
        yield lines, mask
        for row in range(min(rows, 4)):
            yield lines[row : row + 1].clone(), mask


def endings(shape: tuple[int, ...]) -> Iterator[tuple[Tensor | None, End]]:
    """Preconditioners, some elements 0, and what a step ends with, without end."""
    while True:
        for gain in (None, torch.randn(shape).square() * (torch.rand(shape) < 0.8)):
            for end in (NO_END, (CLAMP, -0.7, 1.1), (WRAP, 1 / 0.3, 0.3)):
                yield gain, end
