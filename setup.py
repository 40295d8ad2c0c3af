"""Builds score_kernels._cpu with ninja: each kernel source once per instruction set.

Needs a C++17 compiler and nothing of torch. Without a compiler the package installs all the same
and the pure-torch reference serves. SCORE_KERNELS_NATIVE=0 skips the build, =1 makes a missing
compiler an error.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
KERNELS = ("noise", "update", "dsm", "ssm")
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    # GCC 12's own AVX-512 header trips -Wmaybe-uninitialized.
    "-fno-math-errno",
    "-Wall",
    "-Wno-maybe-uninitialized",
]
X86_ISAS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
    "portable": "",
}


def find_compiler() -> list[str] | None:
    """The C++ compiler as an argument list: $CXX, else the first common name on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["clang++"], ["c++"]]
    return next((c for c in candidates if shutil.which(c[0])), None)


def openmp_flags(compiler: list[str], scratch: Path) -> list[str]:
    """-fopenmp where the compiler can link it; without it the kernels run on one thread."""
    scratch.mkdir(parents=True, exist_ok=True)
    source = scratch / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*compiler, "-fopenmp", str(source), "-o", str(scratch / "openmp")]
    works = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ["-fopenmp"] if works else ["-fopenmp-simd"]


def ninja_file(compiler: list[str], target: Path, scratch: Path) -> str:
    import pybind11

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isas = X86_ISAS if x86 else {"portable": ""}
    openmp = openmp_flags(compiler, scratch)
    includes = [f"-I{p}" for p in (sysconfig.get_path("include"), pybind11.get_include())]
    flags = FLAGS + openmp + (["-DSK_X86"] if x86 else [])
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []

    def escape(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    objects = {scratch / "module.o": ("module.cpp", shlex.join(includes))}
    for isa, isa_flags in isas.items():
        for kernel in KERNELS:
            objects[scratch / f"{kernel}.{isa}.o"] = (
                f"{kernel}.cpp",
                f"-DSK_ISA={isa} {isa_flags}",
            )
    lines = [
        "rule compile",
        f"  command = {shlex.join(compiler + flags)} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join([*compiler, '-shared', *openmp, *undefined])} $in -o $out",
    ]
    for output, (source, extra) in objects.items():
        lines += [
            f"build {escape(output)}: compile {escape(ROOT / CPU / source)}",
            f"  extra = {extra}",
        ]
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
    return "\n".join(lines) + "\n"


class BuildKernels(build_ext):
    """One line when there is nothing to build with; otherwise ninja."""

    def run(self) -> None:
        wanted = os.environ.get("SCORE_KERNELS_NATIVE", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"SCORE_KERNELS_NATIVE: got {wanted!r}, expected auto, 0 or 1")
        self.compiler_command = find_compiler()
        if self.compiler_command is None and wanted == "1":
            raise SystemExit(
                "SCORE_KERNELS_NATIVE=1 but no C++ compiler was found: install g++ or "
                "clang++, or name one in CXX"
            )
        if self.compiler_command is None or wanted == "0":
            why = "SCORE_KERNELS_NATIVE=0" if wanted == "0" else "no C++ compiler found"
            print(f"score_kernels: {why}; the pure-torch reference will serve", file=sys.stderr)
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        scratch = Path(self.build_temp).resolve() / "score_kernels_cpu"
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        build_file = scratch / "build.ninja"
        build_file.write_text(ninja_file(self.compiler_command, target, scratch))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(build_file)]
        if subprocess.run(command, cwd=scratch, check=False).returncode:
            raise SystemExit(
                "score_kernels: the kernels did not compile (above); "
                "SCORE_KERNELS_NATIVE=0 installs without them"
            )


setup(
    ext_modules=[Extension("score_kernels._cpu", sources=[])], cmdclass={"build_ext": BuildKernels}
)
