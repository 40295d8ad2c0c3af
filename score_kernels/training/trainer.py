"""The trainer: score matching over noise levels with averaged weights; it survives being killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose, fresh_seed
from score_kernels.training import checkpoint
from score_kernels.training.batches import Batches
from score_kernels.training.distributed import current
from score_kernels.training.objectives import Objective, objective
from score_kernels.training.progress import Meter

__all__ = ["Trainer"]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """Trains any score network by denoising or sliced score matching over noise levels.

    Every step is a pure function of the weights and (seed, step): which samples it sees, their
    noise levels, their noise, and what torch's generators give to dropout and augmentation. So a
    training that was killed and resumed has the bits of one that was not, on the same machine with
    the same number of threads.

    Under torchrun, where a process group is there before the trainer is made, every rank takes its
    share of each batch and the gradients are averaged by torch's DistributedDataParallel. Samples,
    levels and noise are those of the same batch on one process, so that losses and gradients are
    the same to summation order, and a checkpoint, which rank 0 writes, can be resumed with another
    number of ranks. All ranks make the same calls; only the first one shows progress.

    The averaged weights are ``ema <- m ema + (1 - m) weights`` after each step, from the initial
    weights on, buffers copied (technique 5 of NCSNv2, Song and Ermon 2020, arXiv 2006.09011).

    Args:
        net: the score network, ``net(x, sigma)`` with x ``[B, ...]`` and sigma ``[B]``, trained in
            place where it is. See :func:`score_kernels.as_score` for networks of other forms.
        sigmas: the noise levels, strictly decreasing, in units of the data; see
            :func:`score_kernels.suggest_schedule`.
        optimizer: over the parameters of net.
        loss: ``"dsm"``, denoising score matching (:func:`score_kernels.dsm_loss`); ``"ssm"``,
            sliced score matching of the noisy data at each level (Song et al. 2019, arXiv
            1905.07088), some two to three times its cost; or a function
            ``loss(net, x, sigmas, noise)`` of a batch and the :class:`NoiseKey` of its samples at
            this step, which returns one number, the mean over the batch, or the ``[B]`` losses.
        weighting: p of the levels' weight ``sigma^p`` (not for a loss of your own). 2 is NCSN's.
        batch_size: samples an optimiser step, over all parts and ranks.
        accumulate: parts that a rank's share of a batch is split into to save memory: the same
            noise and samples, the gradient to summation order. Times the ranks it must divide
            batch_size.
        ema_decay: m above, in [0, 1).
        ema_warmup: take ``min(m, (1 + n) / (10 + n))`` at step n, for trainings shorter than a few
            ``1 / (1 - m)`` steps.
        clip_norm: largest norm of the gradient of all parameters; longer ones are scaled to it.
        warmup_steps: the learning rate rises in a straight line over so many steps.
        scheduler: a torch scheduler of this optimizer, stepped once a step.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``: of the network under autocast.
            The noise, the losses and the weights stay in float32; float16 scales the loss.
        conditions: names by which the parts of a dataset's items after the sample are passed to the
            network (``("label",)`` for items ``(x, label)``) or to a loss of your own. Without
            names they are left out.
        seed: 64 bits; default: drawn from torch's default generator.
        about: what else a checkpoint should say, of plain values: it is saved and not looked at.

    Attributes:
        net, optimizer, sigmas: as given; sigmas as ``[L]`` float32 on the CPU.
        ema: the network with the averaged weights, in eval mode.
        step: optimiser steps taken.
        losses: ``[step]`` float32, the loss of every step, on the CPU.
        level_losses: for every complete epoch its mean loss at each level, ``[L]``.
        ranks: this process among those of the training: ``rank``, ``size``, ``first``.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        sigmas: Any,
        optimizer: Optimizer,
        *,
        loss: str | Callable[..., Tensor] = "dsm",
        weighting: float = 2.0,
        batch_size: int = 128,
        accumulate: int = 1,
        ema_decay: float = 0.999,
        ema_warmup: bool = False,
        clip_norm: float | None = None,
        warmup_steps: int = 0,
        scheduler: LRScheduler | None = None,
        precision: str = "float32",
        conditions: Sequence[str] = (),
        seed: int | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        checks.instance("net", net, nn.Module, "a torch.nn.Module")
        checks.instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
        self.ranks = current()
        self.net = net
        self.optimizer = optimizer
        self.sigmas = torch.tensor(checks.noise_levels(sigmas), dtype=torch.float32)
        self.batch_size = checks.count("batch_size", batch_size, least=1)
        self.accumulate = checks.count("accumulate", accumulate, least=1)
        if batch_size % (accumulate * self.ranks.size):
            among = "" if self.ranks.size == 1 else f", times the {self.ranks.size} ranks,"
            raise ValueError(
                f"accumulate: got {accumulate}, expected it to divide{among} batch_size = "
                f"{batch_size}"
            )
        self.ema_decay = checks.not_negative("ema_decay", ema_decay)
        if ema_decay >= 1:
            raise ValueError(f"ema_decay: got {ema_decay}, expected a number in [0, 1)")
        self.ema_warmup = ema_warmup
        self.clip_norm = None if clip_norm is None else checks.positive("clip_norm", clip_norm)
        self.warmup_steps = checks.count("warmup_steps", warmup_steps, least=0)
        self.scheduler = scheduler
        self.precision = checks.choice("precision", precision, _PRECISIONS)
        self.conditions = tuple(conditions)
        # One for all ranks.
        self.seed = self.ranks.gathered(NoiseKey(fresh_seed() if seed is None else seed).seed)[0]
        self.about = dict(about or {})
        self.weighting = checks.number("weighting", weighting)
        self.loss = loss if isinstance(loss, str) else "custom"
        self._objective: Objective = objective(loss, self.sigmas, self.weighting)
        parameter = next(net.parameters(), None)
        if parameter is None:
            raise ValueError("net: got a network without parameters, expected one to train")
        self.device = parameter.device
        # What the losses call. It gives all ranks the weights of the first one.
        self._parallel = net if self.ranks.size == 1 else DistributedDataParallel(net)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self._average = AveragedModel(net, multi_avg_fn=self._blend)
        # The first update copies: the average starts at the initial weights.
        self._average.update_parameters(net)
        self._average.eval().requires_grad_(False)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._optimizer = f"{type(optimizer).__name__} {groups}"
        self.step = 0
        self._losses = torch.empty(0)
        self._pending: list[Tensor] = []
        self.level_losses: list[Tensor] = []
        # Of the epoch under way: sums of the losses and their number, by level.
        self._levels = torch.zeros(2, len(self.sigmas), dtype=torch.float64, device=self.device)
        self._data_count: int | None = None

    @property
    def ema(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._average.module

    @property
    def losses(self) -> Tensor:
        """The loss of every step so far, ``[step]`` float32. Waits for the device."""
        self._collect()
        return self._losses

    def fit(
        self,
        data: Any,
        steps: int,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        save_every: int = 1000,
        report_every: int = 50,
        workers: int = 0,
        tensorboard: str | os.PathLike[str] | None = None,
        callback: Callable[[Trainer], None] | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Train until `steps` optimiser steps have been taken in all, those before included.

        Args:
            data: ``[N, ...]`` float32 tensor, a :class:`score_kernels.cli.data.Data` or a dataset
                with ``__len__`` and ``__getitem__`` whose items are samples, or tuples of a sample
                and its conditions. For equal bits after a resume an item must be a function of its
                index and, with ``workers=0``, of torch's default generator.
            steps: the step to stop at.
            checkpoint: the file to save to every `save_every` steps and at the end, atomically.
            resume: go on from that file where it exists. Without it, an existing file is an error:
                nothing is overwritten by mistake.
            save_every, report_every: in steps. The loss is looked at every `report_every` steps
                (and before every save), so that nothing waits for the device in between.
            workers: processes that fetch a dataset's items.
            tensorboard: folder for the scalars loss, learning rate and samples per second.
            callback: called with the trainer every `report_every` steps and at the end. It may read
                everything; what it draws from torch's generators changes nothing here.
            progress: show a bar with the loss and the throughput, and at the end of epochs, of ten
                or so of them, the losses by level.

        Returns:
            The losses, as the attribute.

        Raises:
            FileExistsError: checkpoint exists and resume is False.
            FloatingPointError: a loss is not finite. The step and the noise levels are named, and
                nothing is saved after it.
            ImportError: tensorboard is given and not installed.
            ValueError: the data, an argument or the checkpoint to resume from do not fit.
        """
        steps = checks.count("steps", steps, least=0)
        save_every = checks.count("save_every", save_every, least=1)
        report_every = checks.count("report_every", report_every, least=1)
        workers = checks.count("workers", workers, least=0)
        batches = Batches(
            data, self.batch_size, self.seed, workers, self.conditions, self._places()
        )
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and self._exists(path):
            if not resume:
                raise FileExistsError(
                    f"checkpoint: {path} exists; go on from it with resume=True, or name another"
                )
            self.load(path)
        if self._data_count not in (None, batches.count):
            raise ValueError(
                f"data: got {batches.count} samples, and {self._data_count} in the steps before"
            )
        self._data_count = batches.count
        shown = (tensorboard, progress) if self.ranks.first else (None, False)
        self.net.train()
        with (
            Meter(self, steps, batches.epoch(steps), *shown) as meter,
            self._own_random_state(),
        ):
            stream = batches.between(self.step, steps)
            while self.step < steps:
                torch.manual_seed(self._torch_seed())
                x, conditions = next(stream)
                self._one_step(x, conditions)
                if batches.epoch(self.step) > batches.epoch(self.step - 1):
                    self._end_epoch()
                    meter.epoch(batches.epoch(self.step), self.level_losses[-1])
                last = self.step == steps
                if last or self.step % report_every == 0:
                    meter.report()
                    if callback is not None:
                        callback(self)
                        self.net.train()
                if path is not None and (last or self.step % save_every == 0):
                    self.save(path)
            # Where there was no step to do.
            if path is not None and not self._exists(path):
                self.save(path)
        return self.losses

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically: weights, averaged weights and their count, optimiser,
        scheduler, loss scale, step, seed, settings, losses, `about`. All ranks call it, the first
        one writes.

        Raises:
            FloatingPointError: a loss since the last look is not finite; nothing is written.
            OSError: the file cannot be written; an earlier one is as it was.
        """
        self._collect()
        levels = self._summed(self._levels)
        if not self.ranks.first:
            return
        state = {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "ema_count": int(self._average.n_averaged),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step": self.step,
            "settings": self._settings(),
            "sigmas": self.sigmas,
            "data_count": self._data_count,
            "losses": self.losses,
            "levels": levels,
            "level_losses": self.level_losses,
            "about": self.about,
        }
        checkpoint.write(path, state)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over all that :meth:`save` wrote; training goes on with the same bits.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or of another network or another training: what differs
                is named. To start a new training from its weights, use
                :func:`score_kernels.training.checkpoint.load_weights`.
        """
        state = checkpoint.read(path)
        missing = {"net", "ema", "optimizer", "step", "settings"} - state.keys()
        if missing:
            raise ValueError(
                f"checkpoint {path}: no checkpoint of a training, no {sorted(missing)}"
            )
        found, wanted = state["settings"], self._settings()
        differ = [
            f"{name} = {found.get(name)} there and {value} here"
            for name, value in wanted.items()
            if found.get(name) != value
        ]
        if not torch.equal(state["sigmas"], self.sigmas):
            differ.append("its sigmas are others")
        if (state["scheduler"] is None) != (self.scheduler is None):
            differ.append("a scheduler is given in one and not in the other")
        if differ:
            raise ValueError(f"checkpoint {path}: of another training: {'; '.join(differ)}")
        checkpoint.restore(path, self.net, state["net"])
        checkpoint.restore(path, self.ema, state["ema"])
        self._average.n_averaged.fill_(state["ema_count"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"checkpoint {path}: of another optimizer ({error})") from error
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self._data_count = state["data_count"]
        self._losses, self._pending = state["losses"], []
        # Every rank adds to its own; their sum is what was saved.
        self._levels.copy_(state["levels"] if self.ranks.first else torch.zeros(()))
        self.level_losses = list(state["level_losses"])
        self.about = dict(state["about"])

    def _one_step(self, x: Tensor, conditions: dict[str, Any]) -> None:
        part = self.batch_size // (self.accumulate * self.ranks.size)
        key = NoiseKey(self.seed, draw=self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, first in enumerate(self._firsts()):
            rows = slice(i * part, (i + 1) * part)
            given = {n: c[rows].to(self.device, non_blocking=True) for n, c in conditions.items()}
            with self._together(i + 1 == self.accumulate):
                with self._autocast():
                    loss, by_level = self._objective(
                        self._parallel,
                        x[rows].to(self.device, torch.float32, non_blocking=True),
                        key.for_samples(first),
                        given,
                    )
                self._scaler.scale(loss / self.accumulate).backward()
            total += loss.detach() / self.accumulate
            if by_level is not None:
                each, labels = by_level[0].double(), by_level[1]
                self._levels[0].index_add_(0, labels, each)
                self._levels[1].index_add_(0, labels, torch.ones_like(each))
        if self.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)
        with self._warm_rate():
            self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        self._average.update_parameters(self.net)
        self._pending.append(total)
        self.step += 1

    def _firsts(self) -> list[int]:
        """Place in the batch of the first sample of each of this rank's parts."""
        part = self.batch_size // (self.accumulate * self.ranks.size)
        return [(i * self.ranks.size + self.ranks.rank) * part for i in range(self.accumulate)]

    def _places(self) -> Tensor:
        """Places in the batch of all of this rank's samples."""
        part = self.batch_size // (self.accumulate * self.ranks.size)
        return torch.cat([torch.arange(first, first + part) for first in self._firsts()])

    def _together(self, last: bool) -> Any:
        """Gradients are averaged over the ranks with the last part."""
        if isinstance(self._parallel, DistributedDataParallel) and not last:
            return self._parallel.no_sync()
        return nullcontext()

    def _summed(self, value: Tensor) -> Tensor:
        """Over the ranks."""
        if self.ranks.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def _exists(self, path: Path) -> bool:
        """Whether the first rank finds the file, which all act upon."""
        return self.ranks.gathered(path.exists())[0]

    def _blend(self, averaged: Any, current: Any, _: Tensor | int) -> None:
        """One step of the average; it is counted here, on the host."""
        n = self.step
        decay = min(self.ema_decay, (1 + n) / (10 + n)) if self.ema_warmup else self.ema_decay
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def _collect(self) -> None:
        """Bring the pending losses to the host and look at them."""
        if not self._pending:
            return
        losses = self._summed(torch.stack(self._pending).float()).cpu() / self.ranks.size
        bad = losses.isfinite().logical_not().nonzero()
        if len(bad):
            step = self.step - len(losses) + int(bad[0])
            sums = self._summed(self._levels[0]).cpu()
            levels = [f"{s:g}" for s in self.sigmas[sums.isfinite().logical_not()].tolist()]
            where = f", at noise level sigma = {', '.join(levels[:5])}" if levels else ""
            raise FloatingPointError(
                f"loss: got {float(losses[bad[0]])} at step {step}{where}; nothing was saved after "
                "it. A lower learning rate, clip_norm or precision='bfloat16' may help"
            )
        self._losses = torch.cat([self._losses, losses])
        self._pending = []

    def _end_epoch(self) -> None:
        # Before the levels of a loss that is not finite are forgotten.
        self._collect()
        sums, counts = self._summed(self._levels).cpu()
        self.level_losses.append((sums / counts).float())
        self._levels.zero_()

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a resumed training to be the same training."""
        return {
            "seed": self.seed,
            "optimizer": self._optimizer,
            "loss": self.loss,
            "weighting": self.weighting,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "ema_decay": self.ema_decay,
            "ema_warmup": self.ema_warmup,
            "clip_norm": self.clip_norm,
            "warmup_steps": self.warmup_steps,
            "precision": self.precision,
        }

    def _torch_seed(self) -> int:
        key = NoiseKey(
            self.seed, purpose=Purpose.TORCH_SEED, draw=self.step, first_sample=self.ranks.rank
        )
        low, high = ops.words((1, 2), key, device="cpu")[0].tolist()
        return high << 32 | low

    def _autocast(self) -> Any:
        dtype = _PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Steps seed torch's generators; the caller's are as they were afterwards."""
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            yield

    @contextmanager
    def _warm_rate(self) -> Iterator[None]:
        """The learning rate of a step of the warm-up, whatever scheduler set it."""
        share = (self.step + 1) / self.warmup_steps if self.step < self.warmup_steps else 1.0
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if share != 1.0:
            for group in groups:
                group["lr"] = group["lr"] * share
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
