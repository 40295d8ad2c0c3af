"""A PyTorch function of a row, traced, as C++ over csrc/fused.h's number type.

The function runs once on one row, and each of its ATen operations becomes a loop over the elements
of its result. Operations on shapes (views, transposes, rolls, concatenations) move no data: a
tensor is an array of the C++ function with an index for each of its elements. What does not depend
on the row is computed here.
"""

from __future__ import annotations

import math
import operator
import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate, map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["source_of"]

# More than an array has elements.
_RANGE = 1 << 20
# Operations that are done again rather than stored by one loop and read by the next.
_RECOMPUTED = 4
# The most assignments that are written out one by one.
_UNROLLED = 64
# The most numbers of a row that temporaries hold: 2 MB of the stack, of 16 rows.
_MOST = 1 << 15
# Columns of a matrix that csrc/fused.h's product takes at a time.
_BLOCK = 8


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
        logic, condition = text in _OF_MASKS, text == _ELEMENTWISE["where"]
        for i, v in enumerate(operands):
            wanted = logic or (condition and i == 0)
            if wanted and not v.mask:
                given[i] = f"(F({given[i]}) != F(0))"
            elif v.mask and not wanted:
                given[i] = f"where({given[i]}, F(1), F(0))"
        return text.format(*given)

    def moved(self, value: Value) -> bool:
        """Whether elements are of the open loop's other rounds."""
        return value.name in self.open and not _is_range(value.index)

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
        if _is_range(index):
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
        text = ", ".join(map(_literal, numbers))
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
        if not start and not rows.shape[1]:
            raise _Unknown("a largest or smallest element", " of none")
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
            if not _is_range(index - index[0]):
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
        text = ", ".join(map(_literal, blocks.ravel().tolist()))
        self.lines.append(f"alignas(64) static const float {name}[] = {{{text}}};")
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

    def gather(self, parts: list[list[str]], shape: tuple[int, ...]) -> Value:
        """Sums of elements of several arrays, one for each element."""
        self.close()
        name = self.name("t")
        self.lines.append(f"F {name}[{len(parts)}];")
        if len(parts) <= _UNROLLED or any(len(terms) > 1 for terms in parts):
            self.lines += [f"{name}[{i}] = {' + '.join(terms)};" for i, terms in enumerate(parts)]
        else:
            places: dict[str, list[tuple[int, int]]] = {}
            for i, (term,) in enumerate(parts):
                source, _, at = term.rstrip("]").partition("[")
                places.setdefault(source, []).append((i, int(at)))
            for source, pairs in places.items():
                to, of = (self.table(np.array(side)) for side in zip(*pairs, strict=True))
                copy = f"{name}[{to}[i]] = {source}[{of}[i]];"
                self.lines.append(f"for (int i = 0; i < {len(pairs)}; ++i) {copy}")
        return Value(name, np.arange(len(parts)).reshape(shape))


def _is_range(index: np.ndarray) -> bool:
    return np.array_equal(index, np.arange(len(index)))


def _literal(x: float) -> str:
    if math.isnan(x):
        return "NAN"
    if math.isinf(x):
        return "INFINITY" if x > 0 else "-INFINITY"
    return f"{float(np.float32(x)).hex()}f"


