"""The choice between the backends.

The first backend in the order of preference that serves a tensor's device and dtype is used;
``use_backend`` and ``set_backend`` force one. What backends provide:
:class:`score_kernels.backends.Backend`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from threading import Lock

import torch

from score_kernels.backends import reference, triton
from score_kernels.backends.compiled import cuda, native
from score_kernels.backends.reference import Reference as Backend

__all__ = ["Backend", "backends", "choose", "set_backend", "use_backend"]

# In the order of preference.
_ALL: tuple[Backend, ...] = (cuda, native, triton.backend, reference.backend)
_BACKENDS = {backend.name: backend for backend in _ALL}
# Forced in a block, and in the process.
_in_block: ContextVar[str | None] = ContextVar("score_kernels.backend")
_in_process: str | None = None
_choices: dict[tuple[str | None, torch.device, torch.dtype], Backend] = {}
# The choice for float32 on the CPU while no thread is in a block: small steps look here first.
cpu_float32: Backend | None = None
_open_blocks, _lock = 0, Lock()


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
    forced = _in_block.get(_in_process)
    found = _choices.get((forced, device, dtype))
    if found is None:
        found = _choices[forced, device, dtype] = _search(forced, device, dtype)
    return found


def choose_cpu_float32() -> Backend:
    """`choose` for a float32 state on the CPU."""
    global cpu_float32
    with _lock:
        found = choose(torch.device("cpu"), torch.float32)
        if not _open_blocks:
            cpu_float32 = found
    return found


def _search(forced: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    if forced is None:
        return next(b for b in _ALL if not b.unavailable() and not b.refuses(device, dtype))
    if why := _BACKENDS[forced].refuses(device, dtype):
        raise ValueError(
            f"backend: {forced!r} is forced but {why}; "
            "use_backend(None) chooses by device and dtype"
        )
    return _BACKENDS[forced]


def _check(name: str | None) -> None:
    if name is None:
        return
    there = "; ".join(f"{k}: {v}" for k, v in backends().items())
    if name not in _BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of the backends ({there})")
    if why := _BACKENDS[name].unavailable():
        raise ValueError(f"name: got {name!r}, which is not available: {why} ({there})")


def set_backend(name: str | None) -> None:
    """Force a backend in the whole process; ``None`` chooses by device again.

    Raises:
        ValueError: there is no such backend, or it is not available here; the message lists all.
    """
    global _in_process, cpu_float32
    _check(name)
    with _lock:
        _in_process, cpu_float32 = name, None


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Force a backend in a block, and there in this thread alone; ``None`` chooses by device::

        with score_kernels.use_backend("reference"):
            ...

    Raises:
        ValueError: as `set_backend`.
    """
    _check(name)
    return _forced(name)


@contextmanager
def _forced(name: str | None) -> Iterator[None]:
    global _open_blocks, cpu_float32
    with _lock:
        _open_blocks, cpu_float32 = _open_blocks + 1, None
    token = _in_block.set(name)
    try:
        yield
    finally:
        _in_block.reset(token)
        with _lock:
            _open_blocks -= 1


if "SCORE_KERNELS_BACKEND" in os.environ:
    set_backend(os.environ["SCORE_KERNELS_BACKEND"])
