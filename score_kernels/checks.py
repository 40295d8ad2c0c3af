"""Argument checks with messages ``name: got ..., expected ...``."""

from __future__ import annotations

import enum
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Number = TypeVar("Number", int, float)

_FLOAT32 = torch.float32
LARGEST = torch.finfo(torch.float32).max
_STATES = (torch.float32, torch.float64)
_SCORES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unsigned(name: str, value: Any, bits: int) -> int:
    """An integer in [0, 2**bits)."""
    # Under torch.compile an int may be a symbol that knows little more than that.
    if type(value) is int and 0 <= value < 1 << bits:
        return value
    if isinstance(value, enum.Enum):
        value = value.value
    # A seed of True is a mistake; NumPy's integers are not.
    if isinstance(value, (bool, Tensor, np.ndarray)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {_kind(value)}, expected an integer")
    value = operator.index(value)
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: got {value}, expected 0 <= {name} < 2**{bits}")
    return value


def count(name: str, value: Any, *, least: int) -> int:
    """An integer of at least `least`."""
    value = unsigned(name, value, 63)
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return value


def number(name: str, value: Any) -> float:
    """A finite Python (or NumPy) number."""
    if type(value) is not float:
        wrong = (bool, np.bool_, np.ndarray, Tensor, str)
        if isinstance(value, wrong) or not hasattr(value, "__float__"):
            waits = "; call .item() where you can afford to wait"
            hint = waits if isinstance(value, Tensor) and value.numel() == 1 else ""
            raise TypeError(f"{name}: got {_kind(value)}, expected a number{hint}")
        value = float(value)
    # torch.compile follows comparisons of a number that varies, and not math.isfinite.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return value


def positive(name: str, value: Any) -> float:
    """A finite number above zero."""
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: got {value}, expected a number above 0")
    return value


def not_negative(name: str, value: Any) -> float:
    """A finite number of at least zero."""
    value = number(name, value)
    if value < 0:
        raise ValueError(f"{name}: got {value}, expected a number of at least 0")
    return value


def within_float32(name: str, value: Any) -> float:
    """A finite number that float32 holds."""
    value = number(name, value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: got {value}, expected a number within float32's range")
    return value


def ends(sigma_max: Any, sigma_min: Any) -> tuple[float, float]:
    """The largest and the smallest of several noise levels."""
    high, low = positive("sigma_max", sigma_max), positive("sigma_min", sigma_min)
    if not low < high:
        raise ValueError(f"sigma_min: got {low}, expected less than sigma_max = {high}")
    return high, low


def numbers_of(name: str, values: Any) -> list[float]:
    """Finite numbers of a one-dimensional tensor or a sequence, as Python floats."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or not values.dtype.is_floating_point:
            raise ValueError(f"{name}: got {_kind(values)}, expected one dimension of floats")
        values = values.detach().double().tolist()
    elif isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: got {_kind(values)}, expected a tensor or a sequence of numbers")
    return [number(f"{name}[{i}]", value) for i, value in enumerate(values)]


def one_or_each(
    name: str, value: Any, count: int, check: Callable[[str, Any], Number]
) -> list[Number]:
    """A number, or one for each of `count` steps or levels, checked."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [check(name, value)]
    if len(value) != count or not count:
        raise ValueError(f"{name}: got {len(value)} numbers, expected one, or {count}")
    return [check(f"{name}[{i}]", v) for i, v in enumerate(value)]


def limits(name: str, value: Any) -> tuple[float, float]:
    """Two numbers, low <= high, infinite ones too."""
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {value!r}, expected two numbers (low, high)") from None
    # None of the two may be NaN.
    if not low <= high:
        raise ValueError(f"{name}: got ({low:g}, {high:g}), expected low <= high")
    return low, high


def noise_level(name: str, value: Any) -> float:
    """A positive number within float32's range."""
    level = positive(name, value)
    if not 2.0**-126 <= level <= LARGEST:
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


def reduction(value: Any) -> None:
    """The name of a reduction over the batch."""
    choice("reduction", value, ("mean", "sum", "none"))


def choice(name: str, value: Any, options: Iterable[str], more: str = "") -> str:
    """One of some names; `more` is added to what is expected."""
    options = list(options)
    if not isinstance(value, str) or value not in options:
        expected = ", ".join(map(repr, options))
        raise ValueError(f"{name}: got {value!r}, expected one of {expected}{more}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {_kind(value)}, expected True or False")
    return bool(value)


def function(name: str, value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise TypeError(f"{name}: got {_kind(value)}, expected a function")


def takes_sigma(name: str, score: Any, error: TypeError) -> None:
    """Name what is wrong where a call ``score(x, sigma)`` failed as it takes x alone."""
    called = score.forward if isinstance(score, torch.nn.Module) else score
    try:
        inspect.signature(called).bind_partial(None, None)
    except TypeError:
        raise TypeError(
            f"{name}: got a function that does not take (x, sigma) ({error}); for a network that "
            "does not take the noise level there is score_kernels.unconditional"
        ) from error
    except ValueError:
        # A builtin without a signature.
        return


def changed(name: str, argument: str) -> RuntimeError:
    """The error of a score that changes its argument in place."""
    way = "expected it as it was"
    if argument == "x":
        copy = f"lambda x, *sigma: {name}(x.clone(), *sigma)"
        way = f"as ReLU(inplace=True) does; expected x as it was, or a copy: {copy}"
    return RuntimeError(f"{name}: changed its argument {argument} in place, {way}")


def keywords(name: str, value: Any) -> dict[str, Any]:
    """Keyword arguments, copied."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: got {_kind(value)}, expected keyword arguments by name")
    return dict(value)


def device(name: str, value: Any) -> torch.device | None:
    """A device that torch can use, or none."""
    if value is None:
        return None
    try:
        found = torch.device(value)
        if found.type == "meta":
            raise ValueError("it computes nothing")
        torch.empty(0, device=found)
    # torch has another error for each way in which a device is missing.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: got {_kind(value)}, expected a device that torch can use here ({why})"
        ) from None
    return found


def instance(name: str, value: Any, kind: type, expected: str) -> None:
    """A value of the expected type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {_kind(value)}, expected {expected}")


def noise_shape(shape: Any, name: str = "shape") -> tuple[int, ...]:
    """A shape [B, ...] whose samples fit the noise contract's 32-bit block."""
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
    return sizes


def sample_range(first_sample: int, batch: int) -> None:
    """Global sample indices that fit into 56 bits."""
    if first_sample + batch > 1 << 56:
        raise ValueError(
            f"first_sample: got {first_sample} for a batch of {batch}, "
            "expected first_sample + batch <= 2**56"
        )


def identities(name: str, value: Any, like: Tensor) -> None:
    """Integers that say what each row is: int64 [B] in the shape and on the device of `like`."""
    instance(name, value, Tensor, "an int64 tensor [B]")
    instance(name, like, Tensor, "an int64 tensor [B]")
    if value.dtype != torch.int64 or value.dim() != 1:
        raise TypeError(f"{name}: got {_kind(value)}, expected an int64 tensor [B]")
    if value.shape != like.shape or value.device != like.device:
        raise ValueError(
            f"{name}: got {len(value)} on {value.device}, expected as many as samples, {len(like)} "
            f"on {like.device}"
        )


def segments(value: Any, batch: Tensor | None = None, name: str = "segments") -> None:
    """The segment of each row, int64 [B], numbered from 0; of a batch, if that is there."""
    identities(name, value, value)
    if batch is not None:
        segments_fit(value, batch, name)
    if value.is_cpu and not torch.compiler.is_dynamo_compiling() and value.numel():
        low, high = (int(end) for end in value.aminmax())
        if low < 0 or high >= len(value):
            raise ValueError(
                f"{name}: got values from {low} to {high}, expected numbers from 0 to "
                f"{len(value) - 1}, at most one for each of {len(value)} rows"
            )


def segments_fit(value: Tensor, batch: Tensor, name: str = "segments") -> None:
    """A segment for each row of a batch, on its device."""
    if len(value) != len(batch) or value.device != batch.device:
        raise ValueError(
            f"{name}: got {len(value)} on {value.device}, expected one a row, {len(batch)} on "
            f"{batch.device}"
        )


def state(name: str, value: Any) -> None:
    """A state [B, ...]: fp32 or, on the reference, fp64."""
    if not isinstance(value, Tensor):
        instance(name, value, Tensor, "a tensor")
    if value.dtype not in _STATES:
        hint = ""
        if value.dtype.is_complex:
            hint = "; torch.view_as_real(x) has the real and imaginary parts of a complex one"
        elif value.dtype.is_floating_point:
            hint = "; a half-precision state loses small steps: keep it in float32"
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected torch.float32 "
            f"(or torch.float64 on the reference backend){hint}"
        )
    if value.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions, expected [B, ...]")


def score(name: str, value: Any) -> None:
    """A score [B, ...] on its own: fp32, half precision or, on the reference, fp64."""
    instance(name, value, Tensor, "a tensor")
    if value.dtype not in _SCORES:
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected a floating one of 16 to 64 bits"
        )
    if value.dim() == 0:
        raise ValueError(f"{name}: got a tensor without dimensions, expected [B, ...]")


def score_like(x: Tensor, score: Any, name: str = "score") -> None:
    """A score that fits the state x: shape, device, dtype."""
    if not isinstance(score, Tensor):
        instance(name, score, Tensor, "a tensor")
    if score.shape != x.shape:
        raise ValueError(
            f"{name}: got shape {tuple(score.shape)}, expected that of x, {tuple(x.shape)}"
        )
    if not (x.is_cpu and score.is_cpu) and score.device != x.device:
        raise ValueError(f"{name}: got device {score.device}, expected that of x, {x.device}")
    if score.dtype is _FLOAT32:
        return
    allowed = _SCORES if x.dtype == torch.float64 else _SCORES[:3]
    if score.dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise TypeError(
            f"{name}: got dtype {score.dtype}, expected one of {names} with x of {x.dtype}"
        )


def per_sample(name: str, value: Any, batch: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """A tensor [B] of a dtype on the batch's device."""
    if not isinstance(value, Tensor):
        instance(name, value, Tensor, "a tensor [B]")
    if value.dtype is not dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {dtype}")
    same_device = value.is_cpu and batch.is_cpu or value.device == batch.device
    if value.dim() != 1 or value.numel() != batch.shape[0] or not same_device:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} on {value.device}, expected [B] = "
            f"{tuple(batch.shape[:1])} on {batch.device}"
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
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    words = " ".join(repr(value).split())
    return f"{type(value).__name__} {words if len(words) <= 60 else words[:57] + '...'}"
