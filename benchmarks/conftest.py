"""Checks before it measures; prints what pytest-benchmark timed and what was timed beside it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import score_kernels
from score_kernels.cli.selfcheck import selfcheck


def pytest_sessionstart() -> None:
    """No figure of a library that computes something else."""
    red = [check for check in selfcheck("cpu", quick=True) if check.ok is False]
    if red:
        found = "; ".join(f"{check.name}: {check.figure}" for check in red)
        pytest.exit(f"nothing is measured, score-kernels selfcheck fails: {found}", returncode=1)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return f"{model or platform.processor()}, {torch.get_num_threads()} threads at most"


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    rows = [b.extra_info for b in config._benchmarksession.benchmarks if "ns" in b.extra_info]
    if not rows:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"machine: {_processor()}; torch {torch.__version__}; "
        f"native: {score_kernels.backends()['native']}"
    )
    write("medians of interleaved rounds, ns per element; x: quotients; us: a call of the last one")
    header = None
    for row in rows:
        columns = [*row["ns"], *row["ratios"]]
        if columns != header:
            header = columns
            names = " ".join(f"{name:>12}" for name in columns)
            write(f"{'shape':>16} {'threads':>7} {names} {'us':>9}")
        figures = [f"{v:12.2f}" for v in row["ns"].values()]
        figures += [f"{v:11.1f}x" for v in row["ratios"].values()]
        write(f"{row['shape']:>16} {row['threads']:>7} {' '.join(figures)} {row['us']:9.2f}")
