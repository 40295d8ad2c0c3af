"""Run as a program: a training killed at random moments, and resumed, against one left alone.

    python killed.py FOLDER KILLS

A process that has only imported torch forks each attempt, so that a restart costs milliseconds.
Prints one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from functools import partial
from pathlib import Path

import torch
from forked import attempt

import score_kernels
from score_kernels.networks import MLPScore
from score_kernels.training import checkpoint

STEPS, SAVE_EVERY = 200, 2


def train(path: Path, steps: int) -> None:
    torch.manual_seed(0)
    net = MLPScore(4, 32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    trainer = score_kernels.Trainer(
        net,
        score_kernels.geometric_sigmas(5.0, 0.1, 5),
        optimizer,
        batch_size=16,
        accumulate=2,
        clip_norm=1.0,
        ema_warmup=True,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        seed=3,
    )
    data = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(data, steps, checkpoint=path, resume=True, save_every=SAVE_EVERY, progress=False)


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    times = []
    # The first step, with all that a process does once, and then the rest.
    for steps in (1, STEPS):
        started = time.perf_counter()
        assert attempt(partial(train, folder / "alone.pt", steps))
        times.append(time.perf_counter() - started)
    before, rest = times
    path, chance, reached = folder / "killed.pt", random.Random(), []
    while len(reached) < kills:
        # On average the training is at its end with the last kill; where it is earlier, it starts
        # again.
        seconds = chance.uniform(0.7, 1.4) * before + chance.uniform(0, 2) * rest / kills
        if attempt(partial(train, path, STEPS), seconds):
            path.unlink()
        else:
            reached.append(checkpoint.read(path)["step"] if path.exists() else 0)
    assert attempt(partial(train, path, STEPS))
    alone, killed = checkpoint.read(folder / "alone.pt"), checkpoint.read(path)
    left = sorted(p.name for p in folder.iterdir())
    print(json.dumps({"steps": reached, "files": left, "differ": differences(alone, killed, "")}))


def differences(a: object, b: object, where: str) -> list[str]:
    """The places where two checkpoints are not equal to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(a.nan_to_num(9), b.nan_to_num(9)) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [where]
        return [d for k in a for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [where]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{where}.{i}")]
    return [] if a == b else [where]


if __name__ == "__main__":
    main()
