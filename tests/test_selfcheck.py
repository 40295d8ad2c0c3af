"""Every check of selfcheck passes on every backend, and finds a kernel that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import FIBERS, NATIVE, on_backend
from scipy import stats
from torch import Tensor

import score_kernels
from score_kernels import ops
from score_kernels.backends import choose
from score_kernels.backends.compiled import native
from score_kernels.cli.main import main
from score_kernels.cli.selfcheck import CHECKS, context, parity, selfcheck, statistics
from score_kernels.cli.selfcheck.context import CPU, CheckContext, Skipped

GPU_ONLY = ["CUDA graph", "another stream", "every GPU", "more than 2**31 elements"]
# What the reference, which serves every CPU, is not compared with itself in.
BY_ITSELF = [
    "golden words and normals",
    "batches in parts, thread counts",
    "ten runs of every reduction",
    *statistics.CHECKS,
]
needs_native = pytest.mark.skipif(not NATIVE, reason="needs the C++ kernels")
QUICK = CheckContext(CPU, quick=True)


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in GPU_ONLY])
@pytest.mark.parametrize("backend", ["reference", *FIBERS, *(["native"] if NATIVE else [])])
def test_check(backend: str, name: str) -> None:
    """The C++ kernels in every instruction set and in full."""
    with on_backend(backend):
        if backend == "reference" and name not in BY_ITSELF:
            with pytest.raises(Skipped, match="the reference (itself )?serves"):
                CHECKS[name](QUICK)
        else:
            ok, figure, expected = CHECKS[name](CheckContext(CPU, quick=backend != "native"))
            assert ok, f"{figure}, expected {expected}"


@needs_native
def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    before = native.kernels.isa(), torch.get_num_threads(), choose(CPU, torch.float32)
    random = torch.random.get_rng_state()
    assert main(["selfcheck", "--quick"]) == 0
    captured = capsys.readouterr()
    for word in (torch.__version__, "checking native on cpu", *native.kernels.isas(), *CHECKS):
        assert word in captured.out
    assert f"{len(CHECKS) - 4} ok, 0 FAILED, 4 skipped" in captured.out
    assert captured.err == ""
    assert (native.kernels.isa(), torch.get_num_threads(), choose(CPU, torch.float32)) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_what_cannot_be_run_is_not_ok() -> None:
    with score_kernels.use_backend("reference"):
        checks = {check.name: check for check in selfcheck(quick=True)}
    assert list(checks) == list(CHECKS)
    assert [name for name, check in checks.items() if check.ok] == BY_ITSELF
    assert [name for name, check in checks.items() if check.ok is False] == []
    assert all(checks[name].figure == "for GPUs only" for name in GPU_ONLY)
    assert checks["kernels"].figure == "the reference serves this device: it is forced"


def last_bit(out: Tensor) -> Tensor:
    """One element, one unit in the last place off."""
    if out.numel():
        out.view(-1)[-1:] = torch.nextafter(out.view(-1)[-1:], torch.tensor(torch.inf))
    return out


def one_bit_off(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: last_bit(right(*arguments))


def draw_ignored(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, sigma, key: right(x, sigma, (*key[:2], 0, *key[3:]))


def last_fill_off(right: Callable[..., Any]) -> Callable[..., Any]:
    def fill(out: Tensor, kind: str, key: Any) -> None:
        right(out, kind, key)
        if kind == "normal":
            last_bit(out)

    return fill


def wide_normals(right: Callable[..., Any]) -> Callable[..., Any]:
    def fill(out: Tensor, kind: str, key: Any) -> None:
        right(out, kind, key)
        if kind == "normal":
            out *= 1.05

    return fill


def repeating_draws(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda out, kind, key: right(out, kind, (*key[:2], 0, *key[3:]))


def first_step_only(right: Callable[..., Any]) -> Callable[..., Any]:
    def step(out: Tensor, x: Tensor, score: Tensor, table: Tensor, at: Any, *rest: Any) -> None:
        right(out, x, score, table, None if at is None else torch.zeros_like(at), *rest)

    return step


def mask_forgotten(right: Callable[..., Any]) -> Callable[..., Any]:
    def step(*arguments: Any) -> None:
        known, mask = (*arguments[6:8], None, None)[:2]
        everywhere = None if mask is None else torch.ones_like(mask)
        right(*arguments[:6], known, everywhere)

    return step


def a_thousandth_off(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: 1.001 * right(*arguments)


def last_sample_forgotten(right: Callable[..., Any]) -> Callable[..., Any]:
    def loss(score: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        value, gradient = right(score, *arguments)
        unwritten = torch.empty(1)
        return torch.cat([value[:-1], unwritten[: len(value)]]), gradient

    return loss


def unsteady(right: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(10**6))
    return lambda *arguments: right(*arguments) * (1 + 2.0**-22 * (next(calls) % 2))


def planted(right: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise RuntimeError("planted\nin two lines")

    return fail


@needs_native
@pytest.mark.parametrize(
    "method, defect, caught",
    [
        ("perturb", one_bit_off, ["keys, sizes and alignments", "batches in parts, thread counts"]),
        ("perturb", draw_ignored, ["keys, sizes and alignments"]),
        ("fill", last_fill_off, ["golden words and normals", "noise against the reference"]),
        ("fill", wide_normals, ["moments and distribution"]),
        ("fill", repeating_draws, ["correlations of neighbours", "golden words and normals"]),
        ("table_step", first_step_only, ["updates, tables, known elements"]),
        ("table_step", mask_forgotten, ["updates, tables, known elements", "annealed chain"]),
        ("dsm_gradient", a_thousandth_off, ["denoising loss and gradient"]),
        ("dsm_loss", last_sample_forgotten, ["denoising loss and gradient"]),
        ("probe_sums", a_thousandth_off, ["probes, sliced and differences"]),
        ("probe_sums", unsteady, ["ten runs of every reduction"]),
        ("probe_shift", a_thousandth_off, ["probes, sliced and differences"]),
    ],
)
def test_a_planted_defect_is_found(
    method: str,
    defect: Callable[..., Any],
    caught: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, method, defect(getattr(native, method)))
    for name in caught:
        assert not CHECKS[name](QUICK)[0], name


@needs_native
def test_a_wrong_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding of the kernel adds no noise."""
    right = native._affine_step

    def noiseless(*arguments: Any) -> None:
        right(*arguments[:8], 0.0, *arguments[9:])

    monkeypatch.setattr(native, "_affine_step", noiseless)
    assert not CHECKS["updates, tables, known elements"](QUICK)[0]


