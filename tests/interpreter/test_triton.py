"""The Triton kernels, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import tolerances
import torch
from addressed import EXACT, SUMS, Batch
from conftest import FIBERS, NATIVE, filled, on_backend
from rounding import probe_terms
from steps import endings, lines_and_masks
from torch import Tensor

import score_kernels
from score_kernels import NoiseKey, ops
from score_kernels.backends import triton
from score_kernels.backends.compiled import native
from score_kernels.noise import _restored

KEY = NoiseKey(2**63 + 5, purpose=3, draw=2**32 - 1, first_sample=2**32 - 2)
SHAPES = [(1, 1), (5, 3), (2, 4), (300, 2), (2, 255), (2, 3, 32, 32), (1, 4099)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_interpreter_runs_the_kernels() -> None:
    assert triton.backend.unavailable() is None
    assert "interpreter" in score_kernels.backends()["triton"]


@pytest.mark.parametrize("backend", ["reference", *NATIVE[:1], *FIBERS, "triton"])
def test_all_backends_have_the_oracle_s_words(backend: str) -> None:
    fields = {name: getattr(KEY, name) for name in ("seed", "purpose", "draw", "first_sample")}
    with on_backend(backend):
        for shape in ((1, 1), (3, 5), (2, 1030)):
            got = ops.words(shape, KEY).numpy()
            assert np.array_equal(got, oracle.words(*shape, **fields))
            got = ops.normal(shape, KEY).double().numpy()
            assert np.abs(got - oracle.normals(*shape, **fields)).max() <= tolerances.NORMAL


def test_a_million_normals_are_native_s_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # A program of the interpreter takes as long for a large tile as for a small one.
    monkeypatch.setattr(triton, "TILE", 2**16)
    got = filled(triton.backend, "normal", (4, 250_000), KEY)
    want = filled(native, "normal", (4, 250_000), KEY)
    differ = int((got != want).sum())
    print(f"normals: {differ} of {got.numel()} differ")
    assert differ == 0


def test_pieces_of_rows_run_over_two_axes_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second axis is full with three; a million elements a row fill no real one."""
    monkeypatch.setattr(triton, "TILE", 4)
    monkeypatch.setattr(triton, "_MOST", 3)
    got = filled(triton.backend, "normal", (2, 130), KEY)
    assert torch.equal(got, filled(native, "normal", (2, 130), KEY))
    x, score = torch.randn(2, 130), torch.randn(2, 130)
    results = [torch.empty(2, 130), torch.empty(2, 130)]
    for out, backend in zip(results, (triton.backend, native), strict=True):
        backend.affine_step(out, x, score, 0.9, 0.2, 0.3, KEY)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", ["uniform", "rademacher"])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_noise_is_native_s_to_the_bit(shape: tuple[int, ...], kind: str) -> None:
    got = filled(triton.backend, kind, shape, KEY)
    assert torch.equal(got, filled(native, kind, shape, KEY))


def close(got: Tensor, want: Tensor, relative: float = tolerances.FP32_RELATIVE) -> None:
    assert got.dtype == want.dtype
    assert (got.double() - want.double()).norm() <= relative * want.double().norm()


