"""What real pipelines do and slip on: each test is named after what it guards."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from test_sliced import NoDerivative
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Dataset, TensorDataset

import score_kernels as sk
from score_kernels import NoiseKey, ops
from score_kernels.bars import progress_bar
from score_kernels.cli import config
from score_kernels.cli.main import main
from score_kernels.cli.train import train
from score_kernels.diffusion.sde import VE, VP
from score_kernels.networks import MLPScore
from score_kernels.training import Trainer, checkpoint
from score_kernels.training.batches import permutation
from score_kernels.training.interrupt import interrupts_delayed

KEY = NoiseKey(2**63 + 5, draw=3, first_sample=7)
SIGMAS = sk.geometric_sigmas(5.0, 0.1, 6)
ANNEAL: dict[str, Any] = {"sigmas": SIGMAS, "steps_per_level": 5, "step_size": 1e-3}


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return -x / (1 + sigma.view(-1, *[1] * (x.dim() - 1)) ** 2)


def make(net: nn.Module | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    net = net or MLPScore(3, 8)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    return Trainer(net, SIGMAS, optimizer, **{"batch_size": 8, "seed": 3, **options})


# Training


def test_nan_weights_do_not_replace_the_last_good_checkpoint(tmp_path: Path) -> None:
    path, trainer = tmp_path / "c.pt", make()
    data = torch.randn(20, 3)
    trainer.fit(data, 3, checkpoint=path, progress=False)
    good = path.read_bytes()
    for part, name in (("net", "net.layers.0.weight"), ("ema", "ema.layers.0.weight")):
        trainer = make()
        trainer.load(path)
        with torch.no_grad():
            getattr(trainer, part).layers[0].weight[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match=f"{name}: not finite after step 2"):
            trainer.save(path)
        assert path.read_bytes() == good


class Drawn(Dataset):
    """Items that are drawn from torch's generator."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(3)


