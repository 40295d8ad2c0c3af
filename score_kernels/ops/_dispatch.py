"""One way into every op: straight to a backend, or through torch's dispatcher.

Small batches spend their time in Python and in the dispatcher. An op goes straight to its backend
unless something traces, transforms or differentiates, or a tensor is of another class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from score_kernels import checks
from score_kernels.noise import NoiseKey

library = torch.library.Library("score_kernels", "DEF")

# The last arguments of every op: a NoiseKey's.
KEY_SCHEMA = "SymInt seed, SymInt purpose, SymInt draw, SymInt first_sample, Tensor? addresses"
_FIELDS = KEY_SCHEMA.count(",") + 1

is_compiling = torch.compiler.is_dynamo_compiling
transforms_active = torch._C._are_functorch_transforms_active
modes_active = torch._C._len_torch_dispatch_stack
_profiler_enabled = torch.autograd._profiler_enabled
is_grad_enabled = torch.is_grad_enabled
PLAIN = (Tensor, torch.nn.Parameter)


def undisturbed() -> bool:
    """Whether nothing traces, transforms, records or differentiates forwards."""
    return not (
        is_compiling()
        or transforms_active()
        or modes_active()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    )


def direct(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors may bypass torch's dispatcher and autograd."""
    if not undisturbed():
        return False
    grad = is_grad_enabled()
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or (grad and t.requires_grad)):
            return False
    return True


def dense(t: Tensor) -> Tensor:
    """t itself, or a copy where its memory does not hold its elements in order.

    A contiguous tensor may be negated lazily only if it has one element.
    """
    return t if t.numel() != 1 and t.is_contiguous() else t.resolve_neg().contiguous()


def transformed(*gradients: Tensor) -> bool:
    """Whether torch.func, forward mode or a batch of gradients is active.

    Ops are then computed by plain formulas, which have every derivative and batching rule.
    """
    if transforms_active() or forward_ad._current_level >= 0:
        return True
    # Of torch.autograd.grad(is_grads_batched=True).
    return not is_compiling() and any(functorch.is_legacy_batchedtensor(g) for g in gradients)


def refuse_vmap(**tensors: Tensor | None) -> None:
    """An error for samples that torch.func.vmap hides: all would get the noise of sample 0.

    Scores may be hidden: those of several networks for the same samples have the same noise.
    """
    for name, value in tensors.items():
        while value is not None and not functorch.is_batchedtensor(value):
            wrapped = not is_compiling() and functorch.is_gradtrackingtensor(value)
            value = functorch.get_unwrapped(value) if wrapped else None
        if value is not None:
            raise RuntimeError(
                f"{name}: got samples under torch.func.vmap, which all would have the noise of "
                "sample 0; expected the whole batch [B, ...]. For gradients of each sample, make "
                "the noise first (ops.perturb, ops.normal), and apply vmap to what follows"
            )


def version_of(tensor: Tensor) -> int:
    """A number that changes with a tensor's values, where torch counts them."""
    return -1 if is_compiling() or tensor.is_inference() else tensor._version


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether reverse mode may ask for derivatives by one of the tensors."""
    return is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an op with torch and return it as a function.

    The implementation takes the op's arguments with the key as one tuple, last, on tensors whose
    memory holds their values; what it writes to it resolves itself.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    op = getattr(torch.ops.score_kernels, name)
    own = op.default._schema.arguments[:-_FIELDS]
    tensors = [i for i, a in enumerate(own) if "Tensor" in str(a.type)]
    read = [i for i in tensors if own[i].alias_info is None]

    def dispatched(*arguments: Any) -> Any:
        values = list(arguments[:-_FIELDS])
        for i in read:
            if values[i] is not None:
                values[i] = values[i].resolve_neg()
        return implementation(*values, arguments[-_FIELDS:])

    library.impl(name, dispatched, "CompositeExplicitAutograd")
    # torch's own kernel for negated views fails where an op writes in place.
    library.impl(name, torch.library.fallthrough_kernel, "Negative")
    torch.library.register_fake(f"score_kernels::{name}", fake)

    def call(*arguments: Any) -> Any:
        if direct(*[arguments[i] for i in tensors]):
            return implementation(*arguments)
        return op(*arguments[:-1], *arguments[-1])

    return call


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` without torch's look-up of default values, of which ours have none."""
    if is_compiling() or transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def check_key(noise: Any, name: str, batch: Tensor) -> None:
    """A NoiseKey whose samples, and a batch whose elements, fit the noise contract."""
    if type(noise) is not NoiseKey:
        checks.instance("noise", noise, NoiseKey, "a NoiseKey")
    if batch.numel() > 1 << 34:
        checks.noise_shape(batch.shape, name)
    if noise[3] > (1 << 56) - (1 << 34):
        checks.sample_range(noise[3], batch.shape[0])
    if noise[4] is not None:
        check_addresses(noise[4], batch)


def check_addresses(addresses: Tensor, batch: Tensor) -> None:
    """Addresses of as many rows as the batch has, on its device."""
    here = addresses.is_cpu and batch.is_cpu or addresses.device == batch.device
    if addresses.shape[0] != batch.shape[0] + 1 or not here:
        raise ValueError(
            f"noise: got addresses of {len(addresses) - 1} rows on {addresses.device}, expected "
            f"those of the batch, {batch.shape[0]} on {batch.device}"
        )


def new_like(x: Tensor, *_: Any) -> Tensor:
    """The fake implementation of an op whose result is like x, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def state_dtype(score: Tensor) -> torch.dtype:
    """The dtype of the state and the loss that go with a score."""
    return torch.float64 if score.dtype == torch.float64 else torch.float32
