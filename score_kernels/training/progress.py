"""What a training shows while it runs: a bar, lines at the end of epochs, TensorBoard's scalars."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from score_kernels.training import Trainer

# Noise levels shown at the end of an epoch, spread over all of them; and epochs shown at most.
_SHOWN_LEVELS, _SHOWN_EPOCHS = 6, 10


class Meter:
    """Context manager around a training's steps."""

    def __init__(
        self,
        trainer: Trainer,
        steps: int,
        epochs: int,
        tensorboard: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        self.trainer = trainer
        self.writer = None if tensorboard is None else _writer(tensorboard)
        self.bar = tqdm(
            total=steps, initial=trainer.step, desc="training", unit="step", disable=not progress
        )
        self.every = max(1, epochs // _SHOWN_EPOCHS)
        self.started, self.first = time.perf_counter(), trainer.step

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def report(self) -> None:
        """After some steps: the mean loss of those since the last report."""
        loss = float(self.trainer.losses[self.first :].mean())
        now, step = time.perf_counter(), self.trainer.step
        rate = (step - self.first) * self.trainer.batch_size / max(now - self.started, 1e-9)
        self.started, self.first = now, step
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss:.4g}, {rate:.0f} samples/s")
        if self.writer is not None:
            self.writer.add_scalar("loss", loss, step)
            self.writer.add_scalar("samples_per_second", rate, step)
            self.writer.add_scalar(
                "learning_rate", self.trainer.optimizer.param_groups[0]["lr"], step
            )

    def epoch(self, number: int, losses: Tensor) -> None:
        """At the end of an epoch: its mean loss at each noise level."""
        if self.writer is not None:
            self.writer.add_histogram("loss_by_level", losses.nan_to_num(), number)
        if number % self.every:
            return
        levels = len(losses)
        shown = sorted({i * (levels - 1) // (_SHOWN_LEVELS - 1) for i in range(_SHOWN_LEVELS)})
        pairs = [f"{float(self.trainer.sigmas[i]):.3g}: {float(losses[i]):.4g}" for i in shown]
        if not self.bar.disable:
            self.bar.write(f"epoch {number}, loss by noise level: {', '.join(pairs)}")


def _writer(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: a folder is given, but TensorBoard is not installed: "
            "pip install tensorboard"
        ) from error
    return SummaryWriter(os.fspath(folder))
