"""The choice between the backends.

A backend is an object with the functions of :class:`Backend`. The first one in the order of
preference that serves a tensor's device and dtype is used; ``use_backend`` forces one.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from score_kernels.backends import reference, triton
from score_kernels.backends.compiled import cuda, native
from score_kernels.noise import Key

__all__ = ["Backend", "backends", "choose", "use_backend"]


class Backend(Protocol):
    """What a backend provides. Arguments have been checked by ``score_kernels.ops``."""

    name: str
    # Whether its steps can be part of a CUDA graph.
    capturable: bool

    def unavailable(self) -> str | None:
        """Why the backend cannot be used on this machine, or None."""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the backend cannot serve a state of this device and dtype, or None."""

    def describe(self) -> str:
        """One line for ``score-kernels info``."""

    def fill(self, out: Tensor, kind: str, key: Key) -> None:
        """Noise of a kind: "words" into int64, "normal", "uniform", "rademacher" into fp32."""

    def affine_step(
        self, out: Tensor, x: Tensor, score: Tensor, a: float, b: float, c: float, key: Key
    ) -> None:
        """out = a x + b score + c z, all contiguous; out may be x; c = 0 draws no noise."""

    def table_step(
        self,
        out: Tensor,
        x: Tensor,
        score: Tensor,
        table: Tensor,
        step: Tensor | None,
        key: Key,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """affine_step with (a, b, c) = table[step] and draw + step, read where the tensors are:
        table [lines, 3] float32 and step, int64 without dimensions, contiguous, on x's device.
        Without a step the table has one line for all samples or one for each. With known, in x's
        shape and dtype, and mask, bool, the table has five columns, and out is table[., 3] known +
        table[., 4] z where mask is true, whatever x and score are there; a noise scale of 0 draws
        no noise. known shares no memory with out."""

    def perturb(self, x: Tensor, sigma: Tensor, key: Key) -> Tensor:
        """x + sigma z; x contiguous, sigma [B] float32."""

    def dsm_loss(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, key: Key, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """[B] losses 1/2 weight sum (sigma score + z)^2 and, if asked for, their gradient by an
        fp32 score (else an empty tensor); score contiguous, sigma and weight [B] float32."""

    def dsm_gradient(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, upstream: Tensor, key: Key
    ) -> Tensor:
        """upstream weight sigma (sigma score + z) in the score's dtype; upstream [B] float32."""

    def probe_sums(
        self, kind: str, a: Tensor, b: Tensor | None, differences: bool, key: Key
    ) -> Tensor:
        """[4, B]: v.v, v.a, v.b (0 without b) and a.a over each sample, for a probe v of a kind,
        "normal" or "rademacher"; a and b contiguous and of one dtype. With differences, of
        (a + b) / 2 and a - b in place of a and b."""

    def probe_scale(self, kind: str, factor: Tensor, shape: tuple[int, ...], key: Key) -> Tensor:
        """factor v; factor [B] float32 (or float64, which the result then has)."""

    def probe_shift(self, kind: str, x: Tensor, factor: Tensor, key: Key) -> Tensor:
        """[2, B, ...]: x + factor v and x - factor v; x contiguous, factor [B] of its dtype."""


# In the order of preference.
_ALL: tuple[Backend, ...] = (cuda, native, triton.backend, reference.backend)
_BACKENDS = {backend.name: backend for backend in _ALL}
_forced: str | None = None
_choices: dict[tuple[torch.device, torch.dtype], Backend] = {}


def backends() -> dict[str, str]:
    """Every backend by name, with what it is, or why it is not available here."""
    return {
        name: f"unavailable: {why}" if (why := backend.unavailable()) else backend.describe()
        for name, backend in _BACKENDS.items()
    }


def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for a state of this device and dtype: the forced one, else the best.

    Raises:
        ValueError: a forced backend cannot serve it.
    """
    # Read once: another thread may force a backend, which begins a new dictionary.
    choices = _choices
    found = choices.get((device, dtype))
    if found is None:
        found = choices[device, dtype] = _search(device, dtype)
    return found


def _search(device: torch.device, dtype: torch.dtype) -> Backend:
    forced = _forced
    if forced is None:
        return next(b for b in _ALL if not b.unavailable() and not b.refuses(device, dtype))
    if why := _BACKENDS[forced].refuses(device, dtype):
        raise ValueError(
            f"backend: {forced!r} is forced but {why}; "
            "use_backend(None) chooses by device and dtype"
        )
    return _BACKENDS[forced]


def _force(name: str | None) -> None:
    global _forced, _choices
    _forced = name
    _choices = {}


class use_backend:
    """Force a backend by name, for the whole process, or choose by device again with ``None``.

    As a call it stays in force; as a context manager it ends with the block::

        score_kernels.use_backend("reference")
        with score_kernels.use_backend("native"):
            ...

    Raises:
        ValueError: there is no such backend, or it is not available here; the message lists all.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            there = "; ".join(f"{k}: {v}" for k, v in backends().items())
            if name not in _BACKENDS:
                raise ValueError(f"name: got {name!r}, expected one of the backends ({there})")
            if why := _BACKENDS[name].unavailable():
                raise ValueError(f"name: got {name!r}, which is not available: {why} ({there})")
        self._before = _forced
        _force(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _force(self._before)


if "SCORE_KERNELS_BACKEND" in os.environ:
    use_backend(os.environ["SCORE_KERNELS_BACKEND"])
