"""The compiled backends: C++ on CPUs and CUDA C++ on GPUs.

A backend turns tensors into addresses and sizes for a module of kernels, ``score_kernels._cpu`` or
``score_kernels._cuda``, whose functions take the fields of the structs in csrc/args.h in order.

A CUDA kernel runs on the tensors' device, on torch's current stream there. What it allocates comes
from torch's caching allocator on that stream and is used on no other, so that nothing needs
``record_stream``; a tensor made on another stream must be ready, as for any op of torch.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from score_kernels.backends.reference import NO_END, End, Reference, apart
from score_kernels.noise import Key

# The numbers of sk::Kind and sk::Dtype in csrc/args.h.
KINDS = {"words": 0, "normal": 1, "uniform": 2, "rademacher": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The kernels that each function needs; it falls back to the reference where a module lacks one.
KERNELS = {
    "fill": "fill",
    "affine_step": "affine_step",
    "table_step": "table_step",
    "perturb": "perturb",
    "dsm_loss": "dsm",
    "dsm_gradient": "dsm",
    "probe_sums": "probe",
    "probe_scale": "probe",
    "probe_shift": "probe",
}


class CompiledBackend(Reference):
    """The functions of a Backend over `kernels`, a module that takes addresses.

    A subclass says on which device and stream a tensor's kernels run (the module's last arguments),
    and in which dtype the gradient of a half-precision score is written.
    """

    device_type: str

    def __init__(self, module: str) -> None:
        self.kernels: Any = None
        self.on_cpu = self.device_type == "cpu"
        self._why: str | None = None
        try:
            self.kernels = importlib.import_module(module)
        except ImportError as error:
            self._why = f"{module} was not built or does not load ({error})"
        for function, kernel in KERNELS.items():
            if self.kernels is not None and not hasattr(self.kernels, kernel):
                setattr(self, function, getattr(super(), function))
        self._affine_step: Any = getattr(self.kernels, "affine_step", None)

    def unavailable(self) -> str | None:
        return self._why

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self._why is not None:
            return self._why
        if device.type != self.device_type:
            return f"serves {self.device_type} tensors, not {device}"
        if dtype != torch.float32:
            return f"serves states of torch.float32, not {dtype}"
        return None

    def device_and_stream(self, device: torch.device) -> tuple[int, ...]:
        return ()

    def gradient_dtype(self, score: torch.dtype) -> torch.dtype:
        return torch.float32

    def fill(self, out: Tensor, kind: str, key: Key) -> None:
        where = () if self.on_cpu else self.device_and_stream(out.device)
        self.kernels.fill(out.data_ptr(), *_sizes(out), KINDS[kind], *_fields(key), *where)

    def affine_step(
        self, out: Tensor, x: Tensor, score: Tensor, a: float, b: float, c: float, key: Key
    ) -> None:
        source, at = x.data_ptr(), score.data_ptr()
        target, rows, count = source, x.shape[0], x.numel()
        dtype, elements = DTYPES[score.dtype], count // rows if rows else 0
        if out is not x:
            target = out.data_ptr()
        elif (dtype or at != source) and -8 * count < at - source < 8 * count:
            score = apart(x, score)
            at = score.data_ptr()
        seed, purpose, draw, first, addresses = key
        rows_at = 0 if addresses is None else addresses.data_ptr()
        # Without a tuple of arguments to unpack: it costs a tenth of a small step.
        step = self._affine_step
        if self.on_cpu:
            step(
                target, source, at, dtype, rows, elements, a, b, c, seed, purpose, draw, first,
                rows_at,
            )  # fmt: skip
        else:
            where = self.device_and_stream(x.device)
            step(target, source, at, dtype, rows, elements, a, b, c, *_fields(key), *where)

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
        lines, columns = table.shape
        # The kernel may read the score and what is known after it has written x.
        score, known = apart(out, score), None if known is None else apart(out, known, same=True)
        if precondition is not None:
            precondition = apart(out, precondition)
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
            _address(precondition),
            *end,
            *_fields(key),
            *self.device_and_stream(x.device),
        )

    def perturb(self, x: Tensor, sigma: Tensor, key: Key) -> Tensor:
        out = torch.empty_like(x)
        self.kernels.perturb(
            out.data_ptr(),
            x.data_ptr(),
            sigma.data_ptr(),
            *_sizes(x),
            *_fields(key),
            *self.device_and_stream(x.device),
        )
        return out

    def dsm_loss(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, key: Key, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        # The kernel does not visit samples without elements: their loss is 0.
        loss = torch.empty_like(sigma) if score.numel() else torch.zeros_like(sigma)
        new = torch.empty_like(score, dtype=torch.float32) if with_gradient else loss.new_empty(0)
        self._dsm(loss, new if with_gradient else None, score, sigma, weight, None, key)
        return loss, new

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
            *_fields(key),
            *self.device_and_stream(score.device),
        )

    def probe_sums(
        self, kind: str, a: Tensor, b: Tensor | None, differences: bool, key: Key
    ) -> Tensor:
        # The kernel does not visit samples without elements: their sums are 0.
        new = a.new_empty if a.numel() else a.new_zeros
        shape, half = (4, a.shape[0]), a.dtype is not torch.float32
        out = new(shape, dtype=torch.float32) if half else new(shape)
        self._probe(out, kind, a, key, a, b, differences)
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
        a: Tensor | None = None,
        b: Tensor | None = None,
        differences: bool = False,
        factor: Tensor | None = None,
        x: Tensor | None = None,
    ) -> None:
        partial = None if a is None or self.on_cpu else self._workspace(a, 4)
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
            *_fields(key),
            *(() if self.on_cpu else self.device_and_stream(out.device)),
        )

    def _workspace(self, batch: Tensor, sums: int) -> Tensor | None:
        """Where a kernel of two stages leaves the sums of the chunks of each row."""
        if self.on_cpu:
            return None
        rows, elements = _sizes(batch)
        chunks = self.kernels.partials(elements)
        if chunks <= 1:
            return None
        return batch.new_empty((sums, rows, chunks), dtype=torch.float32)


class Native(CompiledBackend):
    """C++ on CPU tensors. torch is imported first, so that the kernels share its OpenMP pool."""

    name, capturable, device_type = "native", False, "cpu"

    def __init__(self) -> None:
        super().__init__("score_kernels._cpu")
        if self.kernels is not None and "SCORE_KERNELS_ISA" in os.environ:
            try:
                self.kernels.set_isa(os.environ["SCORE_KERNELS_ISA"])
            except ValueError as error:
                raise ValueError(f"SCORE_KERNELS_ISA: {error}") from None

    def describe(self) -> str:
        threads = self.kernels.openmp_threads()
        pool = f"{threads} OpenMP threads" if threads else "1 thread, built without OpenMP"
        isa = self.kernels.isa()
        others = ", ".join(other for other in self.kernels.isas() if other != isa)
        return f"C++ on CPU, {isa} (also here: {others or 'none'}), {pool}"


class Cuda(CompiledBackend):
    """CUDA C++ on CUDA tensors."""

    name, capturable, device_type = "cuda", True, "cuda"

    def __init__(self) -> None:
        super().__init__("score_kernels._cuda")
        self._why = self._why or self._no_device()

    def _no_device(self) -> str | None:
        if torch.version.hip is not None:
            return "torch is built for ROCm"
        if torch.version.cuda is None:
            return "torch is built without CUDA"
        count, why = self.kernels.devices()
        return None if count else why

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if why := super().refuses(device, dtype):
            return why
        built = min(int(arch) for arch in self.kernels.archs.split(";"))
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < built:
            has = f"{device} has {major}.{minor}"
            return f"was built for compute capability {built / 10} and up, {has}"
        return None

    def describe(self) -> str:
        archs, count = self.kernels.archs.replace(";", ", sm_"), self.kernels.devices()[0]
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
        return f"CUDA C++ for sm_{archs}; {count} devices: {names}"

    def device_and_stream(self, device: torch.device) -> tuple[int, ...]:
        return device.index, torch.cuda.current_stream(device).cuda_stream

    def gradient_dtype(self, score: torch.dtype) -> torch.dtype:
        return score

    def dsm_loss(
        self, score: Tensor, sigma: Tensor, weight: Tensor | None, key: Key, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        loss, gradient = super().dsm_loss(score, sigma, weight, key, False)
        if with_gradient:
            ones = torch.ones_like(sigma)
            gradient = self.dsm_gradient(score, sigma, weight, ones, key).float()
        return loss, gradient


native, cuda = Native(), Cuda()


def _sizes(batch: Tensor) -> tuple[int, int]:
    """(rows, elements of a row) of [B, ...]."""
    rows = batch.shape[0]
    return rows, batch.numel() // rows if rows else 0


def _fields(key: Key) -> tuple[int, ...]:
    return (*key[:4], _address(key[4]))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
