"""The command ``score-kernels``: info, selfcheck, train, sample."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import score_kernels
from score_kernels.cli import samplers

# Every environment variable the library reads.
VARIABLES = (
    *("SCORE_KERNELS_BACKEND", "SCORE_KERNELS_ISA", "SCORE_KERNELS_CACHE"),
    *("SCORE_KERNELS_NATIVE", "SCORE_KERNELS_CUDA", "SCORE_KERNELS_CUDA_ARCHS"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"score-kernels {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        training = arguments.command == "train"
        hint = "; --resume goes on from the last checkpoint" if training else ""
        print(f"score-kernels {arguments.command}: stopped{hint}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="score-kernels", description="Fast, reproducible score-based generative modelling."
    )
    parser.add_argument("--version", action="version", version=score_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backends this machine has, and why others are missing")

    add = commands.add_parser("selfcheck", help="check what the kernels compute").add_argument
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--quick", action="store_true", help="a tenth of the numbers, in seconds")

    add = commands.add_parser("train", help="train a network on images or arrays").add_argument
    add("--data", help="a folder of images, an .npy, .npz or IDX file")
    add("--out", type=Path, default=Path("run"), help="folder to write to (run)")
    add("--config", type=Path, help="settings, a TOML file; see --print-config")
    add("--steps", type=int, help="training steps in place of the settings'")
    add("--seed", type=int, help="decides everything random")
    add("--device", help="cpu, cuda, cuda:1, ...")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--from", dest="start", type=Path, help="begin with the weights of this checkpoint")
    add("--print-config", action="store_true", help="print all settings and what they mean")

    add = commands.add_parser("sample", help="sample a checkpoint of train").add_argument
    add("path", metavar="checkpoint", type=Path)
    # The longer name is for torchrun, which takes --num for an abbreviation of its own option.
    add("--num", "--num-samples", dest="count", type=int, default=64, help="how many (64)")
    add("--out", type=Path, default=Path("samples"), help="folder (samples)")
    add("--format", choices=("npz", "png"), default="npz", help="arrays or images (npz)")
    add("--shard-size", type=int, default=1024, help="samples a shard (1024)")
    add("--seed", type=int, default=0, help="names all noise (default 0)")
    add("--first", dest="first_sample", type=int, default=0, help="id of the first sample (0)")
    add("--weights", choices=("ema", "raw"), default="ema")
    add("--batch-size", type=int, default=64, help="samples at a time, changes no noise (64)")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--sampler", choices=samplers.NAMES, help="default: as the training's settings")
    add("--calls", type=int, help="of the network for a sample, at most")
    either = argparse.BooleanOptionalAction
    add("--clamp", action=either, default=True, help="samples to the data's range (default)")
    add("--animate", action="store_true", help="samples.gif, the chain from noise on")
    add("--overwrite", action="store_true", help="remove an earlier run from --out first")
    return parser


def _info(_: argparse.Namespace) -> int:
    print(info())
    return 0


def _selfcheck(arguments: argparse.Namespace) -> int:
    from score_kernels.cli.selfcheck import run

    print(info())
    return run(arguments.device, quick=arguments.quick)


def _train(arguments: argparse.Namespace) -> int:
    from score_kernels.cli import config
    from score_kernels.cli.train import train

    file, given = arguments.config, vars(arguments)
    tables = config.to_dict(config.load(file) if file else config.Config())
    tables["data"] |= {"path": arguments.data} if arguments.data else {}
    named = ("steps", "seed", "device")
    tables["training"] |= {key: given[key] for key in named if given[key] is not None}
    settings = config.from_dict(tables, "of the command line")
    if arguments.print_config:
        print(config.to_toml(settings))
    else:
        train(settings, arguments.out, resume=arguments.resume, start=arguments.start)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from score_kernels.cli.sample import sample

    sample(**{name: value for name, value in vars(arguments).items() if name != "command"})
    return 0


_COMMANDS = {"info": _info, "selfcheck": _selfcheck, "train": _train, "sample": _sample}


def info() -> str:
    """The text of ``score-kernels info``, to send with a bug report."""
    versions = f"score_kernels {score_kernels.__version__}, torch {torch.__version__}"
    lines = [
        f"{versions}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"threads: {torch.get_num_threads()} (torch.get_num_threads)",
        "backends, the first that serves a tensor is used:",
        *(f"  {name:10} {text}" for name, text in score_kernels.backends().items()),
        "environment:",
        *(f"  {name} = {os.environ.get(name, '(not set)')}" for name in VARIABLES),
    ]
    return "\n".join(lines)