_FUNCTIONS = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc", "exp",
    "exp2", "expm1", "floor", "log", "log10", "log1p", "log2", "round", "sin", "sinh", "sqrt",
    "tan", "tanh", "trunc",
)  # fmt: skip
# ATen operations of elements: C++ text of their operands.
_ELEMENTWISE = {
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
_MASKS = {
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
_OF_MASKS = {text for name, text in _MASKS.items() if name.startswith(("logical", "bitwise"))}
_SAME = ("alias", "clone", "detach", "lift_fresh_copy", "contiguous", "_to_copy", "expand_copy")
# Operations that torch takes for elementary, and has in terms of the others.
_DECOMPOSED = [
    getattr(torch.ops.aten, name)
    for name in (
        "_log_softmax", "_softmax", "elu", "gelu", "gelu_backward", "leaky_relu",
        "leaky_relu_backward", "linalg_vector_norm", "native_batch_norm", "native_layer_norm",
        "native_layer_norm_backward",
    )
]  # fmt: skip
_EXPAND = torch.ops.aten.expand.default
# Operations on shapes, which torch itself does on the indices.
_SHAPES = (
    "_unsafe_view", "cat", "diagonal", "diagonal_scatter", "expand", "flip", "index", "index_put",
    "index_select", "permute", "repeat", "reshape", "roll", "select", "select_scatter", "slice",
    "slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind",
    "unfold", "unsqueeze", "view",
)  # fmt: skip
_POWERS = {
    0.5: "sqrt({0})", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", -1: "F(1) / {0}",
    -0.5: "F(1) / sqrt({0})", -2: "F(1) / ({0} * {0})",
}  # fmt: skip
_REDUCTIONS = {
    "sum": ("{0} + {1}", "0"),
    "amax": ("maximum({0}, {1})", ""),
    "amin": ("minimum({0}, {1})", ""),
    "prod": ("{0} * {1}", "1"),
}


@torch.no_grad()
def source_of(function: Callable[..., Tensor], arguments: Sequence[Tensor]) -> str:
    """The C++ text of a function of a row x ``[1, dim]`` and, if there is one more, sigma ``[1]``.

    Raises:
        NotImplementedError: an operation is not in the tables above; it is named.
        ValueError: the result is not a row like x.
    """
    decompositions = {**core_aten_decompositions(), **get_decompositions(_DECOMPOSED)}
    decompositions[torch.ops.aten.var.correction] = _variance
    decompositions[torch.ops.aten.var_mean.correction] = lambda x, dim=None, **options: (
        _variance(x, dim, **options),
        x.mean(list(range(x.dim())) if dim is None else dim, options.get("keepdim", False)),
    )
    # A function of its arguments alone: make_fx counts those with a default too.
    pure = torch.func.functionalize(lambda *given: function(*given), remove="mutations")
    try:
        graph = make_fx(pure, decompositions)(*arguments)
    except RuntimeError as error:
        if "_local_scalar_dense" not in str(error):
            raise
        raise NotImplementedError(
            "source: takes a number out of a tensor that depends on the row, as `if x.sum() > 0` "
            "and `float(x.norm())` do, expected torch.where and tensors; for torch.distributions, "
            "validate_args=False"
        ) from error
    _without_likes(graph)
    x = arguments[0]
    writer = Writer()
    known: dict[Any, Any] = {}
    inputs = iter(
        [Value("x", np.arange(x.numel()).reshape(x.shape)), Value("sigma", np.zeros(1, int))]
    )
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(inputs)
        elif node.op == "get_attr":
            known[node] = getattr(graph, node.target)
        elif node.op == "output":
            return _finish(writer, map_arg(node.args[0], known.__getitem__), x)
        else:
            given = map_arg((node.args, node.kwargs), known.__getitem__)
            try:
                known[node] = _emit(writer, node, *given)
            except _Unknown as unknown:
                name, more = unknown.args
                with _Finder(name) as finder:
                    function(*arguments)
                raise NotImplementedError(
                    f"source: {name}{more} is not fused{finder.line}; see the operations in "
                    "score_kernels/fused/trace.py, or write the score as C++ text"
                ) from None
    raise AssertionError("a graph ends with its output")


def _without_likes(graph: torch.fx.GraphModule) -> None:
    """Constants in place of full_like, and what then nothing depends on removed.

    That is the value whose gradient is wanted: it gives the gradient's ones their shape alone.
    """
    target = torch.ops.aten.full_like.default
    for node in graph.graph.find_nodes(op="call_function", target=target):
        like = node.meta["tensor_meta"]
        full = (tuple(like.shape), node.args[1]), {"dtype": like.dtype}
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(torch.ops.aten.full.default, *full)
        node.replace_all_uses_with(made)
    graph.graph.eliminate_dead_code()


def _variance(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    axes = list(range(x.dim())) if dim is None else dim
    squares = (x - x.mean(axes, True)) ** 2
    degrees = math.prod(x.shape[axis] for axis in axes) - (1 if correction is None else correction)
    return squares.sum(axes, keepdim) / degrees


def _finish(writer: Writer, result: Any, x: Tensor) -> str:
    value = writer.numbers(result)
    declared = f"F {value.name}[{x.numel()}];"
    if not _is_range(value.index.ravel()) or declared not in writer.lines:
        value = writer.elementwise("{0}", [value])
        declared = f"F {value.name}[{x.numel()}];"
    writer.close()
    body = "\n".join(writer.lines).replace(declared, f"F* const {value.name} = s;")
    # An array that only its own loop reads is declared and stored for nothing.
    uses = Counter(re.findall(r"\b[mt]\d+(?=\[)", body))
    for name in [name for name, count in uses.items() if count == 2]:
        body = re.sub(
            rf"^ *(?:F|Mask) {name}\[\d+\];\n|^ *{name}\[i\] = {name}_;\n", "", body, flags=re.M
        )
    held = sum(map(int, re.findall(r"^(?:F|Mask) \w+\[(\d+)\];", body, re.M)))
    if held > _MOST:
        raise NotImplementedError(
            f"source: holds {held} numbers of a row at a time, as of all pairs of elements, "
            f"expected at most {_MOST}"
        )
    return (
        "template <class F>\nvoid score(const F* x, F sigma_, F* s, const float*) {\n"
        f"using namespace sk::fused;\nconst F sigma[1] = {{sigma_}};\n(void)sigma;\n{body}\n}}\n"
    )


def _emit(writer: Writer, node: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The value of a node of the graph, from those of its arguments."""
    flat = tree_leaves((positional, named))
    if node.target is operator.getitem or not any(isinstance(a, Value) for a in flat):
        # Of constants, or a part of a list.
        return node.target(*positional, **named)
    name = node.target._schema.name.partition("::")[2]
    if name in _SAME:
        dtype = named.get("dtype")
        if dtype not in (None, torch.float32, torch.float64):
            raise _Unknown(name, f" to {dtype}")
        # A mask that becomes a number is one from here on: masks add up otherwise.
        return writer.numbers(positional[0]) if dtype is not None else positional[0]
    if name == "add" and all(isinstance(a, Value) and a.mask for a in positional):
        return writer.elementwise(_MASKS["logical_or"], positional, mask=True)
    if name == "copy":
        return _reshaped(writer, _EXPAND, (positional[1], _shape(positional[0])), {})
    if name == "pow" and isinstance(positional[1], (int, float)) and positional[1] in _POWERS:
        return writer.elementwise(_POWERS[positional[1]], positional[:1])
    if name == "clamp":
        low, high = (*positional[1:], None, None)[:2]
        value = positional[0]
        if low is not None:
            value = writer.elementwise(_ELEMENTWISE["maximum"], [value, low])
        return value if high is None else writer.elementwise("minimum({0}, {1})", [value, high])
    if name in ("add", "sub") and named.get("alpha", 1) != 1:
        sign = "+" if name == "add" else "-"
        return writer.elementwise(f"{{0}} {sign} {_literal(named['alpha'])} * {{1}}", positional)
    if name in _ELEMENTWISE and not set(named) - {"alpha"}:
        return writer.elementwise(_ELEMENTWISE[name], positional)
    if name in _MASKS:
        return writer.elementwise(_MASKS[name], positional, mask=True)
    if name == "index_put" and positional[3:] == (True,):
        return _added_at(writer, *positional[:3])
    if name == "bmm":
        a, b = (writer.numbers(operand) for operand in positional)
        pairs = zip(a.index, b.index, strict=True)
        parts = [writer.matmul(Value(a.name, i), Value(b.name, j)) for i, j in pairs]
        terms = [[f"{part.name}[{k}]"] for part in parts for k in part.index.flat]
        return writer.gather(terms, (len(parts), *parts[0].index.shape))
    if name in _SHAPES:
        return _reshaped(writer, node.target, positional, named)
    if name in ("max", "min") and not node.target._schema.overload_name.startswith("names"):
        # With a dimension, values and places.
        largest = writer.reduce(
            *_REDUCTIONS[f"a{name}"], positional[0], *(*positional[1:], None, False)[:2]
        )
        return (largest, None) if len(positional) > 1 else largest
    if name in _REDUCTIONS or name == "mean":
        dims = positional[1] if len(positional) > 1 else None
        keepdim = positional[2] if len(positional) > 2 else named.get("keepdim", False)
        text, start = _REDUCTIONS["sum" if name == "mean" else name]
        total = writer.reduce(text, start, positional[0], dims, keepdim)
        if name != "mean":
            return total
        count = positional[0].index.size / max(total.index.size, 1)
        return writer.elementwise("{0} / {1}", [total, count])
    if name == "mm":
        return writer.matmul(*positional)
    if name == "addmm" and not named:
        return writer.elementwise("{0} + {1}", [positional[0], writer.matmul(*positional[1:])])
    raise _Unknown(name, "")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.index.shape if isinstance(value, Value) else value.shape)


def _reshaped(
    writer: Writer, operation: Any, positional: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """torch's own operation on tensors of indices, of which every array has a range of its own."""
    names: list[str] = []
    name = operation._schema.name.partition("::")[2]
    # The argument that has indices, which are left as they are.
    indices = {"index": 1, "index_put": 1, "index_select": 2}.get(name)
    tensors = [a for a in tree_leaves((positional, named)) if isinstance(a, (Value, Tensor))]

    def numbers(a: Any) -> Any:
        if not isinstance(a, (Value, Tensor)):
            return a
        # A part of one mask is a mask; several arrays become one of numbers.
        value = writer.value(a) if len(tensors) == 1 else writer.numbers(a)
        if value.name not in names:
            names.append(value.name)
        return torch.from_numpy(np.asarray(value.index + _RANGE * names.index(value.name)))

    def values(a: Tensor) -> Value:
        of, at = np.divmod(a.numpy(), _RANGE)
        if not a.numel() or (of == of.flat[0]).all():
            if not a.numel():
                return Value(names[0], at)
            return Value(names[of.flat[0]], at)
        parts = [[f"{names[n]}[{k}]"] for n, k in zip(of.flat, at.flat, strict=True)]
        return writer.gather(parts, at.shape)

    given = [a if i == indices else map_aggregate(a, numbers) for i, a in enumerate(positional)]
    if indices is not None and any(isinstance(a, Value) for a in tree_leaves(given[indices])):
        raise _Unknown(name, " at places that depend on the row")
    # A view of a copy, which is none here.
    view = name in ("view", "_unsafe_view")
    made = (torch.reshape if view else operation)(*given, **map_aggregate(named, numbers))
    return [values(m) for m in made] if isinstance(made, (list, tuple)) else values(made)


def _added_at(writer: Writer, into: Any, indices: Any, values: Any) -> Value:
    """``into`` with values added at indices, which may repeat: what indexing's gradient is."""
    into, values = writer.numbers(into), writer.numbers(values)
    elements = torch.arange(into.index.size).view(into.index.shape)
    places = elements[tuple(slice(None) if i is None else i for i in indices)].numpy()
    parts = [[f"{into.name}[{k}]"] for k in into.index.flat]
    added = np.broadcast_to(values.index, places.shape)
    for at, k in zip(places.ravel(), added.ravel(), strict=True):
        parts[at].append(f"{values.name}[{k}]")
    return writer.gather(parts, into.index.shape)


class _Unknown(Exception):
    """An operation that is not in the tables: its name, and more words."""


class _Finder(TorchDispatchMode):
    """The last line outside torch and this library that calls an operation of a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.line = name, ""

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2] == self.name:
            own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
            frames = [f for f in traceback.extract_stack() if not f.filename.startswith(own)]
            self.line = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        return func(*args, **(kwargs or {}))
