"""What the kernels cost on a GPU, read off the machine code: nothing runs, nothing is timed.

    python -m benchmarks.sass

Each kernel is compiled to a cubin for each target and disassembled with the nvdisasm that comes
with the triton package. Counted are the instructions of the hot path: one full turn of the loop
that does the work. What a multiprocessor can issue, and what its pipes can execute, while the bytes
of an element move at the card's bandwidth, over what an element takes, is the headroom: above 1 the
memory is the tighter bound, below 1 the arithmetic. Bounds from data sheets, never speeds.

Beside ours stand other ways to the same Langevin step. Exits with 1 if one of ours is over budget.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc/cuda"
PEERS = ROOT / "benchmarks/gpu_peers"
# As setup.py compiles the kernels.
FLAGS = ("-O3", "-std=c++17", "--fmad=false")


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it: multiprocessors, boost clock in GHz, bandwidth in TB/s, and
    results a multiprocessor has from each pipe in a cycle."""

    name: str
    arch: str
    processors: int
    clock: float
    bandwidth: float
    lanes: dict[str, int]

    def slots(self, bytes_per_element: float, lanes: int = 4 * 32) -> float:
        """Instructions per element that can be issued while its bytes move: four warps a cycle, or
        what a pipe of fewer lanes takes."""
        each_second = self.processors * self.clock * 1e9 * lanes
        return each_second * bytes_per_element / (self.bandwidth * 1e12)


CARDS = (
    Card("A100 40GB", "sm_80", 108, 1.41, 1.555, {"fma": 64, "alu": 64, "xu": 16}),
    Card("H100 SXM", "sm_90", 132, 1.755, 3.35, {"fma": 128, "alu": 64, "xu": 16}),
    Card("B200", "sm_100", 148, 1.965, 8.0, {"fma": 128, "alu": 64, "xu": 16}),
)
ARCHS = tuple(card.arch for card in CARDS)


@dataclass(frozen=True)
class Row:
    """A kernel: bytes an element must move, and budgets in instructions per element, one for each
    of CARDS."""

    kernel: str
    source: str
    bytes: int
    budgets: tuple[float, float, float]
    elements: int = 8

    def function(self, arch: str) -> Function:
        return compiled(CUDA / self.source, arch)[0][self.kernel]

    def cost(self, arch: str) -> Cost:
        return Cost(self.function(arch).hot_path(), self.elements, self.bytes)

    def budget(self, arch: str) -> float:
        return self.budgets[ARCHS.index(arch)]


# The budgets rest on the counts at the time of writing and some 5% for another compiler's taste.
ROWS = (
    Row("affine_kernel<float, true, false>", "update.cu", 12, (37, 37, 28.5)),
    Row("affine_kernel<BFloat16, true, false>", "update.cu", 10, (38, 38, 30)),
    Row("affine_kernel<Float16, true, false>", "update.cu", 10, (38, 38, 29.5)),
    Row("affine_kernel<float, true, true>", "update.cu", 12, (37, 37, 28.5)),
    Row("affine_kernel<BFloat16, true, true>", "update.cu", 10, (38, 38, 30)),
    Row("affine_kernel<Float16, true, true>", "update.cu", 10, (38, 38, 29.5)),
    Row("table_kernel<float, true, 0>", "update.cu", 12, (37, 37, 28.5)),
    Row("table_kernel<float, true, 1>", "update.cu", 17, (44, 45, 34.5)),
    Row("perturb_kernel<true>", "dsm.cu", 8, (34.5, 34.5, 26)),
    Row("loss_kernel<float, true>", "dsm.cu", 4, (34, 34, 27)),
    Row("loss_kernel<BFloat16, true>", "dsm.cu", 2, (35.5, 35.5, 29)),
    Row("loss_kernel<Float16, true>", "dsm.cu", 2, (35, 35, 28)),
    Row("gradient_kernel<float, true>", "dsm.cu", 8, (36, 36, 27)),
    Row("gradient_kernel<BFloat16, true>", "dsm.cu", 4, (38.5, 38.5, 29.5)),
    Row("gradient_kernel<Float16, true>", "dsm.cu", 4, (37.5, 37.5, 28.5)),
    Row("sums_kernel<RademacherMap, float, true, false>", "ssm.cu", 8, (19, 19, 19)),
    Row("sums_kernel<NormalMap, float, true, false>", "ssm.cu", 8, (37.5, 37.5, 29.5)),
    Row("scale_kernel<RademacherMap, true, false>", "ssm.cu", 4, (16, 16, 15)),
    Row("scale_kernel<NormalMap, true, false>", "ssm.cu", 4, (34, 34, 26)),
    Row("scale_kernel<RademacherMap, true, true>", "ssm.cu", 12, (18.5, 18.5, 17)),
    Row("scale_kernel<NormalMap, true, true>", "ssm.cu", 12, (36.5, 36.5, 27.5)),
    Row("fill_kernel<WordMap, true, long>", "noise.cu", 8, (14, 14, 14)),
    Row("fill_kernel<UniformMap, true, float>", "noise.cu", 4, (15, 15, 14)),
    Row("fill_kernel<RademacherMap, true, float>", "noise.cu", 4, (15, 15, 14)),
    Row("fill_kernel<NormalMap, true, float>", "noise.cu", 4, (33, 33, 25.5)),
)

