"""The C++ kernels of ``score_kernels._cpu`` on CPU tensors."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from score_kernels._torch import is_compiling, modes_active, transforms_active
from score_kernels.backends.compiled import PointerKernels
from score_kernels.noise import NoiseKey

_why: str | None = None
# torch is imported above, so that the kernels share the OpenMP pool torch brought along.
try:
    _cpu = importlib.import_module("score_kernels._cpu")
except ImportError as error:
    _why = f"score_kernels._cpu was not built or does not load ({error})"

if _why is None and "SCORE_KERNELS_ISA" in os.environ:
    try:
        _cpu.set_isa(os.environ["SCORE_KERNELS_ISA"])
    except ValueError as error:
        raise ValueError(f"SCORE_KERNELS_ISA: {error}") from None


class Native(PointerKernels):
    """C++ on CPU tensors."""

    name = "native"
    capturable = False
    kernels: Any = None if _why else _cpu

    def unavailable(self) -> str | None:
        return _why

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if _why is not None:
            return _why
        if device.type != "cpu":
            return f"serves CPU tensors, not {device}"
        if dtype != torch.float32:
            return f"serves states of torch.float32, not {dtype}"
        return None

    def describe(self) -> str:
        threads = _cpu.openmp_threads()
        pool = f"{threads} OpenMP threads" if threads else "1 thread, built without OpenMP"
        others = ", ".join(isa for isa in _cpu.isas() if isa != _cpu.isa())
        return f"C++ on CPU, {_cpu.isa()} (also here: {others or 'none'}), {pool}"


backend = Native()

_FLOAT32, _STRIDED = torch.float32, torch.strided
_is_grad_enabled = torch.is_grad_enabled
# A kernel that writes through a pointer must say so itself, or autograd would not notice that a
# tensor it has saved has changed. The public function wraps this one, for a twentieth of a step.
try:
    _increment_version = torch._C._increment_version
    _increment_version((torch.zeros(1),))
except (AttributeError, TypeError):
    _increment_version = torch.autograd.graph.increment_version  # type: ignore[assignment]


# Whether quick_step may serve: the registry says so when native is the choice for the CPU.
quick = False


def quick_step(
    x: Tensor, score: Tensor, a: float, b: float, c: float, noise: NoiseKey, in_place: bool
) -> Tensor | None:
    """The affine step past torch's dispatcher, checked in as few attribute reads as possible.

    None, with nothing done, for everything but plain contiguous fp32 CPU tensors, and when another
    backend is forced: the caller then checks in full and dispatches. So do calls that are traced,
    differentiated (also forwards) or transformed, and tensors whose memory does not hold their
    values (a lazy negation, zeros without memory).
    """
    if not (
        quick
        and type(x) is type(score) is Tensor
        and type(noise) is NoiseKey
        and x.dtype is score.dtype is _FLOAT32
        and x.is_cpu
        and score.is_cpu
        and x.layout is score.layout is _STRIDED
        and not (is_compiling() or transforms_active() or modes_active())
        and not ((x.requires_grad or score.requires_grad) and _is_grad_enabled())
        and forward_ad._current_level < 0
        and x.is_contiguous()
        and score.is_contiguous()
        and not (x.is_neg() or score.is_neg())
    ):
        return None
    try:
        shape, count = x.shape, x.numel()
        if not 0 < count <= 1 << 34 or shape != score.shape or not shape:
            return None
    # Nested tensors have no shape.
    except RuntimeError:
        return None
    rows = shape[0]
    if noise.first_sample + rows > 1 << 56:
        return None
    source = x.data_ptr()
    distance = score.data_ptr() - source
    # No memory: zeros without any, or freed ones. The full way knows which.
    if not source or distance == -source:
        return None
    out, target = x, source
    if not in_place:
        out = torch.empty_like(x)
        target = out.data_ptr()
    elif distance and -4 * count < distance < 4 * count:
        return None
    else:
        _increment_version((x,))
    _cpu.affine_step(
        target,
        source,
        source + distance,
        0,
        rows,
        count // rows,
        a,
        b,
        c,
        noise.seed,
        noise.purpose,
        noise.draw,
        noise.first_sample,
    )
    return out
