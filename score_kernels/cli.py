"""The command ``score-kernels``: info, selfcheck, demo."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import score_kernels

# Every environment variable the library reads, as in the README's table.
VARIABLES = (
    "SCORE_KERNELS_BACKEND",
    "SCORE_KERNELS_ISA",
    "SCORE_KERNELS_NATIVE",
    "SCORE_KERNELS_CUDA",
    "SCORE_KERNELS_CUDA_ARCHS",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="score-kernels", description="Fast, reproducible score-based generative modelling."
    )
    parser.add_argument("--version", action="version", version=score_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backends this machine has, and why others are missing")
    check = commands.add_parser(
        "selfcheck", help="whether the kernels compute what they should (under a minute)"
    )
    check.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    check.add_argument("--quick", action="store_true", help="a tenth of the numbers, in seconds")
    demo = commands.add_parser(
        "demo", help="train on real digits, sample new ones, and write a report (a few minutes)"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to")
    demo.add_argument("--seed", type=int, default=0, help="decides everything random (default 0)")
    demo.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    demo.add_argument(
        "--quick", action="store_true", help="a few seconds, to see that it runs: no real digits"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        print(info())
        return 0
    if arguments.command == "selfcheck":
        from score_kernels import selfcheck

        print(info())
        try:
            return selfcheck.run(arguments.device, quick=arguments.quick)
        except ValueError as error:
            print(f"score-kernels selfcheck: {error}", file=sys.stderr)
            return 1
    from score_kernels.demo import run

    try:
        run(arguments.out, seed=arguments.seed, threads=arguments.threads, quick=arguments.quick)
    except (ImportError, OSError, ValueError) as error:
        print(f"score-kernels demo: {error}", file=sys.stderr)
        return 1
    return 0


def info() -> str:
    """The text of ``score-kernels info``: what to send with a bug report."""
    versions = f"score_kernels {score_kernels.__version__}, torch {torch.__version__}"
    lines = [
        f"{versions}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"threads: {torch.get_num_threads()} (torch.get_num_threads)",
        "backends, the first that serves a tensor is used:",
    ]
    lines += [f"  {name:10} {text}" for name, text in score_kernels.backends().items()]
    lines.append("environment:")
    lines += [f"  {name} = {os.environ.get(name, '(not set)')}" for name in VARIABLES]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
