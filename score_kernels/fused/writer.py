"""The text of a C++ function as it grows, operation by operation.

Tensors are arrays of the function, with an index for each of their elements: shapes cost nothing.
Elementwise operations of one size share a loop, until one needs an element of another round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ELEMENTWISE", "MASKS", "Value", "Writer", "is_range", "literal"]

# Operations that are done again rather than stored by one loop and read by the next.
_RECOMPUTED = 4
# The most assignments that are written out one by one.
_UNROLLED = 64
# Columns of a matrix that csrc/fused.h's product takes at a time.
_BLOCK = 8


_FUNCTIONS = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc", "exp",
    "exp2", "expm1", "floor", "log", "log10", "log1p", "log2", "round", "sin", "sinh", "sqrt",
    "tan", "tanh", "trunc",
)  # fmt: skip
# ATen operations of elements: C++ text of their operands.
ELEMENTWISE = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "reciprocal": "F(1) / {0}",
    **{name: f"{name}({{0}})" for name in _FUNCTIONS},
    "rsqrt": "F(1) / sqrt({0})",
    "abs": "abs({0})",
    "sigmoid": "F(1) / (F(1) + exp(-{0}))",
    "relu": "maximum({0}, F(0))",
    "square": "{0} * {0}",
    "sign": "where({0} > F(0), F(1), where({0} < F(0), F(-1), {0} * F(0)))",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "where": "where({0}, {1}, {2})",
    **{name: f"{name}({{0}}, {{1}})" for name in ("atan2", "fmod", "hypot", "pow", "remainder")},
}
MASKS = {
    "lt": "F({0}) < F({1})",
    "le": "F({0}) <= F({1})",
    "gt": "F({0}) > F({1})",
    "ge": "F({0}) >= F({1})",
    "eq": "F({0}) == F({1})",
    "ne": "F({0}) != F({1})",
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_not": "!{0}",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_not": "!{0}",
}
_OF_MASKS = {text for name, text in MASKS.items() if name.startswith(("logical", "bitwise"))}


@dataclass
class Value:
    """A tensor of the C++ function: the name of an array, and where its elements are in it.

    Names begin with t for numbers, m for masks and k for constants.
    """

    name: str
    index: np.ndarray

    @property
    def mask(self) -> bool:
        return self.name.startswith("m")


@dataclass
class Writer:
    """The text of the function as it grows: finished lines, and a loop that may go on."""

    lines: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    # What the open loop computes, of so many elements: the text and its operands.
    open: dict[str, tuple[str, list[Value]]] = field(default_factory=dict)
    size: int = 0
    count: int = 0
    # Names of tables of indices.
    tables: dict[bytes, str] = field(default_factory=dict)

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def close(self) -> None:
        if self.body:
            unroll = "SK_UNROLL(16)\n" if self.size <= 16 else ""
            body = "\n".join(f"  {line}" for line in self.body)
            self.lines.append(f"{unroll}for (int i = 0; i < {self.size}; ++i) {{\n{body}\n}}")
        self.body, self.open = [], {}

    def elementwise(self, text: str, operands: Sequence[Any], *, mask: bool = False) -> Value:
        """``text``, in which {0}, {1}, ... are operands, for each element of their broadcast."""
        values = [self.value(operand) for operand in operands]
        shape = np.broadcast_shapes(*(value.index.shape for value in values))
        flat = [Value(v.name, np.broadcast_to(v.index, shape).ravel()) for v in values]
        size = math.prod(shape)
        if size != self.size or max(map(self.again, flat)) > _RECOMPUTED:
            self.close()
        self.size = size
        name, kind = (self.name("m"), "Mask") if mask else (self.name("t"), "F")
        self.lines.append(f"{kind} {name}[{size}];")
        self.body.append(f"const {kind} {name}_ = {self.applied(text, flat)};")
        self.body.append(f"{name}[i] = {name}_;")
        self.open[name] = text, flat
        return Value(name, np.arange(size).reshape(shape))

    def applied(self, text: str, operands: Sequence[Value]) -> str:
        given = list(map(self.element, operands))
        # Of masks: logic, and where's condition. All else is of numbers.
        logic, condition = text in _OF_MASKS, text == ELEMENTWISE["where"]
        for i, v in enumerate(operands):
            wanted = logic or (condition and i == 0)
            if wanted and not v.mask:
                given[i] = f"(F({given[i]}) != F(0))"
            elif v.mask and not wanted:
                given[i] = f"where({given[i]}, F(1), F(0))"
        return text.format(*given)

    def moved(self, value: Value) -> bool:
        """Whether elements are of the open loop's other rounds."""
        return value.name in self.open and not is_range(value.index)

    def again(self, value: Value, most: int = _RECOMPUTED) -> int:
        """Operations to do again for elements of other rounds; more than most: too many."""
        if not self.moved(value):
            return 0
        text, operands = self.open[value.name]
        count = 1 if not set("/(") & set(text) else most + 1
        for operand in operands:
            if count <= most:
                count += self.again(Value(operand.name, operand.index[value.index]), most - count)
        return count

    def element(self, value: Value) -> str:
        """The i-th of some elements of an array, inside the open loop."""
        name, index = value.name, value.index
        if self.moved(value):
            text, operands = self.open[name]
            return f"({self.applied(text, [Value(o.name, o.index[index]) for o in operands])})"
        if is_range(index):
            return f"{name}_" if name in self.open else f"{name}[i]"
        if (index == index[0]).all():
            return f"{name}[{index[0]}]"
        return f"{name}[{self.table(index)}[i]]"

    def table(self, index: np.ndarray) -> str:
        """The name of a constant array of indices."""
        key = index.tobytes()
        if key not in self.tables:
            self.tables[key] = self.name("at")
            numbers = ", ".join(map(str, index.ravel()))
            self.lines.append(f"static const uint16_t {self.tables[key]}[] = {{{numbers}}};")
        return self.tables[key]

    def numbers(self, operand: Any) -> Value:
        """A value that is no mask."""
        value = self.value(operand)
        return self.elementwise("{0}", [value]) if value.mask else value

    def value(self, operand: Any) -> Value:
        """A traced tensor as it is; numbers and constant tensors as an array of numbers."""
        if isinstance(operand, Value):
            return operand
        tensor = torch.as_tensor(operand).detach().double()
        numbers, name = tensor.flatten().tolist(), self.name("k")
        index = np.arange(len(numbers))
        if len(set(numbers)) == 1:
            numbers, index = numbers[:1], np.zeros_like(index)
        text = ", ".join(map(literal, numbers))
        self.lines.append(f"static const float {name}[] = {{{text}}};")
        return Value(name, index.reshape(tuple(tensor.shape)))

    def reduce(self, text: str, start: str, value: Value, dims: Any, keepdim: bool) -> Value:
        """``text`` of the result so far {0} and an element {1}, over dimensions."""
        value = self.numbers(value)
        rank = value.index.ndim
        axes = range(rank) if dims is None or dims == [] else dims
        axes = sorted({axis % rank for axis in ([axes] if isinstance(axes, int) else axes)})
        kept = [axis for axis in range(rank) if axis not in axes]
        index = value.index.transpose([*kept, *axes])
        shape = tuple(value.index.shape[axis] for axis in kept)
        rows = index.reshape(math.prod(shape), math.prod(value.index.shape[a] for a in axes))
        self.close()
        name = self.name("t")
        self.lines.append(f"F {name}[{len(rows)}];")
        self.lines += self.accumulate(name, rows, text, start, value.name)
        if keepdim:
            shape = tuple(1 if a in axes else value.index.shape[a] for a in range(rank))
        return Value(name, np.arange(len(rows)).reshape(shape))

    def accumulate(
        self, name: str, rows: np.ndarray, text: str, start: str, source: str
    ) -> list[str]:
        if rows.size <= _UNROLLED:
            lines = []
            for i, row in enumerate(rows):
                target, first = f"{name}[{i}]", 0 if start else 1
                lines.append(f"{target} = {start or f'{source}[{row[0]}]'};")
                for j in row[first:]:
                    lines.append(f"{target} = {text.format(target, f'{source}[{j}]')};")
            return lines
        count = rows.shape[1]
        # Consecutive elements by a formula, others by a table.
        if np.array_equal(rows.ravel(), np.arange(rows.size) + rows[0, 0]):
            element = f"{source}[{rows[0, 0]} + i * {count} + j]"
        else:
            element = f"{source}[{self.table(rows)}[i * {count} + j]]"
        return [
            f"for (int i = 0; i < {len(rows)}; ++i) {{",
            f"  F total = {start or element.replace('+ j]', '+ 0]')};",
            f"  for (int j = {0 if start else 1}; j < {count}; ++j)",
            f"    total = {text.format('total', element)};",
            f"  {name}[i] = total;",
            "}",
        ]

    def matmul(self, a: Any, b: Any) -> Value:
        if not isinstance(a, Value):
            # The constant matrix comes second.
            right = self.numbers(b)
            made = self.matmul(Value(right.name, right.index.T), torch.as_tensor(a).T)
            return Value(made.name, made.index.T)
        left, name = self.numbers(a), self.name("t")
        rows, count = left.index.shape
        if isinstance(b, Value):
            return self.product_of_values(left, self.numbers(b))
        columns, matrix = len(b.T), self.packed(b)
        self.lines.append(f"F {name}[{rows * columns}];")
        for r, index in enumerate(left.index):
            row = Value(left.name, index)
            if not is_range(index - index[0]):
                row = self.elementwise("{0}", [row])
            self.close()
            self.lines.append(
                f"product<{count}, {columns}>(&{row.name}[{row.index[0]}], {matrix}, "
                f"&{name}[{r * columns}]);"
            )
        return Value(name, np.arange(rows * columns).reshape(rows, columns))

    def packed(self, matrix: Tensor) -> str:
        """The name of a constant matrix, as csrc/fused.h's product reads it."""
        count, columns = matrix.shape
        blocks = np.zeros((count, -(-columns // _BLOCK) * _BLOCK))
        blocks[:, :columns] = matrix.detach().double().numpy()
        blocks = blocks.reshape(count, -1, _BLOCK).swapaxes(0, 1)
        name = self.name("k")
        text = ", ".join(map(literal, blocks.ravel().tolist()))
        self.lines.append(f"static const float {name}[] = {{{text}}};")
        return name

    def product_of_values(self, left: Value, right: Value) -> Value:
        self.close()
        (rows, count), columns = left.index.shape, right.index.shape[1]
        name, a, b = self.name("t"), self.table(left.index), self.table(right.index)
        self.lines.append(f"F {name}[{rows * columns}];")
        first, second = (
            f"{left.name}[{a}[i * {count} + k]]",
            f"{right.name}[{b}[k * {columns} + j]]",
        )
        self.lines += [
            f"for (int i = 0; i < {rows}; ++i)",
            f"  for (int j = 0; j < {columns}; ++j) {{",
            "    F sum = 0;",
            f"    for (int k = 0; k < {count}; ++k) sum += {first} * {second};",
            f"    {name}[i * {columns} + j] = sum;",
            "  }",
        ]
        return Value(name, np.arange(rows * columns).reshape(rows, columns))

    def gather(self, parts: Sequence[list[tuple[str, int]]], shape: tuple[int, ...]) -> Value:
        """Sums of elements of several arrays, one for each element."""
        self.close()
        name = self.name("t")
        self.lines.append(f"F {name}[{len(parts)}];")
        if len(parts) <= _UNROLLED or any(len(terms) > 1 for terms in parts):
            for i, terms in enumerate(parts):
                self.lines.append(f"{name}[{i}] = {' + '.join(f'{a}[{k}]' for a, k in terms)};")
        else:
            places: dict[str, list[tuple[int, int]]] = {}
            for i, ((source, at),) in enumerate(parts):
                places.setdefault(source, []).append((i, at))
            for source, pairs in places.items():
                to, of = (self.table(np.array(side)) for side in zip(*pairs, strict=True))
                copy = f"{name}[{to}[i]] = {source}[{of}[i]];"
                self.lines.append(f"for (int i = 0; i < {len(pairs)}; ++i) {copy}")
        return Value(name, np.arange(len(parts)).reshape(shape))


def is_range(index: np.ndarray) -> bool:
    return np.array_equal(index, np.arange(len(index)))


def literal(x: float) -> str:
    if math.isnan(x):
        return "NAN"
    if math.isinf(x):
        return "INFINITY" if x > 0 else "-INFINITY"
    return f"{float(np.float32(x)).hex()}f"
