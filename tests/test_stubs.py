"""The types of the compiled modules are those that `make stubs` writes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import stubgen

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_stubs_are_fresh(name: str, tmp_path: Path) -> None:
    module = f"score_kernels.{name}"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")
    stubgen.main(["--quiet", "--inspect-mode", "-m", module, "-o", str(tmp_path)])
    made, kept = (folder / f"score_kernels/{name}.pyi" for folder in (tmp_path, ROOT))
    ruff = [sys.executable, "-m", "ruff", "format", "--quiet", "--config", "pyproject.toml"]
    subprocess.run([*ruff, str(made)], check=True, cwd=ROOT)
    assert kept.read_text() == made.read_text(), f"{kept} is stale: make stubs"
