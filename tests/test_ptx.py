"""A part of tests/ptx: PTX of the CUDA and the Triton kernels, executed on a CPU, no GPU needed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
TRITON = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")


@pytest.mark.parametrize(
    "family, target",
    [pytest.param("cuda", "100", marks=NVCC), pytest.param("triton", "90", marks=TRITON)],
)
def test_updates_and_dsm_are_native_s(family: str, target: str, tmp_path: Path) -> None:
    """Ragged and whole rows, fp32 and bf16 scores: elements to the bit, sums to rounding."""
    done = subprocess.run(
        ["tests/ptx/run", family, target, "part"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PTX_BUILD": str(tmp_path)},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "values that differ: none" in done.stdout
