"""The reference's words to the bit against the oracle, its normals against float64; keys.

That every backend has the reference's bits is a check of selfcheck.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import tolerances
import torch
from conftest import BACKENDS, on_backend

import score_kernels
from score_kernels import NoiseKey, ops
from score_kernels.backends import reference
from score_kernels.noise import Purpose, fresh_seed

# Odd sizes, one block and less, several tiles, samples that carry into the high word inside a
# vector, and the ends of every range.
KEYS = [
    {"seed": 0, "purpose": 0, "draw": 0, "first_sample": 0},
    {"seed": 2**64 - 1, "purpose": 255, "draw": 2**32 - 1, "first_sample": 2**56 - 90},
    {"seed": 0x0123456789ABCDEF, "purpose": 7, "draw": 99, "first_sample": 2**32 - 3},
]
SIZES = [(1, 1), (7, 1), (90, 1), (5, 2), (64, 2), (33, 3), (6, 4), (9, 5), (3, 7), (5, 63)]
SIZES += [(4, 64), (3, 130), (2, 253), (2, 257), (2, 1023), (2, 1025), (1, 4103)]


def test_oracle_gives_the_published_answers() -> None:
    assert len(oracle.KNOWN_ANSWERS) == 3
    for row in oracle.KNOWN_ANSWERS:
        got = oracle.philox([np.array([c]) for c in row[:4]], (row[4], row[5]))
        assert [int(w[0]) for w in got] == row[6:]


def test_reference_gives_the_published_answers() -> None:
    for c0, c1, c2, c3, k0, k1, *answer in oracle.KNOWN_ANSWERS:
        block, sample = torch.tensor([c0]), torch.tensor([(c3 & 0xFFFFFF) << 32 | c2])
        draw, key = torch.tensor([c1]), (k1 << 32 | k0, c3 >> 24, 0, 0, None)
        words = reference._philox(block, draw, sample, key)
        assert words[0].tolist() == answer


@pytest.mark.parametrize("key", KEYS, ids=["zero", "ends", "carry"])
@pytest.mark.parametrize("rows, elements", SIZES)
def test_noise_equals_the_oracle(rows: int, elements: int, key: dict[str, int]) -> None:
    shape, noise = (rows, elements), NoiseKey(**key)
    words = oracle.words(rows, elements, **key)
    normals = oracle.normals(rows, elements, **key)
    with on_backend("reference"):
        got = ops.words(shape, noise)
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(got.numpy(), words)
        z = ops.normal(shape, noise).double().numpy()
        np.testing.assert_allclose(z, normals, rtol=0, atol=tolerances.NORMAL)
        u = ops.uniform(shape, noise).numpy()
        np.testing.assert_array_equal(u, oracle.uniforms_of(words))
        assert u.min() > 0 and u.max() <= 1
        np.testing.assert_array_equal(ops.rademacher(shape, noise).numpy(), 1 - 2 * (words >> 31))


def test_golden_words_and_normals(backend: str) -> None:
    """The contract does not change from release to release."""
    golden = json.loads((Path(__file__).parent / "data/golden.json").read_text())
    assert len(golden) == 6
    for case in golden:
        key, shape = NoiseKey(**case["key"]), case["shape"]
        assert ops.words(shape, key).flatten().tolist() == case["words"]
        want = [float.fromhex(z) for z in case["normals"]]
        assert ops.normal(shape, key).flatten().tolist() == want


def test_rank_and_shape_do_not_enter() -> None:
    key = NoiseKey(13)
    flat = ops.normal((4, 60), key)
    for shape in ((4, 3, 4, 5), (4, 60, 1), (4, 1, 2, 30, 1)):
        assert torch.equal(ops.normal(shape, key).flatten(1), flat)
    assert torch.equal(ops.normal((4,), key), ops.normal((4, 1), key)[:, 0])


def test_other_dtypes_hold_the_same_values(backend: str) -> None:
    key = NoiseKey(14)
    for fill in (ops.normal, ops.uniform, ops.rademacher):
        z = fill((3, 37), key)
        assert z.dtype == torch.float32
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            got = fill((3, 37), key, dtype=dtype)
            assert got.dtype == dtype and torch.equal(got, z.to(dtype))


def test_noise_is_made_on_the_device_that_is_named() -> None:
    for fill in (ops.words, ops.normal, ops.uniform, ops.rademacher):
        assert fill((3, 37), NoiseKey(14), device="meta").is_meta


def test_empty_batches(backend: str) -> None:
    for shape in ((0,), (0, 5), (3, 0), (3, 0, 7), (0, 0)):
        for fill in (ops.words, ops.normal, ops.uniform, ops.rademacher):
            assert fill(shape, NoiseKey(1)).shape == shape


def test_purposes_are_distinct_and_fixed() -> None:
    assert {p.name: p.value for p in Purpose} == {
        "USER": 0,
        "PRIOR": 1,
        "LANGEVIN": 2,
        "DSM_LEVEL": 3,
        "DSM_NOISE": 4,
        "DATA_ORDER": 5,
        "TORCH_SEED": 6,
        "KNOWN": 7,
        "TRACE": 8,
        "DISTANCE": 9,
        "SSM_PROBE": 64,
    }


def test_key_methods() -> None:
    key = NoiseKey(5, purpose=1, draw=2, first_sample=3)
    assert key.at(9) == NoiseKey(5, purpose=1, draw=9, first_sample=3)
    assert key.for_samples(8) == NoiseKey(5, purpose=1, draw=2, first_sample=8)
    assert key.for_purpose(7) == NoiseKey(5, purpose=7, draw=2, first_sample=3)
    assert NoiseKey(np.int64(4)) == NoiseKey(4) and hash(key) == hash(key.at(2))
    with pytest.raises(AttributeError):
        key.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("seed", 1.5, TypeError),
        ("seed", True, TypeError),
        ("seed", None, TypeError),
        ("seed", "1", TypeError),
        ("purpose", 256, ValueError),
        ("purpose", -1, ValueError),
        ("draw", 2**32, ValueError),
        ("draw", -1, ValueError),
        ("draw", torch.tensor(3), TypeError),
        ("first_sample", 2**56, ValueError),
        ("first_sample", -1, ValueError),
    ],
)
def test_key_refuses(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        NoiseKey(**{"seed": 0, field: value})  # type: ignore[arg-type]
    if field == "draw":
        with pytest.raises(error, match="draw"):
            NoiseKey(0).at(value)  # type: ignore[arg-type]


def test_torch_s_seed_rules_the_default_seed() -> None:
    torch.manual_seed(3)
    first = [fresh_seed() for _ in range(100)]
    torch.manual_seed(3)
    assert [fresh_seed() for _ in range(100)] == first
    assert len(set(first)) == 100 and all(0 <= s < 2**64 for s in first)
    # All 64 bits take both values.
    assert np.bitwise_or.reduce(np.array(first, np.uint64)) == 2**64 - 1
    assert np.bitwise_and.reduce(np.array(first, np.uint64)) == 0


def test_the_reference_stands_for_a_missing_native_backend() -> None:
    assert set(score_kernels.backends()) == {"cuda", "native", "triton", "reference"}
    assert BACKENDS[0] == "reference"
