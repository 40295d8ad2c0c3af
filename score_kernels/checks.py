"""Argument checks. Every message names the argument, what came and what is expected."""

from __future__ import annotations

import enum
import itertools
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from score_kernels._torch import is_compiling, transforms_active

# What has its values in memory, if it is on a device that has any.
PLAIN = (Tensor, torch.nn.Parameter)
_LARGEST = torch.finfo(torch.float32).max


def unsigned(name: str, value: Any, bits: int) -> int:
    """An integer in [0, 2**bits)."""
    # Under torch.compile an int may be a symbol that knows little more than that.
    if type(value) is int and 0 <= value < 1 << bits:
        return value
    # bool is an int to Python, but a seed of True is a mistake.
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: got {_kind(value)}, expected an integer")
        try:
            value = operator.index(value)
        # What an array of several numbers says.
        except TypeError:
            raise TypeError(f"{name}: got {_kind(value)}, expected an integer") from None
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: got {_digits(value)}, expected 0 <= {name} < 2**{bits}")
    return value


def count(name: str, value: Any, *, least: int) -> int:
    """An integer of at least `least`."""
    value = unsigned(name, value, 63)
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return value


def number(name: str, value: Any) -> float:
    """A finite Python (or NumPy) number."""
    if isinstance(value, (bool, np.bool_, np.complexfloating, Tensor)) or not hasattr(
        value, "__float__"
    ):
        hint = "; call .item() where you can afford to wait" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name}: got {_kind(value)}, expected a number{hint}")
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(f"{name}: got {_kind(value)}, expected a finite number") from None
    # What an array of several numbers says.
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {_kind(value)}, expected a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return value


def positive(name: str, value: Any) -> float:
    """A finite number above zero."""
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: got {value}, expected a number above 0")
    return value


def ends(sigma_max: Any, sigma_min: Any) -> tuple[float, float]:
    """The largest and the smallest of several noise levels."""
    high, low = positive("sigma_max", sigma_max), positive("sigma_min", sigma_min)
    if not low < high:
        raise ValueError(f"sigma_min: got {low}, expected less than sigma_max = {high}")
    return high, low


def not_negative(name: str, value: Any) -> float:
    """A finite number of at least zero."""
    value = number(name, value)
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected a number of at least 0")
    return value


