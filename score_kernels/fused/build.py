"""Compiles C++ text into a library once, and keeps it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from score_kernels.noise import include

__all__ = ["CUDA_FLAGS", "compiled", "compiler", "cuda_kernel"]

# As setup.py's: the score shares vectors with the kernel that calls it.
_ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}
_FLAGS = [
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    # Constants of a function template are one for all libraries of a process, unless hidden.
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-mtune=native",
]

CUDA_FLAGS = ["--std=c++17", "--fmad=false", "--device-as-default-execution-space"]


def compiler() -> list[str] | None:
    """The C++ compiler as an argument list: $CXX, else the first common name on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["clang++"], ["c++"]]
    return next((c for c in candidates if shutil.which(c[0])), None)


def compiled(source: str, isa: str) -> ctypes.CDLL:
    """The library of a source that includes score_kernels' headers, for an instruction set.

    Kept in ``$SCORE_KERNELS_CACHE``, by default ``score_kernels`` below ``$XDG_CACHE_HOME`` or
    ``~/.cache``, by its content, the flags and the compiler. A library appears there whole or not
    at all, so that processes may compile at once.

    Raises:
        RuntimeError: there is no compiler, or it reports an error.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or name one in CXX")
    flags = [*_FLAGS, *_ISAS.get(isa, []), f"-I{include()}"]
    libraries = ["-lmvec", "-lm"] if sys.platform == "linux" and isa in _ISAS else []
    header = (Path(include()) / "score_kernels" / "fused.h").read_text()
    content = "\0".join([source, header, *flags, _version(tuple(command))])
    folder = _cache()
    library = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            text, made = Path(scratch) / "score.cpp", Path(scratch) / "score.so"
            text.write_text(source)
            arguments = [*command, *flags, str(text), "-o", str(made), *libraries]
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"score: the compiler says\n{done.stderr.strip()}")
            os.replace(made, library)
    return ctypes.CDLL(str(library))


def cuda_kernel(source: str) -> Callable[..., None]:
    """The chain's kernel for the current GPU, by NVRTC, which torch brings with it."""
    return _cuda_kernel(source, torch.cuda.current_device())


@functools.cache
def _cuda_kernel(source: str, _: int) -> Callable[..., None]:
    return torch.cuda._compile_kernel(
        source, "sk_chain", cuda_include_dirs=[include()], nvcc_options=list(CUDA_FLAGS)
    )


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _cache() -> Path:
    if named := os.environ.get("SCORE_KERNELS_CACHE"):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "score_kernels"
