"""Inpainting: the known elements of a state."""

from __future__ import annotations

import torch
from torch import Tensor

from score_kernels import checks

__all__ = ["known_elements"]


def known_elements(
    x: Tensor, known: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """A user's known and mask in the shape of x and on its device, checked, if there are any."""
    if known is None and mask is None:
        return None
    if known is None or mask is None:
        missing = "mask" if mask is None else "known"
        raise ValueError(f"{missing}: got none, expected it beside the other of known and mask")
    for name, value in (("known", known), ("mask", mask)):
        checks.instance(name, value, Tensor, "a tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected torch.bool, true where known")
    values, where = _spread_out("known", known, x), _spread_out("mask", mask, x)
    if not bool((values.isfinite() | ~where).all()):
        raise ValueError("known: not finite where mask is true, expected finite numbers there")
    return values, where


def _spread_out(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A copy in the shape of x."""
    dtype = torch.bool if value.dtype == torch.bool else x.dtype
    try:
        return torch.empty_like(x, dtype=dtype).copy_(value)
    except RuntimeError:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected one that broadcasts to the "
            f"state's, {tuple(x.shape)}"
        ) from None
