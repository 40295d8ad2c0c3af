"""The trainer: against a loop written by hand, over resumes and splits, and every wrong input."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from scipy import stats
from torch import Tensor, nn

from score_kernels import (
    NoiseKey,
    Purpose,
    Trainer,
    dsm_loss,
    geometric_sigmas,
    ops,
    sliced_score_loss,
)
from score_kernels.networks import MLPScore
from score_kernels.training import checkpoint as files
from score_kernels.training.batches import Batches, permutation
from score_kernels.training.distributed import Ranks

SIGMAS = geometric_sigmas(5.0, 0.1, 6)


def make(
    net: Callable[[], nn.Module] = lambda: MLPScore(3, 16),
    rate: float = 1e-2,
    period: int = 0,
    **options: Any,
) -> Trainer:
    torch.manual_seed(0)
    made = net()
    optimizer = torch.optim.Adam(made.parameters(), lr=rate)
    if period:
        options["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, period, 0.5)
    return Trainer(made, SIGMAS, optimizer, **{"batch_size": 8, "seed": 5, **options})


def data(count: int = 37) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1))


def fit(trainer: Trainer, source: Any, steps: int, **options: Any) -> Tensor:
    return trainer.fit(source, steps, progress=False, **options)


def everything(trainer: Trainer) -> list[Tensor]:
    """All tensors of a training, whose bits a resume must not change."""
    states = [trainer.net.state_dict(), trainer.ema.state_dict()]
    tensors = [t for state in states for t in state.values()]
    for state in trainer.optimizer.state_dict()["state"].values():
        tensors += [torch.as_tensor(v) for v in state.values()]
    return [*tensors, trainer.losses, *trainer.level_losses, trainer._level_sums]


def same(a: Trainer, b: Trainer) -> bool:
    pairs = list(zip(everything(a), everything(b), strict=True))
    return all(torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in pairs)


class Noisy(nn.Module):
    """A network with dropout, batch normalisation's buffers, and conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 16, bias=False), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        out = self.last(self.body(x)) / sigma[:, None]
        return out if label is None else out * (1 + label[:, None])


LOOPS: dict[str, dict[str, Any]] = {
    "all at once": {"ema_decay": 0.9, "clip_norm": 0.5, "warmup_steps": 4},
    "weighting": {"weighting": 1.0},
    "sliced": {"loss": "ssm", "weighting": 3.0},
    "another weighting": {"weighting": 3.0},
    "parts": {"accumulate": 4, "clip_norm": 2.0},
    "average that warms up": {"ema_warmup": True},
    "average of short memory": {"ema_decay": 0.2, "ema_warmup": True},
    "bfloat16": {"precision": "bfloat16", "ema_decay": 0.5},
    "float16": {"precision": "float16", "clip_norm": 0.5, "ema_decay": 0.5},
    "scheduler": {"scheduler": 3, "warmup_steps": 5},
    "batch": {"batch_size": 5, "seed": 2**64 - 1, "ema_decay": 0.5},
}


