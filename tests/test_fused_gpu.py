"""Fused chains as CUDA kernels, on a CPU: through fibers, and as the PTX that NVRTC makes of them.

The score's operations here are correctly rounded ones, so that CPU and GPU have the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NATIVE
from fibers.build import COMPILER, compile_fibers
from torch import Tensor

import score_kernels as sk
from score_kernels import fused
from score_kernels.fused import build

pytestmark = pytest.mark.skipif(not COMPILER or not NATIVE, reason="needs a C++ compiler")
NVRTC = [f for path in sys.path for f in Path(path).glob("nvidia/cu13/lib/libnvrtc.so.13")]
needs_nvrtc = pytest.mark.skipif(not NVRTC, reason="needs nvidia-cuda-nvrtc, of Linux")

ROOT = Path(__file__).parent.parent
LAUNCH = """
extern "C" __attribute__((visibility("default"))) int launch(
    const dim3* grid, const dim3* block, float* x, const float* table, const float* params,
    const long long* addresses, const int* rest) {
  const cudaLaunchConfig_t config = {*grid, *block, 0, nullptr};
  return cudaLaunchKernelEx(&config, sk_chain, x, table, params, addresses, rest[0], rest[1],
                            rest[2], rest[3], rest[4], rest[5], rest[6], rest[7], rest[8],
                            rest[9], rest[10], rest[11]);
}
"""
WELLS = """
template <class F> void score(const F* x, F sigma, F* s, const float* p) {
  for (int i = 0; i < 2; ++i)
    s[i] = sk::fused::where(x[i] > 0, p[0] - x[i], x[i] / p[1]) / (sigma * sigma + 1);
}
"""


def rational(x: Tensor, sigma: Tensor) -> Tensor:
    """Rows that mix their elements, a root, a comparison and the noise level."""
    length = (x.square().mean(1, keepdim=True) + 1).sqrt()
    return (torch.where(x > 0, 1 - x, x.roll(1, 1) * 0.5) / length) / sigma[:, None]


class Launched:
    """A kernel that is launched as torch.cuda._compile_kernel's are, over memory of the CPU."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], args: list[Any]
    ) -> None:
        assert all(isinstance(a, Tensor) for a in args[:4])
        # As ctypes does it there.
        numbers = [ctypes.c_int(n).value for n in args[4:]]
        self.run(grid, block, args[:4], numbers)


def fibers(source: str, folder: Path) -> Launched:
    text = folder / "chain.cpp"
    text.write_text(f"#include <cuda_runtime.h>\n#define SK_FUSED_GPU\n{source}{LAUNCH}")
    # As build.py's, so that the constants of one kernel are not those of the next.
    flags = ["-fvisibility=hidden", f"-I{sk.include()}"]
    compile_fibers([text], folder / "chain.so", link=["-shared"], flags=flags)
    launch = ctypes.CDLL(str(folder / "chain.so")).launch

    def run(grid: Any, block: Any, tensors: list[Tensor], numbers: list[int]) -> None:
        dims = [(ctypes.c_uint32 * 3)(*of) for of in (grid, block)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        assert launch(*dims, *pointers, (ctypes.c_int * 12)(*numbers)) == 0

    return Launched(run)


def nvrtc(source: str, target: int) -> str:
    """PTX, with the options that torch.cuda._compile_kernel is given."""
    # Which the compiler would look for elsewhere.
    for builtins in NVRTC[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(NVRTC[0]))
    program, size, text = ctypes.c_void_p(), ctypes.c_size_t(), source.encode()
    options = [f"--gpu-architecture=compute_{target}", f"-I{sk.include()}", *build.CUDA_FLAGS]
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"", 0, None, None) == 0
    given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    done = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert (done, log.value) == (0, b"")
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    return ptx.value.decode()


