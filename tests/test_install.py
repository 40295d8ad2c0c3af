"""What a stranger meets first: the build without a compiler, the command, the environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from score_kernels.backends.compiled import native
from score_kernels.cli.main import VARIABLES, main

ROOT = Path(__file__).parent.parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a build needs, so that nothing of the checkout is touched."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "score_kernels"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "headers")
        )
    return tmp_path


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SCORE_KERNELS_CUDA": "0", **environment},
    )


def test_without_a_compiler_the_build_says_so_and_goes_on(sources: Path) -> None:
    done = build(sources, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    line = "score_kernels: no C++ compiler found; the pure-torch reference will serve"
    assert line in done.stderr.splitlines()
    assert not list(sources.glob("score_kernels/*.so"))
    assert (sources / "score_kernels/headers/score_kernels/noise.h").exists()
    # An editable install's finder would still find the checkout's kernels.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
        "import torch, score_kernels as sk; print(sk.backends());"
        "print(sk.ops.normal((1, 2), sk.NoiseKey(0)).tolist())"
    )
    used = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(sources)},
    )
    assert "unavailable: score_kernels._cpu was not built" in used.stdout
    assert used.stderr == ""


def test_the_native_build_can_be_left_out_or_demanded(sources: Path) -> None:
    done = build(sources, SCORE_KERNELS_NATIVE="0")
    assert done.returncode == 0 and "SCORE_KERNELS_NATIVE=0" in done.stderr
    done = build(sources, SCORE_KERNELS_NATIVE="1", CXX="no-such-compiler")
    assert done.returncode != 0 and "install g++" in done.stderr
    done = build(sources, SCORE_KERNELS_NATIVE="yes")
    assert done.returncode != 0 and "expected auto, 0 or 1" in done.stderr


def test_info_names_every_backend_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("native", "reference", torch.__version__, *VARIABLES):
        assert word in text
    assert native.kernels.isa() in text


def test_without_nvcc_the_build_says_so(sources: Path) -> None:
    nowhere = {"CUDACXX": "no-such-nvcc", "SCORE_KERNELS_NATIVE": "0"}
    done = build(sources, SCORE_KERNELS_CUDA="auto", **nowhere)
    assert done.returncode == 0, done.stderr
    assert "no nvcc or no C++ compiler found; built without CUDA kernels" in done.stderr
    done = build(sources, SCORE_KERNELS_CUDA="1", **nowhere)
    assert done.returncode != 0
    assert "no nvcc was found: install NVIDIA's CUDA toolkit" in done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_compute_capabilities_that_nvcc_does_not_know_are_refused(sources: Path) -> None:
    done = build(
        sources, SCORE_KERNELS_NATIVE="0", SCORE_KERNELS_CUDA="1", SCORE_KERNELS_CUDA_ARCHS="80;7"
    )
    assert done.returncode != 0
    assert "SCORE_KERNELS_CUDA_ARCHS: got '80;7', expected" in done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_cuda_module_loads_without_a_driver() -> None:
    from score_kernels import _cuda
    from score_kernels.backends import backends
    from score_kernels.backends.compiled import cuda

    assert _cuda.archs.split(";")[0] == "80"
    count, why = _cuda.devices()
    if count == 0:
        assert why
        assert cuda.unavailable()
        assert backends()["cuda"].startswith("unavailable: ")


def test_without_triton_everything_else_works() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, score_kernels as sk;"
        "sk.ops.langevin_step(torch.zeros(2, 3), torch.zeros(2, 3), 0.1, sk.NoiseKey(0));"
        "print(sk.backends()['triton'])"
    )
    assert run_python(code).stdout.strip() == "unavailable: triton is not installed"


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, score_kernels; score_kernels.backends(); print('triton' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_the_table_of_variables_lists_every_one() -> None:
    page = (ROOT / "docs/install.md").read_text()
    sources = [*ROOT.glob("score_kernels/**/*.py"), ROOT / "setup.py"]
    used = {
        name for path in sources for name in re.findall(r"SCORE_KERNELS_[A-Z_]+", path.read_text())
    }
    assert used == set(VARIABLES)
    assert all(f"`{name}`" in page for name in VARIABLES)


def test_the_environment_forces_backend_and_instruction_set() -> None:
    code = (
        "import torch, score_kernels; from score_kernels.backends import choose;"
        "from score_kernels.backends.compiled import native;"
        "print(choose(torch.device('cpu'), torch.float32).name, native.kernels.isa())"
    )
    assert "reference" in run_python(code, SCORE_KERNELS_BACKEND="reference").stdout
    for isa in native.kernels.isas():
        assert isa in run_python(code, SCORE_KERNELS_ISA=isa).stdout
    done = run_python(code, SCORE_KERNELS_ISA="sse9")
    assert "SCORE_KERNELS_ISA: isa: got 'sse9', expected one of" in done.stderr
    done = run_python(code, SCORE_KERNELS_BACKEND="tpu")
    assert "ValueError" in done.stderr and "got 'tpu', expected one of the backends" in done.stderr


@pytest.mark.skipif(
    not native.kernels.openmp_threads() or not Path("/proc/self/maps").exists(),
    reason="needs OpenMP and /proc",
)
def test_the_kernels_share_torch_s_thread_pool() -> None:
    """Two OpenMP runtimes in one process fight for the cores: milliseconds a call."""
    # In a process of its own: other packages of the tests bring pools of their own.
    code = """
import torch
from pathlib import Path
from score_kernels.backends.compiled import native
pools = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()
         if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
assert len(pools) == 1, pools
for threads in (1, 2):
    torch.set_num_threads(threads)
    assert native.kernels.openmp_threads() == threads
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