class Masked(nn.Module):
    """A network with a mask of infinities, and frozen batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

    def get_extra_state(self) -> str:
        return "meters"

    def set_extra_state(self, state: str) -> None:
        assert state == "meters"

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.last(self.norm(x) @ self.mask.softmax(1)) / sigma[:, None]


def test_masks_of_infinities_are_saved_and_infinities_that_came_are_not(tmp_path: Path) -> None:
    trainer = make(Masked())
    trainer.fit(torch.randn(20, 3), 3, checkpoint=tmp_path / "c.pt", progress=False)
    trainer.net.norm.running_var[0] = math.inf
    with pytest.raises(FloatingPointError, match="net.norm.running_var: not finite"):
        trainer.save(tmp_path / "c.pt")


def test_evaluating_between_two_fits_does_not_unfreeze() -> None:
    trainer, data = make(Masked()), torch.randn(20, 3)
    trainer.net.norm.eval()
    trainer.fit(data, 2, progress=False)
    trainer.net.eval()
    trainer.fit(data, 4, progress=False)
    assert trainer.net.training and not trainer.net.norm.training
    assert trainer.net.norm.num_batches_tracked == 0
    trainer.net.train()
    trainer.fit(data, 6, progress=False)
    assert trainer.net.norm.num_batches_tracked == 2


def test_workers_draw_other_numbers_after_every_start() -> None:
    seen: list[Tensor] = []

    def loss(net: nn.Module, x: Tensor, sigmas: Tensor, noise: NoiseKey) -> Tensor:
        seen.append(x.clone())
        return net(x, sigmas[:1].expand(len(x))).square().mean()

    trainer = make(loss=loss)
    for steps in (1, 2):
        trainer.fit(Drawn(), steps, workers=1, progress=False)
    assert not torch.equal(seen[0], seen[1])
    again = make(loss=loss)
    again.fit(Drawn(), 1, workers=1, progress=False)
    assert torch.equal(seen[2], seen[0])


def test_samples_with_equal_words_are_in_any_order() -> None:
    count = 1_000_000
    words = ops.words((1, 2 * count), NoiseKey(1, purpose=sk.Purpose.DATA_ORDER))[0, :count]
    order = permutation(count, 1, 0)
    tied = words[order[1:]] == words[order[:-1]]
    rising = int((order[1:] > order[:-1])[tied].sum())
    # Of about 116 pairs half rise; P(outside) < 1e-6 for a fair coin.
    assert 90 < int(tied.sum()) < 150 and 28 < rising < 88
    assert torch.equal(order.sort().values, torch.arange(count))


def test_optimizers_and_schedulers_that_cannot_train_the_network_are_refused() -> None:
    net, other = MLPScore(3, 8), MLPScore(3, 8)
    adam = torch.optim.Adam(net.parameters())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam)
    of_another = torch.optim.lr_scheduler.ExponentialLR(torch.optim.Adam(other.parameters()), 0.9)
    for optimizer, options, error, words in (
        (torch.optim.Adam(other.parameters()), {}, ValueError, "optimizer: got one with no param"),
        (torch.optim.LBFGS(net.parameters()), {}, TypeError, "optimizer: got LBFGS"),
        (adam, {"scheduler": plateau}, TypeError, "scheduler: got ReduceLROnPlateau"),
        (adam, {"scheduler": of_another}, ValueError, "scheduler: got one of another optimizer"),
        (adam, {"conditions": "label"}, TypeError, "conditions: got 'label', expected names"),
    ):
        with pytest.raises(error, match=words):
            Trainer(net, SIGMAS, optimizer, **options)  # type: ignore[arg-type]


def test_modules_keep_their_own_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.out(self.norm(x)) / sigma[:, None]

    net = Net()
    net.norm.eval()
    trainer = make(net)
    trainer.fit(
        torch.randn(20, 3), 3, report_every=1, callback=lambda t: t.net.eval(), progress=False
    )
    assert torch.equal(net.norm.running_mean, torch.zeros(3))
    assert net.out.training and not net.norm.training
    net.eval()
    trainer.fit(torch.randn(20, 3), 4, progress=False)
    assert net.training


def test_a_missing_folder_is_found_before_the_training(tmp_path: Path) -> None:
    trainer = make()
    with pytest.raises(FileNotFoundError, match="checkpoint: got .*existing folder"):
        trainer.fit(torch.randn(20, 3), 5, checkpoint=tmp_path / "no" / "c.pt", progress=False)
    assert trainer.step == 0


def test_epochs_that_end_in_one_step_have_an_entry_each() -> None:
    trainer = make(batch_size=64)
    trainer.fit(torch.randn(20, 3), 5, progress=False)
    assert len(trainer.level_losses) == 5 * 64 // 20


def test_the_callers_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    make_state = make()
    torch.set_rng_state(before)
    make_state.fit(torch.randn(20, 3, generator=torch.Generator()), 3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_ctrl_c_stops_between_steps_and_saves(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "c.pt"

    class Adam(torch.optim.Adam):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            Adam.calls += 1
            if Adam.calls == 3:
                # Within the update, before the counters.
                os.kill(os.getpid(), signal.SIGINT)
            return result

    def trained(optimizer_of: Callable[..., Any]) -> Trainer:
        torch.manual_seed(0)
        net = MLPScore(3, 8)
        return Trainer(net, SIGMAS, optimizer_of(net.parameters()), batch_size=8, seed=3)

    # A shell's background jobs ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    data = torch.randn(20, 3)
    with pytest.raises(KeyboardInterrupt):
        trained(Adam).fit(data, 6, checkpoint=path, progress=False)
    assert checkpoint.read(path)["step"] == 3
    resumed = trained(Adam)
    resumed.fit(data, 6, checkpoint=path, resume=True, progress=False)
    whole = trained(Adam)
    whole.fit(data, 6, progress=False)
    for a, b in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(resumed.losses, whole.losses)
    # The third step ends an epoch.
    assert len(whole.level_losses) == 2
    assert torch.equal(torch.stack(resumed.level_losses).nan_to_num(),
                       torch.stack(whole.level_losses).nan_to_num())  # fmt: skip
    # In another thread signals do not arrive, and none are delayed.
    thread = threading.Thread(target=lambda: interrupts_delayed().__enter__())
    thread.start()
    thread.join()
    # A handler of the user's own stays.
    own: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: own.append(number))
    with interrupts_delayed() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
    assert own == [signal.SIGINT] and not pressed
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupts_delayed() as pressed:
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# Checkpoints


def test_weights_of_another_scaling_are_refused(tmp_path: Path) -> None:
    path, trainer = tmp_path / "c.pt", make(MLPScore(3, 8, data_std=0.5))
    trainer.fit(torch.randn(20, 3), 1, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="_extra_state is 0.5 in the file and 2.0 in the network"):
        checkpoint.load_weights(path, MLPScore(3, 8, data_std=2.0))
    checkpoint.load_weights(path, MLPScore(3, 8, data_std=0.5))
    with pytest.raises(ValueError, match="data_std: got weights of 0.5, expected 2.0"):
        MLPScore(3, 8, data_std=2.0).load_state_dict(trainer.net.state_dict())


def test_one_bit_of_damage_is_named_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    weights = {"w": torch.randn(4)}
    checkpoint.write(path, {"net": weights})
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="has no ema weights"):
        checkpoint.load_weights(path, nn.Identity())
    rng = np.random.default_rng()
    for bit in rng.choice(8 * len(whole), 500, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = checkpoint.read(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert torch.equal(found["net"]["w"], weights["w"])


def test_a_failed_write_leaves_nothing_and_a_link_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real.pt", tmp_path / "link.pt"
    checkpoint.write(real, {"step": 1})
    link.symlink_to(real)
    checkpoint.write(link, {"step": 2})
    assert link.is_symlink() and checkpoint.read(real)["step"] == 2
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoint.write(real, {"bad": lambda: None})
    assert sorted(os.listdir(tmp_path)) == ["link.pt", "real.pt"]


# Commands


@pytest.fixture
def points(tmp_path: Path) -> Path:
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(60, 3)).astype("f4"))
    return tmp_path / "points.npy"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    return tmp_path / "images.npy"


def settings(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text)
    return path


SMALL = "[network]\nkind = 'mlp'\nwidth = 8\ndepth = 1\n[training]\nbatch_size = 8\n"


@pytest.mark.parametrize(
    "section, line, words",
    [
        ("noise", "step_size = -1", "step_size: got -1.0, expected a number above 0"),
        ("noise", "levels = 1", "levels: got 1, expected at least 2"),
        ("sampling", "count = -1", "count: got -1, expected at least 0"),
        ("sampling", "every = -1", "every: got -1, expected at least 0"),
        ("training", "save_every = 0", "save_every: got 0, expected at least 1"),
        ("training", "steps = -3", "steps: got -3, expected at least 0"),
        ("training", "learning_rate = 0", "learning_rate: got 0.0, expected a number above 0"),
    ],
)
def test_settings_are_checked_before_the_first_step(
    tmp_path: Path, section: str, line: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        config.load(settings(tmp_path, f"[{section}]\n{line}\n"))


def test_settings_of_sampling_alone_may_change_on_resume(tmp_path: Path, points: Path) -> None:
    out, common = tmp_path / "run", ["train", "--data", str(points), "--steps", "2"]
    first = settings(tmp_path, SMALL + "[noise]\nlevels = 3\n")
    assert main([*common, "--config", str(first), "--out", str(out)]) == 0
    second = settings(
        tmp_path, SMALL + "[noise]\nlevels = 3\nstep_size = 0.0001\nsteps_per_level = 2\n"
    )
    assert main([*common, "--config", str(second), "--out", str(out), "--resume"]) == 0
    trained = sk.load(out / "checkpoint.pt")
    assert (trained.schedule.step_size, trained.schedule.steps_per_level) == (0.0001, 2)
    assert "step_size 0.0001 (given)" in trained.schedule.why
    first = settings(tmp_path, SMALL + "[noise]\nlevels = 3\n")
    assert main([*common, "--config", str(first), "--out", str(out), "--resume"]) == 0
    schedule = sk.load(out / "checkpoint.pt").schedule
    ratio = float(schedule.sigmas[0] / schedule.sigmas[-1]) ** 0.5
    best = sk.best_step_size(ratio, float(schedule.sigmas[-1]), schedule.steps_per_level)
    assert schedule.steps_per_level == 5 and math.isclose(schedule.step_size, best, rel_tol=1e-6)


def test_a_checkpoint_gives_network_schedule_and_units_back(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "run"
    toml = settings(tmp_path, SMALL + "[noise]\nlevels = 3\n[sampling]\ncount = 0\n")
    arguments = ["train", "--data", str(images), "--steps", "3", "--config", str(toml)]
    assert main([*arguments, "--out", str(out)]) == 0
    trained = sk.load(out / "checkpoint.pt", weights="raw")
    state = checkpoint.read(out / "checkpoint.pt")
    for name, value in trained.net.state_dict().items():
        assert torch.equal(value, state["net"][name])
    assert not trained.net.training and len(trained.schedule.sigmas) == 3
    with pytest.raises(ValueError, match="device: got str 'cuda:99', expected a device that torch"):
        sk.load(out / "checkpoint.pt", device="cuda:99")
    assert repr(trained).startswith("Trained(MLPScore, 3 levels, Data(0 samples of shape (1, 4, 4)")
    assert trained.data.shape == (1, 4, 4)
    x = torch.tensor([[-1.0, 1.0, 0.0]])
    assert trained.data.unscale(x).tolist() == [[0, 255, 128]]
    with pytest.raises(ValueError, match="not written by score-kernels train"):
        checkpoint.write(tmp_path / "c.pt", {"net": {}})
        sk.load(tmp_path / "c.pt")


def test_a_long_warm_up_is_shortened_and_said(
    tmp_path: Path, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = settings(tmp_path, SMALL + "[noise]\nlevels = 3\n")
    arguments = ["train", "--data", str(points), "--steps", "30", "--config", str(toml)]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "warm-up: 3 steps, a tenth of all, instead of 200" in capsys.readouterr().out


def test_sheets_are_drawn_of_trained_networks_once(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from score_kernels.cli import train as command

    drawn: list[Any] = []
    draw = command.draw_samples
    monkeypatch.setattr(command, "draw_samples", lambda *a, **k: drawn.append(a) or draw(*a, **k))
    toml = settings(tmp_path, SMALL + "[noise]\nlevels = 3\n[sampling]\ncount = 4\nevery = 2\n")
    arguments = ["train", "--data", str(images), "--config", str(toml)]
    assert main([*arguments, "--steps", "0", "--out", str(tmp_path / "none")]) == 0
    assert not drawn and not (tmp_path / "none" / "samples.png").exists()
    out = tmp_path / "run"
    assert main([*arguments, "--steps", "4", "--out", str(out)]) == 0
    assert len(drawn) == 2
    assert (out / "samples.png").read_bytes() == (out / "samples-00000004.png").read_bytes()


def test_devices_that_compute_nothing_are_one_line(
    tmp_path: Path, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("cuda", "meta", "cudaa"):
        code = main(
            ["train", "--data", str(points), "--device", device, "--out", str(tmp_path / "r")]
        )
        said = capsys.readouterr().err
        assert code == 1 and f"device: got str '{device}'" in said and said.count("\n") <= 2


def test_a_sheet_of_something_else_is_not_overwritten(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "run", tmp_path / "samples.png"
    toml = settings(tmp_path, SMALL + "[noise]\nlevels = 3\n[sampling]\ncount = 0\n")
    arguments = ["train", "--data", str(images), "--config", str(toml), "--steps", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    other.write_bytes(b"mine")
    assert main(["sample", str(out / "checkpoint.pt"), "--num", "2", "--out", str(tmp_path)]) == 1
    assert "samples.png: of something else" in capsys.readouterr().err
    assert other.read_bytes() == b"mine"


def test_two_jobs_in_one_folder_are_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from score_kernels.training.checkpoint import locked\n"
        "try:\n    with locked(Path(sys.argv[1])): print('held')\n"
        "except BlockingIOError as error: print(error)"
    )

    def other() -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with checkpoint.locked(tmp_path):
        assert "another process is writing to it" in other()
    assert other() == "held\n"


def test_a_shortened_warm_up_goes_on_when_resumed(tmp_path: Path, points: Path) -> None:
    toml = settings(tmp_path, SMALL + "cosine = false\n[noise]\nlevels = 3\n")
    common = ["train", "--data", str(points), "--config", str(toml), "--out", str(tmp_path / "run")]
    assert main([*common, "--steps", "20"]) == 0
    assert main([*common, "--steps", "40", "--resume"]) == 0
    state = checkpoint.read(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == 40 and state["settings"]["warmup_steps"] == 2


def test_steps_that_diverge_are_found_before_the_training(tmp_path: Path, points: Path) -> None:
    tables = {"data": {"path": str(points)}, "noise": {"levels": 3, "sigma_min": 0.1}}
    tables["noise"]["step_size"] = 0.05
    with pytest.raises(ValueError, match="step_size: got 0.05, expected less than 4 sigma_min"):
        train(config.from_dict(tables, "here"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_sheet_that_diverges_does_not_end_the_training(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def diverge(*_: Any, **__: Any) -> Tensor:
        raise FloatingPointError("x: sample 0 is not finite")

    monkeypatch.setattr("score_kernels.cli.train.draw_samples", diverge)
    toml = settings(tmp_path, SMALL + "steps = 4\n[noise]\nlevels = 3\n[sampling]\nevery = 2\n")
    out = tmp_path / "run"
    assert main(["train", "--data", str(images), "--config", str(toml), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "samples-00000002.png is not drawn: x: sample 0" in text and "step_size" in text
    assert checkpoint.read(out / "checkpoint.pt")["step"] == 4


def test_folders_of_trainings_and_samples_are_not_mixed(
    tmp_path: Path, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = settings(tmp_path, SMALL + "steps = 2\n[noise]\nlevels = 3\n")
    out = tmp_path / "run"
    common = ["train", "--data", str(points), "--config", str(toml)]
    assert main([*common, "--out", str(out), "--resume"]) == 0
    assert f"no checkpoint in {out}: starting at step 0" in capsys.readouterr().out
    path = str(out / "checkpoint.pt")
    assert main(["sample", path, "--out", str(out), "--overwrite"]) == 1
    assert "is the folder of a training" in capsys.readouterr().err
    assert main(["sample", path, "--num", "2", "--out", str(tmp_path / "s")]) == 0
    assert main([*common, "--out", str(tmp_path / "s")]) == 1
    assert "holds samples" in capsys.readouterr().err


def test_the_bar_of_a_training_is_not_drawn_at_every_report(
    capsys: pytest.CaptureFixture[str],
) -> None:
    make().fit(torch.randn(20, 3), 200, report_every=1)
    # At the epochs that are shown, and the end.
    assert capsys.readouterr().err.count("step/s") < 40


def test_bars_do_not_fill_log_files(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress_bar(range(3), desc="work"):
        threading.Event().wait(0.2)
    # The empty bar and the full one.
    assert capsys.readouterr().err.count("work") == 2


# Samplers


def test_a_score_that_changes_x_in_place_is_refused() -> None:
    def relu(x: Tensor, *sigma: Tensor) -> Tensor:
        return -nn.functional.relu(x, inplace=True)

    for run in (
        lambda: sk.annealed_langevin(relu, (3, 4), seed=1, **ANNEAL),
        lambda: sk.langevin(relu, (3, 4), step_size=0.1, steps=2, seed=1),
        lambda: sk.predictor_corrector(relu, (3, 4), VE(), steps=3, seed=1),
        lambda: sk.probability_flow(relu, (3, 4), SIGMAS, seed=1),
    ):
        with pytest.raises(RuntimeError, match="score: changed its argument x in place"):
            run()
    with torch.inference_mode():
        x = sk.annealed_langevin(gaussian, (3, 4), seed=1, **ANNEAL)
    assert torch.equal(x, sk.annealed_langevin(gaussian, (3, 4), seed=1, **ANNEAL))


def test_callbacks_may_change_the_state_and_are_watched() -> None:
    def clamp(progress: Any) -> None:
        progress.x.clamp_(-1, 1)

    def explode(x: Tensor, sigma: Tensor) -> Tensor:
        return -x if float(sigma[0]) > 0.3 else x * math.nan

    options = dict(ANNEAL, seed=1, denoise=False, callback=clamp)
    # The first step of level 4.
    steps = 5 * 4
    with pytest.raises(FloatingPointError, match=rf"after step {steps} \(level 4, .*score is not"):
        sk.annealed_langevin(explode, (3, 4), **options)
    with pytest.warns(RuntimeWarning, match="stopped, with the state after"):
        x = sk.annealed_langevin(explode, (3, 4), on_nan="stop", **options)
    assert x.abs().max() <= 1

    def poison(progress: Any) -> None:
        if progress.step == steps:
            progress.x[2, 1] = math.nan

    options["callback"] = poison
    with pytest.raises(FloatingPointError, match=f"sample 9 .* after the callback of step {steps}"):
        sk.annealed_langevin(gaussian, (3, 4), first_sample=7, **options)


def test_options_that_would_be_ignored_are_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="first_step: got 2 without a seed"):
        sk.annealed_langevin(gaussian, x, first_step=2, **ANNEAL)
    for sampler, options in (
        (sk.langevin, {"step_size": 0.1, "steps": 2}),
        (sk.ddpm, {"schedule": sk.DDPMSchedule.linear(10)}),
        (sk.probability_flow, {"sigmas": SIGMAS}),
    ):
        with pytest.raises(TypeError, match=f"{sampler.__name__}: got an unexpected .*'denoise'"):
            sampler(gaussian, x, denoise=True, **options)
    with pytest.raises(ValueError, match="init: got 'foo'"):
        sk.annealed_langevin(gaussian, x, init="foo", **ANNEAL)


def test_networks_with_dropout_in_training_mode_are_said() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    options: dict[str, Any] = {"step_size": 0.1, "steps": 1, "seed": 1}
    for call in (
        lambda: sk.langevin(net, (2, 3), **options),
        lambda: sk.log_likelihood(sk.unconditional(net), torch.zeros(2, 3), SIGMAS),
    ):
        words = "score: a network in training mode, with dropout"
        with pytest.warns(UserWarning, match=words) as said:
            call()
        # Where the library is called.
        assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.langevin(net.eval(), (2, 3), **options)
        sk.langevin(nn.Linear(3, 3).train(), (2, 3), **options)


def test_coefficients_beyond_float32_are_refused() -> None:
    x = torch.zeros(2, 3)
    for call in (
        lambda: ops.affine_step_(x, x, 1.0, 1e39, 0.0, KEY),
        lambda: ops.langevin_step_(x, x, 1e39, KEY),
        lambda: ops.langevin_step(x, x, 1e39, KEY),
        lambda: sk.annealed_langevin(gaussian, x, [1e20, 1e-3], steps_per_level=1, step_size=1e-6),
    ):
        with pytest.raises(ValueError, match="within float32's range"):
            call()


def test_a_recorded_result_comes_once() -> None:
    options = dict(ANNEAL, seed=1)
    for denoise, every, frames in ((False, 10, 3), (False, 7, 5), (True, 10, 4)):
        x = sk.annealed_langevin(gaussian, (2, 3), denoise=denoise, **options)
        trajectory = sk.annealed_langevin(
            gaussian, (2, 3), denoise=denoise, record_every=every, **options
        )
        assert len(trajectory) == frames and torch.equal(trajectory[-1], x)
    # Known parts: with noise up to the end in annealed dynamics, and none in what ends at 0.
    known: dict[str, Any] = {"known": torch.zeros(3), "mask": torch.tensor([True, False, False])}
    options.update(known, record_every=10, denoise=False)
    assert len(sk.annealed_langevin(gaussian, (2, 3), **options)) == 4
    flow = sk.probability_flow(gaussian, (2, 3), SIGMAS, seed=1, record_every=2, **known)
    assert len(flow) == 3 and not flow[-1][:, 0].any()


def test_guided_scores_take_conditions() -> None:
    def score(x: Tensor, sigma: Tensor, shift: float, label: float) -> Tensor:
        return gaussian(x - shift * label, sigma)

    guided = sk.classifier_free(score, 2.0, cond={"label": 1.0}, uncond={"label": 0.0})
    x = sk.annealed_langevin(guided, (2, 3), seed=1, conditions={"shift": 0.5}, **ANNEAL)

    def plain(x: Tensor, sigma: Tensor) -> Tensor:
        return 3 * gaussian(x - 0.5, sigma) - 2 * gaussian(x, sigma)

    assert torch.equal(x, sk.annealed_langevin(plain, (2, 3), seed=1, **ANNEAL))
    # The two conditions of the guidance go before a sampler's.
    at = torch.randn(2, 3), torch.ones(2)
    assert torch.equal(guided(*at, shift=0.5, label=9.0), guided(*at, shift=0.5))


def test_networks_without_sigma_are_told_the_wrapper() -> None:
    net = nn.Linear(3, 3)
    for call in (
        lambda: sk.annealed_langevin(net, (2, 3), seed=1, **ANNEAL),
        lambda: sk.dsm_loss(net, torch.zeros(2, 3), SIGMAS, seed=1),
        lambda: sk.sliced_score_loss(net, torch.zeros(2, 3), 0.5, seed=1),
        lambda: sk.exact_score_loss(net, torch.zeros(2, 3), 0.5),
        lambda: sk.log_likelihood(net, torch.zeros(2, 3), SIGMAS),
    ):
        with pytest.raises(TypeError, match=r"does not take \(x, sigma\).*unconditional"):
            call()
    with pytest.raises(TypeError, match=r"missing 1 required .*'label'"):
        sk.dsm_loss(lambda x, sigma, label: x, torch.zeros(2, 3), SIGMAS, seed=1)
    with pytest.raises(TypeError, match="inside"):
        sk.dsm_loss(lambda x, sigma: _fail(), torch.zeros(2, 3), SIGMAS, seed=1)


def _fail() -> Tensor:
    raise TypeError("inside")


def test_sigma_is_not_changed_by_a_score() -> None:
    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return -x / sigma.mul_(2)[:, None]

    for call in (
        lambda: sk.dsm_loss(score, torch.zeros(2, 3), SIGMAS, seed=1),
        lambda: sk.annealed_langevin(score, (1, 3), seed=1, **ANNEAL),
    ):
        with pytest.raises(RuntimeError, match="changed its argument sigma in place"):
            call()


def test_callbacks_that_change_nothing_are_refused() -> None:
    def assign(progress: Any) -> None:
        progress.x = progress.x.clamp(-1, 1)

    for callback in (lambda p: p.x.clamp(-1, 1), assign):
        with pytest.raises(TypeError, match="callback: returned a new tensor or set progress.x"):
            sk.annealed_langevin(gaussian, (2, 3), seed=1, callback=callback, **ANNEAL)
    # As list.append, or a number for a log.
    sk.annealed_langevin(gaussian, (2, 3), seed=1, callback=lambda p: float(p.x[0, 0]), **ANNEAL)


# Losses


@pytest.mark.parametrize("method", ["double_backward", "jvp", "finite_difference", "exact"])
def test_data_are_not_changed_by_a_score(method: str) -> None:
    net, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), torch.randn(4, 3)
    kept = x.clone()

    def loss() -> Tensor:
        if method == "exact":
            return sk.exact_score_loss(net, x)
        return sk.sliced_score_loss(net, x, seed=1, method=method)

    with pytest.raises(RuntimeError, match="score: changed its argument x in place.*clone"):
        loss()
    if method != "jvp":
        assert torch.equal(x, kept)


def test_scores_that_cut_their_graph_are_refused() -> None:
    """Their trace would be 0; that of a score that does not depend on x is."""

    @torch.inference_mode()
    def inferred(x: Tensor, sigma: Tensor) -> Tensor:
        return -2 * x

    def detached(x: Tensor, sigma: Tensor) -> Tensor:
        return (-2 * x).detach()

    x = torch.randn(4, 3)
    for score in (inferred, detached):
        for call in (
            lambda f=score: sk.sliced_score_loss(f, x, 1.0, seed=1),
            lambda f=score: sk.sliced_score_loss(f, x, 1.0, seed=1, method="jvp"),
            lambda f=score: sk.exact_score_loss(f, x, 1.0),
            lambda f=score: sk.log_likelihood(f, x, SIGMAS),
        ):
            with pytest.raises(RuntimeError, match="score: its value depends on x and has no der"):
                call()


def test_vmap_over_samples_is_refused() -> None:
    x, sigma = torch.randn(4, 2, 3), torch.rand(4, 2) + 0.1
    calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "perturb": lambda x, s: ops.perturb(x, s, KEY),
        "langevin_step": lambda x, s: ops.langevin_step(x, x, 0.1, KEY),
        "langevin_step_": lambda x, s: ops.langevin_step_(x.clone(), x, 0.1, KEY),
        "dsm_loss": lambda x, s: sk.dsm_loss(gaussian, x, SIGMAS, seed=1),
        "dsm_loss_from_score": lambda x, s: ops.dsm_loss_from_score(x, s, KEY),
        "fd_pair": lambda x, s: ops.fd_pair(x, s, KEY),
        "sliced_score_loss": lambda x, s: sk.sliced_score_loss(gaussian, x, s, seed=1),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="under torch.func.vmap.*make the noise first"):
            torch.func.vmap(call)(x, sigma)
        with pytest.raises(RuntimeError, match="under torch.func.vmap"):
            torch.func.vmap(torch.func.grad(lambda a, s, f=call: f(a, s).sum()))(x, sigma)
    # The recipe: gradients of each sample in the weights, noise made before.
    weight = torch.randn(3, 3)
    noisy = ops.perturb(x[0], sigma[0], KEY)

    def loss(w: Tensor, y: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (s * (y @ w) + z).square().sum()

    z = ops.normal(noisy.shape, KEY)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(weight, noisy, sigma[0], z)
    leaf = weight.clone().requires_grad_()
    total = ops.dsm_loss_from_score(noisy @ leaf, sigma[0], KEY).sum()
    torch.testing.assert_close(each.sum(0), torch.autograd.grad(total, leaf)[0])


def test_finite_differences_see_one_dropout_mask() -> None:
    dropout, x = nn.Dropout(0.5), torch.randn(64, 20)

    def score(y: Tensor) -> Tensor:
        return -dropout(y)

    found = []
    for method in ("double_backward", "finite_difference"):
        torch.manual_seed(1)
        found.append(sk.sliced_score_loss(score, x, seed=2, method=method, fd_step=0.1))
        found.append(torch.rand(()))
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[3], found[1])


def test_numbers_that_vary_compile_twice_and_without_breaks() -> None:
    x, s = torch.randn(4, 5), torch.randn(4, 5)
    calls: dict[str, Callable[[Tensor, float], Any]] = {
        "affine_step_": lambda x, a: ops.affine_step_(x.clone(), s[: len(x)], a, a, a, KEY),
        "langevin_step": lambda x, a: ops.langevin_step(x, s[: len(x)], a, KEY),
        "weighting": lambda x, a: sk.dsm_loss(gaussian, x, SIGMAS, seed=1, weighting=a),
        "fd_step": lambda x, a: sk.sliced_score_loss(
            lambda y: -y, x, seed=1, method="finite_difference", fd_step=a
        ),
        "sigma": lambda x, a: sk.sliced_score_loss(
            gaussian, x, a, seed=1, method="finite_difference"
        ),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for i in range(12):
            a = 0.1 + 0.07 * i
            torch.testing.assert_close(compiled(x, a), call(x, a))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, name
        torch._dynamo.reset()
        dynamic = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (4, 3, 2):
            torch.testing.assert_close(dynamic(x[:rows], 0.3), call(x[:rows], 0.3))


class Slotted:
    """A score that can be neither hashed nor referred to weakly."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self, x: Tensor) -> Tensor:
        return -x


