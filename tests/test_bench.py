"""`score-kernels bench`: what it writes, and that a red check leaves an op out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.cases import OPS
from benchmarks.table import COLUMNS
from score_kernels.cli import main as cli
from score_kernels.cli import selfcheck

QUICK = ["--quick", "--no-compile", "--rounds", "1"]


def test_every_op_has_checks_that_exist() -> None:
    assert all(set(checks) <= set(selfcheck.CHECKS) for _, checks, _ in OPS.values())


def test_rows_are_added_to_one_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "bench",
        "--out",
        str(tmp_path),
        *QUICK,
        "--op",
        "perturb",
        "--op",
        "scheduler chain",
    ]
    for count in (1, 2):
        assert cli.main(arguments) == 0
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


def test_a_red_check_leaves_an_op_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    red = selfcheck.Check("golden normals", False, "3 of 16 values differ", "none differ")
    right = selfcheck.only
    monkeypatch.setattr(
        selfcheck,
        "only",
        lambda kit, names: [red, *right(kit, set(names) - {red.name})],
    )
    arguments = ["bench", "--out", str(tmp_path), *QUICK, "--op", "normal", "--op", "perturb"]
    assert cli.main(arguments) == 1
    assert "normal: not measured, failed: golden normals" in capsys.readouterr().out
    with open(tmp_path / "bench.csv", newline="") as file:
        assert {row["op"] for row in csv.DictReader(file)} == {"perturb"}


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["--op", "sorting"], "names: got 'sorting', expected some of: langevin_step"),
        (["--rounds", "0"], "rounds: got 0, expected at least 1"),
        (["--device", "tpu"], "device: got 'tpu', expected cpu, cuda"),
    ):
        assert cli.main(["bench", "--out", str(tmp_path), *arguments]) != 0
        assert message in capsys.readouterr().err
    (tmp_path / "bench.csv").write_text("a,b\n1,2\n")
    assert cli.main(["bench", "--out", str(tmp_path), *QUICK, "--op", "perturb"]) != 0
    assert "bench.csv: has other columns" in capsys.readouterr().err
    assert (tmp_path / "bench.csv").read_text() == "a,b\n1,2\n"
