"""The CUDA kernels of ``score_kernels._cuda`` on CUDA tensors.

A kernel runs on the tensors' device, on torch's current stream there. What it allocates comes from
torch's caching allocator on that stream and is used on no other, so that nothing needs
``record_stream``; a tensor made on another stream must be ready, as for any op of torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from score_kernels.backends.compiled import PointerKernels

_why: str | None = None
try:
    _cuda = importlib.import_module("score_kernels._cuda")
except ImportError as error:
    _why = f"score_kernels._cuda was not built or does not load ({error})"


def _no_device() -> str | None:
    """Why there is no GPU to serve, or None."""
    if torch.version.hip is not None:
        return "torch is built for ROCm"
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    count, why = _cuda.devices()
    return None if count else why


_why = _why or _no_device()


class Cuda(PointerKernels):
    """CUDA C++ on CUDA tensors."""

    name = "cuda"
    capturable = True
    kernels: Any = None if _why else _cuda

    def place(self, device: torch.device) -> tuple[int, ...]:
        return device.index, torch.cuda.current_stream(device).cuda_stream

    def partials(self, elements: int) -> int:
        return self.kernels.partials(elements)

    def gradient_dtype(self, score: torch.dtype) -> torch.dtype:
        return score

    def dsm_loss(
        self,
        score: torch.Tensor,
        sigma: torch.Tensor,
        weight: torch.Tensor | None,
        key: tuple[int, ...],
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = super().dsm_loss(score, sigma, weight, key, False)
        if with_gradient:
            ones = torch.ones_like(sigma)
            gradient = self.dsm_gradient(score, sigma, weight, ones, key).float()
        return loss, gradient

    def unavailable(self) -> str | None:
        return _why

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if _why is not None:
            return _why
        if device.type != "cuda":
            return f"serves CUDA tensors, not {device}"
        if dtype != torch.float32:
            return f"serves states of torch.float32, not {dtype}"
        built = min(int(arch) for arch in _cuda.archs.split(";"))
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < built:
            has = f"{device} has {major}.{minor}"
            return f"was built for compute capability {built / 10} and up, {has}"
        return None

    def describe(self) -> str:
        count, _ = _cuda.devices()
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
        return f"CUDA C++ for sm_{_cuda.archs.replace(';', ', sm_')}; {count} devices: {names}"


backend = Cuda()
