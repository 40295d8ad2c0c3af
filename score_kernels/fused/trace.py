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

from score_kernels.fused.writer import ELEMENTWISE, MASKS, Value, Writer, is_range, literal

__all__ = ["source_of"]

# More than an array has elements.
_RANGE = 1 << 20
# The most numbers of a row that temporaries hold: 2 MB of the stack, of 16 rows.
_MOST = 1 << 15
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
        NotImplementedError: an operation is not in the tables; it is named.
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
                    f"source: {name}{more} is not fused{finder.line}; see what can be "
                    "fused in docs/fused.md, or write the score as C++ text"
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
    if not is_range(value.index.ravel()) or declared not in writer.lines:
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
        return writer.elementwise(MASKS["logical_or"], positional, mask=True)
    if name == "copy":
        return _reshaped(writer, _EXPAND, (positional[1], _shape(positional[0])), {})
    if name == "pow" and isinstance(positional[1], (int, float)) and positional[1] in _POWERS:
        return writer.elementwise(_POWERS[positional[1]], positional[:1])
    if name == "clamp":
        low, high = (*positional[1:], None, None)[:2]
        value = positional[0]
        if low is not None:
            value = writer.elementwise(ELEMENTWISE["maximum"], [value, low])
        return value if high is None else writer.elementwise("minimum({0}, {1})", [value, high])
    if name in ("add", "sub") and named.get("alpha", 1) != 1:
        sign = "+" if name == "add" else "-"
        return writer.elementwise(f"{{0}} {sign} {literal(named['alpha'])} * {{1}}", positional)
    if name in ELEMENTWISE and not set(named) - {"alpha"}:
        return writer.elementwise(ELEMENTWISE[name], positional)
    if name in MASKS:
        return writer.elementwise(MASKS[name], positional, mask=True)
    if name == "index_put" and positional[3:] == (True,):
        return _added_at(writer, *positional[:3])
    if name == "bmm":
        a, b = (writer.numbers(operand) for operand in positional)
        pairs = zip(a.index, b.index, strict=True)
        parts = [writer.matmul(Value(a.name, i), Value(b.name, j)) for i, j in pairs]
        terms = [[(part.name, k)] for part in parts for k in part.index.flat]
        return writer.gather(terms, (len(parts), *parts[0].index.shape))
    if name in _SHAPES:
        return _reshaped(writer, node.target, positional, named)
    if name in ("max", "min"):
        dims, keepdim = (*positional[1:], None, False)[:2]
        found = writer.reduce(*_REDUCTIONS[f"a{name}"], positional[0], dims, keepdim)
        # Of a dimension, the values and their places, which are not fused.
        return found if dims is None else (found, None)
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
        used = set(of.flat) or {0}
        if len(used) == 1:
            return Value(names[used.pop()], at)
        parts = [[(names[n], k)] for n, k in zip(of.flat, at.flat, strict=True)]
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
    parts = [[(into.name, k)] for k in into.index.flat]
    added = np.broadcast_to(values.index, places.shape)
    for at, k in zip(places.ravel(), added.ravel(), strict=True):
        parts[at].append((values.name, k))
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
