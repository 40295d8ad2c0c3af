"""The machine code of the CUDA kernels: compiled and read, never run, so that no GPU is needed."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import pickle
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fibers.build import shared

from benchmarks import sass

ABSENT = [
    name
    for name, found in {
        "nvcc": sass.find_nvcc(),
        "nvdisasm": sass.find_binary_tool("nvdisasm"),
        "cuobjdump": sass.find_binary_tool("cuobjdump"),
    }.items()
    if found is None
]
pytestmark = pytest.mark.skipif(
    bool(ABSENT), reason=f"needs {', '.join(ABSENT)} (CUDA toolkit, triton package)"
)
each_arch = pytest.mark.parametrize("arch", sass.ARCHS)
each_row = pytest.mark.parametrize("row", sass.ROWS, ids=lambda row: row.kernel)
SOURCES = sorted(sass.CUDA.glob("*.cu"))
NORMALS = "fill_kernel<NormalMap, true, float>"
STEPS = ("affine_kernel<float, true, false>", "affine_kernel<float, true, true>")


@pytest.fixture(scope="module", autouse=True)
def _compiled(root: Path) -> Iterator[None]:
    """Compiled once for all processes of a run."""

    def make(folder: Path) -> None:
        sass.compile_all()
        jobs = itertools.product(SOURCES, sass.ARCHS)
        found = {job: sass.compiled(*job) for job in jobs}
        (folder / "kernels").write_bytes(pickle.dumps(found))

    found = pickle.loads((shared(root, "sass", make) / "kernels").read_bytes())
    compiled = sass.compiled

    def known(source: Path, arch: str, flags: tuple[str, ...] = sass.FLAGS) -> Any:
        return found[source, arch] if flags == sass.FLAGS else compiled(source, arch, flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sass, "compiled", known)
        yield


def functions(arch: str) -> list[sass.Function]:
    return [f for source in SOURCES for f in sass.compiled(source, arch)[0].values()]


@each_arch
def test_no_kernel_uses_local_memory(arch: str) -> None:
    for source in SOURCES:
        kernels, report = sass.compiled(source, arch)
        said = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
        assert said == [("0", "0", "0")] * len(kernels), report
        for function in kernels.values():
            assert not sass.faults(function)


@each_arch
@each_row
def test_vector_kernels_cost_and_move_what_the_table_says(row: sass.Row, arch: str) -> None:
    function, cost = row.function(arch), row.cost(arch)
    assert not sass.faults(function, cost, row.budget(arch))
    # No branch in a full iteration: what is counted is what every element costs.
    assert len(function.hot_path(longest=True)) == len(cost.path)
    assert cost.moved == row.bytes


@each_arch
@each_row
def test_vector_kernels_read_and_write_whole_quads(row: sass.Row, arch: str) -> None:
    accesses = Counter(i.global_bytes for i in row.cost(arch).path if i.global_bytes)
    halves = "Float16" in row.kernel
    # The mask of a quad: a byte each.
    masked = row.kernel == "table_kernel<float, true, 1>"
    assert accesses.pop(4, 0) == (2 if masked else 0)
    assert set(accesses) <= ({16, 8} if halves else {16, 32})
    # Scores of half precision, x and out in fp32.
    if row.kernel.startswith("affine_kernel"):
        assert accesses == ({8: 2, 16: 4} if halves else {16: 6})


def test_every_vector_kernel_has_a_row() -> None:
    names = {f.name.split("<")[0] for f in functions("sm_90") if re.search(r"\btrue\b", f.name)}
    assert names == {row.kernel.split("<")[0] for row in sass.ROWS}


@pytest.mark.parametrize("card", sass.CARDS, ids=lambda card: card.name)
def test_the_langevin_step_leaves_the_arithmetic_room(card: sass.Card) -> None:
    least = {"A100 40GB": 1.5, "H100 SXM": 1.5, "B200": 1.0}[card.name]
    cost = sass.ROWS[0].cost(card.arch)
    assert cost.instructions <= 38
    assert cost.issue_headroom(card) >= least
    assert cost.pipe_headroom(card)[0] >= least


@each_arch
def test_normals_are_ieee_operations_and_one_approximate_seed(arch: str) -> None:
    for function in functions(arch):
        approximate = {i.opcode for i in function.instructions if i.name == "MUFU"}
        assert approximate <= {"MUFU.RSQ"}, function.name
        if "NormalMap, true" in function.name or function.name.startswith(
            "affine_kernel<float, true,"
        ):
            assert approximate == {"MUFU.RSQ"}
    normals = sass.compiled(sass.CUDA / "noise.cu", arch)[0][NORMALS]
    allowed = {"FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"}
    assert {
        i.opcode for i in normals.instructions if re.match("F|D(ADD|MUL|FMA)", i.name)
    } <= allowed


@each_arch
def test_normals_have_the_operations_of_the_contract(arch: str) -> None:
    """Nothing is contracted or split. A pair of normals has, as noise.h writes them: the uniform
    and -2 ln 2 k, an fma each; f, an addition; P, 6 fma; the radicand, 1; the root, 2 products and
    2 fma; g, g g, the sine's last and both normals, 5 products; cosine and sine, 4 fma each."""
    path = sass.compiled(sass.CUDA / "noise.cu", arch)[0][NORMALS].hot_path()
    count: Counter[str] = Counter()
    for i in path:
        if i.name.startswith("F"):
            count[i.name.rstrip("2")] += 2 if i.name.endswith("2") else 1
    pairs = 4
    assert count == {"FFMA": 19 * pairs, "FMUL": 7 * pairs, "FADD": pairs}


