"""Prints the table of a run: what pytest-benchmark timed and what was timed beside it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import score_kernels


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
    names = list(rows[0]["ns"])
    write("")
    write(
        f"machine: {_processor()}; torch {torch.__version__}; "
        f"native: {score_kernels.backends()['native']}"
    )
    write("medians of interleaved rounds, ns per element (us per call in the last column)")
    write(
        f"{'shape':>16} {'threads':>7} "
        + " ".join(f"{n:>9}" for n in names)
        + f" {'eager/':>8} {'compiled/':>9} {'by hand/':>8} {'/floor':>7} {'us/call':>8}"
    )
    for row in rows:
        ns = row["ns"]
        ours = ns["in place"]
        write(
            f"{row['shape']:>16} {row['threads']:>7} "
            + " ".join(f"{ns[n]:9.2f}" for n in names)
            + f" {ns['eager'] / ns['step']:7.1f}x {ns['compiled'] / ns['step']:8.1f}x"
            + f" {ns['by hand'] / ours:7.1f}x {ours / ns['floor']:6.1f}x"
            + f" {ours * row['elements'] / 1e3:8.2f}"
        )
    write(
        "eager/ and compiled/: over langevin_step (a new tensor, as they make one); by hand/ and "
        "/floor: over langevin_step_ (in place)"
    )
