"""The command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from score_kernels import NoiseKey, checks
from score_kernels.cli import plots
from tools.noise_statistics import report, words
from tools.noise_statistics.run import run

SEED = 1907


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every test passed, else 1."""
    args = _parser().parse_args(argv)
    if args.command == "words":
        return _words(args.order, args.seed)
    if args.command == "tails":
        print(report.map_table())
        return 0
    if args.picture:
        plots.require()
    result = run(args.count, args.seed)
    print(report.table(result.findings), report.summary(result), sep="\n\n")
    for path, save in (
        (args.json, report.save_json),
        (args.markdown, report.save_markdown),
        (args.picture, report.draw),
    ):
        if path:
            save(path, result)
    return 1 if report.failed(result.findings) else 0


def _parser() -> argparse.ArgumentParser:
    program = "python -m tools.noise_statistics"
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} [options]\n       {program} words [--order ORDER] [--seed SEED]\n"
        f"       {program} tails",
        description="Tests normals of the noise contract; exits with 1 if a test fails.",
    )
    parser.add_argument(
        "--count", type=_count, default=10**8, help="normals, 1e8 by default; up to whole groups"
    )
    parser.add_argument("--seed", type=_seed, default=SEED, help=f"the first seed, {SEED}")
    parser.add_argument("--json", metavar="FILE", help="write the findings")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    parser.add_argument("--picture", metavar="FILE", help="write a PNG: tails and p-values")
    commands = parser.add_subparsers(prog=program, dest="command", title="commands")
    stream = commands.add_parser(
        "words", help="raw 32-bit little-endian words without end on standard output"
    )
    stream.add_argument(
        "--order", choices=words.ORDERS, default="elements", help="what runs fastest"
    )
    # Without a default of its own, which would undo a seed given before the command.
    stream.add_argument("--seed", type=_seed, default=argparse.SUPPRESS, help=f"{SEED}")
    commands.add_parser("tails", help="what tails 32-bit words can give beside the normal law's")
    return parser


def _words(order: str, seed: int) -> int:
    try:
        words.write(sys.stdout.buffer, order, NoiseKey(seed))
    except BrokenPipeError:
        # The reader has had enough, which is the only end there is. Python flushes its standard
        # output once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _count(text: str) -> int:
    try:
        return checks.count("count", int(float(text)), least=1)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1, such as 1e9") from error


def _seed(text: str) -> int:
    try:
        return checks.unsigned("seed", int(text, 0), 64)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 <= seed < 2**64") from error
