"""The native kernels, without Python, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import ast
import itertools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fibers.build import COMPILER, run, shared

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")

HERE = Path(__file__).parent
ROOT = HERE.parent
DRIVER = HERE / "host/native_driver.cpp"


def constants() -> dict[str, Any]:
    """What setup.py says about compiling; importing it would build."""
    found = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return found


SETUP = constants()
PROCESSOR = SETUP["OTHER_NAMES"].get(platform.machine().lower(), platform.machine().lower())
ISAS: dict[str, str] = SETUP["ISAS"].get(PROCESSOR, {"portable": ""})
# -O1, without three checks of pointers that ASan makes at the access, and without marking every
# temporary of inlined code as out of scope: compiling would take ten times as long.
SANITIZED = [
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,pointer-overflow,object-size",
    "-fno-sanitize-address-use-after-scope",
    "-fno-sanitize-recover=all",
]


def command_for(processor: str, compiler: list[str] = COMPILER) -> list[str]:
    defined = SETUP["PROCESSORS"].get(processor)
    return [*compiler, *SETUP["FLAGS"], "-fopenmp", *([defined] if defined else [])]


def build(
    folder: Path, extra: list[str], processor: str = PROCESSOR, compiler: list[str] = COMPILER
) -> Path:
    """The driver with every kernel in every instruction set of a processor."""
    command = [*command_for(processor, compiler), *extra]
    csrc = ROOT / "csrc"
    jobs = [(DRIVER, folder / "driver.o", f"-I{csrc}")]
    isas = SETUP["ISAS"].get(processor, {"portable": ""})
    kernels = [path for path in sorted((csrc / "cpu").glob("*.cpp")) if path.stem != "module"]
    for kernel, (isa, flags) in itertools.product(kernels, isas.items()):
        made = folder / f"{kernel.stem}.{isa}.o"
        jobs.append((kernel, made, f"-DSK_ISA={isa} {flags}"))
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(
            lambda job: run([*command, *shlex.split(job[2]), "-c", str(job[0]), "-o", str(job[1])]),
            jobs,
        ):
            pass
    program = folder / "driver"
    run([*command, *(str(made) for _, made, _ in jobs), "-o", str(program)])
    return program


def drive(
    program: Path, isa: str, threads: int, through: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": str(threads), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [*through, program, isa],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def here(program: Path) -> list[str]:
    """The instruction sets of this processor."""
    found = [isa for isa in ISAS if drive(program, isa, 1).returncode != 77]
    assert "portable" in found
    return found


@pytest.fixture(scope="module")
def right(root: Path) -> str:
    """What the driver prints: the same on every instruction set and number of threads."""
    program = shared(root, "right", lambda folder: build(folder, [])) / "driver"
    texts = set()
    for isa, threads in itertools.product(here(program), (1, 2)):
        done = drive(program, isa, threads)
        assert done.returncode == 0, done.stderr[-500:]
        texts.add(done.stdout)
    (text,) = texts
    assert text.count("\n") > 3000
    return text


@pytest.fixture(scope="module")
def sanitized(root: Path) -> Path:
    return shared(root, "sanitized", lambda folder: build(folder, SANITIZED)) / "driver"


def test_sanitizers_are_silent(sanitized: Path, right: str) -> None:
    for isa, threads in itertools.product(here(sanitized), (1, 2)):
        done = drive(sanitized, isa, threads)
        assert done.returncode == 0, f"{isa}, {threads} threads\n{done.stderr[-2000:]}"
        assert done.stderr == ""
        assert done.stdout == right


ARM_COMPILER, ARM = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")


@pytest.mark.skipif(
    not (ARM_COMPILER and ARM), reason="needs g++-aarch64-linux-gnu and qemu-user-static"
)
def test_an_arm_processor_gives_the_same_bits(tmp_path: Path, right: str) -> None:
    program = build(tmp_path, ["-static"], "aarch64", [str(ARM_COMPILER)])
    for isa, threads in (("neon", 1), ("neon", 2), ("portable", 1)):
        done = drive(program, isa, threads, [str(ARM)])
        assert done.returncode == 0, done.stderr[-500:]
        assert done.stdout == right, isa


DEFECTS = [
    pytest.param(
        "update.cpp",
        "i < count; ++i) out[i] = end(affine(a, x[i], b, score[i]));",
        "i <= count; ++i) out[i] = end(affine(a, x[i], b, score[i]));",
        "heap-buffer-overflow",
        id="an element past the end",
    ),
    pytest.param(
        "tile.h",
        "constexpr uint64_t kTileBuffer = kTile + 128;",
        "constexpr uint64_t kTileBuffer = kTile - 16;",
        "stack-buffer-overflow",
        id="no room for a tile",
    ),
    pytest.param(
        "update.cpp",
        "row * args.columns : 0),",
        "int32_t(row << 30) * int32_t(args.columns) : 0),",
        "signed integer overflow",
        id="an index of 32 bits",
    ),
]


@pytest.mark.parametrize("name, old, new, said", DEFECTS)
def test_a_planted_defect_is_caught(
    tmp_path: Path, sanitized: Path, name: str, old: str, new: str, said: str
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / "cpu" / name).read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}, expected once"
    (csrc / "cpu" / name).write_text(text.replace(old, new))
    # The rest is as it was: only the update's kernels are compiled again.
    isa = here(sanitized)[0]
    made, program = tmp_path / "update.o", tmp_path / "driver"
    command = [*command_for(PROCESSOR), *SANITIZED]
    source = str(csrc / "cpu/update.cpp")
    run([*command, f"-DSK_ISA={isa}", *shlex.split(ISAS[isa]), "-c", source, "-o", str(made)])
    others = [o for o in sanitized.parent.glob("*.o") if o.name != f"update.{isa}.o"]
    run([*command, *map(str, others), str(made), "-o", str(program)])
    done = drive(program, isa, 1)
    assert done.returncode != 0
    assert said in done.stderr, done.stderr[-2000:]
