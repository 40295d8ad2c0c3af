"""Builds score_kernels._cpu and score_kernels._cuda with ninja.

_cpu: each kernel source once per instruction set. Needs a C++17 compiler and nothing of torch.
Without a compiler the package installs all the same and the pure-torch reference serves.
SCORE_KERNELS_NATIVE=0 skips it, =1 makes a missing compiler an error.

_cuda: built where there is nvcc, with the CUDA runtime linked in; it needs neither a GPU nor a
torch with CUDA. SCORE_KERNELS_CUDA=0 skips it, =1 makes a missing nvcc an error.
SCORE_KERNELS_CUDA_ARCHS lists compute capabilities, "80;90;100" by default: machine code for each,
and PTX of the last for GPUs to come.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU, CUDA = Path("csrc/cpu"), Path("csrc/cuda")
# For kernels of users; score_kernels.include() gives the folder above.
HEADERS = [Path("csrc") / name for name in ("noise.h", "update.h", "fused.h", "fused_gpu.h")]
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    # GCC 12's own AVX-512 header trips -Wmaybe-uninitialized.
    "-fno-math-errno",
    # Without it GCC calls floorf one by one.
    "-fno-trapping-math",
    "-Wall",
    "-Wno-maybe-uninitialized",
]
# The instruction sets that kernels are compiled for on a processor, best first, and their flags.
ISAS = {
    "x86_64": {
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
        "avx2": "-mavx2 -mfma",
        "portable": "",
    },
    "aarch64": {"neon": "-DSK_NEON", "portable": ""},
}
PROCESSORS = {"x86_64": "-DSK_X86", "aarch64": "-DSK_ARM64"}
# What systems call them otherwise.
OTHER_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
DEFAULT_ARCHS = "80;90;100"


def find_compiler() -> list[str] | None:
    """The C++ compiler as an argument list: $CXX, else the first common name on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["clang++"], ["c++"]]
    return next((c for c in candidates if shutil.which(c[0])), None)


def find_nvcc() -> str | None:
    """nvcc: $CUDACXX, else on PATH, else in $CUDA_HOME or the usual folder."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    homes = [os.environ.get("CUDA_HOME") or "/usr/local/cuda"]
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{homes[0]}/bin")


def cuda_archs(nvcc: str) -> list[str]:
    """The compute capabilities to build for. Defaults that this nvcc does not know are left out."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [line.strip().removeprefix("compute_") for line in listed.stdout.split()]
    asked = os.environ.get("SCORE_KERNELS_CUDA_ARCHS")
    if not asked:
        return [arch for arch in DEFAULT_ARCHS.split(";") if arch in known]
    archs = sorted(asked.replace(".", "").split(";"), key=lambda arch: (len(arch), arch))
    if unknown := [arch for arch in archs if arch not in known]:
        raise SystemExit(
            f"SCORE_KERNELS_CUDA_ARCHS: got {asked!r}, expected capabilities that {nvcc} knows "
            f"({', '.join(known)}), separated by semicolons; it does not know {', '.join(unknown)}"
        )
    return archs


def openmp_flags(compiler: list[str], scratch: Path) -> list[str]:
    """-fopenmp where the compiler can link it; without it the kernels run on one thread."""
    source = scratch / "openmp.cpp"
    source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*compiler, "-fopenmp", str(source), "-o", str(scratch / "openmp")]
    works = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return ["-fopenmp"] if works else ["-fopenmp-simd"]


def includes() -> str:
    import pybind11

    paths = (sysconfig.get_path("include"), pybind11.get_include())
    return shlex.join(f"-I{path}" for path in paths)


def kernels(folder: Path, pattern: str) -> list[Path]:
    """The sources of kernels: every file but the module's own."""
    found = sorted((ROOT / folder).glob(pattern))
    return [path.relative_to(ROOT) for path in found if path.stem != "module"]


def ninja_file(compile: str, link: str, objects: dict[Path, tuple[Path, str]], target: Path) -> str:
    """One compile rule and one link rule; `objects`: what to make of which source with what."""

    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        f"  command = {compile} $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link} $in -o $out",
    ]
    for output, (source, extra) in objects.items():
        lines += [f"build {escape(output)}: compile {escape(ROOT / source)}", f"  extra = {extra}"]
    lines.append(f"build {escape(target)}: link {' '.join(map(escape, objects))}")
    return "\n".join(lines) + "\n"


