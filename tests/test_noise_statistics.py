"""The statistics of tools/noise_statistics against SciPy, enumeration and planted defects.

What they say of the library's own noise at a depth worth its time is `make stats`, not a test.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
from scipy import integrate, special, stats

from score_kernels import NoiseKey, ops
from tools.noise_statistics import cli, laws, words
from tools.noise_statistics.dependence import Correlations
from tools.noise_statistics.distribution import (
    BINS,
    Cells,
    Distribution,
    Moments,
    goodness_of_fit,
    moment_variance,
    normal_moment,
)
from tools.noise_statistics.findings import ALPHA, Finding, failed, level
from tools.noise_statistics.run import Result, run
from tools.noise_statistics.streams import Source, group, native, replace

ROOT = Path(__file__).parent.parent
COUNT, SIZE = 1 << 20, 1 << 16


def numpy_normals(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    generator = np.random.default_rng(list(key[:4]))
    return generator.standard_normal((rows, elements), dtype=np.float32)


def stretched(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    """Of variance 1.01."""
    return numpy_normals(rows, elements, key) * np.float32(math.sqrt(1.01))


def clipped(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    return numpy_normals(rows, elements, key).clip(-4, 4)


def rounded(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    """To half precision."""
    return numpy_normals(rows, elements, key).astype(np.float16).astype(np.float32)


def linked(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    """Each element has a hundredth of the one three before it."""
    z = numpy_normals(rows, elements, key).ravel()
    z[3:] = 0.01 * z[:-3] + np.float32(math.sqrt(1 - 1e-4)) * z[3:]
    return z.reshape(rows, elements)


def linked_in_size(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    """Every fiftieth pair has one absolute value, with signs of their own."""
    z = numpy_normals(rows, elements, key).ravel()
    z[1::100] = np.copysign(z[::100], z[1::100])
    return z.reshape(rows, elements)


def blind_to_draws(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    return numpy_normals(rows, elements, key.at(0))


def half_a_sample(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    """One block of one group is that of another group."""
    if key.first_sample and key.seed % 2 and key.draw % 2 and key.purpose % 2:
        key = group(0, 1907, SIZE).keys[0, 1, 1]
    return numpy_normals(rows, elements, key)


def blind_to_high_samples(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
    return numpy_normals(rows, elements, key.for_samples(key.first_sample % 2**32))


@cache
def result_of(source: Source) -> Result:
    return run(COUNT, 1907, source=source, size=SIZE, progress=False)


@pytest.mark.parametrize("source", [numpy_normals, native])
def test_good_normals_pass(source: Source) -> None:
    result = result_of(source)
    assert result.count == COUNT and len(result.findings) > 60
    assert not failed(result.findings)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (stretched, {"mean of z^2", "mean of z^4"}),
        (clipped, {"above 4", "below -4", "largest", "smallest"}),
        (rounded, {f"chi-square of {BINS} bins"}),
        (linked, {"correlation, elements 3 apart"}),
        (linked_in_size, {"correlation, the two of a pair, squares"}),
        (blind_to_draws, {"correlation, consecutive draws", "stretches of 4096 that repeat"}),
        (half_a_sample, {"stretches of 4096 that repeat"}),
        (blind_to_high_samples, {"correlation, samples 2^32 apart"}),
    ],
)
def test_planted_defects_are_found(source: Source, found: set[str]) -> None:
    assert found <= {f.name for f in failed(result_of(source).findings)}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_numbers_that_are_none_fail(value: float) -> None:
    def broken(rows: int, elements: int, key: NoiseKey) -> np.ndarray:
        z = numpy_normals(rows, elements, key)
        z[0, 0] = value
        return z if value else 0 * z

    bad = {f.name for f in failed(run(1, 0, source=broken, size=1 << 12, progress=False).findings)}
    assert {"mean of z^2", "largest"} <= bad


def test_tails_clipped_at_5_deviations_are_found() -> None:
    expected, p = laws.tail(5, 10**8, 0)
    assert expected == pytest.approx(10**8 * stats.norm.sf(5), rel=1e-12)
    assert p < ALPHA / 100 and laws.extreme_p(5.0, 10**8) < ALPHA / 100
    assert laws.tail(5, 10**8, 29)[1] > 0.5 and laws.extreme_p(5.6, 10**8) > 0.1


def test_moments() -> None:
    z = numpy_normals(1, 100_001, NoiseKey(1)).ravel()
    moments = Moments()
    for part in np.array_split(z, [10, 50_000]):
        moments.add(part)
    assert moments.count == len(z)
    for k, total in zip(moments.ORDERS, moments.sums, strict=True):
        powers = z.astype(np.longdouble) ** k
        assert abs(total - powers.sum()) <= 1e-12 * abs(powers).sum()
        assert normal_moment(k) == pytest.approx(stats.norm.moment(k), abs=1e-9)
        assert moment_variance(k) == pytest.approx(
            stats.norm.moment(2 * k) - stats.norm.moment(k) ** 2, rel=1e-9
        )


def test_goodness_of_fit() -> None:
    for seed, shift in itertools.product((2, 3), (0.0, 0.2, -9.0)):
        z = np.sort(numpy_normals(1, 1001, NoiseKey(seed)).ravel() + np.float32(shift))
        distance, statistic = goodness_of_fit(z)
        exact = z.astype(np.float64)
        assert distance == pytest.approx(stats.kstest(exact, "norm").statistic, rel=1e-12)
        assert laws.kolmogorov(distance, len(z)) == pytest.approx(
            stats.kstest(exact, "norm").pvalue, rel=1e-9
        )
        # Of any sample, and without fitting: SciPy does not give this figure by itself.
        known = {"loc": 0.0, "scale": 1.0}
        anderson = stats.goodness_of_fit(
            stats.norm, exact, known_params=known, statistic="ad", n_mc_samples=1
        )
        assert statistic == pytest.approx(anderson.statistic, rel=1e-9)


def imhof(x: float) -> float:
    """P(sum_j chi_j^2 / (j (j + 1)) > x), the limit law of A^2, by Imhof's integral (1961)."""
    j = np.arange(1, 400)
    weight = 1 / (j * (j + 1.0))
    # All further terms by their mean.
    x -= 1 / (len(j) + 1)

    def integrand(t: float) -> float:
        angle = 0.5 * np.arctan(weight * t).sum() - x * t / 2
        return math.sin(angle) / t / math.exp(0.25 * np.log1p((weight * t) ** 2).sum())

    return 0.5 + integrate.quad(integrand, 0, 800, limit=1000)[0] / math.pi