def executed(source: str, target: int) -> Launched:
    sys.path.insert(0, str(ROOT / "tests" / "ptx"))
    import ptx

    kernel = ptx.Module(nvrtc(source, target)).kernel("sk_chain")

    def run(grid: Any, block: Any, tensors: list[Tensor], numbers: list[int]) -> None:
        memory = ptx.Memory()
        for tensor in tensors:
            memory.add(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        values = [tensor.data_ptr() for tensor in tensors] + [n & 0xFFFFFFFF for n in numbers]
        packed = bytearray(max(kernel.offsets[name] + size for name, size in kernel.parameters))
        for (name, size), value in zip(kernel.parameters, values, strict=True):
            at = kernel.offsets[name]
            packed[at : at + size] = value.to_bytes(size, "little")
        kernel.launch(grid, block, bytes(packed), memory)

    return Launched(run)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCORE_KERNELS_CACHE", str(tmp_path_factory.mktemp("fused")))
        yield


def check(kernel: Launched, score: fused.FusedScore, rows: int) -> None:
    """Whole chains of the kernel and of the CPU: with levels, addresses, pauses, without noise."""
    launch = functools.partial(score._launch, kernel)
    x, ids = torch.randn(rows, score.dim), torch.arange(rows) * 3 + 2**33
    sigmas = sk.geometric_sigmas(5.0, 0.5, 4)
    annealed = functools.partial(
        sk.annealed_langevin, score, x, sigmas, steps_per_level=3, step_size=0.2
    )
    # With means other than 1.
    sde = functools.partial(sk.euler_maruyama, score, x, sk.VP(), steps=6)
    for sample, options in (
        (annealed, {}),
        (annealed, {"samples": ids, "pieces": ids % 5, "draws": ids % 7}),
        (annealed, {"first_sample": 2**40 + 1, "record_every": 5, "clamp": (-0.5, 1.5)}),
        (annealed, {"wrap": 0.7}),
        (sde, {"seed": 2**63 - 1}),
    ):
        given = {"seed": 5, **options}
        want = sample(**given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused.FusedScore, "_runner", lambda *_: launch)
            got = sample(**given)
        assert torch.equal(got, want), options


@pytest.mark.parametrize("rows, dim", [(1, 1), (130, 2), (37, 3), (5, 4), (3, 37)])
def test_fibers_have_the_bits_of_a_cpu(rows: int, dim: int, tmp_path: Path) -> None:
    score = fused.score(rational, dim)
    check(fibers(score.text, tmp_path), score, rows)


def test_fibers_with_parameters(tmp_path: Path) -> None:
    score = fused.score(WELLS, 2, params=torch.tensor([1.0, 3.0]))
    check(fibers(score.text, tmp_path), score, 200)


@needs_nvrtc
@pytest.mark.parametrize("target", [80, 100])
@pytest.mark.parametrize("rows, dim", [(130, 2), (37, 3)])
def test_nvrtc_s_ptx_has_the_bits_of_a_cpu(target: int, rows: int, dim: int) -> None:
    score = fused.score(rational, dim)
    check(executed(score.text, target), score, rows)


@needs_nvrtc
@pytest.mark.skipif(not shutil.which("ptxas"), reason="needs ptxas")
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("dim, most", [(2, 48), (8, 80)])
def test_short_rows_stay_in_registers(target: int, dim: int, most: int, tmp_path: Path) -> None:
    text, made = tmp_path / "chain.ptx", tmp_path / "chain.cubin"
    text.write_text(nvrtc(fused.score(rational, dim).text, target))
    command = ["ptxas", f"-arch=sm_{target}", "-v", str(text), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = re.search(r"Used (\d+) registers", done.stderr)
    assert used is not None and int(used[1]) <= most
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr


def test_addresses_out_of_range_give_nan(tmp_path: Path) -> None:
    score = fused.score(rational, 2)
    kernel = fibers(score.text, tmp_path)
    x, rows = torch.zeros(2, 2), torch.tensor([[3, 0], [2**56, 0]])
    score._launch(kernel, x, torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0]]), (5, 0, 0, 0, rows))
    assert x[0].isfinite().all() and x[1].isnan().all()