# The pipe of an instruction by its name before the first dot; what is left is "alu". "control" has
# what a warp does once, too: the uniform instructions, whose names begin with U.
PIPES = {
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 IMAD IDP HFMA2 HADD2 HMUL2",
    "xu": "MUFU I2F F2I F2F",
    "memory": "LDG STG LD ST LDS STS LDC LDCU ULDC LDL STL SHFL ATOM ATOMG ATOMS RED REDG",
    "control": "BRA BSSY BSYNC EXIT BAR WARPSYNC CALL RET NOP YIELD BREAK DEPBAR",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
PIPE_NAMES = ("fma", "alu", "xu", "memory", "control")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def pipe(self) -> str:
        default = "control" if self.name.startswith("U") else "alu"
        return PIPE_OF.get(self.name, default)

    @property
    def conditional(self) -> bool:
        return bool(self.predicate or re.match(r"!?U?P\d", self.operands))

    @property
    def global_bytes(self) -> int:
        """Bytes of global memory that a thread reads or writes with it."""
        if self.name not in ("LDG", "STG"):
            return 0
        modifiers = self.opcode.split(".")
        widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((width for name, width in widths.items() if name in modifiers), 4)


@dataclass
class Function:
    """The machine code of one kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    # Bytes of local memory of a thread: arrays that are indexed, and spilled registers.
    local: int = 0

    def hot_path(self, longest: bool = False) -> list[Instruction]:
        """A full turn of the innermost loop in which there is most to do.

        Full: with all the stores of a turn or, where there are none, all the loads. Of such paths
        the shortest, as what it leaves out are branches for values that hardly come, or the
        longest."""
        paths = [self._path(*loop, longest) for loop in self._loops()]
        if not paths:
            raise ValueError(f"{self.name}: has no loop, expected one")
        return max(paths, key=len)

    def straight_path(self) -> list[Instruction]:
        """The shortest full path from the entry to an exit, for a kernel whose loops, if any, are
        in branches for values that hardly come."""
        last = len(self.instructions) - 1
        exits = {i for i in range(last + 1) if self.instructions[i].name == "EXIT"}
        return self._path(0, last, exits, longest=False)

    def _target(self, index: int) -> int | None:
        """Where the branch at an index goes, as an index."""
        instruction = self.instructions[index]
        if instruction.name != "BRA":
            return None
        label = re.search(r"`\((\S+)\)", instruction.operands)
        return None if label is None else self.labels[label.group(1)]

    def _successors(self, index: int) -> list[int]:
        instruction = self.instructions[index]
        target = self._target(index)
        # What is called are a function's own slow paths: a path that calls is not looked at.
        ends = target is not None or instruction.name in ("EXIT", "RET", "CALL")
        follows = [index + 1] if instruction.conditional or not ends else []
        return follows if target is None else [*follows, target]

    def _loops(self) -> Iterator[tuple[int, int, set[int]]]:
        """(head, last, branches back to the head) of the loops without a loop inside."""
        backs: dict[int, set[int]] = {}
        for index in range(len(self.instructions)):
            target = self._target(index)
            # A branch to itself is padding after the end.
            if target is not None and target < index:
                backs.setdefault(target, set()).add(index)
        for head, ends in backs.items():
            if not any(head < other <= max(ends) for other in backs):
                yield head, max(ends), ends

    def _path(self, first: int, last: int, ends: set[int], longest: bool) -> list[Instruction]:
        """Of the paths forward from `first` to one of `ends` the best as hot_path has it."""
        inside = self.instructions[first : last + 1]
        full = "STG" if any(i.name == "STG" for i in inside) else "LDG"
        best: dict[int, tuple[int, int, int | None]] = {}
        for at in range(last, first - 1, -1):
            onward = [s for s in self._successors(at) if at < s <= last and s in best]
            choices: list[tuple[int, int, int | None]] = [(*best[s][:2], s) for s in onward]
            if at in ends:
                choices.append((0, 0, None))
            if choices:
                touched, length, then = max(choices, key=lambda choice: choice[:2])
                touched += self.instructions[at].name == full
                best[at] = (touched, length + (1 if longest else -1), then)
        if first not in best:
            raise ValueError(f"{self.name}: has no path without calls")
        path = []
        step: int | None = first
        while step is not None:
            path.append(self.instructions[step])
            step = best[step][2]
        return path


@dataclass(frozen=True)
class Cost:
    """A path, the elements that a thread does on it, the bytes that each of them must move."""

    path: list[Instruction]
    elements: int
    bytes: float

    @property
    def instructions(self) -> float:
        return len(self.path) / self.elements

    @property
    def moved(self) -> float:
        """Bytes of global memory that the path reads and writes, per element."""
        return sum(i.global_bytes for i in self.path) / self.elements

    def pipes(self) -> dict[str, float]:
        """Instructions per element of each pipe."""
        count = Counter(i.pipe for i in self.path)
        return {pipe: count[pipe] / self.elements for pipe in PIPE_NAMES}

    def issue_headroom(self, card: Card) -> float:
        return card.slots(self.bytes) / self.instructions

    def pipe_headroom(self, card: Card) -> tuple[float, str]:
        """That of the pipe with the least, and its name."""
        busy = Counter(i.pipe for i in self.path)
        # Two floats in one instruction take the pipe twice.
        busy["fma"] += sum(i.name in ("FFMA2", "FMUL2", "FADD2") for i in self.path)
        return min(
            (card.slots(self.bytes, lanes) * self.elements / busy[pipe], pipe)
            for pipe, lanes in card.lanes.items()
            if busy[pipe]
        )


def faults(function: Function, cost: Cost | None = None, budget: float | None = None) -> list[str]:
    """What a kernel may not do: use local memory, or more instructions than its budget."""
    found = []
    if function.local:
        found.append(f"{function.name}: {function.local} bytes of local memory a thread")
    opcodes = sorted({i.opcode for i in function.instructions if i.name in ("LDL", "STL")})
    if opcodes:
        found.append(f"{function.name}: {', '.join(opcodes)}")
    if cost is not None and budget is not None and cost.instructions > budget:
        found.append(
            f"{function.name}: {cost.instructions:.1f} instructions per element, budget {budget:g}"
        )
    return found


def find_nvcc() -> str | None:
    """nvcc where setup.py looks for it: $CUDACXX, else on PATH, else in the usual folder."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_binary_tool(name: str) -> str | None:
    """nvdisasm or cuobjdump of the triton package, else of the toolkit."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        found = Path(spec.origin).parent / "backends/nvidia/bin" / name
        if found.exists():
            return str(found)
    return shutil.which(name)


def _run(tool: str | None, name: str, *arguments: object) -> tuple[str, str]:
    """What a tool wrote to stdout and to stderr."""
    if tool is None:
        raise FileNotFoundError(
            f"{name} not found: nvcc comes with the CUDA toolkit, nvdisasm and cuobjdump with the "
            "triton package, c++filt with binutils"
        )
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    return done.stdout, done.stderr


@cache
def compiled(
    source: Path, arch: str, flags: tuple[str, ...] = FLAGS
) -> tuple[dict[str, Function], str]:
    """The kernels of a source by name, and what ptxas said about registers and spills."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        arguments = (*flags, f"-arch={arch}", "-cubin", "-Xptxas", "-v", source, "-o", cubin)
        _, report = _run(find_nvcc(), "nvcc", *arguments)
        return disassembled(cubin), report


def compile_all(progress: bool = False) -> None:
    """Compiles every source for every card, so that the rest finds it done."""
    jobs = [(source, arch) for source in sorted(CUDA.glob("*.cu")) for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda job: compiled(*job), jobs)
        for _ in tqdm(done, "kernels", len(jobs), leave=False, disable=not progress):
            pass


def disassembled(cubin: Path) -> dict[str, Function]:
    """The kernels of a cubin, by demangled name."""
    text, _ = _run(find_binary_tool("nvdisasm"), "nvdisasm", "-c", cubin)
    functions: dict[str, Function] = {}
    current: Function | None = None
    for line in text.splitlines():
        if header := re.match(r"\.text\.(\S+):", line):
            current = functions[header.group(1)] = Function(header.group(1))
        elif current is not None and (label := re.match(r"(\.L_\S+):", line)):
            current.labels[label.group(1)] = len(current.instructions)
        elif current is not None and (
            code := re.match(
                r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?(\S+?)(?:\s+(.*?))?\s*;", line
            )
        ):
            address, predicate, opcode, operands = code.groups()
            current.instructions.append(
                Instruction(int(address, 16), predicate or "", opcode, operands or "")
            )
    usage, _ = _run(find_binary_tool("cuobjdump"), "cuobjdump", "-res-usage", cubin)
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        functions[name].registers, functions[name].local = int(registers), int(stack)
    names, _ = _run(shutil.which("c++filt"), "c++filt", *functions)
    for name, function in zip(names.splitlines(), functions.values(), strict=True):
        function.name = _short(name)
    return {function.name: function for function in functions.values()}


def _short(name: str) -> str:
    """perturb_kernel<true> of a demangled name."""
    return re.sub(r"\(anonymous namespace\)::|sk::|\(bool\)|^void ", "", name).split("(")[0]


def _curand_step(arch: str) -> Function:
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    headers = [h for root in roots for h in Path(root).glob("*/include/curand_kernel.h")]
    if not headers:
        raise ModuleNotFoundError("needs cuRAND's headers: pip install nvidia-curand")
    flags = ("-I", str(headers[0].parent))
    return compiled(PEERS / "curand_step.cu", arch, flags)[0]["curand_step"]


def _inductor_step(name: str, arch: str) -> Function:
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError("needs Triton: pip install triton")
    from benchmarks.gpu_peers import inductor_step

    if not hasattr(inductor_step.triton_helpers, "randn4x"):
        raise ModuleNotFoundError("needs a torch whose Inductor has randn4x, as 2.13's")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        capability = int(arch.removeprefix("sm_"))
        cubin.write_bytes(inductor_step.compile_step(getattr(inductor_step, name), capability))
        return disassembled(cubin)[name]


@dataclass(frozen=True)
class Peer:
    """Another way to the Langevin step of fp32 scores."""

    name: str
    elements: int
    function: Callable[[str], Function]
    loop: bool

    def cost(self, function: Function) -> Cost:
        path = function.hot_path() if self.loop else function.straight_path()
        return Cost(path, self.elements, ROWS[0].bytes)


PEER_ROWS = (
    Peer("cuRAND, Philox, curand_normal4", 4, _curand_step, loop=True),
    Peer(
        "torch.compile, torch 2.13",
        8,
        lambda arch: _inductor_step("inductor_step", arch),
        loop=False,
    ),
    Peer(
        "torch.compile before, a Philox block an element",
        8,
        lambda arch: _inductor_step("inductor_step_tl_randn", arch),
        loop=False,
    ),
)


def eager_passes() -> list[int]:
    """Bytes per element that each kernel of the step reads and writes in eager PyTorch."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            # randn_like takes a tensor and does not read it.
            read = () if func is torch.ops.aten.randn_like.default else args
            passes.append(sum(t.itemsize for t in (*read, out) if isinstance(t, torch.Tensor)))
            return out

    passes: list[int] = []
    x, score, a = torch.empty(1, device="meta"), torch.empty(1, device="meta"), 0.01
    with Passes():
        x + a / 2 * score + a**0.5 * torch.randn_like(x)
    return passes


WIDTH = 49
LEGEND = f"""\
Instructions per element of the hot path, by pipe: reg, registers a thread; local, bytes of local
memory a thread, spills included; budget, instructions per element at most; bytes, that an element
must move. Headroom, how many times over these bytes leave time for the instructions: issue, by what
a multiprocessor issues; pipe, by its tightest pipe. Above 1 memory is the tighter bound. Counted
from machine code and data sheets: bounds, not speeds.

{"":{WIDTH}} {"instr":>6} {"fma":>5} {"alu":>5} {"xu":>5} {"mem":>5} {"ctl":>5} \
{"reg":>4} {"local":>5} {"budget":>6} {"bytes":>5} {"issue":>6} {"pipe":>6}"""


def line(name: str, function: Function, cost: Cost, card: Card, budget: float | None) -> str:
    pipes = " ".join(f"{count:5.1f}" for count in cost.pipes().values())
    allowed = "" if budget is None else f"{budget:g}"
    pipe_headroom, pipe = cost.pipe_headroom(card)
    return (
        f"{name:{WIDTH}} {cost.instructions:6.1f} {pipes} {function.registers:4} "
        f"{function.local:5} {allowed:>6} {cost.bytes:5g} {cost.issue_headroom(card):6.2f} "
        f"{pipe_headroom:6.2f} {pipe}"
    )


def main() -> int:
    try:
        compile_all(progress=True)
    except FileNotFoundError as absent:
        print(absent, file=sys.stderr)
        return 2
    print(LEGEND)
    found = []
    try:
        from benchmarks.triton_code import KERNELS as in_triton
    except ImportError:
        in_triton = ()
        print("without the rows in Triton: pip install triton")
    count = len(CARDS) * (len(PEER_ROWS) + len(in_triton))
    progress = tqdm(total=count, desc="Triton and peers", leave=False)
    for card in CARDS:
        lines = [f"\n{card.arch}, {card.name}"]
        for row in ROWS:
            function, cost = row.function(card.arch), row.cost(card.arch)
            budget = row.budget(card.arch)
            found += [f"{card.arch}: {fault}" for fault in faults(function, cost, budget)]
            lines.append(line(row.kernel, function, cost, card, budget))
        lines.append("the same in Triton")
        for kernel in in_triton:
            function, cost = kernel.function(card.arch), kernel.cost(card.arch)
            found += [f"{card.arch}: {kernel.name}: {fault}" for fault in faults(function)]
            lines.append(line(kernel.name, function, cost, card, None))
            progress.update()
        lines.append("the Langevin step of fp32 scores otherwise")
        for peer in PEER_ROWS:
            try:
                function = peer.function(card.arch)
                lines.append(line(peer.name, function, peer.cost(function), card, None))
            except ModuleNotFoundError as missing:
                lines.append(f"{peer.name:{WIDTH}} {missing}")
            progress.update()
        progress.clear()
        print("\n".join(lines), flush=True)
    progress.close()
    passes = eager_passes()
    print(f"\neager PyTorch: {len(passes)} kernels, {sum(passes)} bytes per element")
    for fault in found:
        print(fault)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
