"""What a training shows while it runs: a progress bar, and scalars for TensorBoard."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from score_kernels.training import Trainer


class Meter:
    """Reports the progress of :meth:`Trainer.fit`."""

    def __init__(
        self, trainer: Trainer, steps: int, epochs: int, tensorboard: Any, progress: bool
    ) -> None:
        self.trainer = trainer
        self.writer = None
        if tensorboard is not None:
            # Not installed with this package.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(os.fspath(tensorboard))
        self.bar = tqdm(
            total=steps, initial=trainer.step, desc="training", unit="step", disable=not progress
        )
        # About ten epochs of a training are shown.
        self.every = max(1, epochs // 10)
        self.reported = trainer.step, time.perf_counter()

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def report(self) -> None:
        """The mean loss and the throughput since the last report."""
        (before, started), step, now = self.reported, self.trainer.step, time.perf_counter()
        self.reported = step, now
        loss = float(self.trainer.losses[before:].mean())
        rate = (step - before) * self.trainer.batch_size / max(now - started, 1e-9)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss:.4g}, {rate:.0f} samples/s")
        if self.writer is not None:
            learning_rate = self.trainer.optimizer.param_groups[0]["lr"]
            self.writer.add_scalar("loss", loss, step)
            self.writer.add_scalar("samples_per_second", rate, step)
            self.writer.add_scalar("learning_rate", learning_rate, step)

    def epoch(self, number: int, losses: Tensor) -> None:
        """The mean loss of an epoch at each noise level, six of which are shown."""
        if self.writer is not None:
            self.writer.add_histogram("loss_by_level", losses.nan_to_num(), number)
        if self.bar.disable or number % self.every:
            return
        shown = sorted({i * (len(losses) - 1) // 5 for i in range(6)})
        pairs = [f"{self.trainer.sigmas[i]:.3g}: {losses[i]:.4g}" for i in shown]
        self.bar.write(f"epoch {number}, loss by noise level: {', '.join(pairs)}")
