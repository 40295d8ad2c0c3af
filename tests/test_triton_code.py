"""The Triton kernels compiled ahead of time for three GPUs, and read; none is needed."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import sass
from tools import run_docs

if importlib.util.find_spec("triton") is None or not sass.find_nvcc():
    pytest.skip("needs triton and nvcc", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.triton_code import KERNELS, Kernel, built
from score_kernels.backends.triton import kernels

each_arch = pytest.mark.parametrize("arch", sass.ARCHS)
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
# Of the CUDA kernel's instructions per element.
BUDGET = 1.25


@each_arch
@each_kernel
def test_costs_little_more_than_cuda(kernel: Kernel, arch: str) -> None:
    function, _, metadata = built(kernel, arch)
    assert not sass.faults(function)
    # The last stage of a sum goes from warp to warp by shared memory, eight bytes each.
    assert metadata.shared <= (32 if "ITERATIONS" in dict(kernel.constants) else 0)
    ours, cuda = kernel.cost(arch).instructions, kernel.row.cost(arch).instructions
    assert ours <= BUDGET * cuda, f"{ours:.1f} against {cuda:.1f} instructions per element"


@each_arch
@pytest.mark.parametrize("name", [k.name for k in KERNELS if k.name.endswith("addressed")])
def test_addresses_cost_at_most_an_instruction_an_element(name: str, arch: str) -> None:
    with_them, without = (
        next(k for k in KERNELS if k.name == n) for n in (name, name.removesuffix(" addressed"))
    )
    # There ptxas moves the addresses of the whole kernel to its uniform registers.
    most = 1.4 if (name, arch) == ("dsm loss fp32 addressed", "sm_80") else 1.0
    more = with_them.cost(arch).instructions - without.cost(arch).instructions
    print(f"{name} {arch}: {more:+.2f}")
    assert more <= most


@each_arch
@each_kernel
def test_reads_and_writes_128_bits(kernel: Kernel, arch: str) -> None:
    widths = Counter(i.global_bytes for i in built(kernel, arch)[0].straight_path())
    vectors = 4 if "bf16" in kernel.name or "fp16" in kernel.name else 0
    assert widths[16] + widths[32] >= 4 or vectors and widths[8] >= 4
    # Single numbers: of a row, of a table, and the sums; and quads of a mask, a byte an element.
    assert widths[4] <= (4 if "known" not in kernel.name else 5 + kernel.elements // 4)


@each_arch
@each_kernel
def test_normals_are_ieee_operations_and_one_approximate_seed(kernel: Kernel, arch: str) -> None:
    function, ptx, _ = built(kernel, arch)
    assert set(re.findall(r"fma\.\w+\.f32(?:x2)?", ptx)) <= {"fma.rn.f32", "fma.rn.f32x2"}
    approximate = set(re.findall(r"\w+\.approx[.\w]*", ptx))
    assert approximate <= {"rsqrt.approx.f32", "rsqrt.approx.ftz.f32"}
    assert not re.search(r"\b(div|sqrt|ex2|lg2|sin|cos)\.", ptx)
    special = {i.opcode for i in function.instructions if i.opcode.startswith("MUFU")}
    assert special <= {"MUFU.RSQ"}


@each_arch
def test_nothing_is_contracted(arch: str) -> None:
    """The normals take as many fused operations a quad as csrc/noise.h has, and no more."""
    (kernel,) = (k for k in KERNELS if k.name == "normal")
    path = kernel.function(arch).straight_path()
    quads = kernel.elements // 4
    fused = sum(i.name == "FFMA" for i in path) + 2 * sum(i.name == "FFMA2" for i in path)
    # Two pairs of u, ln (1 + 6 + 1), root (2), cos (4) and sin (4).
    assert fused == quads * 2 * (1 + 8 + 2 + 8)


def test_a_chain_compiles_its_kernel_once() -> None:
    """What Triton keys its cache by does not change with the step, the key, or the batch."""
    function = kernels.update.step_kernel
    target = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(function.signature, function.params, target)
    import torch

    x = torch.zeros(16)
    seen = set()
    for t in range(1000):
        _, specialization, _ = bind(
            x,
            x,
            x,
            1.0,
            0.5 * 0.99**t,
            0.7 * 0.99**t,
            1 + t % 7,
            16 * t + 4,
            2**64 - 1 - t * 2**54,
            t % 256,
            t * 4_000_000,
            t * 2**46,
            None,
            NOISE=True,
            R=1,
            Q=256,
            WHOLE=True,
            PACKED=False,
        )
        seen.add(str(specialization))
    assert len(seen) == 1


@each_arch
def test_a_kernel_of_users_compiles(arch: str, tmp_path: Path) -> None:
    """The dropout of docs/kernels.md; tests/interpreter runs it."""
    found = run_docs.blocks((Path(__file__).parents[1] / "docs/kernels.md").read_text())
    (code,) = (block.code for block in found if block.code.startswith("# dropout.py\n"))
    (tmp_path / "dropout.py").write_text(code)
    spec = importlib.util.spec_from_file_location("dropout", tmp_path / "dropout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    types = ("*fp32", "*fp32", "i32", "fp32", "u64", "u32", "constexpr")
    names = [parameter.name for parameter in module.dropout_kernel.params]
    source = ASTSource(
        module.dropout_kernel, dict(zip(names, types, strict=True)), constexprs={"BLOCKS": 256}
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    ptx = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    # A uniform is a fused multiply-add, of two numbers at a time on sm_100; nothing else is fused.
    fused = ptx.count("fma.rn.f32") + ptx.count("fma.rn.f32x2")
    assert fused == 4 * 256 // 128
