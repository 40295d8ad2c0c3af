"""The benchmark suite: ops and samplers on the machine at hand, against PyTorch and peers.

    python -m benchmarks          every op and chain; writes bench.csv and bench.png
    python -m benchmarks small    what calls on 64 elements cost
    python -m benchmarks rows     what the addresses of rows cost
    python -m benchmarks steps    steps with clamps, wraps and preconditioners
    python -m benchmarks fused    chains whose score is fused with them

Nothing is measured where ``score-kernels selfcheck`` finds a fault. All variants of a case take
turns, so compare within one run, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import OPS
from benchmarks.fused import fused
from benchmarks.rows import rows
from benchmarks.small import small
from benchmarks.steps import steps
from benchmarks.table import bench
from score_kernels.cli.selfcheck import selfcheck

PARTS = {"small": small, "rows": rows, "steps": steps, "fused": fused}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a check fails and nothing is measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=("table", *PARTS), default="table")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder to write to")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--op", action="append", choices=OPS, help="only this one; may be repeated")
    parser.add_argument("--threads", type=int, help="default: torch's; of the parts: 1, then 2")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each variant")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, 5 rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.threads or 1) < 1:
        parser.error("--rounds, --threads: expected at least 1")
    before = torch.get_num_threads()
    rounds = 5 if arguments.quick else arguments.rounds
    try:
        red = [check for check in selfcheck(arguments.device, quick=True) if check.ok is False]
        if red:
            found = "; ".join(f"{check.name}: {check.figure}" for check in red)
            print(f"nothing is measured, score-kernels selfcheck fails: {found}")
            return 1
        device = torch.device(arguments.device)
        if arguments.what != "table":
            threads = [arguments.threads] if arguments.threads else [1, 2]
            PARTS[arguments.what](device, threads=threads, rounds=rounds)
        else:
            torch.set_num_threads(arguments.threads or before)
            names, compiled = arguments.op or list(OPS), not arguments.no_compile
            bench(
                arguments.out, names, device,
                rounds=rounds, quick=arguments.quick, compiled=compiled,
            )  # fmt: skip
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
