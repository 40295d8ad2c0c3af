"""Inpainting: the known elements of a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from score_kernels import checks

__all__ = ["known_elements"]


def known_elements(
    x: Tensor, known: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Copies of a user's known and mask in the shape of x and on its device, if there are any."""
    if known is None and mask is None:
        return None
    copies = []
    value: Any
    for name, value, dtype in (("known", known, x.dtype), ("mask", mask, torch.bool)):
        checks.instance(name, value, Tensor, "a tensor: known and mask go together")
        if dtype == torch.bool and value.dtype != dtype:
            raise TypeError(f"mask: got dtype {value.dtype}, expected torch.bool, true where known")
        try:
            copies.append(torch.empty_like(x, dtype=dtype).copy_(value))
        except RuntimeError:
            got, shape = tuple(value.shape), tuple(x.shape)
            raise ValueError(f"{name}: got shape {got}, expected a part of {shape}") from None
    values, where = copies
    if not bool((values.isfinite() | ~where).all()):
        raise ValueError("known: not finite where mask is true, expected finite numbers there")
    return values, where
