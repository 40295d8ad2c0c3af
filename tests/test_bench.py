"""The benchmark suite: what it writes, and that nothing is measured where a check is red."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as suite
from benchmarks import fused, small
from benchmarks.cases import OPS, SMALL, case
from benchmarks.table import COLUMNS
from score_kernels.cli import selfcheck

QUICK = ["--quick", "--no-compile", "--rounds", "1"]


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "selfcheck", lambda device, quick: [])


@pytest.mark.parametrize("op", OPS)
def test_every_variant_runs(op: str) -> None:
    made = case(op, SMALL, "float32", torch.device("cpu"))
    assert {"ours", "eager"} <= set(made.variants)
    with torch.set_grad_enabled(made.grad):
        for name, step in made.variants.items():
            if not name.startswith("compiled"):
                step()


def test_rows_are_added_to_one_file(
    no_checks: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--out", str(tmp_path), *QUICK, "--op", "perturb", "--op", "scheduler chain"]
    for count in (1, 2):
        assert suite.main(arguments) == 0
        with open(tmp_path / "bench.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        found = [(row["op"], row["variant"], row["shape"]) for row in rows]
        assert found.count(("perturb", "ours", "64x3x128x128")) == count
        assert found.count(("scheduler chain", "ours in diffusers", "1x64")) == count
    assert set(rows[0]) == set(COLUMNS) and all(None not in row.values() for row in rows)
    for row in rows:
        low, median, high = (float(row[k]) for k in ("p20_us", "p50_us", "p80_us"))
        assert 0 < low <= median <= high
        assert float(row["over_ours"]) == 1 or row["variant"] != "ours"
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert "x floor" in capsys.readouterr().out


def test_nothing_is_measured_where_a_check_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    red = selfcheck.Check("golden normals", False, "3 of 16 values differ", "none differ")
    monkeypatch.setattr(suite, "selfcheck", lambda device, quick: [red])
    assert suite.main(["--out", str(tmp_path), *QUICK, "--op", "normal"]) == 1
    assert "golden normals: 3 of 16 values differ" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_small_calls(no_checks: None, capsys: pytest.CaptureFixture) -> None:
    assert suite.main(["small", "--threads", "1", *QUICK]) == 0
    out = capsys.readouterr().out
    assert all(row in out for row in small.ROWS) and "score in bfloat16" in out


def test_rows_with_addresses(no_checks: None, capsys: pytest.CaptureFixture) -> None:
    assert suite.main(["rows", "--threads", "1", *QUICK]) == 0
    assert "4096x3" in capsys.readouterr().out


def test_wrong_input_is_named(
    no_checks: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bench.csv").write_text("a,b\n1,2\n")
    for arguments, message in (
        (["--op", "sorting"], "langevin_step"),
        (["--rounds", "0"], "expected at least 1"),
        ([*QUICK, "--op", "perturb"], "bench.csv: has other columns"),
    ):
        with pytest.raises(SystemExit):
            suite.main(["--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err
    assert (tmp_path / "bench.csv").read_text() == "a,b\n1,2\n"


def test_wrong_device_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--device", "tpu"])
    assert "device: got 'tpu', expected cpu, cuda" in capsys.readouterr().err


def test_fused_chains(
    no_checks: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_lattice = fused.Case("lattice", fused.lattice, (3, 16), 1, 1, energy=True)
    monkeypatch.setattr(fused, "cases", lambda device: [small_lattice])
    assert suite.main(["fused", "--threads", "1", *QUICK]) == 0
    heading, line = capsys.readouterr().out.splitlines()[-2:]
    assert all(name in heading for name in fused.COLUMNS)
    assert re.fullmatch(r"lattice +3 +1( +[0-9.]+ x[0-9.]+){4}", line)
