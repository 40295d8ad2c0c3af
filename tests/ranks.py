"""Run as a program, by torchrun or alone: a few steps of training, and what came of them.

    torchrun --standalone --nproc-per-node 2 ranks.py CHECKPOINT STEPS LOSS ACCUMULATE [DIE]

With DIE the last rank is killed at that step of its first attempt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import score_kernels
from score_kernels.networks import MLPScore
from score_kernels.training import distributed


class Noisy(nn.Module):
    """A network with buffers, and dropout that shows whose generator is used."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = MLPScore(4, 16)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.scale * self.inner(self.dropout(x), sigma)


def train(path: Path, steps: int, loss: str, accumulate: int, die: int | None) -> None:
    with distributed.joined("cpu") as ranks:
        # Ranks start apart; the first one's weights count.
        torch.manual_seed(ranks.rank)
        net = Noisy(0.0)
        trainer = score_kernels.Trainer(
            net,
            score_kernels.geometric_sigmas(5.0, 0.1, 5),
            torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9),
            loss=loss,
            batch_size=24,
            accumulate=accumulate,
            clip_norm=1.0,
            seed=3,
        )
        data = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))

        def watch(trainer: score_kernels.Trainer) -> None:
            first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            if trainer.step == die and first_attempt and ranks.rank == ranks.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.fit(
            data,
            steps,
            checkpoint=path,
            resume=True,
            save_every=4,
            report_every=1,
            callback=watch,
            progress=False,
        )
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        equal = [torch.equal(weights, other) for other in ranks.all_gather(weights)]
        if ranks.first:
            print(f"{ranks.size} ranks, step {trainer.step}, all equal: {all(equal)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]) if len(sys.argv) > 5 else None,
    )
    # All is written and the group is left. A thread of gloo's that is not joined yet aborts a
    # process whose interpreter is torn down (torch 2.13), some one in a hundred times.
    sys.stdout.flush()
    os._exit(0)