def cpu_build(compiler: list[str], target: Path, scratch: Path) -> str:
    machine = platform.machine().lower()
    processor = OTHER_NAMES.get(machine, machine)
    isas = ISAS.get(processor, {"portable": ""})
    openmp = openmp_flags(compiler, scratch)
    flags = FLAGS + openmp + ([PROCESSORS[processor]] if processor in PROCESSORS else [])
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    objects = {scratch / "module.o": (CPU / "module.cpp", includes())}
    for isa, isa_flags in isas.items():
        for kernel in kernels(CPU, "*.cpp"):
            extra = f"-DSK_ISA={isa} {isa_flags}"
            objects[scratch / f"{kernel.stem}.{isa}.o"] = (kernel, extra)
    link = shlex.join([*compiler, "-shared", *openmp, *undefined])
    return ninja_file(shlex.join(compiler + flags), link, objects, target)


def cuda_build(nvcc: str, target: Path, scratch: Path) -> str:
    archs = cuda_archs(nvcc)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    named = os.environ.get("CXX")
    host = [f"-ccbin={shlex.split(named)[0]}"] if named else []
    defines = shlex.quote(f'-DSK_CUDA_ARCHS="{";".join(archs)}"')
    objects = {scratch / "module.o": (CUDA / "module.cpp", f"{defines} {includes()}")}
    for kernel in kernels(CUDA, "*.cu"):
        objects[scratch / f"{kernel.stem}.o"] = (kernel, shlex.join(codes))
    # torch brings a CUDA runtime of its own: the one linked in must stay out of its sight.
    link = [nvcc, *host, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
    return ninja_file(shlex.join([nvcc, *host, *NVCC_FLAGS]), shlex.join(link), objects, target)


def choice(variable: str) -> str:
    wanted = os.environ.get(variable, "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: got {wanted!r}, expected auto, 0 or 1")
    return wanted


class BuildKernels(build_ext):
    """Headers into the package; one line for what there is nothing to build with, ninja for the
    rest."""

    def run(self) -> None:
        compiler, nvcc = find_compiler(), find_nvcc()
        self.writers: dict[str, Callable[[Path, Path], str]] = {}
        native, cuda = choice("SCORE_KERNELS_NATIVE"), choice("SCORE_KERNELS_CUDA")
        if compiler is None and native == "1":
            raise SystemExit(
                "SCORE_KERNELS_NATIVE=1 but no C++ compiler was found: install g++ or "
                "clang++, or name one in CXX"
            )
        if nvcc is None and cuda == "1":
            raise SystemExit(
                "SCORE_KERNELS_CUDA=1 but no nvcc was found: install NVIDIA's CUDA toolkit "
                "(12.8 or later for sm_100), put nvcc on PATH or name it in CUDACXX"
            )
        if compiler is None or native == "0":
            why = "SCORE_KERNELS_NATIVE=0" if native == "0" else "no C++ compiler found"
            print(f"score_kernels: {why}; the pure-torch reference will serve", file=sys.stderr)
        else:
            self.writers["score_kernels._cpu"] = lambda *to: cpu_build(compiler, *to)
        if nvcc is None or compiler is None or cuda == "0":
            why = "SCORE_KERNELS_CUDA=0" if cuda == "0" else "no nvcc or no C++ compiler found"
            print(f"score_kernels: {why}; built without CUDA kernels", file=sys.stderr)
        else:
            self.writers["score_kernels._cuda"] = lambda *to: cuda_build(nvcc, *to)
        self.extensions = [e for e in self.extensions if e.name in self.writers]
        package = Path(self.get_ext_fullpath("score_kernels._cpu")).parent
        installed = package / "headers" / "score_kernels"
        installed.mkdir(parents=True, exist_ok=True)
        for header in HEADERS:
            shutil.copy(ROOT / header, installed)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import ninja

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        scratch = Path(self.build_temp).resolve() / ext.name.replace(".", "")
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        build_file = scratch / "build.ninja"
        build_file.write_text(self.writers[ext.name](target, scratch))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(build_file)]
        if subprocess.run(command, cwd=scratch, check=False).returncode:
            variable = "NATIVE" if ext.name.endswith("_cpu") else "CUDA"
            raise SystemExit(
                f"score_kernels: {ext.name} did not compile (above); "
                f"SCORE_KERNELS_{variable}=0 installs without it"
            )


setup(
    ext_modules=[Extension(f"score_kernels.{name}", sources=[]) for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": BuildKernels},
)
