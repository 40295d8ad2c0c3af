"""The command ``score-kernels``: info, selfcheck, train, sample."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    _add_train(commands)
    _add_sample(commands)
    arguments = parser.parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"score-kernels {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"score-kernels {arguments.command}: stopped", file=sys.stderr)
        return 130


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="train a network on a folder of images, an .npy, .npz or IDX file"
    )
    train.add_argument("--data", help="the folder or file")
    train.add_argument("--out", type=Path, default=Path("run"), help="folder to write to (run)")
    train.add_argument("--config", type=Path, help="settings, a TOML file; see --print-config")
    train.add_argument("--steps", type=int, help="training steps in place of the settings'")
    train.add_argument("--seed", type=int, help="decides everything random")
    train.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    train.add_argument(
        "--print-config", action="store_true", help="print all settings and what they mean"
    )


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="make new samples with a checkpoint of train",
        description="Make new samples with a checkpoint of train, in shards with a manifest. "
        "Stopped or killed, the same command goes on; shards that are there are checked. With "
        "several processes: torchrun --nproc-per-node 2 -m score_kernels.cli sample CHECKPOINT "
        "--num-samples 50000 ...",
    )
    sample.add_argument("checkpoint", type=Path)
    # torchrun takes --num, wherever it stands, for an abbreviation of an option of its own.
    sample.add_argument(
        "--num",
        "--num-samples",
        type=int,
        default=64,
        help="how many (default 64); under torchrun by the longer name only",
    )
    sample.add_argument("--out", type=Path, default=Path("samples"), help="folder (samples)")
    sample.add_argument(
        "--format",
        choices=("npz", "png"),
        default="npz",
        help="arrays, or images of 1 or 3 channels (default npz)",
    )
    sample.add_argument("--shard-size", type=int, default=1024, help="samples a shard (1024)")
    sample.add_argument("--seed", type=int, default=0, help="names all noise (default 0)")
    sample.add_argument("--first", type=int, default=0, help="id of the first sample")
    sample.add_argument("--weights", choices=("ema", "raw"), default="ema")
    sample.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="changes no sample's noise; torch's own sums may round differently for other sizes, "
        "on a CPU for batches of less than 16, and other numbers of threads (default 64)",
    )
    sample.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    sample.add_argument(
        "--overwrite", action="store_true", help="start afresh: remove an earlier run from --out"
    )


def _info(_: argparse.Namespace) -> int:
    print(info())
    return 0


def _selfcheck(arguments: argparse.Namespace) -> int:
    from score_kernels.cli import selfcheck

    print(info())
    return selfcheck.run(arguments.device, quick=arguments.quick)


def _train(arguments: argparse.Namespace) -> int:
    from score_kernels.cli import config
    from score_kernels.cli.train import train

    tables = {} if arguments.config is None else config.to_dict(config.load(arguments.config))
    for section, key in (
        ("data", "data"),
        ("training", "steps"),
        ("training", "seed"),
        ("training", "device"),
    ):
        value = getattr(arguments, key)
        if value is not None:
            tables.setdefault(section, {})["path" if key == "data" else key] = value
    settings = config.from_dict(tables, "of the command line")
    if arguments.print_config:
        print(config.to_toml(settings))
        return 0
    train(settings, arguments.out, resume=arguments.resume)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from score_kernels.cli.sample import sample

    sample(
        arguments.checkpoint,
        arguments.out,
        count=arguments.num,
        seed=arguments.seed,
        weights=arguments.weights,
        batch_size=arguments.batch_size,
        first_sample=arguments.first,
        format=arguments.format,
        shard_size=arguments.shard_size,
        device=arguments.device,
        overwrite=arguments.overwrite,
    )
    return 0


_COMMANDS = {
    "info": _info,
    "selfcheck": _selfcheck,
    "train": _train,
    "sample": _sample,
}


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