@pytest.mark.parametrize("name", LOOPS)
def test_it_is_the_loop_one_would_write(name: str) -> None:
    """Data, levels, noise, dropout, loss, gradient, clipping, rate and averages of every step."""
    given = {"batch_size": 8, "seed": 5, "loss": "dsm", "weighting": 2.0, "accumulate": 1}
    given |= {"ema_decay": 0.999, "ema_warmup": False, "clip_norm": None, "warmup_steps": 0}
    given |= {"precision": "float32", **LOOPS[name]}
    period = given.pop("scheduler", 100)
    trainer, source = make(Noisy, period=period, **given), data()
    net, losses = copy.deepcopy(trainer.net), []
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    average = [p.detach().clone() for p in net.parameters()]
    scaler = torch.amp.GradScaler("cpu", enabled=given["precision"] == "float16")
    dtype = getattr(torch, given["precision"])
    size, seed, parts = given["batch_size"], given["seed"], given["accumulate"]
    stream = torch.cat([permutation(37, seed, epoch) for epoch in range(3)])
    state = torch.get_rng_state()
    for step in range(12):
        key = NoiseKey(seed).at(step)
        words = ops.words((1, 4), key.for_purpose(Purpose.TORCH_SEED))[0].tolist()
        torch.manual_seed(words[0] + 2**32 * words[1])
        optimizer.zero_grad()
        total = torch.zeros(())
        for first in range(0, size, size // parts):
            x = source[stream[step * size + first :][: size // parts]]
            rows = key.for_samples(first)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if given["loss"] == "dsm":
                    loss = dsm_loss(net, x, SIGMAS, noise=rows, weighting=given["weighting"])
                else:
                    labels = ops.words((len(x),), rows.for_purpose(Purpose.DSM_LEVEL)) * 6 >> 32
                    sigma = SIGMAS[labels]
                    z = ops.normal(x.shape, rows.for_purpose(Purpose.DSM_NOISE))
                    noisy = x + sigma[:, None] * z
                    each = sliced_score_loss(net, noisy, sigma, noise=rows, reduction="none")
                    loss = (sigma ** given["weighting"] * each).mean()
            scaler.scale(loss / parts).backward()
            total += loss.detach() / parts
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), given["clip_norm"] or math.inf)
        warm = given["warmup_steps"]
        rate = 1e-2 * 0.5 ** (step // period)
        optimizer.param_groups[0]["lr"] = rate * (min(1.0, (step + 1) / warm) if warm else 1.0)
        scaler.step(optimizer)
        scaler.update()
        m = given["ema_decay"]
        m = min(m, (1 + step) / (10 + step)) if given["ema_warmup"] else m
        for mean, p in zip(average, net.parameters(), strict=True):
            mean.copy_(m * mean + (1 - m) * p.detach())
        losses.append(total)
    torch.set_rng_state(state)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(fit(trainer, source, 12), torch.stack(losses))
    for got, want in zip(trainer.net.parameters(), net.parameters(), strict=True):
        close(got, want)
    for got, want in zip(trainer.ema.parameters(), average, strict=True):
        close(got, want)
    for got, want in zip(trainer.ema.buffers(), net.buffers(), strict=True):
        close(got, want)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2 * 0.5 ** (12 // period)


def test_every_group_of_parameters_warms_up() -> None:
    rates: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    net = MLPScore(3, 8)
    first, *rest = net.parameters()
    optimizer = Watched([{"params": [first], "lr": 0.4}, {"params": rest, "lr": 0.8}])
    fit(Trainer(net, SIGMAS, optimizer, batch_size=8, warmup_steps=4), data(), 5)
    want = [[0.4 * share, 0.8 * share] for share in (0.25, 0.5, 0.75, 1, 1)]
    np.testing.assert_allclose(rates, want)


def test_ranks_have_seeds_of_their_own() -> None:
    trainer = make()
    seeds = [trainer._torch_seeds()]
    trainer.ranks = dataclasses.replace(trainer.ranks, rank=1)
    seeds.append(trainer._torch_seeds())
    key = NoiseKey(5, purpose=Purpose.TORCH_SEED)
    words = ops.words((2, 4), key).tolist()
    assert seeds == [(a + 2**32 * b, c + 2**32 * d) for a, b, c, d in words]


class Two(Ranks):
    """Two ranks that find the same."""

    def all_gather(self, value: Any) -> list[Any]:
        return [value, value]

    def all_reduce(self, value: Tensor) -> Tensor:
        return 2 * value


class Averaging(nn.Module):
    """Stands for DistributedDataParallel: counts what is not averaged at once."""

    waits = 0

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *arguments: Any) -> Tensor:
        return self.net(*arguments)

    def no_sync(self) -> Any:
        Averaging.waits += 1
        return contextlib.nullcontext()


def test_the_second_of_two_ranks_takes_its_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two parts of two samples of each batch of eight; processes are in test_ranks.py."""
    module, sent, seen = "score_kernels.training.trainer.", [], []
    monkeypatch.setattr(module + "current", lambda: Two(rank=1, size=2))
    monkeypatch.setattr(module + "DistributedDataParallel", Averaging)
    monkeypatch.setattr(module + "dist.broadcast", lambda value, source: sent.append(source))

    def loss(net: nn.Module, x: Tensor, sigmas: Tensor, noise: NoiseKey) -> Tensor:
        assert isinstance(net, Averaging)
        seen.append((x, noise))
        return net(x, sigmas[:1].expand(len(x))).square().mean()

    trainer, source = make(Noisy, accumulate=2, loss=loss), data()
    # The first one shows a bar.
    trainer.fit(source, 3)
    assert capsys.readouterr().err == ""
    parts = [*trainer.net.parameters(), *trainer.net.buffers()]
    assert sent == [0] * len(parts) and Averaging.waits == 3
    stream = permutation(37, 5, 0)
    for i, (x, noise) in enumerate(seen):
        step, first = i // 2, (2, 6)[i % 2]
        rows = stream[8 * step + first :][:2]
        assert torch.equal(x, source[rows]) and noise == NoiseKey(5, draw=step, first_sample=first)
    # The mean over the ranks, which are alike, of the mean over the parts.
    alone = make(Noisy, accumulate=2, loss=lambda *_: torch.ones((), requires_grad=True))
    assert torch.equal(fit(alone, source, 2), torch.ones(2))
    with pytest.raises(ValueError, match="expected accumulate x 2 ranks to divide batch_size = 8"):
        make(accumulate=8)


def test_all_that_belongs_to_a_training_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    trainer = make(precision="float16", about={"units": "meters", "year": 1999})
    fit(trainer, data(), 2)
    scale = {**trainer._scaler.state_dict(), "scale": 128.0, "_growth_tracker": 7}
    trainer._scaler.load_state_dict(scale)
    trainer.save(path)
    again = make(precision="float16", about={"year": 2000})
    again.load(path)
    assert again._scaler.state_dict() == scale
    assert again.about == {"units": "meters", "year": 2000}
    changed: dict[str, Any] = {
        "seed": 6, "loss": "ssm", "weighting": 1.0, "batch_size": 16, "accumulate": 2,
        "ema_decay": 0.9, "ema_warmup": True, "clip_norm": 1.0, "warmup_steps": 3,
        "precision": "bfloat16",
    }  # fmt: skip
    for name, value in changed.items():
        other = make(**{"precision": "float16", name: value})
        with pytest.raises(ValueError, match=f"{name} = .* there and {value} here"):
            other.load(path)
    files.write(tmp_path / "other.pt", {"step": 3})
    with pytest.raises(ValueError, match="not written by a Trainer"):
        again.load(tmp_path / "other.pt")
    scheduled = make(precision="float16", period=3)
    with pytest.raises(ValueError, match="a scheduler is given in one and not in the other"):
        scheduled.load(path)


class Augmented(torch.utils.data.Dataset):
    """Items that draw from torch's generator, with labels."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.values[index] + 0.1 * torch.randn(3), index % 3


@pytest.mark.parametrize("cut", [1, 7, 19])
@pytest.mark.parametrize("how", ["tensor", "dataset"])
def test_a_resumed_training_has_the_bits_of_one_never_stopped(
    tmp_path: Path, cut: int, how: str
) -> None:
    """With dropout, buffers, augmentation, a scheduler and an epoch's end in between."""

    def start() -> Trainer:
        trainer = make(
            Noisy, accumulate=2, clip_norm=1.0, conditions=("label",) * (how != "tensor")
        )
        trainer.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, 20)
        return trainer

    source = data() if how == "tensor" else Augmented(data())
    whole = start()
    before = torch.get_rng_state()
    fit(whole, source, 20)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was moved"
    path = tmp_path / "c.pt"
    fit(start(), source, cut, checkpoint=path)
    torch.manual_seed(99)
    resumed = start()
    fit(resumed, source, 20, checkpoint=path, resume=True, report_every=3)
    assert resumed.step == 20 and same(whole, resumed)
    last = files.read(path)
    assert torch.equal(last["losses"], whole.losses) and last["ema_count"] == 21
    # In the file, too: loaded again nothing is left to do.
    again = start()
    fit(again, source, 20, checkpoint=path, resume=True)
    assert same(whole, again)


def test_parts_of_a_batch_see_the_batch_s_noise() -> None:
    """One step with 1, 2 and 8 parts: the gradient to summation order."""
    gradients = []
    for parts in (1, 2, 8):
        trainer = make(accumulate=parts)
        fit(trainer, data(), 1)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.net.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_the_order_of_the_data() -> None:
    """Every sample once an epoch, batches always full, epochs ordered anew and by the seed."""
    batches = Batches(data(), 8, 5, 0, (), torch.arange(8))
    stream = torch.cat([batches.rows(t) for t in range(37)])
    epochs = stream.view(8, 37)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(37))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8
    assert torch.equal(Batches(data(), 5, 5, 0, (), torch.arange(5)).rows(3), stream[15:20])
    assert not torch.equal(permutation(37, 6, 0), epochs[0])
    assert [batches.epoch(t) for t in (0, 4, 5, 37)] == [0, 0, 1, 8]
    # A batch larger than the data spans several epochs.
    large = Batches(data(3), 8, 5, 0, (), torch.arange(8))
    assert sorted(large.rows(0).tolist()) == sorted([0, 1, 2] * 2 + large.rows(0)[6:].tolist())
    # Uniform: where sample 0 lands in 3000 permutations of 10.
    places = torch.stack([permutation(10, 7, e) for e in range(3000)]).eq(0).nonzero()[:, 1]
    counts = torch.bincount(places, minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > tolerances.ALPHA


def test_the_order_is_that_of_pairs_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second word of a sample decides between equal first ones."""
    key = NoiseKey(5, purpose=Purpose.DATA_ORDER, draw=2)
    first, second = ops.words((1, 74), key).view(2, 37).numpy()
    assert permutation(37, 5, 2).tolist() == np.lexsort((second, first)).tolist()
    words = torch.tensor([[7, 2**32 - 1, 7, 7, 0, 6, 2**32 - 1, 4, 2**31, 9]])
    monkeypatch.setattr(ops, "words", lambda *_, **__: words)
    assert permutation(5, 5, 2).tolist() == [4, 2, 0, 3, 1]


def test_any_source_of_data_gives_the_same_training() -> None:
    class Scaled:
        def __len__(self) -> int:
            return 37

        def __getitem__(self, index: int) -> Tensor:
            raise AssertionError("one by one is slow")

        def scaled(self, rows: Tensor) -> Tensor:
            return data()[rows]

    values = data()
    sources = [values, Scaled(), list(values), torch.utils.data.TensorDataset(values)]
    losses = [fit(make(), source, 9) for source in sources]
    losses.append(fit(make(), torch.utils.data.TensorDataset(values), 9, workers=1))
    assert all(torch.equal(loss, losses[0]) for loss in losses[1:])


class Fetched(torch.utils.data.Dataset):
    """Ones from a worker, zeros from this process."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3,), float(torch.utils.data.get_worker_info() is not None))


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_fetched_by_workers(workers: int) -> None:
    seen: list[Tensor] = []

    def loss(net: nn.Module, x: Tensor, sigmas: Tensor, noise: NoiseKey) -> Tensor:
        seen.append(x)
        return net(x, sigmas[:1].expand(len(x))).square().mean()

    fit(make(loss=loss), Fetched(), 1, workers=workers)
    assert torch.equal(seen[0], torch.full((8, 3), float(workers > 0)))


def test_sliced_and_custom_losses() -> None:
    """SSM weighs v^T grad s v + 1/2 ||s||^2 by sigma^2; both train on a Gaussian to its score."""
    trainer = make(loss="ssm", batch_size=256, rate=3e-3)
    # The sliced objective of N(0, (1 + sigma^2) I)'s own score is -D/2 sigma^2 / (1 + sigma^2).
    labels = torch.arange(6)
    floor = -1.5 * float((SIGMAS**2 / (1 + SIGMAS**2))[labels].mean())
    losses = fit(trainer, torch.randn(4000, 3, generator=torch.Generator().manual_seed(2)), 300)
    assert abs(float(losses[-100:].mean()) - floor) < 0.06
    assert all(table.shape == (6,) for table in trainer.level_losses) and trainer.level_losses

    def plain(reduction: str) -> Callable[..., Tensor]:
        def loss(net: nn.Module, x: Tensor, sigmas: Tensor, noise: NoiseKey) -> Tensor:
            assert torch.equal(sigmas, SIGMAS)
            return sliced_score_loss(net, x, 1.0, noise=noise, reduction=reduction)

        return loss

    one, each = (fit(make(loss=plain(r)), data(), 5) for r in ("mean", "none"))
    assert torch.equal(one, each)


def test_losses_by_level() -> None:
    """Against the same losses gathered by hand over an epoch of 5 steps and a bit."""
    trainer = make(rate=0.0)
    fit(trainer, data(40), 7)
    sums, counts = torch.zeros(6), torch.zeros(6)
    for step in range(5):
        x = data(40)[permutation(40, 5, 0)[step * 8 : step * 8 + 8]]
        key = NoiseKey(5).at(step)
        each = dsm_loss(trainer.net, x, SIGMAS, noise=key, reduction="none").detach()
        labels = (ops.words((8, 1), key.for_purpose(3))[:, 0] * 6) >> 32
        sums.index_add_(0, labels, each)
        counts.index_add_(0, labels, torch.ones(8))
    assert len(trainer.level_losses) == 1
    torch.testing.assert_close(trainer.level_losses[0], sums / counts, equal_nan=True)


def test_the_average_warms_up_and_is_not_the_weights(tmp_path: Path) -> None:
    cold, warm = make(ema_decay=0.999), make(ema_decay=0.999, ema_warmup=True)
    fit(cold, data(), 20, checkpoint=tmp_path / "c.pt")
    fit(warm, data(), 20)
    start = make().net

    def distance(a: nn.Module, b: nn.Module) -> float:
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        return math.sqrt(sum(float((p - q).detach().square().sum()) for p, q in pairs))

    assert distance(cold.ema, start) < 0.05 * distance(cold.net, start)
    assert distance(warm.ema, warm.net) < distance(warm.ema, start)
    for which, wanted in (("raw", cold.net), ("ema", cold.ema)):
        net = MLPScore(3, 16)
        files.load_weights(tmp_path / "c.pt", net, which=which)
        assert distance(net, wanted) == 0
    assert not any(p.requires_grad for p in cold.ema.parameters()) and not cold.ema.training


def test_a_loss_that_is_not_finite_is_named_and_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"

    def make_bad() -> Trainer:
        trainer = make(rate=1e-3)

        class Poisoned(nn.Module):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
                out = self.net(x, sigma)
                if trainer.step == 9 and self.training:
                    out = torch.where(sigma[:, None] > 1, math.inf, out)
                return out

        trainer.net = trainer._model = Poisoned(trainer.net)
        trainer._average = torch.optim.swa_utils.AveragedModel(trainer.net)
        return trainer

    trainer = make_bad()
    with pytest.raises(
        FloatingPointError, match=r"loss: got inf at step 9, at noise level sigma ="
    ):
        fit(trainer, data(), 30, checkpoint=path, save_every=4)
    assert files.read(path)["step"] == 8
    with pytest.raises(FloatingPointError):
        trainer.save(path)
    assert files.read(path)["step"] == 8


def test_callback_bar_and_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    trainer = make(Noisy)
    # Two seconds from report to report.
    clock = types.SimpleNamespace(perf_counter=partial(next, itertools.count(0, 2)))
    monkeypatch.setattr("score_kernels.training.progress.time", clock)

    def watch(trainer: Trainer) -> None:
        seen.append(trainer.step)
        torch.rand(3)
        trainer.net.eval()

    trainer.fit(data(), 10, report_every=4, callback=watch)
    assert seen == [4, 8, 10]
    err = capsys.readouterr().err
    last = float(trainer.losses[8:].mean())
    assert "10/10" in err and f"loss {last:.4g}, 8 samples/s" in err
    make().fit(data(), 3, progress=False)
    assert capsys.readouterr().err == ""
    assert torch.equal(trainer.losses, fit(make(Noisy), data(), 10))

    class Writer:
        scalars: dict[str, list[int]] = {}
        values: dict[str, list[float]] = {}

        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert math.isfinite(value)
            self.scalars.setdefault(name, []).append(step)
            self.values.setdefault(name, []).append(value)

        def add_histogram(self, name: str, values: Tensor, step: int) -> None:
            self.scalars.setdefault(name, []).append(step)

        def close(self) -> None:
            self.scalars["closed"] = []

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    losses = fit(make(), data(), 10, report_every=5, tensorboard=tmp_path)
    assert Writer.values["loss"] == [float(losses[:5].mean()), float(losses[5:].mean())]
    assert Writer.values["samples_per_second"] == [20, 20]
    assert Writer.values["learning_rate"] == [1e-2, 1e-2]
    assert Writer.scalars["loss"] == [5, 10] and Writer.scalars["loss_by_level"] == [1, 2]
    assert Writer.scalars["learning_rate"] == [5, 10] and "closed" in Writer.scalars
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="tensorboard"):
        fit(make(), data(), 10, tensorboard=tmp_path)