@pytest.mark.parametrize("x", [0.2, 0.5, 1.0, 1.9, 2.1, 4.0, 8.0])
def test_anderson_darling_p_value(x: float) -> None:
    assert laws.anderson_darling(x) == pytest.approx(imhof(x), abs=3e-5)


def test_anderson_darling_percentage_points() -> None:
    """Of a fully known law, as Stephens (1986) prints them."""
    for x, p in ((1.933, 0.1), (2.492, 0.05), (3.070, 0.025), (3.880, 0.01)):
        assert laws.anderson_darling(x) == pytest.approx(p, abs=3e-4)
    assert laws.anderson_darling(0) == 1


def test_chi_square() -> None:
    counts, expected = np.array([8, 15, 27]), np.array([10.0, 16.0, 24.0])
    figure, p = laws.chi_square(counts, expected)
    known = stats.chisquare(counts, expected)
    assert figure == pytest.approx(known.statistic, rel=1e-12)
    assert p == pytest.approx(2 * min(known.pvalue, 1 - known.pvalue), rel=1e-9)
    # Too good to be true.
    assert laws.chi_square(np.full(1000, 100), np.full(1000, 100.0))[1] < 1e-12


def test_counts_of_the_distribution() -> None:
    z = np.sort(numpy_normals(1, SIZE, NoiseKey(4)).ravel())
    distribution = Distribution()
    distribution.add(z[: SIZE // 2].copy())
    distribution.add(z[SIZE // 2 :].copy())
    edges = np.concatenate(([-np.inf], distribution.edges, [np.inf]))
    # np.histogram's bins are closed on the left; ours on the right.
    np.testing.assert_array_equal(distribution.histogram[::-1], np.histogram(-z, -edges[::-1])[0])
    assert distribution.above[0] == (z > 3).sum() and distribution.below[0] == (z < -3).sum()
    assert (distribution.smallest, distribution.largest) == (z[0], z[-1])
    # Each half is no normal sample at all.
    assert max(distribution.kolmogorov + distribution.anderson) < 1e-12


def test_bins_are_equally_likely() -> None:
    """Up to where fp32 can put their edges: half a spacing of at most 2^-23, times the density."""
    edges = Distribution().edges
    below = laws.below_rounded(edges)
    assert abs(below - np.arange(1, BINS) / BINS).max() < 0.4 * 2.0**-23
    for edge, probability in zip(edges[::9001], below[::9001], strict=True):
        middle = (float(edge) + float(np.nextafter(edge, np.float32(9)))) / 2
        assert np.float32(middle - 1e-12) <= edge < np.float32(middle + 1e-12 * (1 + abs(middle)))
        assert probability == stats.norm.cdf(middle)


def test_cells() -> None:
    z = numpy_normals(1, 4000, NoiseKey(5)).ravel()
    cells = Cells()
    cells.add(z)
    part = np.minimum((special.ndtr(z.astype(np.float64)) * 8).astype(int), 7)
    for shift, counts in cells.counts.items():
        expected = np.zeros_like(counts)
        for start in range(shift, len(z) - 3, 4):
            a, b, c, d = part[start : start + 4]
            expected[((a * 8 + b) * 8 + c) * 8 + d] += 1
        np.testing.assert_array_equal(counts, expected)


def test_correlations() -> None:
    block = numpy_normals(50, 400, NoiseKey(6))
    correlations = Correlations()
    correlations.add_within(block)
    z = block.astype(np.float64)
    sums = {
        "elements 3 apart": (z.ravel()[:-3], z.ravel()[3:]),
        "the two of a pair": (z[:, ::2].ravel(), z[:, 1::2].ravel()),
        "consecutive samples": (z[:-1].ravel(), z[1:].ravel()),
    }
    for name, (a, b) in sums.items():
        pairs, plain, squares = correlations.sums[name]
        assert pairs == len(a)
        # Sums of 20,000 numbers in fp32, next to deviations of 141 and 283.
        assert plain == pytest.approx((a * b).sum(), abs=0.1)
        assert squares == pytest.approx(((a**2 - 1) * (b**2 - 1)).sum(), abs=0.1)
    same = Correlations()
    same.add("itself", block.ravel(), block.ravel())
    one, of_squares = same.findings()
    assert float(one.figure) == pytest.approx(1, abs=0.05) and one.p < 1e-12
    assert float(of_squares.figure) == pytest.approx(1, abs=0.1) and of_squares.p < 1e-12


def test_tails_of_the_contract_map() -> None:
    for threshold in (5.0, 6.0):
        word = np.arange(2**32 * stats.norm.sf(threshold) * 40)
        r = np.sqrt(-2 * np.log(oracle.uniforms_of(word).astype(np.float64)))
        beyond = np.arccos(threshold / r[r > threshold]).sum() / math.pi / 2**32
        assert laws.map_tail(threshold) == pytest.approx(beyond, rel=1e-12)
    # Only the smallest word reaches so far: u = 2^-33.
    farthest = math.sqrt(66 * math.log(2))
    assert laws.map_tail(6.7) == pytest.approx(math.acos(6.7 / farthest) / math.pi / 2**32)
    assert laws.map_tail(6.77) == 0
    assert laws.map_tail(4) == pytest.approx(stats.norm.sf(4), rel=1e-4)


def test_the_table_of_tails(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tails"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[-1][0] == "6.77" and lines[-1][2:] == ["0", "-1"]
    assert all(abs(float(line[3])) < 0.03 for line in lines[:-1])


@pytest.mark.parametrize("index", [0, 1, 5, 200])
def test_groups(index: int) -> None:
    g = group(index, 2**64 - 1, 1 << 20)
    assert g.rows * g.elements == 1 << 20
    base = g.keys[0, 0, 0]
    assert len(set(g.keys.values())) == 8
    assert g.keys[1, 0, 0] == replace(base, seed=(base.seed + 1) % 2**64)
    assert g.keys[0, 1, 0] == base.at(base.draw + 1)
    assert g.keys[0, 0, 1] == base.for_purpose(base.purpose + 1)
    assert g.far["samples 2^32 apart"].first_sample == base.first_sample + 2**32
    for field in ("seed", "draw", "purpose"):
        far = g.far[f"{field}s one bit apart"]
        assert (getattr(far, field) ^ getattr(base, field)).bit_count() == 1
        assert replace(far, **{field: getattr(base, field)}) == base
    moved = g.far["samples one bit apart"].first_sample
    assert (moved ^ base.first_sample).bit_count() == 1
    assert abs(moved - base.first_sample) >= g.rows
    assert group(index + 1, 2**64 - 1, 1 << 20).keys[0, 0, 0].first_sample >= (
        base.first_sample + g.rows
    )


def test_levels_share_alpha_and_nan_fails() -> None:
    findings = [Finding("a", "", "", 0.5), Finding("b", "", "", math.nan)]
    findings.append(Finding("c", "", "", ALPHA / 2))
    assert level(findings) == ALPHA / 3
    assert [f.name for f in failed(findings)] == ["b"]


def test_the_same_seed_gives_the_same_findings() -> None:
    first, again, other = (
        run(1, seed, size=1 << 12, progress=False).findings for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("source", [numpy_normals, stretched])
def test_the_command(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def small(count: int, seed: int) -> Result:
        assert count == 10**9
        return result_of(source)

    monkeypatch.setattr(cli, "run", small)
    json_file, markdown, picture = (tmp_path / name for name in ("a.json", "a.md", "a.png"))
    options = ["--json", str(json_file), "--markdown", str(markdown), "--picture", str(picture)]
    code = cli.main(["--count", "1e9", *options])
    found = json.loads(json_file.read_text())
    bad = source is stretched
    assert code == int(bad) == int("mean of z^2" in found["failed"])
    assert found["count"] == COUNT and found["alpha"] == ALPHA
    table = capsys.readouterr().out
    assert ("FAILED" in table) == ("FAILED" in markdown.read_text()) == bad
    assert all(f["name"] in table and 0 <= f["p"] <= 1 for f in found["findings"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--count=0", "--count=nan", "--count=many", "--seed=-1"])
def test_wrong_options(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([option])
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err


KEY = NoiseKey(2**64 - 3, purpose=7, draw=11, first_sample=2**32 - 2)


def test_streams_are_the_words_of_the_contract() -> None:
    chunks = {name: order(KEY) for name, order in words.ORDERS.items()}
    first = {name: next(stream) for name, stream in chunks.items()}
    for chunk in first.values():
        assert chunk.dtype == np.dtype("<u4") and chunk.shape == (words.CHUNK,)

    def block(key: NoiseKey) -> list[int]:
        return ops.words((1, 4), key).ravel().tolist()

    for i in (0, 1, 3, 700):
        sample = KEY.for_samples(KEY.first_sample + i)
        seed = replace(KEY, seed=(KEY.seed + i) % 2**64)
        at = slice(4 * i, 4 * i + 4)
        assert first["samples"][at].tolist() == block(sample)
        assert first["draws"][at].tolist() == block(KEY.at(KEY.draw + i))
        assert first["seeds"][at].tolist() == block(seed)
    np.testing.assert_array_equal(
        first["elements"], ops.words((1, words.ELEMENTS), KEY).numpy().ravel()
    )
    # The second sample starts after all keys of the first, or with the second chunk.
    second = KEY.for_samples(KEY.first_sample + 1)
    for name in ("draws", "seeds"):
        assert first[name][4 * words.STEPS :][:4].tolist() == block(second)
    assert next(chunks["elements"])[:4].tolist() == block(second)
    later = KEY.for_samples(KEY.first_sample + words.CHUNK // 4)
    assert next(chunks["samples"])[:4].tolist() == block(later)


def test_the_stream_of_the_command_ends_quietly() -> None:
    command = [sys.executable, "-m", "tools.noise_statistics", "words", "--order", "samples"]
    with subprocess.Popen(
        [*command, "--seed", "5"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as stream:
        assert stream.stdout is not None and stream.stderr is not None
        got = stream.stdout.read(64)
        stream.stdout.close()
        assert stream.stderr.read() == b""
    assert stream.returncode == 0
    expected = oracle.words(4, 4, seed=5, purpose=0, draw=0, first_sample=0)
    assert got == expected.astype("<u4").tobytes()
