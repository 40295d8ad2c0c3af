"""Train a score network on real digits, sample new ones, and report how good they are.

    python -m examples.digits --out demo-output

Two minutes on two CPU cores. Needs the package's `demo` extra. Writes samples.png (samples beside
real digits), loss.png, chain.png (some chains at five noise levels), report.json, and report.html,
one page that holds it all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="decides everything random")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's setting by default")
    parser.add_argument("--quick", action="store_true", help="seconds, of a tiny network")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    demo.run(arguments.out, seed=arguments.seed, quick=arguments.quick)


if __name__ == "__main__":
    main()