def test_any_object_may_be_a_score() -> None:
    x = torch.randn(8, 3)
    got = sk.sliced_score_loss(Slotted(), x, seed=1)
    torch.testing.assert_close(got, sk.sliced_score_loss(lambda y: -y, x, seed=1))

    class Flash(Slotted):
        __slots__ = ()

        def __call__(self, x: Tensor) -> Tensor:
            return weight * NoDerivative.apply(x)

    weight = torch.ones(3, requires_grad=True)
    with pytest.warns(UserWarning, match="no derivative"):
        sk.sliced_score_loss(Flash(), x, seed=1)


def test_what_was_found_out_about_a_network_with_conditions_is_remembered() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.calls = nn.Linear(3, 3), 0

        def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
            self.calls += 1
            return self.out(NoDerivative.apply(x)) + label[:, None]

    net = Net()
    trainer = make(net, loss="ssm", conditions=("label",))
    data = TensorDataset(torch.randn(16, 3), torch.rand(16))
    with pytest.warns(UserWarning, match="no derivative"):
        trainer.fit(data, 4, progress=False)
    # Once to find out, and two calls of finite differences a step.
    assert net.calls == 1 + 2 * 4


def test_batches_of_gradients() -> None:
    x, s = torch.randn(3, 5, requires_grad=True), torch.rand(3) + 0.1
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: ops.perturb(x, s, KEY),
        lambda x: ops.dsm_loss_from_score(x, s, KEY, weight=s),
        lambda x: ops.langevin_step(x, x, 0.1, KEY),
        lambda x: sk.dsm_loss(lambda y, t: -x * y, x, SIGMAS, seed=1, reduction="none"),
    ]
    for probe in ("rademacher", "sphere"):
        calls.append(lambda x, p=probe: ops.probe_dot(x, KEY, probe=p))
        calls.append(lambda x, p=probe: ops.probe_scale(x[:, 0], (3, 5), KEY, probe=p))
        calls.append(lambda x, p=probe: ops.fd_pair(x, s, KEY, probe=p))
        for r in (True, False):
            how = {"probe": probe, "variance_reduced": r}
            calls.append(lambda x, h=how: ops.ssm_reduce(x, x * x, KEY, **h))
            calls.append(lambda x, h=how: ops.fd_reduce(x, x * x, s, KEY, **h))
    for i, call in enumerate(calls):
        y = call(x)
        basis = torch.eye(y.numel()).view(-1, *y.shape)
        (got,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
        want = [torch.autograd.grad(y, x, e, retain_graph=True)[0] for e in basis]
        torch.testing.assert_close(got, torch.stack(want), msg=lambda m, i=i: f"{i}: {m}")
        jacobian = torch.autograd.functional.jacobian(call, x.detach(), vectorize=True)
        torch.testing.assert_close(jacobian.reshape(got.shape), got)


def test_scores_without_a_graph_have_their_trace() -> None:
    x = torch.randn(6, 4)

    @torch.no_grad()
    def no_graph(y: Tensor, sigma: Tensor | None = None) -> Tensor:
        return -y

    def constant(y: Tensor, sigma: Tensor | None = None) -> Tensor:
        return torch.ones_like(y)

    weight = torch.ones(4, requires_grad=True)

    def unrelated(y: Tensor, sigma: Tensor | None = None) -> Tensor:
        return weight.expand_as(y)

    for score, trace, squares in ((no_graph, -4.0, x.square().sum(1)), (constant, 0.0, 4.0),
                                  (unrelated, 0.0, 4.0)):  # fmt: skip
        want = trace + 0.5 * torch.as_tensor(squares).mean()
        torch.testing.assert_close(sk.exact_score_loss(score, x).detach(), want)
        for method in ("auto", "double_backward", "jvp", "finite_difference"):
            got = sk.sliced_score_loss(score, x, seed=1, method=method, fd_step=0.5)
            torch.testing.assert_close(got.detach(), want, rtol=1e-4, atol=1e-4)
    # The flow of the constant score moves all points alike: the prior's density there.
    levels = [2.0, 1.0]
    got = sk.log_likelihood(constant, x, levels, seed=1)
    h = math.log(2.0)
    moved = x - 0.5 * h * (1.0 + 4.0)
    want = -0.5 * (moved / 2).square().sum(1) - 4 * math.log(2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(got, want)
    with torch.inference_mode():
        for call in (
            lambda: sk.sliced_score_loss(lambda y: -y, x, seed=1),
            lambda: sk.exact_score_loss(lambda y: -y, x),
            lambda: sk.log_likelihood(gaussian, x, levels, seed=1),
        ):
            with pytest.raises(RuntimeError, match="inference_mode.*no_grad"):
                call()


def test_nothing_is_read_from_the_device_for_labels() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 3, device="cuda")
        labels = torch.zeros(4, dtype=torch.int64, device="cuda")
        loss = sk.dsm_loss(gaussian, x, SIGMAS.tolist(), seed=1, labels=labels)
        assert loss.device.type == "cuda"


def test_a_label_out_of_range_is_nan_where_nothing_is_read() -> None:
    x, labels = torch.randn(4, 3), torch.tensor([-1, 0, 6, 5])

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return sk.dsm_loss(gaussian, x, SIGMAS, seed=1, labels=labels, reduction="none")

    with pytest.raises(ValueError, match="labels: got values from -1 to 6"):
        loss(x, labels)
    got = torch.compile(loss, backend="aot_eager")(x, labels)
    assert got.isnan().tolist() == [True, False, True, False]
    torch.testing.assert_close(got[[1, 3]], loss(x, labels.clamp(0, 5))[[1, 3]])


# Schedules and small things


def test_tables_are_on_the_cpu_and_float32_whatever_the_defaults() -> None:
    def made() -> list[Tensor]:
        return [
            sk.geometric_sigmas(5.0, 0.1, 4),
            sk.geometric_sigmas(1.0, 1.0, 1),
            sk.edm_sigmas(),
            sk.preset("ncsn-mnist").sigmas,
        ]

    def sampled() -> list[Tensor]:
        start = torch.zeros(2, 3, dtype=torch.float32, device="cpu")
        return [
            sk.annealed_langevin(gaussian, start, seed=1, **ANNEAL),
            sk.ddim(gaussian, start, sk.DDPMSchedule.linear(20), steps=5, seed=1),
            sk.predictor_corrector(gaussian, start, VP(), steps=30, seed=1),
        ]

    want, samples = made(), sampled()
    try:
        torch.set_default_dtype(torch.float64)
        for got, expected in zip(made() + sampled(), want + samples, strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, expected)
        assert MLPScore(3, 8).embed.frequencies.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert isinstance(sk.noise.fresh_seed(), int)
        for got, expected in zip(made() + sampled(), want + samples, strict=True):
            assert torch.equal(got, expected)


def test_labels_of_a_network_in_half_precision() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.gain * x + label[:, None]

    for dtype in (torch.float16, torch.bfloat16):
        score = sk.by_label(Net(), SIGMAS, divide=False).to(dtype)
        got = score(torch.zeros(2, 3), SIGMAS[[1, 4]])
        assert got[:, 0].tolist() == [1, 4]


def test_datasets_have_schedules() -> None:
    x = torch.randn(40, 2, 3)
    want = sk.suggest_schedule(x)
    assert sk.suggest_schedule(TensorDataset(x, torch.arange(40))).why == want.why
    assert sk.max_pairwise_distance(TensorDataset(x)) == sk.max_pairwise_distance(x)

    class Listed:
        """Any object with a length and samples, as `Trainer.fit` takes."""

        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> Tensor:
            return x[index]

    assert sk.suggest_schedule(Listed()).why == want.why


def test_levels_too_far_apart_are_judged() -> None:
    x = torch.randn(40, 400)
    wanted = len(sk.suggest_schedule(x).sigmas)
    assert f"too little, take some {wanted} levels" in sk.suggest_schedule(x, levels=4).why
    assert "too little" not in sk.suggest_schedule(x).why


def test_messages_give_the_way_out() -> None:
    with pytest.raises(TypeError, match="view_as_real"):
        ops.langevin_step(torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3), 0.1, KEY)
    with pytest.raises(TypeError, match=r"call \.item\(\)"):
        ops.langevin_step(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(0.1), KEY)
    with pytest.raises(TypeError) as error:
        ops.langevin_step(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(4), KEY)
    assert ".item()" not in str(error.value)


def test_public_names_are_attributes() -> None:
    for name in ("networks", "integrations", "sampling", "diffusion", "Purpose", "VE", "load"):
        assert hasattr(sk, name)
