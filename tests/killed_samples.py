"""Run as a program: a sampling killed at random moments, and gone on with, against one left alone.

    python killed_samples.py FOLDER FORMAT KILLS

A process that has only imported what it needs forks each attempt, so that a restart costs
milliseconds. Prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import attempt

from score_kernels.cli import plots
from score_kernels.cli import sample as cli
from score_kernels.cli.trained import network
from score_kernels.training import checkpoint

SHARD, SHARDS = 8, 20


def write_checkpoint(
    path: Path,
    shape: tuple[int, ...] = (1, 6, 7),
    dtype: str = "uint8",
    bounds: tuple[float, float] = (0.0, 255.0),
    seed: int = 0,
    bias: float = 0.0,
) -> Path:
    """A checkpoint as train writes it, of a tiny network whose weights are random."""
    about: dict[str, Any] = {
        "config": {
            "network": {"kind": "mlp", "width": 8, "depth": 2},
            "sampling": {"sampler": "annealed"},
        },
        "data": {
            "shape": list(shape),
            "dtype": dtype,
            "low": bounds[0],
            "high": bounds[1],
            "std": 0.5,
        },
        "schedule": {
            "sigmas": [1.0, 0.4, 0.1],
            "steps_per_level": 2,
            "step_size": 0.004,
            "why": "",
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nets = {name: network(about) for name in ("net", "ema")}
        for net in nets.values():
            for weights in net.parameters():
                torch.nn.init.normal_(weights, mean=bias, std=0.3)
    state = {name: net.state_dict() for name, net in nets.items()}
    checkpoint.write(path, {"about": about, **state})
    return path


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, hidden ones too, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def sample(path: Path, out: Path, kind: str, shards: int = SHARDS) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    cli.sample(
        path,
        out,
        count=shards * SHARD - 3,
        shard_size=SHARD,
        batch_size=3,
        format=kind,
        progress=False,
    )


def main() -> None:
    folder, kind, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    # Matplotlib and Pillow, which the attempts would import.
    plots.require()
    path = write_checkpoint(folder / "c.pt")
    alone, out = folder / "alone", folder / "killed"
    times = []
    # The first shard, with all that a process does once, and then the rest.
    for shards, to in ((1, out), (SHARDS, alone)):
        started = time.perf_counter()
        assert attempt(partial(sample, path, to, kind, shards))
        times.append(time.perf_counter() - started)
    (before, rest), chance = times, random.Random()
    shutil.rmtree(out)
    expected = digests(alone)
    reached, temporaries, wrong = [], 0, []
    while len(reached) < kills:
        # On average the sampling is at its end with the last kill; where it is earlier, it starts
        # again.
        seconds = chance.uniform(0, 2) * (before + rest / kills)
        if attempt(partial(sample, path, out, kind), seconds):
            shutil.rmtree(out)
            continue
        found = digests(out)
        hidden = [name for name in found if "/." in f"/{name}"]
        temporaries += bool(hidden)
        # Whatever has its own name is whole, but for the manifest, which is not the last one.
        wrong += [n for n in found if n not in hidden and expected.get(n) != found[n]]
        reached.append(len({n.split(".")[0].split("/")[1] for n in found if n[:7] == "shards/"}))
        if (out / "manifest.json").exists():
            json.loads((out / "manifest.json").read_text())
    assert attempt(partial(sample, path, out, kind))
    report = {
        "shards": reached,
        "temporaries": temporaries,
        "wrong": sorted(set(wrong) - {"manifest.json"}),
        "same": digests(out) == expected,
        "files": len(expected),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
