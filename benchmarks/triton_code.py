"""The Triton kernels compiled ahead of time, which needs no GPU: machine code to count."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from score_kernels.backends.triton import ITERATIONS, OPTIONS, SUM_TILE, TILE, kernels

_THREADS = 32 * int(OPTIONS["num_warps"])
F32, BF16, F16, I64, U8 = "*fp32", "*bf16", "*fp16", "*i64", "*u8"


@dataclass(frozen=True)
class Kernel:
    """A kernel with the types of its pointers and its constants, and its like in sass.ROWS."""

    name: str
    jit: Any
    pointers: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    like: str

    @property
    def elements(self) -> int:
        """Elements that a thread handles."""
        return 4 * self.quads * dict(self.constants).get("ITERATIONS", 1) // _THREADS

    @property
    def quads(self) -> int:
        """Quads of a tile."""
        return SUM_TILE if "ITERATIONS" in dict(self.constants) else TILE

    @property
    def row(self) -> sass.Row:
        return next(row for row in sass.ROWS if row.kernel == self.like)

    def function(self, arch: str) -> sass.Function:
        return built(self, arch)[0]

    def cost(self, arch: str) -> sass.Cost:
        return sass.Cost(self.function(arch).straight_path(), self.elements, self.row.bytes)


def _step(score: str, like: str) -> Kernel:
    pointers = (("out", F32), ("x", F32), ("score", score))
    constants = (("NOISE", True),)
    counterpart = f"affine_kernel<{like}, true, false>"
    return Kernel(f"step {score[1:]}", kernels.update.step_kernel, pointers, constants, counterpart)


def _loss(score: str, like: str) -> Kernel:
    pointers = (("partial", F32), ("score", score), ("sigma", F32))
    counterpart = f"loss_kernel<{like}, true>"
    function = kernels.dsm.squares_kernel
    return Kernel(
        f"dsm loss {score[1:]}", function, pointers, (("ITERATIONS", ITERATIONS),), counterpart
    )


def _gradient(score: str, like: str) -> Kernel:
    pointers = (("gradient", score), ("score", score), ("sigma", F32), ("scale", F32))
    counterpart = f"gradient_kernel<{like}, true>"
    function = kernels.dsm.gradient_kernel
    return Kernel(f"dsm gradient {score[1:]}", function, pointers, (), counterpart)


def _probe(kind: str, noise: str) -> tuple[Kernel, ...]:
    scale, sums = kernels.ssm.scale_kernel, kernels.ssm.sums_kernel
    one, two = (("out", F32), ("factor", F32)), (("out", F32), ("x", F32), ("factor", F32))
    both = (("partial", F32), ("a", F32), ("b", F32))
    made = (("KIND", kind), ("DIFFERENCES", False), ("ITERATIONS", ITERATIONS))
    return (
        Kernel(
            f"probe scale {kind}",
            scale,
            one,
            (("KIND", kind), ("x", None)),
            f"scale_kernel<{noise}, true, false>",
        ),
        Kernel(
            f"probe pair {kind}",
            scale,
            two,
            (("KIND", kind),),
            f"scale_kernel<{noise}, true, true>",
        ),
        Kernel(
            f"probe sums {kind}",
            sums,
            both,
            made,
            f"sums_kernel<{noise}, float, true, false>",
        ),
    )


def addressed(kernel: Kernel) -> Kernel:
    """The kernel of rows that have addresses."""
    pointers = (*kernel.pointers, ("addresses", I64))
    return replace(kernel, name=f"{kernel.name} addressed", pointers=pointers)


_PLAIN_TABLE = (("gain", None), ("END", 0))
PLAIN = (
    _step(F32, "float"),
    _step(BF16, "BFloat16"),
    _step(F16, "Float16"),
    Kernel(
        "step by table fp32",
        kernels.update.table_kernel,
        (("out", F32), ("x", F32), ("score", F32), ("table", F32), ("step", I64)),
        (*_PLAIN_TABLE, ("known", None), ("kept", None), ("PER_ROW", False)),
        "table_kernel<float, true, 0>",
    ),
    Kernel(
        "step by lines fp32",
        kernels.update.table_kernel,
        (("out", F32), ("x", F32), ("score", F32), ("table", F32)),
        (*_PLAIN_TABLE, ("step", None), ("known", None), ("kept", None), ("PER_ROW", True)),
        "table_kernel<float, true, 0>",
    ),
    Kernel(
        "step with known fp32",
        kernels.update.table_kernel,
        (*((p, F32) for p in ("out", "x", "score", "table", "known")), ("kept", U8)),
        (*_PLAIN_TABLE, ("step", None), ("PER_ROW", False)),
        "table_kernel<float, true, 1>",
    ),
    Kernel(
        "perturb",
        kernels.dsm.perturb_kernel,
        (("out", F32), ("x", F32), ("sigma", F32)),
        (),
        "perturb_kernel<true>",
    ),
    _loss(F32, "float"),
    _loss(BF16, "BFloat16"),
    _gradient(F32, "float"),
    _gradient(BF16, "BFloat16"),
    *_probe("normal", "NormalMap"),
    *_probe("rademacher", "RademacherMap"),
    Kernel(
        "normal",
        kernels.noise.fill_kernel,
        (("out", F32),),
        (("KIND", "normal"),),
        "fill_kernel<NormalMap, true, float>",
    ),
)
# One of each shape: the others' loops are the same.
_ADDRESSED = ("step fp32", "step by lines fp32", "dsm loss fp32", "probe sums rademacher", "normal")
KERNELS = (*PLAIN, *(addressed(kernel) for kernel in PLAIN if kernel.name in _ADDRESSED))


@cache
def built(kernel: Kernel, arch: str) -> tuple[sass.Function, str, Any]:
    """(machine code, PTX, Triton's metadata) of a kernel."""
    capability = int(arch.removeprefix("sm_"))
    # A row of whole quads, longer than a tile.
    constants = {"R": 1, "Q": kernel.quads, "WHOLE": True, "PACKED": capability >= 100}
    constants.update(kernel.constants)
    pointers = dict(kernel.pointers)
    if "addresses" not in pointers:
        constants["addresses"] = None
    signature, attributes = {}, {}
    for i, parameter in enumerate(kernel.jit.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.name in pointers:
            signature[parameter.name] = pointers[parameter.name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or "fp32"
    source = ASTSource(kernel.jit, signature, constexprs=constants, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(done.asm["cubin"])
        (function,) = sass.disassembled(cubin).values()
    return function, done.asm["ptx"], done.metadata
