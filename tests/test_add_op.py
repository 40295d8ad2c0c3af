"""An op is stated once: a copy of csrc with a new struct and a new kernel has a new function."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from fibers.build import COMPILER, load_module, run

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")

ARGS = """
// out = scale x, scale per row.
struct ToyArgs {
  float* out;
  const float* x;
  const float* scale;
  uint64_t rows, elements;

  static constexpr auto fields() {
    using A = ToyArgs;
    return std::tuple_cat(field<&A::out>("out"), field<&A::x>("x"), field<&A::scale>("scale"),
                          field<&A::rows>("rows"), field<&A::elements>("elements"));
  }
};

#define SK_OPS(OP) \\
  OP(toy, ToyArgs) \\
"""
KERNEL = """
#include "tile.h"

namespace sk {
namespace SK_ISA {

void toy(const ToyArgs& args) {
  for_each_tile(args.rows, args.elements, [args](const Tile& tile) {
    for_each_row(tile, [&](uint64_t row, uint64_t first, uint64_t count) {
      for (uint64_t i = tile.offset + first; i < tile.offset + first + count; ++i)
        args.out[i] = args.scale[row] * args.x[i];
    });
  });
}

}  // namespace SK_ISA
}  // namespace sk
"""


@pytest.fixture(scope="module")
def csrc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of csrc with the op in it, for the CPU alone."""
    folder = tmp_path_factory.mktemp("toy") / "csrc"
    shutil.copytree(CSRC, folder)
    args = (folder / "args.h").read_text()
    start = args.index("#define SK_OPS(OP)")
    end = args.index("\n", start) + 1
    (folder / "args.h").write_text(args[:start] + ARGS.lstrip() + args[end:])
    (folder / "cpu/toy.cpp").write_text(KERNEL.lstrip())
    return folder


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_a_struct_and_a_kernel_make_an_op(csrc: Path) -> None:
    includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_path("include"))]
    # Only the new kernel and the module: the other ops are absent, as one without a kernel is.
    sources = [str(csrc / "cpu" / name) for name in ("toy.cpp", "module.cpp")]
    target = csrc / "_cpu.so"
    run([*COMPILER, *FLAGS, "-DSK_ISA=portable", *includes, *sources, "-o", str(target)])
    module = load_module("_cpu", target)
    assert not hasattr(module, "fill")
    x, scale, out = torch.randn(3, 70), torch.randn(3), torch.empty(3, 70)
    pointers = {"out": out.data_ptr(), "x": x.data_ptr(), "scale": scale.data_ptr()}
    module.toy(**pointers, rows=3, elements=70)
    assert torch.equal(out, scale[:, None] * x)
    module.toy(*pointers.values(), 0, 70)
    with pytest.raises(ValueError, match="scale: got a tensor whose memory was freed"):
        module.toy(**{**pointers, "scale": 0}, rows=3, elements=70)


def test_seeds_are_signed_or_unsigned() -> None:
    kernels = pytest.importorskip("score_kernels._cpu")
    made = []
    for seed in (2**63 + 5, 5 - 2**63):
        out = torch.empty(1, 64)
        kernels.fill(
            out.data_ptr(), *out.shape, kind=1, seed=seed, purpose=3, draw=0, first_sample=0
        )
        made.append(out)
    assert torch.equal(*made)
    with pytest.raises(TypeError):
        kernels.fill(0, 0, 0, kind=1, seed=0.5, purpose=3, draw=0, first_sample=0)
