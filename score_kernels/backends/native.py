"""The C++ kernels of ``score_kernels._cpu`` on CPU tensors."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from score_kernels.noise import Key, NoiseKey

_why: str | None = None
# torch is imported above, so that the kernels share the OpenMP pool torch brought along.
try:
    from score_kernels import _cpu
except ImportError as error:
    _why = f"score_kernels._cpu was not built or does not load ({error})"

# The numbers of sk::Kind and sk::Dtype in csrc/args.h.
_KINDS = {"words": 0, "normal": 1, "uniform": 2, "rademacher": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

if _why is None and "SCORE_KERNELS_ISA" in os.environ:
    try:
        _cpu.set_isa(os.environ["SCORE_KERNELS_ISA"])
    except ValueError as error:
        raise ValueError(f"SCORE_KERNELS_ISA: {error}") from None


def unavailable() -> str | None:
    return _why


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if _why is not None:
        return _why
    if device.type != "cpu":
        return f"serves CPU tensors, not {device}"
    if dtype != torch.float32:
        return f"serves states of torch.float32, not {dtype}"
    return None


def describe() -> str:
    threads = _cpu.openmp_threads()
    pool = f"{threads} OpenMP threads" if threads else "1 thread, built without OpenMP"
    others = ", ".join(isa for isa in _cpu.isas() if isa != _cpu.isa())
    return f"C++ on CPU, {_cpu.isa()} (also here: {others or 'none'}), {pool}"


def fill(kind: str, shape: tuple[int, ...], noise: NoiseKey, device: torch.device) -> Tensor:
    out = torch.empty(shape, dtype=torch.int64 if kind == "words" else torch.float32)
    rows = shape[0]
    elements = out.numel() // rows if rows else 0
    _cpu.fill(
        out.data_ptr(),
        rows,
        elements,
        _KINDS[kind],
        *noise.fields(),
    )
    return out


def affine_step(
    out: Tensor,
    x: Tensor,
    score: Tensor,
    a: float,
    b: float,
    c: float,
    key: Key,
) -> None:
    rows = x.shape[0]
    _cpu.affine_step(
        out.data_ptr(),
        x.data_ptr(),
        score.data_ptr(),
        _DTYPES[score.dtype],
        rows,
        x.numel() // rows if rows else 0,
        a,
        b,
        c,
        *key,
    )


def perturb(x: Tensor, sigma: Tensor, key: Key) -> Tensor:
    out = torch.empty_like(x)
    rows = x.shape[0]
    elements = x.numel() // rows if rows else 0
    _cpu.perturb(out.data_ptr(), x.data_ptr(), sigma.data_ptr(), rows, elements, *key)
    return out


def dsm_loss(
    score: Tensor, sigma: Tensor, weight: Tensor | None, key: Key, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    rows = score.shape[0]
    # A sample without elements is not visited by the kernel: its loss is 0.
    loss = score.new_empty(rows, dtype=torch.float32) if score.numel() else sigma.new_zeros(rows)
    gradient = score.new_empty(score.shape if with_gradient else 0, dtype=torch.float32)
    _dsm(loss, gradient if with_gradient else None, score, sigma, weight, None, key)
    return loss, gradient


def dsm_gradient(
    score: Tensor, sigma: Tensor, weight: Tensor | None, upstream: Tensor, key: Key
) -> Tensor:
    gradient = torch.empty_like(score, dtype=torch.float32)
    _dsm(None, gradient, score, sigma, weight, upstream, key)
    return gradient.to(score.dtype)


def _dsm(
    loss: Tensor | None,
    gradient: Tensor | None,
    score: Tensor,
    sigma: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    key: Key,
) -> None:
    rows = score.shape[0]
    loss_to, gradient_to, weight_at, upstream_at = (
        0 if t is None else t.data_ptr() for t in (loss, gradient, weight, upstream)
    )
    _cpu.dsm(
        loss_to,
        gradient_to,
        score.data_ptr(),
        _DTYPES[score.dtype],
        sigma.data_ptr(),
        weight_at,
        upstream_at,
        rows,
        score.numel() // rows if rows else 0,
        *key,
    )


def probe_sums(kind: str, a: Tensor, b: Tensor | None, differences: bool, key: Key) -> Tensor:
    rows = a.shape[0]
    # Samples without elements are not visited by the kernel: their sums are 0.
    out = a.new_empty((4, rows), dtype=torch.float32) if a.numel() else torch.zeros(4, rows)
    _probe(out, kind, rows, a.numel(), key, a=a, b=b, differences=differences)
    return out


def probe_scale(kind: str, factor: Tensor, shape: tuple[int, ...], key: Key) -> Tensor:
    out = factor.new_empty(shape)
    _probe(out, kind, shape[0], out.numel(), key, factor=factor)
    return out


def probe_shift(kind: str, x: Tensor, factor: Tensor, key: Key) -> Tensor:
    out = x.new_empty((2, *x.shape))
    _probe(out, kind, x.shape[0], x.numel(), key, factor=factor, x=x)
    return out


def _probe(
    out: Tensor,
    kind: str,
    rows: int,
    count: int,
    key: Key,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    differences: bool = False,
    factor: Tensor | None = None,
    x: Tensor | None = None,
) -> None:
    a_at, b_at, factor_at, x_at = (0 if t is None else t.data_ptr() for t in (a, b, factor, x))
    _cpu.probe(
        out.data_ptr(),
        _KINDS[kind],
        a_at,
        b_at,
        0 if a is None else _DTYPES[a.dtype],
        differences,
        factor_at,
        x_at,
        rows,
        count // rows if rows else 0,
        *key,
    )


_FLOAT32, _STRIDED = torch.float32, torch.strided
_is_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_modes_active = torch._C._len_torch_dispatch_stack
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
    differentiated or transformed, and tensors whose memory does not hold their values (a lazy
    negation).
    """
    if not (
        quick
        and type(x) is type(score) is Tensor
        and type(noise) is NoiseKey
        and x.dtype is score.dtype is _FLOAT32
        and x.is_cpu
        and score.is_cpu
        and x.layout is score.layout is _STRIDED
        and not (_is_compiling() or _transforms_active() or _modes_active())
        and not ((x.requires_grad or score.requires_grad) and _is_grad_enabled())
        and x.is_contiguous()
        and score.is_contiguous()
        and not (x.is_neg() or score.is_neg())
    ):
        return None
    shape, count = x.shape, x.numel()
    if not count or shape != score.shape or not shape:
        return None
    rows = shape[0]
    if noise.first_sample + rows > 1 << 56:
        return None
    source = x.data_ptr()
    distance = score.data_ptr() - source
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