@needs_native
def test_an_error_is_a_failure_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "perturb", planted(native.perturb))
    assert main(["selfcheck", "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("training through dsm_loss"))
    assert "FAILED" in row and "RuntimeError: planted in two lines" in row
    assert any(line.startswith("sliced loss of a Gaussian") for line in lines)
    assert "FAILED, 4 skipped" in lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_the_reason_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "cuda:1"):
        assert main(["selfcheck", "--device", device]) == 1
        error = capsys.readouterr().err
        assert f"device: got '{device}'" in error
        assert score_kernels.backends()["cuda"] in error


@pytest.mark.parametrize("device", ["gpu", "meta", "cpu:x", ""])
def test_unknown_devices_are_refused_by_name(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"device: got '{device}', expected cpu, cuda"):
        selfcheck(device)
    assert main(["selfcheck", "--device", device]) == 1
    assert f"got '{device}'" in capsys.readouterr().err


def test_constants_are_the_golden_file_s() -> None:
    golden = json.loads((Path(__file__).parent / "data/golden.json").read_text())
    shape, key, words, normals = parity._GOLDEN
    (case,) = (case for case in golden if score_kernels.NoiseKey(**case["key"]) == key)
    count = shape[0] * shape[1]
    assert [int(word, 16) for word in words.split()] == case["words"][:count]
    want = [float.fromhex(z) for z in case["normals"][:count]]
    assert [float.fromhex(z) for z in normals.split()] == want


def test_the_statistics_share_one_level() -> None:
    share = context.ALPHA / context.STATISTICS
    assert pytest.approx(stats.norm.isf(share / 2), rel=1e-6) == context.DEVIATIONS


@needs_native
def test_checks_of_gpus_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []
    right = parity.annealed_langevin

    def sampler(*arguments: Any, cuda_graph: bool, **keywords: Any) -> Tensor:
        graphs.append(cuda_graph)
        return right(*arguments, **keywords)

    monkeypatch.setattr(CheckContext, "require_gpu", lambda context: None)
    with pytest.raises(Skipped, match="native serves this device, and cannot be captured"):
        CHECKS["CUDA graph"](QUICK)
    monkeypatch.setattr(native, "capturable", True)
    monkeypatch.setattr(parity, "annealed_langevin", sampler)
    assert CHECKS["CUDA graph"](QUICK)[0] and {True, False} == set(graphs)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    assert CHECKS["another stream"](QUICK)[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Skipped, match="one GPU only"):
        CHECKS["every GPU"](QUICK)


def test_large_batches_are_looked_at_in_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity.large_batch(CPU, 999, 136) == (True, "0 of 52,992 values differ", "none differ")
    right = ops.normal

    def wraps(shape: Any, noise: Any, **options: Any) -> Tensor:
        out = right(shape, noise, **options)
        if len(out) in (1, 999):
            out.view(-1)[2**16 :] = out.view(-1)[: out.numel() - 2**16].clone()
        return out

    monkeypatch.setattr(ops, "normal", wraps)
    assert not parity.large_batch(CPU, 999, 136)[0]