def test_about_ten_epochs_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net, sigmas = MLPScore(3, 16), geometric_sigmas(5.0, 0.1, 11)
    trainer = Trainer(net, sigmas, torch.optim.Adam(net.parameters()), batch_size=8, seed=5)
    trainer.fit(data(16), 108)
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("epoch ")]
    assert [int(line[6:].partition(",")[0]) for line in lines] == list(range(5, 55, 5))
    table = trainer.level_losses[4]
    shown = ", ".join(f"{sigmas[i]:.3g}: {table[i]:.4g}" for i in (0, 2, 4, 6, 8, 10))
    assert lines[0].rstrip() == f"epoch 5, loss by noise level: {shown}"


def test_a_checkpoint_is_loaded_into_a_training_that_failed(tmp_path: Path) -> None:
    class Failing(torch.utils.data.Dataset):
        fetched, broken = 0, True

        def __len__(self) -> int:
            return 37

        def __getitem__(self, index: int) -> Tensor:
            self.fetched += 1
            if self.broken and self.fetched > 50:
                raise OSError("the disk is gone")
            return data()[index]

    trainer, source, path = make(), Failing(), tmp_path / "c.pt"
    with pytest.raises(OSError, match="gone"):
        fit(trainer, source, 9, checkpoint=path, save_every=4)
    source.broken = False
    trainer.load(path)
    assert len(trainer.losses) == trainer.step == 4
    whole = make()
    fit(whole, source, 9)
    fit(trainer, source, 9)
    assert same(trainer, whole)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    fit(make(), data(), 3, checkpoint=path)
    bytes_before = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(make(), data(), 5, checkpoint=path)
    others = [
        (make(rate=1e-4), "optimizer ="),
        (make(lambda: MLPScore(3, 20)), r"layers.0.weight is \(16, 3\) in the file and"),
        (make(lambda: MLPScore(3, 16, depth=3)), "layers.2.weight is missing in the file"),
    ]
    for trainer, words in others:
        weights = copy.deepcopy(trainer.net.state_dict())
        with pytest.raises(ValueError, match=f"checkpoint {path}.*{words}"):
            fit(trainer, data(), 5, checkpoint=path, resume=True)
        assert trainer.step == 0
        for name, value in trainer.net.state_dict().items():
            assert torch.equal(value, weights[name])
    with pytest.raises(ValueError, match="data: got 40 samples, and 37 in the steps before"):
        fit(make(), data(40), 5, checkpoint=path, resume=True)
    assert path.read_bytes() == bytes_before and list(tmp_path.iterdir()) == [path]


