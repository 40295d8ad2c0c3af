"""Materialised noise, for the rare caller who needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import choose
from score_kernels.noise import NoiseKey
from score_kernels.ops._dispatch import KEY, register, signed, unsigned

__all__ = ["normal", "rademacher", "uniform", "words"]


def words(
    shape: Sequence[int], noise: NoiseKey, *, device: torch.device | str | None = None
) -> Tensor:
    """The 32-bit words behind each element of a batch of noise, for checks.

    Args:
        shape: ``[B, ...]``.
        noise: names the noise; see :class:`score_kernels.NoiseKey`.
        device: default: torch's default device.

    Returns:
        int64 tensor of the shape, values in ``[0, 2**32)``.
    """
    return _fill("words", shape, noise, torch.int64, device)


def normal(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals, the same bits on every backend and device.

    ``z0 = sqrt(-2 ln u) cos(theta)``, ``z1 = sqrt(-2 ln u) sin(theta)`` (Box and Muller, 1958) from
    pairs of words, within 2e-6 of the exact function, tails to 6.7; see ``csrc/noise.h``.

    Args:
        shape: ``[B, ...]``.
        noise: names the noise; see :class:`score_kernels.NoiseKey`.
        dtype: any floating dtype; other dtypes than float32 hold the float32 value, converted.
        device: default: torch's default device.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    return _fill("normal", shape, noise, dtype, device)


def uniform(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms in (0, 1], ``fma(float(word), 2**-32, 2**-33)`` in float32. Arguments: `normal`."""
    return _fill("uniform", shape, noise, dtype, device)


def rademacher(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random signs, -1 where the word's top bit is set, else +1. Arguments: `normal`."""
    return _fill("rademacher", shape, noise, dtype, device)


def _fill(
    kind: str,
    shape: Sequence[int],
    noise: NoiseKey,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    checks.instance("noise", noise, NoiseKey, "a NoiseKey")
    sizes = checks.noise_shape(shape)
    checks.sample_range(noise.first_sample, sizes[0])
    if kind != "words" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating dtype")
    home = checks.device("device", device)
    filled = _OPS[kind](list(sizes), home, *signed(noise.fields()))
    if filled.dtype == dtype:
        return filled
    try:
        return filled.to(dtype)
    except NotImplementedError:
        raise TypeError(f"dtype: got {dtype}, expected one that torch converts to") from None


def _register_fill(kind: str) -> Callable[..., Any]:
    def fill(shape: list[int], device: torch.device | None, *key: int) -> Tensor:
        home = torch.get_default_device() if device is None else device
        return choose(home, torch.float32).fill(kind, tuple(shape), unsigned(key), home)

    def fake(shape: list[int], device: torch.device | None, *_: Any) -> Tensor:
        dtype = torch.int64 if kind == "words" else torch.float32
        return torch.empty(shape, dtype=dtype, device=device)

    return register(f"{kind}(SymInt[] shape, Device? device, {KEY}) -> Tensor", fill, fake)


_OPS = {kind: _register_fill(kind) for kind in ("words", "normal", "uniform", "rademacher")}
