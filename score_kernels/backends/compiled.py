"""What the compiled backends share: tensors in, addresses and sizes to a module of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from score_kernels.noise import Key

# The numbers of sk::Kind and sk::Dtype in csrc/args.h.
KINDS = {"words": 0, "normal": 1, "uniform": 2, "rademacher": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class PointerKernels:
    """The functions of a Backend over `kernels`, a module that takes addresses.

    A subclass says where a tensor is (`place`, the module's last arguments), in how many pieces
    rows are summed, and in which dtype the gradient of a half-precision score is written.
    """

    kernels: Any

    def place(self, device: torch.device) -> tuple[int, ...]:
        return ()

    def partials(self, elements: int) -> int:
        return 1

    def gradient_dtype(self, score: torch.dtype) -> torch.dtype:
        return torch.float32

    def fill(self, kind: str, shape: tuple[int, ...], key: Key, device: torch.device) -> Tensor:
        dtype = torch.int64 if kind == "words" else torch.float32
        out = torch.empty(shape, dtype=dtype, device=device)
        self.kernels.fill(out.data_ptr(), *_sizes(out), KINDS[kind], *key, *self.place(out.device))
        return out

    def affine_step(
        self, out: Tensor, x: Tensor, score: Tensor, a: float, b: float, c: float, key: Key
    ) -> None:
        self.kernels.affine_step(
            out.data_ptr(),
            x.data_ptr(),
            score.data_ptr(),
            DTYPES[score.dtype],
            *_sizes(x),
            a,
            b,
            c,
            *key,
            *self.place(x.device),
        )

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
        lines, columns = table.shape
        self.kernels.table_step(
            out.data_ptr(),
            x.data_ptr(),
            score.data_ptr(),
            DTYPES[score.dtype],
            *_sizes(x),
            table.data_ptr(),
            _address(step),
            lines,
            columns,
            step is None and lines > 1,
            _address(known),
            _address(mask),
            *key,
            *self.place(x.device),
        )

    def perturb(self, x: Tensor, sigma: Tensor, key: Key) -> Tensor:
        out = torch.empty_like(x)
        self.kernels.perturb(
            out.data_ptr(),
            x.data_ptr(),
            sigma.data_ptr(),
            *_sizes(x),
            *key,
            *self.place(x.device),
        )
        return out

    def dsm_loss(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, key: Key, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        rows = score.shape[0]
        # A sample without elements is not visited by the kernel: its loss is 0.
        loss = (
            score.new_empty(rows, dtype=torch.float32) if score.numel() else sigma.new_zeros(rows)
        )
        gradient = score.new_empty(score.shape if with_gradient else 0, dtype=torch.float32)
        self._dsm(loss, gradient if with_gradient else None, score, sigma, weight, None, key)
        return loss, gradient

    def dsm_gradient(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, upstream: Tensor, key: Key
    ) -> Tensor:
        gradient = torch.empty_like(score, dtype=self.gradient_dtype(score.dtype))
        self._dsm(None, gradient, score, sigma, weight, upstream, key)
        return gradient.to(score.dtype)

    def _dsm(
        self,
        loss: Tensor | None,
        gradient: Tensor | None,
        score: Tensor,
        sigma: Tensor,
        weight: Tensor | None,
        upstream: Tensor | None,
        key: Key,
    ) -> None:
        partial = None if upstream is not None else self._workspace(score, 1)
        self.kernels.dsm(
            _address(loss),
            _address(gradient),
            _address(partial),
            score.data_ptr(),
            DTYPES[score.dtype],
            sigma.data_ptr(),
            _address(weight),
            _address(upstream),
            *_sizes(score),
            *key,
            *self.place(score.device),
        )

    def probe_sums(
        self, kind: str, a: Tensor, b: Tensor | None, differences: bool, key: Key
    ) -> Tensor:
        rows = a.shape[0]
        # Samples without elements are not visited by the kernel: their sums are 0.
        new = a.new_empty if a.numel() else a.new_zeros
        out = new((4, rows), dtype=torch.float32)
        self._probe(out, kind, a, key, a=a, b=b, differences=differences)
        return out

    def probe_scale(self, kind: str, factor: Tensor, shape: tuple[int, ...], key: Key) -> Tensor:
        out = factor.new_empty(shape)
        self._probe(out, kind, out, key, factor=factor)
        return out

    def probe_shift(self, kind: str, x: Tensor, factor: Tensor, key: Key) -> Tensor:
        out = x.new_empty((2, *x.shape))
        self._probe(out, kind, x, key, factor=factor, x=x)
        return out

    def _probe(
        self,
        out: Tensor,
        kind: str,
        batch: Tensor,
        key: Key,
        *,
        a: Tensor | None = None,
        b: Tensor | None = None,
        differences: bool = False,
        factor: Tensor | None = None,
        x: Tensor | None = None,
    ) -> None:
        partial = None if a is None else self._workspace(a, 4)
        self.kernels.probe(
            out.data_ptr(),
            _address(partial),
            KINDS[kind],
            _address(a),
            _address(b),
            0 if a is None else DTYPES[a.dtype],
            differences,
            _address(factor),
            _address(x),
            *_sizes(batch),
            *key,
            *self.place(out.device),
        )

    def _workspace(self, batch: Tensor, sums: int) -> Tensor | None:
        """Where a kernel of two stages leaves the sums of the pieces of each row."""
        rows, elements = _sizes(batch)
        pieces = self.partials(elements)
        if pieces <= 1:
            return None
        return batch.new_empty((sums, rows, pieces), dtype=torch.float32)


def _sizes(batch: Tensor) -> tuple[int, int]:
    """(rows, elements of a row) of [B, ...]."""
    rows = batch.shape[0]
    return rows, batch.numel() // rows if rows else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
