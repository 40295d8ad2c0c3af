"""The kernels in Triton: for AMD, Intel, or no CUDA toolkit.

Tiles are fixed by the length of a row alone (`_geometry`); nothing is tuned at run time, and no
argument that changes from step to step is specialised on, so that a chain compiles a kernel once.
"""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from score_kernels.backends.reference import NO_END, End, Reference, apart
from score_kernels.noise import Key

# Rows times quads of a tile, and the warps that share it: a thread has 32 elements, the four of a
# quad side by side, so that fp32 is read and written 128 bits at a time. Products and sums stay
# apart unless written fma.
TILE = 512
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
# For sums: their tiles, which leave registers for the sums, and how many a program goes through.
SUM_TILE, ITERATIONS = 256, 4
# Blocks along a grid's second axis.
_MOST = 65535


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _search() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted() or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "torch sees no GPU"


class Triton(Reference):
    """Triton on a GPU, or in its interpreter on a CPU (TRITON_INTERPRET=1)."""

    name = "triton"
    capturable = True

    def __init__(self) -> None:
        self._why = _search()
        self._packed: dict[torch.device, bool] = {}

    def unavailable(self) -> str | None:
        return self._why

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self._why is not None:
            return self._why
        types = ("cpu",) if _interpreted() else ("cuda", "xpu")
        if device.type not in types:
            return f"serves tensors on {' and '.join(types)}, not {device}"
        if dtype != torch.float32:
            return f"serves states of torch.float32, not {dtype}"
        return None

    def describe(self) -> str:
        import triton

        where = "its interpreter, on CPU tensors" if _interpreted() else "GPU tensors"
        return f"Triton {triton.__version__} on {where}"

    def fill(self, out: Tensor, kind: str, key: Key) -> None:
        self._launch(_kernels().noise.fill_kernel, out, (out,), key, KIND=kind)

    def affine_step(
        self, out: Tensor, x: Tensor, score: Tensor, a: float, b: float, c: float, key: Key
    ) -> None:
        arguments = (out, x, apart(out, score), a, b, c)
        self._launch(_kernels().update.step_kernel, x, arguments, key, NOISE=c != 0)

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
        precondition: Tensor | None = None,
        end: End = NO_END,
    ) -> None:
        lines = len(table)
        bits = None if mask is None else mask.view(torch.uint8)
        known = None if known is None else apart(out, known, same=True)
        if precondition is not None:
            precondition = apart(out, precondition)
        arguments = (out, x, apart(out, score), table, step, lines, known, bits, precondition)
        kernel, per_row = _kernels().update.table_kernel, step is None and lines > 1
        self._launch(kernel, x, (*arguments, *end[1:]), key, PER_ROW=per_row, END=end[0])

    def perturb(self, x: Tensor, sigma: Tensor, key: Key) -> Tensor:
        out = torch.empty_like(x)
        self._launch(_kernels().dsm.perturb_kernel, x, (out, x, sigma), key)
        return out

    def dsm_loss(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, key: Key, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        squares = self._sums(_kernels().dsm.squares_kernel, 1, score, (score, sigma), key)[0]
        factor = 0.5 if weight is None else 0.5 * weight.double()
        gradient = score.new_empty(0, dtype=torch.float32)
        if with_gradient:
            ones = torch.ones_like(sigma)
            gradient = self.dsm_gradient(score, sigma, weight, ones, key).float()
        return (factor * squares).float(), gradient

    def dsm_gradient(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, upstream: Tensor, key: Key
    ) -> Tensor:
        scale = upstream * (sigma if weight is None else weight * sigma)
        gradient = torch.empty_like(score)
        arguments = (gradient, score, sigma, scale)
        self._launch(_kernels().dsm.gradient_kernel, score, arguments, key)
        return gradient

    def probe_sums(
        self, kind: str, a: Tensor, b: Tensor | None, differences: bool, key: Key
    ) -> Tensor:
        kernel = _kernels().ssm.sums_kernel
        sums = self._sums(kernel, 4, a, (a, b), key, KIND=kind, DIFFERENCES=differences)
        return sums.float()

    def probe_scale(self, kind: str, factor: Tensor, shape: tuple[int, ...], key: Key) -> Tensor:
        out = factor.new_empty(shape)
        self._launch(_kernels().ssm.scale_kernel, out, (out, None, factor), key, KIND=kind)
        return out

    def probe_shift(self, kind: str, x: Tensor, factor: Tensor, key: Key) -> Tensor:
        out = x.new_empty((2, *x.shape))
        self._launch(_kernels().ssm.scale_kernel, x, (out, x, factor), key, KIND=kind)
        return out

    def _sums(
        self,
        kernel: Any,
        count: int,
        batch: Tensor,
        arguments: tuple[Any, ...],
        key: Key,
        **constants: Any,
    ) -> Tensor:
        """[count, rows] in fp64: a kernel's sums over pieces of rows, added up."""
        rows, elements = _sizes(batch)
        pieces = -(-elements // (4 * _geometry(elements, SUM_TILE)[1] * ITERATIONS))
        partial = batch.new_empty((count, rows, pieces), dtype=torch.float32)
        self._launch(kernel, batch, (partial, *arguments), key, iterations=ITERATIONS, **constants)
        return partial.double().sum(2)

    def _launch(
        self,
        kernel: Any,
        batch: Tensor,
        arguments: tuple[Any, ...],
        key: Key,
        *,
        iterations: int = 1,
        **constants: Any,
    ) -> None:
        rows, elements = _sizes(batch)
        if not rows or not elements:
            return
        height, width = _geometry(elements, TILE if iterations == 1 else SUM_TILE)
        if iterations > 1:
            constants["ITERATIONS"] = iterations
        pieces = -(-elements // (4 * width * iterations))
        grid = (-(-rows // height), min(pieces, _MOST), -(-pieces // _MOST))
        seed, purpose, draw, first_sample, addresses = key
        with _on(batch.device):
            kernel[grid](
                *arguments,
                rows,
                elements,
                seed & (2**64 - 1),
                purpose,
                draw,
                first_sample,
                addresses,
                R=height,
                Q=width,
                WHOLE=elements % 4 == 0,
                PACKED=self._has_pairs(batch.device),
                **constants,
                **OPTIONS,
            )

    def _has_pairs(self, device: torch.device) -> bool:
        """Whether the GPU has instructions on two fp32 numbers."""
        found = self._packed.get(device)
        if found is None:
            nvidia = device.type == "cuda" and torch.version.hip is None
            found = nvidia and torch.cuda.get_device_capability(device) >= (10, 0)
            self._packed[device] = found
        return found


def _geometry(elements: int, size: int) -> tuple[int, int]:
    """(rows, quads) of a tile: as many quads of a row as there are, up to the whole tile."""
    quads = -(-elements // 4)
    width = min(size, 1 << max(0, quads - 1).bit_length())
    return size // width, width


def _sizes(batch: Tensor) -> tuple[int, int]:
    return batch.shape[0], math.prod(batch.shape[1:])


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _kernels() -> ModuleType:
    """The kernels' modules. Importing them imports Triton, which takes a while."""
    from score_kernels.backends.triton import kernels

    return kernels


backend = Triton()