ROOTS = """
#include "pair.h"
extern "C" __global__ void theirs(float* x) { *x = __fsqrt_rn(*x); }
extern "C" __global__ void ours(float* x) { *x = sk::square_root(*x); }
extern "C" __global__ void packed(float2* x) {
  const sk::Pair root = sk::square_root(sk::Pair(x->x, x->y));
  *x = make_float2(root.a, root.b);
}
"""


def product(sign: str, *factors: object) -> tuple[str, ...]:
    return (sign, *sorted(map(str, factors)))


def markstein(x: str) -> object:
    """The root of x from the approximate reciprocal root y: g = x y, h = y / 2, then g + r h with
    r = x - g g, rounded once."""
    y = ("rsqrt", x)
    g, h = product("+", x, y), product("+", y, "0.5")
    r = ("fma", product("-", g, g), x)
    return ("fma", product("+", r, h), g)


def stored(path: list[sass.Instruction]) -> list[object]:
    """What a path stores, as expressions of the loaded values x0, x1."""
    values: dict[str, object] = {}

    def value(operand: str, lane: int) -> object:
        register = re.fullmatch(r"R(\d+)(?:\.reuse)?(?:\.F32x2\.HI_LO)?", operand)
        if register is None:
            return operand
        name = f"R{int(register.group(1)) + lane}"
        return values.get(name, name)

    for i in path:
        # FTZ makes subnormals zero: there are none where the callers below say.
        operation = i.opcode.removesuffix(".FTZ")
        first, *rest = i.operands.split(", ")
        if i.name == "STG":
            lanes = i.global_bytes // 4
            return [value(rest[-1], lane) for lane in range(lanes)]
        if not re.fullmatch(r"R\d+", first):
            continue
        lanes = 2 if i.name.endswith("2") else 1
        results: list[object] = [(i.opcode, i.address)]
        if i.name == "LDG":
            results = [f"x{lane}" for lane in range(i.global_bytes // 4)]
        elif operation == "MUFU.RSQ":
            results = [("rsqrt", value(rest[0], 0))]
        elif operation in ("FMUL", "FMUL2", "FFMA", "FFMA2"):
            sign = "-" if sum(f.startswith("-") for f in rest[:2]) == 1 else "+"
            results = []
            for lane in range(lanes):
                factors = [value(f.removeprefix("-"), lane) for f in rest[:2]]
                whole: object = product(sign, *factors)
                if len(rest) == 3:
                    whole = ("fma", whole, value(rest[2], lane))
                results.append(whole)
        for lane, result in enumerate(results):
            values[f"R{int(first[1:]) + lane}"] = result
    raise AssertionError("stores nothing")


def bits(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


@each_arch
def test_the_root_is_the_fast_path_of_the_correctly_rounded_one(arch: str, tmp_path: Path) -> None:
    """That noise.h's root is correctly rounded on a GPU rests on this: where its radicands lie,
    sqrt.rn.f32 is the same operations on the same values."""
    source = tmp_path / "roots.cu"
    source.write_text(ROOTS)
    kernels, _ = sass.compiled(source, arch, (*sass.FLAGS, f"-I{sass.CUDA}"))
    expected = [markstein("x0"), markstein("x1")]
    assert stored(kernels["theirs"].straight_path()) == expected[:1]
    assert stored(kernels["ours"].straight_path()) == expected[:1]
    assert stored(kernels["packed"].straight_path()) == expected
    # The fast path is taken if bits(x) - low <= span, unsigned. noise.h's radicands go from
    # 2^-44, of u = 1, to -2 ln 2^-33 < 46: inside, and far from subnormals in every operation.
    guard = [i for i in kernels["theirs"].instructions if i.name in ("IADD3", "VIADD", "ISETP")]
    minus_low, span = (int(re.findall(r"-?0x\w+", i.operands)[0], 16) for i in guard[:2])
    assert "GT.U32" in guard[1].opcode
    for radicand in (2.0**-44, 46.0):
        assert (bits(radicand) + minus_low) % 2**32 <= span


def test_the_flags_are_the_build_s() -> None:
    tree = ast.parse((sass.ROOT / "setup.py").read_text())
    flags = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS"
    )
    assert tuple(f for f in flags if not f.startswith("-Xcompiler")) == sass.FLAGS


PLANTED = """
extern "C" __global__ void array(float* out, const int* at, int count) {
  float local[16];
  for (int i = 0; i < 16; ++i) local[at[i]] = out[i];
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = local[at[i]];
}
extern "C" __global__ void spill(float* out, int turns) {
  float r[64];
  for (int i = 0; i < 64; ++i) r[i] = out[i * 32 + threadIdx.x];
  for (int t = 0; t < turns; ++t)
    for (int i = 0; i < 64; ++i) r[i] = r[i] * r[(i + 1) % 64] + r[(i + 7) % 64];
  for (int i = 0; i < 64; ++i) out[i * 32 + threadIdx.x] = r[i];
}
"""


def test_planted_local_memory_spills_and_costs_are_reported(tmp_path: Path) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED)
    kernels, report = sass.compiled(source, "sm_90", (*sass.FLAGS, "-maxrregcount=32"))
    assert re.search(r"[1-9]\d* bytes spill stores, [1-9]\d* bytes spill loads", report)
    for function in kernels.values():
        local, opcodes = sass.faults(function)
        assert re.fullmatch(rf"{function.name}: [1-9]\d* bytes of local memory a thread", local)
        assert opcodes.startswith(f"{function.name}: LDL") and "STL" in opcodes
    row = sass.ROWS[0]
    function, cost = row.function("sm_90"), row.cost("sm_90")
    assert sass.faults(function, cost, cost.instructions) == []
    (fault,) = sass.faults(function, cost, cost.instructions - 0.125)
    assert fault.startswith(f"{row.kernel}: ") and "instructions per element, budget" in fault


def test_the_table_has_every_kernel_and_fails_over_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    triton_code = pytest.importorskip("benchmarks.triton_code")
    monkeypatch.setattr(sass, "PEER_ROWS", ())
    assert sass.main() == 0
    table = capsys.readouterr().out
    for row in sass.ROWS:
        assert table.count(row.kernel) == len(sass.CARDS)
    assert "eager PyTorch: 5 kernels, 44 bytes per element" in table
    for kernel in triton_code.KERNELS:
        assert len(re.findall(rf"\n{kernel.name} +\d", table)) == len(sass.CARDS)
    over = dataclasses.replace(sass.ROWS[0], budgets=(37, 20, 28.5))
    monkeypatch.setattr(sass, "ROWS", (over,))
    monkeypatch.setattr(triton_code, "KERNELS", ())
    assert sass.main() == 1
    assert f"sm_90: {over.kernel}: " in capsys.readouterr().out


@pytest.mark.parametrize("peer", sass.PEER_ROWS, ids=lambda peer: peer.name)
def test_peers_compile_and_step(peer: sass.Peer) -> None:
    try:
        function = peer.function("sm_90")
    except ModuleNotFoundError as absent:
        pytest.skip(str(absent))
    cost = peer.cost(function)
    quads = Counter(i.opcode.split(".")[0] for i in cost.path if ".128" in i.opcode)
    assert quads == {"LDG": 2 * cost.elements / 4, "STG": cost.elements / 4}
    assert cost.instructions > sass.ROWS[0].cost("sm_90").instructions
