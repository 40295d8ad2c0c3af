"""The torch library that every op is registered in, and the short ways into it.

A small batch spends its time in Python and in torch's dispatcher. `register` and `apply` go past
what only tracing, transforms and tensor subclasses need whenever nothing of the kind is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from score_kernels import checks
from score_kernels._torch import is_compiling, modes_active, profiler_enabled, transforms_active
from score_kernels.noise import Key

library = torch.library.Library("score_kernels", "DEF")

# The last four arguments of every op.
KEY = "SymInt seed, SymInt purpose, SymInt draw, SymInt first_sample"

# torch's own makes the negation of a lazily negated tensor real, but fails in place.
_FALLTHROUGH = torch.library.fallthrough_kernel


def signed(key: Key) -> Key:
    """A key as an op's arguments: schemas have signed 64-bit integers."""
    return (key[0] - 2**64 if key[0] >= 2**63 else key[0], *key[1:])


def unsigned(key: Key) -> Key:
    """The key again, from an op's arguments."""
    return (key[0] & (2**64 - 1), *key[1:])


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an op for every device, and return it as a function.

    The function calls the implementation itself unless something listens at torch's dispatcher:
    a trace, a transform, a mode, a profiler, or a tensor of another class.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    op = getattr(torch.ops.score_kernels, name)
    parts = [(i, a) for i, a in enumerate(op.default._schema.arguments) if "Tensor" in str(a.type)]
    # What is written is the implementation's own to resolve.
    tensors = [(i, a.name, a.alias_info is not None) for i, a in parts]

    def resolved(*arguments: Any) -> Any:
        """The implementation, on tensors whose memory holds their values."""
        for i, _, written in tensors:
            value = arguments[i]
            if value is not None and value.is_neg() and not written:
                arguments = (*arguments[:i], value.resolve_neg(), *arguments[i + 1 :])
        return implementation(*arguments)

    def stored(*arguments: Any) -> Any:
        """The same for torch's dispatcher, which anyone may call."""
        for i, argument, _ in tensors:
            if arguments[i] is not None:
                checks.memory(argument, arguments[i])
        return resolved(*arguments)

    library.impl(name, stored, "CompositeExplicitAutograd")
    library.impl(name, _FALLTHROUGH, "Negative")
    torch.library.register_fake(f"score_kernels::{name}", fake)

    def call(*arguments: Any) -> Any:
        if is_compiling() or transforms_active() or modes_active() or profiler_enabled():
            return op(*arguments)
        for i, _, _ in tensors:
            value = arguments[i]
            if value is not None and (
                type(value) not in checks.PLAIN or value.is_meta or value._is_zerotensor()
            ):
                return op(*arguments)
        return resolved(*arguments)

    return call


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: what has a formula in plain
    torch, which has every rule, is computed by it there."""
    return transforms_active() or forward_ad._current_level >= 0


def differentiated(*arguments: Any) -> bool:
    """Whether derivatives by one of the arguments may be asked for, outside traces and transforms.

    Forward mode marks no tensor that Python sees: inside a level of it, all may be.
    """
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
    )


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply, for functions that have a setup_context: forward itself where nothing is
    differentiated. Torch's own looks up forward's default values in every call, which takes longer
    than a small step, and ours have none."""
    if is_compiling() or transforms_active():
        return function.apply(*arguments)
    if not differentiated(*arguments):
        return function.forward(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