def test_what_is_refused() -> None:
    net = MLPScore(3, 8)
    optimizer = torch.optim.Adam(net.parameters())
    for options, error, words in (
        ({"loss": "mse"}, ValueError, "loss: got 'mse', expected one of 'dsm', 'ssm' or a fun"),
        ({"loss": 3}, ValueError, "loss: got 3"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"loss": "ssm", "conditions": ("segments",)}, ValueError, "got 'segments', which sliced"),
        ({"accumulate": 3}, ValueError, "accumulate: got 3, expected accumulate x 1 ranks"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay: got 1.0"),
        ({"clip_norm": -1}, ValueError, "clip_norm: got -1"),
        ({"precision": "half"}, ValueError, "precision: got 'half'"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
    ):
        with pytest.raises(error, match=words):
            Trainer(net, SIGMAS, optimizer, **options)
    with pytest.raises(TypeError, match="net: got function"):
        Trainer(lambda x, s: x, SIGMAS, optimizer)
    with pytest.raises(TypeError, match="optimizer: got"):
        Trainer(net, SIGMAS, "adam")
    with pytest.raises(ValueError, match="sigmas"):
        Trainer(net, [1.0, 2.0], optimizer)
    assert len(fit(make(batch_size=1), data(), 2)) == 2
    trainer = make()
    nan = data()
    nan[23, 1] = math.nan
    for source, error, words in (
        (nan, ValueError, "data: sample 23 has a value that is not finite"),
        (torch.zeros(4, 3, dtype=torch.uint8), TypeError, r"data: got dtype torch.uint8.*127.5"),
        (torch.empty(0, 3), ValueError, "data: got 0 samples"),
        (iter([1]), TypeError, "data: got list_iterator"),
        (types.SimpleNamespace(__len__=3), TypeError, "data: got SimpleNamespace"),
    ):
        with pytest.raises(error, match=words):
            fit(trainer, source, 5)
    words = r"conditions: got 1 names, \['label'\], and items of 1 parts"
    with pytest.raises(ValueError, match=words):
        fit(make(conditions=("label",)), torch.utils.data.TensorDataset(data()), 5)
    pairs = torch.utils.data.TensorDataset(data(), torch.ones(len(data())))
    words = r"conditions: got 2 names, \['a', 'b'\], and items of 2 parts"
    with pytest.raises(ValueError, match=words):
        fit(make(conditions=("a", "b")), pairs, 5)
    for value, words in ((data(8), r"\(8, 3\)"), (3, "int")):
        with pytest.raises(ValueError, match=f"loss: got {words} from the function, expected one"):
            fit(make(loss=lambda *_, value=value: value), data(), 1)
    for options in ({"steps": -1}, {"save_every": 0}, {"report_every": 0}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}: got"):
            trainer.fit(data(), **{"steps": 3, **options})
    assert len(trainer.losses) == 0
    trainer.fit(data(), 1, save_every=1, report_every=1)