def sum_rounding(shape: tuple[int, ...]) -> float:
    """Of the sum of its terms' sizes. The interpreter adds the terms of a piece one after another,
    a GPU as a tree."""
    depth = min(math.prod(shape[1:]), 4 * triton.SUM_TILE) + 16
    return depth * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_update(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, score = torch.randn(shape), torch.randn(shape).to(dtype)
    table = torch.tensor([[1.0, 0.5, 0.7], [0.9, 0.2, 0.3], [0.9, 0.2, 0.0]])
    earlier = KEY.at(KEY.draw - 2)
    for c in (0.3, 0.0):
        got, want = torch.empty(shape), torch.empty(shape)
        triton.backend.affine_step(got, x, score, 0.9, 0.2, c, KEY)
        native.affine_step(want, x, score, 0.9, 0.2, c, KEY)
        close(got, want)
    for t in range(3):
        step = torch.full((), t)
        triton.backend.table_step(got, x, score, table, step, earlier)
        native.table_step(want, x, score, table, step, earlier)
        close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_lines_of_samples_and_known_elements(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, score, known = torch.randn(shape), torch.randn(shape).to(dtype), torch.randn(shape)
    for (table, mask), more in zip(lines_and_masks(shape), endings(shape), strict=False):
        given = None if mask is None else known
        got, want = torch.empty(shape), torch.empty(shape)
        for out, backend in ((got, triton.backend), (want, native)):
            backend.table_step(out, x, score, table, None, KEY, given, mask, *more)
        close(got, want)


def test_past_the_table_the_state_is_nan() -> None:
    x, table = torch.ones(2, 5), torch.ones(2, 3)
    for t in (-1, 2):
        out = torch.zeros(2, 5)
        triton.backend.table_step(out, x, x, table, torch.full((), t), KEY)
        assert out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_score_matching(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, score = torch.randn(shape), torch.randn(shape).to(dtype)
    sigma, weight = torch.rand(shape[0]) + 0.1, torch.rand(shape[0])
    ours, theirs, key = triton.backend, native, KEY
    close(ours.perturb(x, sigma, key), theirs.perturb(x, sigma, key))
    for w in (None, weight):
        close(
            ours.dsm_loss(score, sigma, w, key, False)[0],
            theirs.dsm_loss(score, sigma, w, key, False)[0],
            sum_rounding(shape),
        )
        close(
            ours.dsm_gradient(score, sigma, w, weight, key),
            theirs.dsm_gradient(score, sigma, w, weight, key),
            tolerances.INTERPRETER_ROUNDING[dtype],
        )
    loss, gradient = ours.dsm_loss(score, sigma, weight, key, True)
    close(gradient, theirs.dsm_loss(score, sigma, weight, key, True)[1], 2**-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("shape", [(5, 3), (300, 2), (2, 4099)])
def test_probes(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x, factor = torch.randn(shape), torch.rand(shape[0]) + 0.1
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    ours, theirs, key = triton.backend, native, KEY
    for second, differences in ((None, False), (b, False), (b, True)):
        got = ours.probe_sums(kind, a, second, differences, key)
        want = theirs.probe_sums(kind, a, second, differences, key)
        terms = probe_terms(kind, a, second, differences, KEY)
        assert ((got - want).abs() <= sum_rounding(shape) * terms).all()
    close(ours.probe_scale(kind, factor, shape, key), theirs.probe_scale(kind, factor, shape, key))
    close(ours.probe_shift(kind, x, factor, key), theirs.probe_shift(kind, x, factor, key))


@pytest.mark.parametrize("name", [*EXACT, *SUMS])
def test_rows_with_addresses(name: str) -> None:
    """Those of the native kernels; permuted rows keep their bits."""
    op = {**EXACT, **SUMS}[name]
    for rows, elements in ((9, 3), (3, 132), (2, 1030)):
        batch, order = Batch(rows, elements), torch.randperm(rows)
        want = batch.apply(op)
        with score_kernels.use_backend("triton"):
            got = batch.apply(op)
            assert torch.equal(batch[order].apply(op), got[order])
        if name in EXACT:
            assert torch.equal(got, want)
        else:
            scale = math.sqrt(elements) * want.abs().max() + 1
            assert (got - want).abs().max() <= tolerances.FP32_RELATIVE * scale


def test_bad_addresses_make_their_rows_nan() -> None:
    sample, most = torch.tensor([3, -1, 2**56, 7, 8]), 2**32 - 1
    draw, piece = torch.tensor([0, 0, 0, most, 0]), torch.tensor([0, 0, 0, 0, most])
    packed = torch.stack([sample, draw << 32 | piece], 1)
    bad = _restored(*KEY.at(1)[:4], torch.cat([packed, packed[:1]]))
    good = KEY.at(1).rows(torch.tensor([3] * 5))
    with score_kernels.use_backend("triton"):
        for name in ("words", "normal", "uniform", "rademacher", "langevin", "dsm", "ssm"):
            op, parts = {**EXACT, **SUMS}[name], Batch(5, 12).parts[3:]
            got, want = op(bad, *parts), op(good, *parts)
            assert torch.equal(got[0], want[0])
            assert (got[1:] == -1 if name == "words" else got[1:].isnan()).all(), name


def test_empty_batches() -> None:
    for shape in ((0, 3), (3, 0)):
        x, sigma = torch.zeros(shape), torch.ones(shape[0])
        assert filled(triton.backend, "words", shape, KEY).shape == shape
        assert triton.backend.perturb(x, sigma, KEY).shape == shape
        loss = triton.backend.dsm_loss(x, sigma, None, KEY, False)[0]
        assert torch.equal(loss, torch.zeros(shape[0]))


def test_the_public_functions_on_the_forced_backend() -> None:
    x, sigma = torch.randn(3, 5), torch.rand(3) + 0.1
    score = torch.randn(3, 5, requires_grad=True)
    results = []
    for name in ("triton", "native"):
        with score_kernels.use_backend(name):
            loss = ops.dsm_loss_from_score(score, sigma, KEY).mean()
            (gradient,) = torch.autograd.grad(loss, score)
            sliced = score_kernels.sliced_score_loss(lambda y: -0.1 * y, x, noise=KEY)
            end = score_kernels.annealed_langevin(
                lambda y, s: -y, (3, 5), [1.0, 0.5], steps_per_level=2, step_size=0.01, seed=1
            )
            results.append((loss.detach(), gradient, sliced.detach(), end))
    for got, want in zip(*results, strict=True):
        close(got, want)