def numbers_of(name: str, values: Any) -> list[float]:
    """Finite numbers in a row, of a tensor or a sequence, as Python floats."""
    if isinstance(values, Tensor):
        dense(name, values)
        if values.dim() != 1 or not values.dtype.is_floating_point or values.is_meta:
            raise ValueError(f"{name}: got {_kind(values)}, expected one dimension of floats")
        values = values.detach().double().tolist()
    elif isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: got {_kind(values)}, expected a tensor or a sequence of numbers")
    return [number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def noise_level(name: str, value: Any) -> float:
    """A positive number that scores can be told, in float32; its square is within float64's."""
    level = positive(name, value)
    if not 2.0**-126 <= level <= _LARGEST:
        raise ValueError(f"{name}: got {level}, expected a number within float32's range")
    return level


def noise_levels(sigmas: Any, name: str = "sigmas") -> list[float]:
    """Strictly decreasing positive noise levels, as Python floats."""
    levels = [noise_level(f"{name}[{i}]", s) for i, s in enumerate(numbers_of(name, sigmas))]
    if not levels:
        raise ValueError(f"{name}: got none, expected at least one noise level")
    for i, (larger, smaller) in enumerate(itertools.pairwise(levels)):
        if not larger > smaller:
            raise ValueError(
                f"{name}: got {name}[{i}] = {larger} and {name}[{i + 1}] = {smaller}, "
                "expected strictly decreasing noise levels"
            )
    return levels


def noise_shape(shape: Any, name: str = "shape") -> tuple[int, ...]:
    """A shape [B, ...] whose samples fit the noise contract's 32-bit block; name is that of the
    argument which has it."""
    if isinstance(shape, torch.Size):
        sizes: tuple[int, ...] = tuple(shape)
    elif not isinstance(shape, Sequence) or isinstance(shape, (str, bytes, bytearray)):
        raise TypeError(f"{name}: got {_kind(shape)}, expected a sequence of integers [B, ...]")
    else:
        sizes = tuple(count(name, n, least=0) for n in shape)
    if not sizes:
        raise ValueError(f"{name}: got (), expected at least the batch dimension [B, ...]")
    if math.prod(sizes[1:]) > 2**34:
        raise ValueError(
            f"{name}: got samples of {math.prod(sizes[1:])} elements, expected at most 2**34"
        )
    if math.prod(sizes) > 2**59:
        raise ValueError(
            f"{name}: got {sizes[0]} samples of {math.prod(sizes[1:])} elements, expected at most "
            "2**59 elements in all"
        )
    return sizes


def sample_range(first_sample: int, batch: int) -> None:
    """The global indices of a batch fit into 56 bits."""
    if first_sample + batch > 1 << 56:
        raise ValueError(
            f"first_sample: got {first_sample} for a batch of {batch}, "
            "expected first_sample + batch <= 2**56"
        )


def reduction(value: Any) -> None:
    """The name of a reduction over the batch."""
    if value not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {value!r}, expected 'mean', 'sum' or 'none'")


def choice(name: str, value: Any, options: Iterable[str], more: str = "") -> str:
    """One of some names; `more` is added to what is expected."""
    instance(name, value, str, "a string")
    options = list(options)
    if value not in options:
        expected = ", ".join(map(repr, options))
        raise ValueError(f"{name}: got {value!r}, expected one of {expected}{more}")
    return str(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {_kind(value)}, expected True or False")
    return bool(value)


def function(name: str, value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise TypeError(f"{name}: got {_kind(value)}, expected a function")


def keywords(name: str, value: Any) -> dict[str, Any]:
    """Keyword arguments, copied."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}: got {_kind(value)}, expected keyword arguments by name")
    return dict(value)


def device(name: str, value: Any) -> torch.device | None:
    """A device that torch can use, or none."""
    if value is None:
        return None
    try:
        place = torch.device(value)
        if place.type not in ("cpu", "meta"):
            torch.empty(0, device=place)
    # torch has another error for each way in which a device is not there.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: got {_kind(value)}, expected a device to use here ({why})") from None
    return place


def instance(name: str, value: Any, kind: type, expected: str) -> None:
    """A value of the expected type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {_kind(value)}, expected {expected}")


def state(name: str, value: Any) -> None:
    """A state [B, ...]: fp32 or, on the reference, fp64."""
    instance(name, value, Tensor, "a tensor")
    if value.dtype not in (torch.float32, torch.float64):
        hint = (
            "; a half-precision state loses small steps, keep it in float32 and give the "
            "network a copy"
            if value.dtype.is_floating_point
            else ""
        )
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected torch.float32 "
            f"(or torch.float64 on the reference backend){hint}"
        )
    dense(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions, expected [B, ...]")


def dense(name: str, value: Tensor) -> None:
    """A tensor whose elements lie in memory with strides."""
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name}: got layout {layout}, expected a dense tensor")
    if type(value) in PLAIN and not is_compiling() and not transforms_active():
        memory(name, value)


def memory(name: str, value: Tensor) -> None:
    """Not a tensor whose storage was made smaller under it, as by `untyped_storage().resize_(0)`:
    kernels, torch's too, would read and write what is not there."""
    count = value.numel()
    if not count or not (value.is_cpu or value.is_cuda) or value._is_zerotensor():
        return
    if not value.is_contiguous():
        count = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    there = value.untyped_storage().nbytes()
    needed = (value.storage_offset() + count) * value.itemsize
    if there < needed:
        raise ValueError(
            f"{name}: got a tensor whose storage was resized to {there} bytes, expected the "
            f"{needed} that its shape and strides reach over"
        )


def in_memory(value: Tensor) -> Tensor:
    """A tensor that a kernel can read: contiguous, its values where its pointer says."""
    if value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.resolve_neg().contiguous()


def score_like(x: Tensor, score: Any, name: str = "score") -> None:
    """A score that fits the state x: shape, device, dtype."""
    instance(name, score, Tensor, "a tensor")
    dense(name, score)
    if score.shape != x.shape:
        raise ValueError(
            f"{name}: got shape {tuple(score.shape)}, expected that of x, {tuple(x.shape)}"
        )
    if score.device != x.device:
        raise ValueError(f"{name}: got device {score.device}, expected that of x, {x.device}")
    allowed = [torch.float32, torch.bfloat16, torch.float16]
    if x.dtype == torch.float64:
        allowed.append(torch.float64)
    if score.dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise TypeError(
            f"{name}: got dtype {score.dtype}, expected one of {names} with x of {x.dtype}"
        )


def score(name: str, value: Any) -> None:
    """A score [B, ...] on its own: fp32, half precision or, on the reference, fp64."""
    instance(name, value, Tensor, "a tensor")
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected a floating one of 16 to 64 bits"
        )
    dense(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions, expected [B, ...]")


def per_sample(name: str, value: Any, batch: Tensor) -> None:
    """A float32 [B] on the batch's device."""
    instance(name, value, Tensor, "a tensor [B]")
    if value.dtype != torch.float32:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected torch.float32")
    dense(name, value)
    if value.shape != batch.shape[:1]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected [B] = {tuple(batch.shape[:1])}"
        )
    if value.device != batch.device:
        raise ValueError(
            f"{name}: got device {value.device}, expected that of the batch, {batch.device}"
        )


def sigma(value: Tensor, x: Tensor) -> None:
    """Noise levels [B] as a network takes them: one a sample, nothing read back."""
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"sigma: got shape {tuple(value.shape)}, expected [{x.shape[0]}], one a sample of x "
            f"with shape {tuple(x.shape)}"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested tensor of dtype {value.dtype}"
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, numbers.Integral):
        return f"{type(value).__name__} {_digits(int(value))}"
    try:
        words = " ".join(repr(value).split())
    # An integer inside may be longer than Python writes out.
    except ValueError:
        return type(value).__name__
    return f"{type(value).__name__} {words if len(words) <= 60 else words[:57] + '...'}"


def _digits(value: int) -> str:
    # Python refuses to write out what is longer still.
    return str(value) if value.bit_length() <= 256 else f"an integer of {value.bit_length()} bits"
