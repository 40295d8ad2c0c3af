"""The progress bar of a training, and scalars for TensorBoard."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

from score_kernels.bars import progress_bar

if TYPE_CHECKING:
    from score_kernels.training import Trainer


class Meter:
    """Reports the progress of :meth:`Trainer.fit`."""

    def __init__(self, trainer: Trainer, steps: int, tensorboard: Any, progress: bool) -> None:
        self.trainer, self.writer = trainer, None
        if tensorboard is not None:
            # Not installed with this package.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(os.fspath(tensorboard))
        self.bar = progress_bar(
            total=steps, initial=trainer.step, desc="training", unit="step", disable=not progress
        )
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
        rate = (step - before) * self.trainer.batch_size / (now - started)
        # Drawn by update, and not more often than the bar allows.
        self.bar.set_postfix_str(f"loss {loss:.4g}, {rate:.0f} samples/s", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.writer is not None:
            self.writer.add_scalar("loss", loss, step)
            self.writer.add_scalar("samples_per_second", rate, step)
            rate = self.trainer.optimizer.param_groups[0]["lr"]
            self.writer.add_scalar("learning_rate", rate, step)

    def epoch(self, number: int, losses: Tensor, show: bool) -> None:
        """The mean loss of an epoch at each noise level, six of which are shown."""
        if self.writer is not None:
            self.writer.add_histogram("loss_by_level", losses.nan_to_num(), number)
        if show and not self.bar.disable:
            shown = sorted({i * (len(losses) - 1) // 5 for i in range(6)})
            pairs = [f"{self.trainer.sigmas[i]:.3g}: {losses[i]:.4g}" for i in shown]
            self.bar.write(f"epoch {number}, loss by noise level: {', '.join(pairs)}")
