"""What the kernels cost on a GPU, read off the machine code: nothing runs, nothing is timed.

    python -m benchmarks.sass

A kernel is compiled to a cubin for each target and disassembled with the nvdisasm that comes with
the triton package. Counted is the hot path, the turn of the innermost loop in which a thread does
the most work, by instruction and pipe. Divided by its elements and by what a multiprocessor issues
in a cycle that is the issue bound; the bytes that must move over the card's bandwidth are the DRAM
bound. A kernel whose DRAM bound is the longer one has arithmetic to spare. Both are bounds from
data sheets, never speeds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc/cuda"


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it: multiprocessors, boost clock in GHz, bandwidth in TB/s."""

    name: str
    arch: str
    processors: int
    clock: float
    bandwidth: float

    def slots(self, bytes_per_element: float) -> float:
        """Instructions per element that can be issued while its bytes move: four warps a cycle."""
        lanes = self.processors * self.clock * 1e9 * 4 * 32
        return lanes * bytes_per_element / (self.bandwidth * 1e12)


CARDS = (
    Card("A100 40GB", "sm_80", 108, 1.41, 1.555),
    Card("H100 SXM", "sm_90", 132, 1.755, 3.35),
    Card("B200", "sm_100", 148, 1.965, 8.0),
)

# The pipe that executes an instruction, by how its name begins; what is left is integer and moves.
PIPES = {
    "fma": ("FFMA", "FMUL", "FADD", "IMAD", "IDP"),
    "xu": ("MUFU", "I2F", "F2I", "F2F"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDC", "LDL", "STL", "SHFL", "ATOM", "RED"),
    "control": ("BRA", "BSSY", "BSYNC", "EXIT", "BAR", "WARPSYNC", "CALL", "RET", "NOP", "YIELD"),
}


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str


@dataclass
class Function:
    """The machine code of one kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def opcodes(self) -> Counter[str]:
        return Counter(i.opcode for i in self.instructions)

    def hot_path(self) -> list[Instruction]:
        """The instructions of a full turn: of all paths round the longest innermost loop the one
        that touches global memory most, then the longest."""
        loops = [list(self._paths(*loop)) for loop in self._loops()]
        if not loops:
            raise ValueError(f"{self.name}: has no loop, expected one")
        hottest = max(loops, key=lambda paths: max(map(len, paths)))
        return max(hottest, key=lambda path: (_touches(path), len(path)))

    def _target(self, index: int) -> int | None:
        """Where the branch at an index goes, as an index."""
        instruction = self.instructions[index]
        if not instruction.opcode.startswith("BRA"):
            return None
        label = re.search(r"`\((\S+)\)", instruction.operands)
        return None if label is None else self.labels[label.group(1)]

    def _loops(self) -> Iterator[tuple[int, int]]:
        """(head, branch back) of the loops without a loop inside."""
        loops = []
        for index in range(len(self.instructions)):
            head = self._target(index)
            # A branch to itself is padding after the end.
            if head is not None and head < index:
                loops.append((head, index))
        for head, back in loops:
            if not any((h, b) != (head, back) and head <= h and b <= back for h, b in loops):
                yield head, back

    def _paths(self, head: int, back: int) -> Iterator[list[Instruction]]:
        stack = [(head, [])]
        while stack:
            at, path = stack.pop()
            while head <= at <= back:
                instruction = self.instructions[at]
                path = [*path, instruction]
                if at == back:
                    yield path
                    break
                target = self._target(at)
                if target is not None:
                    taken = head <= target <= back and target > at
                    if not instruction.predicate and "P" not in instruction.operands.split(",")[0]:
                        if not taken:
                            break
                        at = target
                        continue
                    if taken:
                        stack.append((target, path))
                elif instruction.opcode.startswith("EXIT") and not instruction.predicate:
                    break
                at += 1


def _touches(path: list[Instruction]) -> int:
    return sum(i.opcode.startswith(("LDG", "STG")) for i in path)


def pipes(path: list[Instruction]) -> Counter[str]:
    """How many instructions each pipe gets."""
    count: Counter[str] = Counter()
    for i in path:
        count[next((p for p, names in PIPES.items() if i.opcode.startswith(names)), "alu")] += 1
    return count


def find_nvcc() -> str | None:
    return shutil.which("nvcc")


def find_nvdisasm() -> str | None:
    """nvdisasm of the triton package, else of the toolkit."""
    try:
        import triton
    except ImportError:
        return shutil.which("nvdisasm")
    found = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return str(found) if found.exists() else shutil.which("nvdisasm")


FLAGS = ("-std=c++17", "-O3", "--fmad=false")


@cache
def compiled(source: Path, arch: str, *extra: str) -> tuple[dict[str, Function], str]:
    """The kernels of a source by name, and what ptxas said about registers and spills."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc: not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [nvcc, *FLAGS, *extra, f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{source}: nvcc failed: {done.stderr}")
        return disassembled(cubin), done.stderr


def disassembled(cubin: Path) -> dict[str, Function]:
    """The kernels of a cubin, by demangled name."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise FileNotFoundError("nvdisasm: not there; it comes with the triton package")
    text = subprocess.run(
        [nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    functions: dict[str, Function] = {}
    current: Function | None = None
    for line in text.splitlines():
        if header := re.match(r"\.text\.(\S+):", line):
            current = functions[header.group(1)] = Function(header.group(1))
        elif current is not None and (label := re.match(r"(\.L_\S+):", line)):
            current.labels[label.group(1)] = len(current.instructions)
        elif current is not None and (
            code := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?(\S+)\s*(.*?)\s*;", line)
        ):
            address, predicate, opcode, operands = code.groups()
            current.instructions.append(
                Instruction(int(address, 16), predicate or "", opcode, operands)
            )
    names = subprocess.run(
        ["c++filt", *functions], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return dict(zip((_short(n) for n in names), functions.values(), strict=True))


def _short(name: str) -> str:
    """affine_kernel<float, true> of a demangled name."""
    return re.sub(r"\(anonymous namespace\)::|sk::|\(bool\)|^void ", "", name).split("(")[0]
