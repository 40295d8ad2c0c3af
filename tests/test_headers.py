"""noise.h as users have it: alone, by any compiler, with nothing of its own outside sk::."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fibers.build import COMPILER, compile_fibers

import score_kernels as sk
from tools import run_docs

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")

ROOT = Path(__file__).parent.parent
STRICT = ["-std=c++17", "-Wall", "-Wextra", "-pedantic", "-Werror", "-ffp-contract=off"]
COMPILERS = {name: [name, *STRICT] for name in ("g++", "clang++") if shutil.which(name)}
if shutil.which("nvcc"):
    host = "-Xcompiler=-Wall,-Wextra"
    COMPILERS["nvcc"] = ["nvcc", "-std=c++17", "-arch=sm_80", "-Werror=all-warnings", host]
# Of what users may have called things themselves, before and after the header.
USE = """
struct Words; struct Address; struct Counter; int uniform, radius, fma_, philox4x32_10, horner;
#include <score_kernels/noise.h>
struct NormalMap {}; struct NoiseKey {}; enum Product { multiply };
static_assert(SK_NOISE_VERSION == 1);
float first(uint64_t seed) {
  sk::NoiseKey key = {};
  key.seed = seed;
  float z[4], u[4], v[4], w[4];
  const sk::Words words = sk::words_of(key, sk::counter_of(key, 0, 4), 0);
  sk::map_words<sk::NormalMap>(words, z);
  sk::map_words<sk::UniformMap>(words, u);
  sk::map_words<sk::RademacherMap>(words, v);
  sk::map_words<sk::WordMap>(words, w);
  return z[0] + u[0] + v[0] + float(sk::to_bits(w[0]));
}
"""


def compiled(command: list[str], source: Path) -> subprocess.CompletedProcess[str]:
    arguments = [f"-I{sk.include()}", "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", COMPILERS)
def test_the_header_compiles_alone_without_a_warning(name: str, tmp_path: Path) -> None:
    source = tmp_path / ("use.cu" if name == "nvcc" else "use.cpp")
    source.write_text(USE)
    done = compiled(COMPILERS[name], source)
    assert (done.returncode, done.stderr) == (0, "")


def test_fast_math_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "use.cpp"
    source.write_text(USE)
    done = compiled([*COMPILER, "-std=c++17", "-ffast-math"], source)
    assert done.returncode != 0
    assert "noise.h: compiled with -ffast-math" in done.stderr


def test_macros_begin_with_sk(tmp_path: Path) -> None:
    def macros(name: str, text: str) -> set[str]:
        source = tmp_path / name
        source.write_text(text)
        command = [*COMPILER, "-std=c++17", "-dM", "-E", f"-I{sk.include()}", str(source)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"^#define (\w+)", listed, re.MULTILINE))

    standard = "#include <cmath>\n#include <cstdint>\n#include <cstring>\n"
    added = macros("with.cpp", USE) - macros("without.cpp", standard)
    assert added == {"SK_INLINE", "SK_NOISE_VERSION"}


@pytest.mark.parametrize("name", ["noise.h", "fused.h"])
def test_the_installed_headers_are_the_checkout_s(name: str) -> None:
    installed = Path(sk.include()) / "score_kernels" / name
    assert installed.read_text() == (ROOT / "csrc" / name).read_text()


def test_sources_that_were_not_built_have_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("score_kernels.noise.__file__", "/nowhere/noise.py")
    with pytest.raises(FileNotFoundError, match="/nowhere/headers: no headers there, expected"):
        sk.include()


@pytest.fixture
def jitter_cu(tmp_path: Path) -> Path:
    """The CUDA kernel of the page; test_docs.py runs the C++ one."""
    found = run_docs.blocks((ROOT / "docs/kernels.md").read_text())
    (code,) = (block.code for block in found if block.code.startswith("// jitter.cu\n"))
    source = tmp_path / "jitter.cu"
    source.write_text(code)
    return source


@pytest.mark.parametrize("shape", [(1, 1), (3, 10), (2, 2053)])
def test_the_cuda_kernel_of_the_page_on_fibers(jitter_cu: Path, shape: tuple[int, int]) -> None:
    module = jitter_cu.with_suffix(".so")
    compile_fibers([jitter_cu], module, link=["-shared"], flags=[f"-I{sk.include()}"])
    x, seed, draw = torch.randn(shape), 2**63 + 7, 2**32 - 1
    want = x.clone()
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    status = ctypes.CDLL(str(module)).jitter(
        pointer(x.data_ptr()), u64(shape[0]), u64(shape[1]), ctypes.c_float(0.25), u64(seed),
        ctypes.c_uint32(draw), pointer(),
    )  # fmt: skip
    assert status == 0
    # One fused multiply-add, whose product is exact: 0.25 is a power of two.
    assert torch.equal(x, want + 0.25 * sk.ops.normal(shape, sk.NoiseKey(seed, draw=draw)))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_the_cuda_kernel_of_the_page_by_nvcc(jitter_cu: Path, arch: str) -> None:
    flags = ["-std=c++17", "--fmad=false", "-Xptxas=-v", "-cubin", f"-arch=sm_{arch}"]
    done = compiled(["nvcc", *flags], jitter_cu)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr
