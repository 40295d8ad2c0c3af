"""The trainer: score matching over noise levels with averaged weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from score_kernels import checks, ops
from score_kernels.losses.dsm import denoising_losses, draw_labels
from score_kernels.losses.sliced import sliced_score_loss
from score_kernels.noise import NoiseKey, Purpose, fresh_seed
from score_kernels.training import checkpoint
from score_kernels.training.batches import Batches
from score_kernels.training.distributed import current
from score_kernels.training.interrupt import interrupts_delayed
from score_kernels.training.progress import Meter

__all__ = ["Trainer"]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Attributes that must be equal for a resumed training to be the same training.
_SETTINGS = (
    *("seed", "loss", "weighting", "batch_size", "accumulate", "ema_decay", "ema_warmup"),
    *("clip_norm", "warmup_steps", "precision"),
)
# Entries of a checkpoint and the attributes that they restore, beside those with a state_dict.
_SAVED = {
    **{name: name for name in ("step", "level_losses", "about")},
    **{name: f"_{name}" for name in ("data_count", "losses")},
}


def _check_optimizer(net: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: got LBFGS, whose step needs a closure, expected one without")
    groups = optimizer.param_groups
    trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    if trained.isdisjoint(map(id, net.parameters())):
        raise ValueError("optimizer: got one with no parameter of net to train, expected net's own")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TypeError(
            "scheduler: got ReduceLROnPlateau, whose step needs a loss, expected one without; a "
            "callback of fit may step it: lambda trainer: scheduler.step(trainer.losses[-1])"
        )
    if scheduler is None:
        return
    checks.instance("scheduler", scheduler, LRScheduler, "a torch.optim.lr_scheduler.LRScheduler")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler: got one of another optimizer, expected one of the given")


class Trainer:
    """Trains any score network by denoising or sliced score matching.

    Every step is a pure function of the weights and (seed, step): its samples, noise levels, noise,
    and the seeds of torch's generators for dropout and augmentation. A training that was killed and
    resumed has the bits of one that was not, on the same machine and number of threads.

    In an initialized process group, as under torchrun, every rank takes its share of each batch,
    and all make the same calls. DistributedDataParallel averages the gradients: losses and
    gradients are those of one process to summation order, and a checkpoint can be resumed with
    another number of ranks.

    The averaged weights are ``ema <- m ema + (1 - m) weights`` after each step, from the initial
    weights on, buffers copied (technique 5 of NCSNv2, Song and Ermon 2020, arXiv 2006.09011).

    Args:
        net: the score network, ``net(x, sigma)`` with x ``[B, ...]`` and sigma ``[B]``, trained in
            place on its device. See :func:`score_kernels.as_score` for networks of other forms.
        sigmas: the noise levels, strictly decreasing, in units of the data; see
            :func:`score_kernels.suggest_schedule`.
        optimizer: over the parameters of net; one whose ``step()`` takes no closure.
        loss: ``"dsm"``, :func:`score_kernels.dsm_loss`; ``"ssm"``, sliced score matching of the
            noisy data (Song et al. 2019, arXiv 1905.07088), at two to three times its cost; or a
            function ``loss(net, x, sigmas, noise)``, noise the batch's :class:`NoiseKey`, that
            returns the mean over the batch or the ``[B]`` losses.
        weighting: p of the levels' weight ``sigma^p``, 2 as in NCSN; not for a loss function.
        batch_size: samples an optimiser step, over all parts and ranks.
        accumulate: parts that a rank's share of a batch is split into to save memory, with the same
            gradient to summation order. Times the ranks it must divide batch_size.
        ema_decay: m above, in [0, 1).
        ema_warmup: take ``min(m, (1 + n) / (10 + n))`` at step n, for trainings shorter than a few
            ``1 / (1 - m)`` steps.
        clip_norm: largest norm of the gradient of all parameters; longer ones are scaled to it.
        warmup_steps: over so many steps the learning rate rises linearly.
        scheduler: a torch scheduler of this optimizer; its ``step()`` is called after each step.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"`` of the network under autocast;
            noise, losses and weights stay in float32, float16 scales the loss.
        conditions: names by which the parts of a dataset's items after the sample are passed to the
            network or loss function, ``("label",)`` for items ``(x, label)``. Default: left out.
        seed: 64 bits; default: drawn from torch's default generator.
        about: plain values that a checkpoint also holds. Of a checkpoint that is loaded, only those
            with other names are taken.

    Attributes:
        net, optimizer, sigmas: as given, sigmas as ``[L]`` float32 on the CPU.
        ema: the network with the averaged weights, in eval mode.
        step: optimiser steps taken.
        losses: ``[step]`` float32, the loss of every step, on the CPU.
        level_losses: for every complete epoch its mean loss at each level, ``[L]``; epochs that end
            in one step have one mean.
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
        _check_optimizer(net, optimizer, scheduler)
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        levels = checks.noise_levels(sigmas)
        self.sigmas = torch.tensor(levels, dtype=torch.float32, device="cpu")
        self._loss_function = loss if callable(loss) else None
        options = ("dsm", "ssm")
        self.loss = (
            "custom" if callable(loss) else checks.choice("loss", loss, options, " or a function")
        )
        self.weighting = checks.number("weighting", weighting)
        self.batch_size = checks.count("batch_size", batch_size, least=1)
        self.accumulate = checks.count("accumulate", accumulate, least=1)
        self.ema_decay = checks.not_negative("ema_decay", ema_decay)
        if ema_decay >= 1:
            raise ValueError(f"ema_decay: got {ema_decay}, expected a number in [0, 1)")
        self.ema_warmup = ema_warmup
        self.clip_norm = None if clip_norm is None else checks.positive("clip_norm", clip_norm)
        self.warmup_steps = checks.count("warmup_steps", warmup_steps, least=0)
        self.precision = checks.choice("precision", precision, _PRECISIONS)
        if isinstance(conditions, str):
            raise TypeError(f"conditions: got {conditions!r}, expected names: ({conditions!r},)")
        self.conditions = tuple(conditions)
        taken = inspect.signature(sliced_score_loss).parameters if loss == "ssm" else ()
        for name in self.conditions:
            if name in taken:
                raise ValueError(
                    f"conditions: got {name!r}, which sliced_score_loss takes itself, expected "
                    "another name"
                )
        self.about = dict(about or {})

        self.ranks = current()
        size = self.ranks.size
        if batch_size % (accumulate * size):
            raise ValueError(
                f"accumulate: got {accumulate}, expected accumulate x {size} ranks to divide "
                f"batch_size = {batch_size}"
            )
        # [accumulate, samples of a part]: this rank's parts of every batch.
        parts = torch.arange(batch_size, device="cpu").view(accumulate, size, -1)
        self._parts = parts[:, self.ranks.rank]
        # Rank 0's, for all ranks.
        seed = fresh_seed() if seed is None else checks.unsigned("seed", seed, 64)
        self.seed = self.ranks.all_gather(seed)[0]

        self.device = next(net.parameters()).device
        # What a step calls: in `fit`, of several ranks, the network that averages gradients.
        self._model: Any = net
        for value in (*net.parameters(), *net.buffers()) if size > 1 else ():
            dist.broadcast(value.detach(), 0)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self._average = AveragedModel(net, multi_avg_fn=self._update_average)
        # The first update copies: the average starts at the initial weights.
        self._average.update_parameters(net)
        self.ema = self._average.module.eval().requires_grad_(False)

        # Buffers may hold infinities on purpose, as masks of attention do.
        self._finite_at_start = [n for n, finite in self._finite_weights() if finite]
        # Of the modules in the last `fit`: train or eval.
        self._modes: dict[nn.Module, bool] = {}
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        self._settings = {
            **{name: getattr(self, name) for name in _SETTINGS},
            # Before schedulers change it.
            "optimizer": f"{type(optimizer).__name__} {groups}",
        }
        self.step = 0
        self.level_losses: list[Tensor] = []
        self._losses = torch.empty(0, dtype=torch.float32, device="cpu")
        # The losses of the last steps, which may not have been computed yet.
        self._pending: list[Tensor] = []
        self._level_sigmas = self.sigmas.to(self.device)
        # Sums of the losses of this epoch at each level, and their number.
        self._level_sums = torch.zeros(2, len(levels), dtype=torch.float64, device=self.device)
        self._data_count: int | None = None

    @property
    def losses(self) -> Tensor:
        """The losses of all steps, ``[step]`` float32; waits for the device."""
        if not self._pending:
            return self._losses
        losses = self.ranks.all_reduce(torch.stack(self._pending).float()).cpu() / self.ranks.size
        bad = losses.isfinite().logical_not().nonzero()
        if len(bad):
            step = self.step - len(losses) + int(bad[0])
            sums = self.ranks.all_reduce(self._level_sums[0]).cpu()
            levels = [f"{s:g}" for s in self.sigmas[sums.isfinite().logical_not()].tolist()]
            where = f", at noise level sigma = {', '.join(levels[:5])}" if levels else ""
            raise FloatingPointError(
                f"loss: got {float(losses[bad[0]])} at step {step}{where}; nothing was saved after "
                "it. A lower learning rate, clip_norm or precision='bfloat16' may help"
            )
        self._losses, self._pending = torch.cat([self._losses, losses]), []
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
        """Train until `steps` optimiser steps are done, earlier ones included.

        The modules of a network in training mode keep their own modes: batch normalisation in eval
        mode stays frozen. A network in eval mode gets the modes of the `fit` before, or is set to
        train.

        Args:
            data: ``[N, ...]`` float32 tensor, a :class:`score_kernels.cli.data.Data` (any object
                with ``__len__`` and ``scaled(rows)``) or a dataset with ``__len__`` and
                ``__getitem__`` whose items are samples, or tuples of a sample and its conditions.
                For equal bits after a resume an item must be a function of its index and, with
                ``workers=0``, of torch's default generator.
            steps: the step to stop at.
            checkpoint: the file to save to, atomically: every `save_every` steps, at the end, and,
                if Ctrl-C is pressed, after the step at hand, before KeyboardInterrupt is raised.
                Pressed again it is raised at once.
            resume: go on from that file where it exists; without it an existing file is an error.
            save_every, report_every: in steps. The loss is read every `report_every` steps and
                before every save; in between nothing waits for the device.
            workers: processes that fetch a dataset's items.
            tensorboard: folder for the scalars loss, learning rate and samples per second.
            callback: called with the trainer every `report_every` steps and at the end; it may use
                torch's generators.
            progress: show a bar and, for about ten of the epochs, the losses by level, on rank 0.

        Returns:
            The losses, as the attribute.

        Raises:
            FileExistsError: checkpoint exists and resume is False.
            FloatingPointError: a loss is not finite. The step and the noise levels are named, and
                nothing is saved after it.
            FileNotFoundError: the folder of checkpoint is missing, or cannot be written to.
            ImportError: tensorboard is given and not installed.
            ValueError: the data, an argument or the checkpoint to resume from do not fit.
        """
        checks.count("steps", steps, least=0)
        checks.count("save_every", save_every, least=1)
        checks.count("report_every", report_every, least=1)
        if callback is not None:
            checks.function("callback", callback)
        batches = Batches(
            data, self.batch_size, self.seed, workers, self.conditions, self._parts.flatten()
        )
        path = None if checkpoint is None else Path(checkpoint)
        # A link is followed when it is written.
        if path is not None and not os.access(path.resolve().parent, os.W_OK):
            raise FileNotFoundError(
                f"checkpoint: got {path}, expected a file in an existing folder to write to"
            )
        # What rank 0 finds, all act upon.
        if path is not None and self.ranks.all_gather(path.exists())[0]:
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
        if not self.ranks.first:
            tensorboard, progress = None, False
        if not self.net.training and not self._modes:
            self.net.train()
        if self.net.training:
            self._modes = {module: module.training for module in self.net.modules()}
        self._set_modes()
        meter = Meter(self, steps, tensorboard, progress)
        # About ten epochs of a training are shown.
        every = max(1, batches.epoch(steps) // 10)
        # Steps seed the generators they use, and leave the caller's as they were.
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            closing(meter),
            torch.random.fork_rng(devices=devices),
            self._gradients_averaged(),
            interrupts_delayed() as interrupted,
        ):
            stream = batches.between(self.step, steps, self._torch_seeds()[1])
            while self.step < steps:
                self._seed_torch()
                self._train_step(*next(stream))
                epoch, before = batches.epoch(self.step), batches.epoch(self.step - 1)
                if epoch > before:
                    # Names the levels of a loss that is not finite by their sums.
                    _ = self.losses
                    sums, counts = self.ranks.all_reduce(self._level_sums).cpu()
                    self.level_losses += [(sums / counts).float()] * (epoch - before)
                    self._level_sums.zero_()
                    meter.epoch(epoch, self.level_losses[-1], epoch % every == 0)
                last = self.step == steps
                if last or self.step % report_every == 0:
                    meter.report()
                    if callback is not None:
                        callback(self)
                        self._set_modes()
                # Other ranks may not be where they could save.
                stopped = interrupted and self.ranks.size == 1
                if path and (stopped or (self.step % save_every == 0 and not last)):
                    self.save(path)
                if interrupted:
                    raise KeyboardInterrupt
        if path is not None:
            self.save(path)
        return self.losses

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint atomically; all ranks call it, the first one writes.

        It holds weights, averaged weights, the states of optimiser, scheduler and loss scale, step,
        settings, losses and `about`.

        Raises:
            FloatingPointError: a loss since the last report, a weight or an averaged one is not
                finite; nothing is written.
            OSError: the file cannot be written; an earlier one is as it was.
        """
        _, levels = self.losses, self.ranks.all_reduce(self._level_sums)
        self._check_weights()
        if not self.ranks.first:
            return
        state = {
            **{n: None if part is None else part.state_dict() for n, part in self._stateful()},
            **{name: getattr(self, attribute) for name, attribute in _SAVED.items()},
            "ema_count": self.step + 1,
            "settings": self._settings,
            "sigmas": self.sigmas,
            "levels": levels,
        }
        checkpoint.write(path, state)

    def _set_modes(self) -> None:
        for module, mode in self._modes.items():
            module.training = mode

    def _finite_weights(self) -> list[tuple[str, bool]]:
        """The names of weights, averaged ones and buffers, and whether they are finite."""
        named = {
            f"{part}.{name}": value
            for part in ("net", "ema")
            for name, value in getattr(self, part).state_dict().items()
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        }
        # Read from the device once.
        finite = torch.stack([value.isfinite().all() for value in named.values()]).cpu()
        return list(zip(named, finite.tolist(), strict=True))

    def _check_weights(self) -> None:
        finite = dict(self._finite_weights())
        for name in self._finite_at_start:
            # What was renamed since, as by parametrizations, is not known to have been finite.
            if finite.get(name, True):
                continue
            raise FloatingPointError(
                f"{name}: not finite after step {self.step - 1}, unlike the losses; nothing was "
                "saved. A lower learning rate, clip_norm or precision='bfloat16' may help"
            )

    def _torch_seeds(self) -> tuple[int, int]:
        """Seeds of torch's generators in a step, and of the loader's processes from there on."""
        key = NoiseKey(self.seed, purpose=Purpose.TORCH_SEED, first_sample=self.ranks.rank)
        words = ops.words((1, 4), key.at(self.step), device="cpu")[0].tolist()
        return words[1] << 32 | words[0], words[3] << 32 | words[2]

    @contextmanager
    def _gradients_averaged(self) -> Iterator[None]:
        """Average gradients over the ranks; afterwards nothing keeps the process group alive."""
        if self.ranks.size > 1:
            self._model = DistributedDataParallel(self.net)
        try:
            yield
        finally:
            self._model = self.net

    def _seed_torch(self) -> None:
        """Seed the generators of the CPU and of the network's device, and no others."""
        seed, kind = self._torch_seeds()[0], self.device.type
        torch.default_generator.manual_seed(seed)
        with torch.cuda.device(self.device) if kind == "cuda" else nullcontext():
            if kind != "cpu":
                getattr(torch, kind).manual_seed(seed)

    def _stateful(self) -> list[tuple[str, Any]]:
        names = ("net", "ema", "optimizer", "scheduler", "_scaler")
        return [(name.strip("_"), getattr(self, name)) for name in names]

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore everything that :meth:`save` wrote; training goes on with the same bits.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or of another network or another training: what differs
                is named. To start a new training from its weights, use
                :func:`score_kernels.training.checkpoint.load_weights`.
        """
        state = checkpoint.read(path)
        if "settings" not in state:
            raise ValueError(f"checkpoint {path}: not written by a Trainer")
        found = state["settings"]
        differ = [
            f"{name} = {found.get(name)} there and {value} here"
            for name, value in self._settings.items()
            if found.get(name) != value
        ]
        if not torch.equal(state["sigmas"], self.sigmas):
            differ.append("its sigmas are others")
        if (state["scheduler"] is None) != (self.scheduler is None):
            differ.append("a scheduler is given in one and not in the other")
        if differ:
            raise ValueError(f"checkpoint {path}: of another training: {'; '.join(differ)}")
        # Checks the weights before anything changes.
        checkpoint.restore(path, self.net, state["net"])
        for name, part in self._stateful():
            if part is not None:
                part.load_state_dict(state[name])
        given = self.about
        for name, attribute in _SAVED.items():
            setattr(self, attribute, state[name])
        self.about = {**self.about, **given}
        self._pending = []
        # A sum over the ranks: rank 0 takes all of it.
        self._level_sums.zero_()
        if self.ranks.first:
            self._level_sums.copy_(state["levels"])

    def _train_step(self, x: Tensor, conditions: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        dtype = _PRECISIONS[self.precision]
        for i, part in enumerate(self._parts):
            rows = slice(i * len(part), (i + 1) * len(part))
            moved = {n: c[rows].to(self.device, non_blocking=True) for n, c in conditions.items()}
            # Gradients are averaged over the ranks with the last part.
            wait = self.ranks.size > 1 and i + 1 < self.accumulate
            with self._model.no_sync() if wait else nullcontext():
                with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
                    loss = self._loss(
                        x[rows].to(self.device, torch.float32, non_blocking=True),
                        NoiseKey(self.seed, draw=self.step, first_sample=int(part[0])),
                        moved,
                    )
                self._scaler.scale(loss / self.accumulate).backward()
            total += loss.detach() / self.accumulate
        if self.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)
        # In the warm-up at a share of the learning rate.
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.step < self.warmup_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * ((self.step + 1) / self.warmup_steps)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.scheduler is not None:
            self.scheduler.step()
        self._average.update_parameters(self.net)
        self._pending.append(total)
        self.step += 1

    def _loss(self, x: Tensor, key: NoiseKey, conditions: dict[str, Any]) -> Tensor:
        """The mean loss of a part of a batch; its losses are added to those of their levels."""
        net, sigmas = self._model, self._level_sigmas
        if self._loss_function is not None:
            value = self._loss_function(net, x, sigmas, key, **conditions)
            if not isinstance(value, Tensor) or value.shape not in ((), x.shape[:1]):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss: got {got} from the function, expected one number or [B]")
            return value.mean()
        labels = draw_labels(len(x), len(sigmas), key, x.device)
        sigma = sigmas[labels]
        if self.loss == "dsm":
            weight = None if self.weighting == 2.0 else sigma ** (self.weighting - 2.0)
            each = denoising_losses(net, x, sigma, key, weight, conditions)
        else:
            noisy = ops.perturb(x, sigma, key.for_purpose(Purpose.DSM_NOISE))
            each = sliced_score_loss(net, noisy, sigma, noise=key, reduction="none", **conditions)
            each = sigma**self.weighting * each
        self._level_sums[0].index_add_(0, labels, each.detach().double())
        self._level_sums[1].index_add_(0, labels, torch.ones_like(each, dtype=torch.float64))
        return each.mean()

    def _update_average(self, averaged: Any, weights: Any, _: Tensor | int) -> None:
        n = self.step
        decay = min(self.ema_decay, (1 + n) / (10 + n)) if self.ema_warmup else self.ema_decay
        get_ema_multi_avg_fn(decay)(averaged, weights, n)
