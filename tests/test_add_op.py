"""An op is stated once: the files of CONTRIBUTING's list, in a copy, make a new one."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from fibers.build import COMPILER, load_module, run

from score_kernels import NoiseKey

ROOT = Path(__file__).parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "score_kernels"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")

ARGS = """
// out = scale x, scale per row; the key is there as in every op.
struct ToyArgs {
  float* out;
  const float* x;
  const float* scale;
  uint64_t rows, elements;
  NoiseKey key;

  static constexpr auto fields() {
    using A = ToyArgs;
    return std::tuple_cat(field<&A::out>("out"), field<&A::x>("x"), field<&A::scale>("scale"),
                          field<&A::rows>("rows"), field<&A::elements>("elements"),
                          key_fields<&A::key>());
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

# File, the text before which the op's part goes, and that part.
PYTHON = [
    (
        "backends/reference.py",
        "    def perturb(",
        """
    def toy(self, x: Tensor, scale: Tensor, key: Key) -> Tensor:
        return _per_sample(scale, x) * x

""",
    ),
    ("backends/compiled.py", '    "perturb": "perturb",', '    "toy": "toy",\n'),
    (
        "backends/compiled.py",
        "    def perturb(",
        """
    def toy(self, x: Tensor, scale: Tensor, key: Key) -> Tensor:
        out = torch.empty_like(x)
        addresses = out.data_ptr(), x.data_ptr(), scale.data_ptr()
        self.kernels.toy(*addresses, *_sizes(x), *_fields(key), *self.device_and_stream(x.device))
        return out

""",
    ),
    ("ops/dsm.py", '"dsm_loss_from_score", "perturb"]', '"toy", '),
    (
        "ops/dsm.py",
        "def perturb(",
        """
def toy(x: Tensor, scale: Tensor, noise: NoiseKey) -> Tensor:
    return _toy(x, scale, noise) if direct(x, scale) else _toy_op(x, scale, noise)


def _toy(x: Tensor, scale: Tensor, key: Key) -> Tensor:
    return choose(x.device, x.dtype).toy(x.contiguous(), scale.contiguous(), key)


_toy_op = register(f"toy(Tensor x, Tensor scale, {KEY_SCHEMA}) -> Tensor", _toy, new_like)


""",
    ),
]
USE = """
import torch
import score_kernels as sk
from score_kernels import NoiseKey, ops
from score_kernels.backends.compiled import native

assert sk.__file__.startswith({folder!r}), sk.__file__
assert not hasattr(native.kernels, "perturb")
key, scale = NoiseKey(3), torch.rand(5)
for x in (torch.randn(5, 7), torch.randn(5, 7).double()):
    want = scale[:, None] * x
    torch.testing.assert_close(ops.toy(x, scale.to(x.dtype), key), want)
x = torch.randn(5, 7)
compiled = torch.compile(lambda x: ops.toy(x, scale, key), fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(x), scale[:, None] * x)
# What the module lacks comes from the reference.
z = ops.perturb(x, scale, key)
with sk.use_backend("reference"):
    assert torch.equal(z, ops.perturb(x, scale, key))
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
    key = NoiseKey(2**63 + 1)
    fields = (*key[:4], 0)
    module.toy(*pointers.values(), 3, 70, *fields)
    assert torch.equal(out, scale[:, None] * x)
    module.toy(*pointers.values(), 0, 70, *fields)
    with pytest.raises(ValueError, match="scale: got a tensor whose memory was freed"):
        module.toy(*{**pointers, "scale": 0}.values(), 3, 70, *fields)
    package = csrc.parent / "score_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, before, part in PYTHON:
        text = (package / name).read_text()
        assert text.count(before) == 1, (name, before)
        (package / name).write_text(text.replace(before, part.lstrip("\n") + before))
    shutil.copy(target, package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}")
    code = USE.format(folder=str(csrc.parent))
    run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(csrc.parent)!r})\n{code}"])


def test_seeds_are_signed_or_unsigned() -> None:
    kernels = pytest.importorskip("score_kernels._cpu")
    made = []
    for seed in (2**63 + 5, 5 - 2**63):
        out = torch.empty(1, 64)
        kernels.fill(
            out.data_ptr(), *out.shape, kind=1, seed=seed, purpose=3, draw=0, first_sample=0,
            addresses=0,
        )  # fmt: skip
        made.append(out)
    assert torch.equal(*made)
    with pytest.raises(TypeError):
        kernels.fill(0, 0, 0, kind=1, seed=0.5, purpose=3, draw=0, first_sample=0)
