"""The CUDA sources, executed on the CPU: every thread is a fiber, the kernels are unchanged."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tolerances
import torch
from conftest import filled
from fibers.build import COMPILER, CUDA, ORDERS, Fibers, compile_fibers, fibers, shared
from rounding import probe_terms
from steps import endings, lines_and_masks
from torch import Tensor

from score_kernels import NoiseKey
from score_kernels.backends.compiled import native

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")

KEY = NoiseKey(2**63 + 5, purpose=3, draw=9, first_sample=2**32 - 2)
FAR = NoiseKey(7, purpose=2, draw=2**32 - 1, first_sample=2**40 + 2**32 - 1)
SIZES = [0, 1, 3, 4, 5, 64, 132, 255, 1023, 4096 + 7, 3 * 4096]
SHAPES = [(rows, size) for size in SIZES for rows in (1, 3)] + [(300, 2), (2, 3, 16, 16), (0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["words", "normal", "uniform", "rademacher"]


@pytest.fixture(scope="module", params=["single", "packed"])
def kernels(request: pytest.FixtureRequest, root: Path) -> Fibers:
    return fibers(root, packed=request.param == "packed")


@pytest.fixture(params=ORDERS)
def cuda(
    kernels: Fibers, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fibers]:
    monkeypatch.setenv("SK_FIBER_ORDER", request.param)
    yield kernels


def same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got, want), f"{int((got != want).sum())} of {got.numel()} differ"


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).norm() <= tolerances.FP32_RELATIVE * want.norm()


def vectors(rows: int) -> tuple[Tensor, Tensor]:
    return torch.rand(rows) + 0.1, torch.rand(rows)


@pytest.mark.parametrize("key", [KEY, FAR], ids=["key", "far"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_native_s_to_the_bit(cuda: Fibers, kind: str, key: NoiseKey) -> None:
    for shape in SHAPES:
        got = filled(cuda, kind, shape, key)
        same(got, filled(native, kind, shape, key))


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_native_s_to_the_bit(cuda: Fibers, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, score = torch.randn(shape), torch.randn(shape).to(dtype)
        for c in (0.3, 0.0):
            got, want = torch.empty(shape), torch.empty(shape)
            for out, backend in ((got, cuda), (want, native)):
                backend.affine_step(out, x, score, 0.9, 0.2, c, KEY)
            same(got, want)
            cuda.affine_step(x2 := x.clone(), x2, score, 0.9, 0.2, c, KEY)
            same(x2, want)


def test_coefficients_and_draw_are_read_where_the_step_counter_is(cuda: Fibers) -> None:
    x, score = torch.randn(3, 130), torch.randn(3, 130)
    table = torch.tensor([[1.0, 0.5, 0.7], [0.9, 0.1, 0.2], [0.8, 0.3, 0.0]])
    step = torch.zeros((), dtype=torch.int64)
    for t in range(3):
        got, want = torch.empty_like(x), torch.empty_like(x)
        cuda.table_step(got, x, score, table, step, KEY)
        native.affine_step(want, x, score, *table[t].tolist(), KEY.at(9 + t))
        same(got, want)
        step += 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_lines_of_samples_and_known_elements(cuda: Fibers, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, score, known = torch.randn(shape), torch.randn(shape).to(dtype), torch.randn(shape)
        for (table, mask), more in zip(lines_and_masks(shape), endings(shape), strict=False):
            given = None if mask is None else known
            got, want = torch.empty(shape), torch.empty(shape)
            for out, backend in ((got, cuda), (want, native)):
                backend.table_step(out, x, score, table, None, KEY, given, mask, *more)
            same(got, want)


def test_views_off_the_vector_s_alignment(cuda: Fibers) -> None:
    x, score = torch.randn(2 * 128 + 1)[1:].view(2, 128), torch.randn(2, 128)
    got, want = torch.empty(2 * 128 + 3)[3:].view(2, 128), torch.empty(2, 128)
    cuda.affine_step(got, x, score, 0.9, 0.2, 0.3, KEY)
    native.affine_step(want, x, score, 0.9, 0.2, 0.3, KEY)
    same(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denoising_score_matching(cuda: Fibers, dtype: torch.dtype) -> None:
    key = KEY
    for shape in SHAPES:
        x, score = torch.randn(shape), torch.randn(shape).to(dtype)
        sigma, weight = vectors(shape[0])
        same(cuda.perturb(x, sigma, key), native.perturb(x, sigma, key))
        for w in (None, weight):
            got = cuda.dsm_loss(score, sigma, w, key, False)[0]
            close(got, native.dsm_loss(score, sigma, w, key, False)[0])
            same(
                cuda.dsm_gradient(score, sigma, w, weight, key),
                native.dsm_gradient(score, sigma, w, weight, key),
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_probes(cuda: Fibers, kind: str, dtype: torch.dtype) -> None:
    key = KEY
    for shape in SHAPES:
        x, factor = torch.randn(shape), vectors(shape[0])[0]
        a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        for second, differences in ((None, False), (b, False), (b, True)):
            got = cuda.probe_sums(kind, a, second, differences, key)
            want = native.probe_sums(kind, a, second, differences, key)
            terms = probe_terms(kind, a, second, differences, KEY)
            assert ((got - want).abs() <= tolerances.FP32_RELATIVE * terms).all()
        shift = cuda.probe_shift(kind, x, factor, key)
        same(shift, native.probe_shift(kind, x, factor, key))
        scaled = cuda.probe_scale(kind, factor, shape, key)
        same(scaled, native.probe_scale(kind, factor, shape, key))


def test_sums_do_not_depend_on_the_order_of_threads(
    kernels: Fibers, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, sigma = torch.randn(3, 8704), torch.rand(3)
    found = []
    for order in ORDERS:
        monkeypatch.setenv("SK_FIBER_ORDER", order)
        found.append(kernels.dsm_loss(score, sigma, None, KEY, False)[0])
    same(found[1], found[0])
    same(found[2], found[0])


# What goes out of scope is not marked: compiling would take several times as long.
SANITIZED = (
    *("-fsanitize=address,undefined", "-fno-sanitize-address-use-after-scope"),
    *("-fno-sanitize-recover=all", "-g1"),
)


def edited(folder: Path, name: str, old: str, new: str) -> Path:
    """A copy of csrc with one defect in it."""
    shutil.copytree(CUDA.parent, folder / "csrc")
    source = folder / "csrc" / name
    text = source.read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}, expected once"
    source.write_text(text.replace(old, new))
    return folder / "csrc"


def build(folder: Path, csrc: Path, *flags: str) -> None:
    sources = [*sorted((csrc / "cuda").glob("*.cu")), Path(__file__).parent / "fibers/driver.cpp"]
    compile_fibers(sources, folder / "driver", flags=[f"-I{csrc}", *flags])


def drive(folder: Path, csrc: Path, *flags: str) -> Callable[[str], subprocess.CompletedProcess]:
    """Build the driver and return a function that runs it in an order."""
    if not (folder / "driver").exists():
        build(folder, csrc, *flags)

    def run(order: str) -> subprocess.CompletedProcess:
        # What a fiber leaves on its stack is no leak, and its stack is not the thread's.
        environment = {"SK_FIBER_ORDER": order, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
        return subprocess.run(
            [folder / "driver"], capture_output=True, text=True, check=False, env=environment
        )

    return run


@pytest.fixture(scope="module")
def right(root: Path) -> str:
    """What the driver prints."""
    folder = shared(root, "cuda-right", lambda folder: build(folder, CUDA.parent))
    done = drive(folder, CUDA.parent)("forward")
    assert done.returncode == 0, done.stdout[-500:]
    assert done.stdout.count("\n") > 500
    return done.stdout


def test_sanitizers_are_silent(tmp_path: Path, right: str) -> None:
    run = drive(tmp_path, CUDA.parent, *SANITIZED)
    for order in ORDERS:
        done = run(order)
        assert done.returncode == 0, done.stderr[-2000:]
        # ASan says of every program with fibers that it may err on the strict side.
        assert all("swapcontext" in line for line in done.stderr.splitlines())
        assert done.stdout == right


def test_a_missing_barrier_is_caught(tmp_path: Path, right: str) -> None:
    old = "values[k];\n  __syncthreads();\n"
    run = drive(tmp_path, edited(tmp_path, "cuda/sums.h", old, "values[k];\n"))
    assert any(run(order).stdout != right for order in ORDERS)


def test_a_shuffle_in_a_divergent_branch_is_caught(tmp_path: Path) -> None:
    old = "      add_along_row(values);\n"
    run = drive(tmp_path, edited(tmp_path, "cuda/sums.h", old, "      if (row < rows)" + old))
    done = run("forward")
    assert done.returncode == 1
    assert "failed: score_kernels._cuda: dsm_loss: a shuffle at" in done.stdout
    assert "a thread never came" in done.stdout


def test_a_read_past_the_end_is_caught(tmp_path: Path) -> None:
    old = "if (at.element() + i < end) four.v[i] = start[at.element() + i];"
    csrc = edited(tmp_path, "cuda/quads.h", old, old.replace("<", "<="))
    done = drive(tmp_path, csrc, *SANITIZED)("forward")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "READ of size" in done.stderr


def test_a_mask_off_its_alignment_is_caught(tmp_path: Path) -> None:
    csrc = edited(tmp_path, "cuda/update.cu", "args.known, args.mask,", "args.known,")
    done = drive(tmp_path, csrc, *SANITIZED)("forward")
    assert done.returncode != 0
    assert "misaligned address" in done.stderr


def test_a_misaligned_vector_is_caught(tmp_path: Path) -> None:
    old = "return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;"
    csrc = edited(tmp_path, "cuda/launch.h", old, "return pointer != &bytes;")
    done = drive(tmp_path, csrc, *SANITIZED)("forward")
    assert done.returncode != 0
    assert "misaligned address" in done.stderr
