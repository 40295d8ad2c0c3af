"""Materialised noise: words, normals, uniforms, Rademacher signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import choose
from score_kernels.noise import Key, NoiseKey
from score_kernels.ops._dispatch import KEY_SCHEMA, check_addresses, direct, register

__all__ = ["normal", "rademacher", "uniform", "words"]

Device = torch.device | str | None


def words(shape: Sequence[int], noise: NoiseKey, *, device: Device = None) -> Tensor:
    """The 32-bit words behind each element, for checks.

    Args:
        shape: ``[B, ...]``.
        noise: names the noise; see :class:`score_kernels.NoiseKey`.
        device: default: that of the key's addresses, or torch's default device.

    Returns:
        int64 tensor of the shape, values in ``[0, 2**32)``.
    """
    return _fill("words", shape, noise, torch.int64, device)


def normal(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> Tensor:
    """Standard normals, the same bits on every backend and device.

    ``z0 = sqrt(-2 ln u) cos(theta)``, ``z1 = sqrt(-2 ln u) sin(theta)`` (Box and Muller, 1958) from
    pairs of words, within 2e-6 of the exact function, tails to 6.7; see ``csrc/noise.h``.

    Args:
        shape: ``[B, ...]``.
        noise: names the noise; see :class:`score_kernels.NoiseKey`.
        dtype: any floating dtype; other dtypes than float32 hold the float32 value, converted.
        device: default: that of the key's addresses, or torch's default device.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """
    return _fill("normal", shape, noise, dtype, device)


def uniform(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> Tensor:
    """Uniforms in (0, 1], ``fma(float(word), 2**-32, 2**-33)`` in float32. Arguments: `normal`."""
    return _fill("uniform", shape, noise, dtype, device)


def rademacher(
    shape: Sequence[int],
    noise: NoiseKey,
    *,
    dtype: torch.dtype = torch.float32,
    device: Device = None,
) -> Tensor:
    """Rademacher signs: -1 where the word's top bit is set, else +1.

    Arguments: `normal`.
    """
    return _fill("rademacher", shape, noise, dtype, device)


def _fill(
    kind: str, shape: Sequence[int], noise: NoiseKey, dtype: torch.dtype, device: Device
) -> Tensor:
    if type(noise) is not NoiseKey:
        checks.instance("noise", noise, NoiseKey, "a NoiseKey")
    filled = (_FILLS if direct() else _OPS)[kind](shape, device, noise)
    if filled.dtype is dtype:
        return filled
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype}, expected a floating dtype")
    return filled.to(dtype)


def _filler(kind: str) -> Callable[..., Tensor]:
    dtype = torch.int64 if kind == "words" else torch.float32

    def fill(shape: Sequence[int], device: Device, key: Key) -> Tensor:
        addresses = key[4]
        if device is None and addresses is not None:
            device = addresses.device
        # Without dtype and device a third faster; it also finds the default device.
        plain = device is None and dtype is torch.get_default_dtype()
        try:
            out = torch.empty(shape) if plain else torch.empty(shape, dtype=dtype, device=device)
        except (RuntimeError, TypeError):
            checks.noise_shape(shape)
            raise
        if type(shape) is int or not out.dim() or out.numel() > 1 << 34:
            checks.noise_shape(shape)
        if key[3] >= 1 << 55:
            checks.sample_range(key[3], out.shape[0])
        if addresses is not None:
            check_addresses(addresses, out)
        if not out.is_meta:
            choose(out.device, torch.float32).fill(out, kind, key)
        return out

    return fill


def _register(kind: str) -> Callable[..., Tensor]:
    dtype = torch.int64 if kind == "words" else torch.float32

    def fake(shape: list[int], device: torch.device | None, *_: Any) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    schema = f"{kind}(SymInt[] shape, Device? device, {KEY_SCHEMA}) -> Tensor"
    return register(schema, _FILLS[kind], fake)


_KINDS = ("words", "normal", "uniform", "rademacher")
_FILLS = {kind: _filler(kind) for kind in _KINDS}
_OPS = {kind: _register(kind) for kind in _KINDS}
