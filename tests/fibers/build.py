"""Builds csrc/cuda for a CPU: cuda_runtime.h of this folder runs every CUDA thread as a fiber."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock

from score_kernels.backends.compiled import Cuda

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc/cuda"
ORDERS = ("forward", "reverse", "random")
COMPILER = (
    shlex.split(os.environ.get("CXX", ""))
    or [name for name in ("g++", "clang++", "c++") if shutil.which(name)][:1]
)
_CPU = Path("/proc/cpuinfo")
# Without it every fma is a call.
FMA = ["-mfma"] if _CPU.exists() and " fma " in _CPU.read_text() else []
# Kernels store four elements at once through pointers to one.
FLAGS = ("-std=c++17", "-fPIC", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall")


def compile_fibers(
    sources: Sequence[Path], output: Path, *, link: Sequence[str] = (), flags: Sequence[str] = ()
) -> None:
    """Compile CUDA and C++ sources against the fiber header and link them to `output`."""
    command = [*COMPILER, *FLAGS, "-Wno-unknown-pragmas", *FMA, *flags, f"-I{HERE}"]

    def compile_one(source: Path) -> Path:
        made = output.parent / f"{source.stem}.o"
        run([*command, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    run([*COMPILER, *flags, *link, *map(str, objects), "-o", str(output)])


def build_module(folder: Path, *, flags: Sequence[str] = ()) -> None:
    """score_kernels._cuda, on fibers."""
    import pybind11

    includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_path("include"))]
    compile_fibers(
        [*sorted(CUDA.glob("*.cu")), CUDA / "module.cpp"],
        folder / "_cuda.so",
        link=["-shared"],
        flags=[*flags, *includes, '-DSK_CUDA_ARCHS="fibers"'],
    )


def shared(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A folder below the test run's that `make` fills, once for all of its processes."""
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def load_module(name: str, path: Path) -> ModuleType:
    """The extension module at a path. pybind11 gives a module that it has seen the full name of
    again, whatever its path: each path has its own."""
    spec = importlib.util.spec_from_file_location(f"{path.parent}.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


class Fibers(Cuda):
    """The CUDA backend on CPU tensors."""

    name = "fibers"

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.on_cpu = kernels, False
        self._affine_step = kernels.affine_step

    def device_and_stream(self, device: torch.device) -> tuple[int, ...]:
        return 0, 0

    def unavailable(self) -> str | None:
        return None

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype != torch.float32:
            return "serves float32 on CPU"
        return None

    def describe(self) -> str:
        return "CUDA C++ on fibers"


def fibers(root: Path, packed: bool = False) -> Fibers:
    """The backend as on sm_80 and sm_90 or, packed, sm_100, where two normals are made at once."""
    name, flags = ("packed", ["-DSK_PACKED"]) if packed else ("single", [])
    folder = shared(root, name, lambda folder: build_module(folder, flags=flags))
    return Fibers(load_module("_cuda", folder / "_cuda.so"))
