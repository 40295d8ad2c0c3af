"""The choice between the backends.

The first backend in the order of preference that serves a tensor's device and dtype is used;
``use_backend`` forces one. What backends provide: :class:`score_kernels.backends.Backend`.
"""

from __future__ import annotations

import os

import torch

from score_kernels.backends import reference, triton
from score_kernels.backends.compiled import cuda, native
from score_kernels.backends.reference import Reference as Backend

__all__ = ["Backend", "backends", "choose", "use_backend"]

# In the order of preference.
_ALL: tuple[Backend, ...] = (cuda, native, triton.backend, reference.backend)
_BACKENDS = {backend.name: backend for backend in _ALL}
_forced: str | None = None
_choices: dict[tuple[torch.device, torch.dtype], Backend] = {}
# The choice for float32 on the CPU, once it was made: small steps look here first.
cpu_float32: Backend | None = None


def backends() -> dict[str, str]:
    """Every backend by name, with its description or why it is unavailable."""
    return {
        name: f"unavailable: {why}" if (why := backend.unavailable()) else backend.describe()
        for name, backend in _BACKENDS.items()
    }


def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for a device and dtype, forced or the best.

    Raises:
        ValueError: a forced backend cannot serve it.
    """
    # Read once: another thread may force a backend, which begins a new dictionary.
    choices = _choices
    found = choices.get((device, dtype))
    if found is None:
        found = choices[device, dtype] = _search(device, dtype)
    return found


def choose_cpu_float32() -> Backend:
    """`choose` for a float32 state on the CPU."""
    global cpu_float32
    cpu_float32 = choose(torch.device("cpu"), torch.float32)
    return cpu_float32


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
    global _forced, _choices, cpu_float32
    _forced = name
    _choices = {}
    cpu_float32 = None


class use_backend:
    """Force a backend in the whole process; ``None`` chooses by device again.

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
