"""score_kernels.triton in kernels of users, by Triton's interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from score_kernels import NoiseKey, ops
from score_kernels import triton as skt
from tools import run_docs

PAGE = Path(__file__).parents[2] / "docs/kernels.md"
KINDS = {"words": torch.int64, "normal": None, "uniform": None, "rademacher": None}
# With numbers that Triton makes constants of (1), and those that need all of their bits.
KEYS = [
    NoiseKey(1, purpose=0, draw=1),
    NoiseKey(2**64 - 1, purpose=255, draw=2**32 - 1, first_sample=2**56 - 3),
    NoiseKey(2**31, purpose=7, draw=2**31, first_sample=2**32 - 1),
]


@triton.jit
def row_kernel(out, elements, seed, purpose, draw, first, KIND: tl.constexpr, BLOCKS: tl.constexpr):
    sample = first + tl.program_id(0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    values = made(seed, purpose, draw, sample, block, KIND)
    element = tl.program_id(1) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(out + tl.program_id(0) * elements + element, values, mask=element < elements)


@triton.jit
def tile_kernel(
    out, rows, elements, seed, purpose, draw, first, KIND: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.arange(0, 8)[:, None]
    block = tl.arange(0, BLOCKS)[None, :]
    values = made(seed, purpose, draw, first + row, block, KIND)
    element = tl.arange(0, 4 * BLOCKS)[None, :]
    tl.store(out + row * elements + element, values, mask=(row < rows) & (element < elements))


@triton.jit
def made(seed, purpose, draw, sample, block, KIND: tl.constexpr):
    if KIND == "words":
        return skt.words(seed, purpose, draw, sample, block)
    elif KIND == "normal":
        return skt.normal(seed, purpose, draw, sample, block)
    elif KIND == "uniform":
        return skt.uniform(seed, purpose, draw, sample, block)
    else:
        return skt.rademacher(seed, purpose, draw, sample, block)


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_device_functions_have_the_bits_of_ops(kind: str, key: NoiseKey) -> None:
    dtype = KINDS[kind] or torch.float32
    fields = key.seed, key.purpose, key.draw, key.first_sample
    for elements in (37, 64):
        want = getattr(ops, kind)((3, elements), key)
        by_rows, by_tile = (torch.full((3, elements), -7, dtype=dtype) for _ in range(2))
        options = {"KIND": kind, "enable_fp_fusion": False}
        row_kernel[3, 4](by_rows, elements, *fields, BLOCKS=4, **options)
        tile_kernel[(1,)](by_tile, 3, elements, *fields, BLOCKS=16, **options)
        assert torch.equal(by_rows, want)
        assert torch.equal(by_tile, want)


def test_the_dropout_of_the_page(tmp_path: Path) -> None:
    found = run_docs.blocks(PAGE.read_text())
    (code,) = (block.code for block in found if block.code.startswith("# dropout.py\n"))
    (tmp_path / "dropout.py").write_text(code)
    spec = importlib.util.spec_from_file_location("dropout", tmp_path / "dropout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.randn(3, 1030)
    kept = ops.uniform(x.shape, NoiseKey(5, draw=1)) > 0.25
    assert torch.equal(module.dropout(x, 0.25, seed=5, step=1), torch.where(kept, x / 0.75, 0))
