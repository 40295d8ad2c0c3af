"""The headers that CPU and CUDA share, compiled and run as plain C++."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fibers.build import COMPILER, FMA

HERE = Path(__file__).parent


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_every_word_gives_the_contract_s_normal(tmp_path: Path) -> None:
    program = tmp_path / "exhaustive"
    subprocess.run(
        [
            *COMPILER,
            "-std=c++17",
            "-O2",
            *FMA,
            "-ffp-contract=off",
            "-fno-math-errno",
            str(HERE / "host/exhaustive.cpp"),
            "-o",
            str(program),
        ],
        check=True,
    )
    done = subprocess.run(
        [program, HERE / "data/philox4x32_10_kat.txt"], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    # Nothing was left out: every float that a word can round to.
    assert "radius: 83886081 values, 0 differ" in done.stdout
    assert "known answers: 3 rows, 0 wrong" in done.stdout
