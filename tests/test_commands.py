"""`score-kernels train` and `sample`, end to end on small files, and what they refuse."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from score_kernels.cli import config
from score_kernels.cli import main as cli
from score_kernels.cli.train import train
from score_kernels.cli.trained import draw_samples
from score_kernels.networks import MLPScore
from score_kernels.training import Trainer, checkpoint

SETTINGS = """
[network]
width = 8
depth = 2
[noise]
sigma_max = 2.0
levels = 4
steps_per_level = 2
[training]
steps = 6
batch_size = 8
learning_rate = 0.05
warmup_steps = 0
save_every = 2
[sampling]
count = 5
calls = 5
"""


def images(count: int = 12, shape: tuple[int, ...] = (6, 7)) -> np.ndarray:
    return np.random.default_rng().integers(0, 256, (count, *shape), dtype=np.uint8)


def folder_of_images(path: Path) -> Path:
    path.mkdir()
    for i, image in enumerate(images(12, (6, 7, 3))):
        Image.fromarray(image).save(path / f"{i}.png")
    return path


def idx_file(path: Path) -> Path:
    values = images()
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))
    return path


def npy_file(path: Path) -> Path:
    np.save(path, np.random.default_rng().normal(size=(30, 3)).astype(np.float32))
    return path.with_suffix(".npy")


SOURCES = {"folder": folder_of_images, "digits.gz": idx_file, "points.npy": npy_file}


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SETTINGS)
    return path


def run(*arguments: Any) -> int:
    return cli.main([str(a) for a in arguments])


def png(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def sampled(out: Path) -> np.ndarray:
    """All samples of a folder; its shards are in test_shards.py."""
    shards = sorted((out / "shards").iterdir())
    return np.concatenate([np.load(shard)["samples"] for shard in shards])


@pytest.mark.parametrize("kind", SOURCES)
def test_train_then_sample(
    tmp_path: Path, settings: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    source, out = SOURCES[kind](tmp_path / kind), tmp_path / "run"
    random_state = torch.get_rng_state()
    assert run("train", "--data", source, "--config", settings, "--out", out) == 0
    assert torch.equal(torch.get_rng_state(), random_state), "the caller's generator was moved"
    text = capsys.readouterr().out
    assert "sigma_max" in text and "given" in text and "step 6" in text
    numbered = [f"samples-{step:08d}.png" for step in (2, 4, 6)]
    pictures = ["samples.png", *numbered] if kind != "points.npy" else []
    names = sorted([".lock", "checkpoint.pt", "config.toml", "loss.png", *pictures])
    assert sorted(p.name for p in out.iterdir()) == names
    assert png(out / "loss.png").std() > 5
    used = config.load(out / "config.toml")
    assert used.data.path == str(source) and used.training.steps == 6
    state = checkpoint.read(out / "checkpoint.pt")
    assert state["step"] == 6 and len(state["losses"]) == 6

    shape = {"folder": (3, 6, 7), "digits.gz": (1, 6, 7), "points.npy": (3,)}[kind]
    got = tmp_path / "samples"
    assert run("sample", out / "checkpoint.pt", "--num", 5, "--out", got, "--seed", 4) == 0
    samples = sampled(got)
    assert samples.shape == (5, *shape)
    assert samples.dtype == (np.float32 if kind == "points.npy" else np.uint8)
    assert (got / "samples.png").exists() == bool(pictures)
    # Other batch sizes, and one sample alone: the same, to what the network's own sums allow.
    again = tmp_path / "again"
    code = run("sample", out / "checkpoint.pt", "--num", 2, "--out", again, "--seed", 4,
               "--first", 3, "--batch-size", 1)  # fmt: skip
    assert code == 0
    part = sampled(again).astype(float)
    assert np.abs(part - samples[3:]).max() <= (1e-4 if kind == "points.npy" else 1)
    raw = tmp_path / "raw"
    assert run("sample", out / "checkpoint.pt", "--num", 5, "--out", raw, "--seed", 4,
               "--weights", "raw") == 0  # fmt: skip
    assert (sampled(raw) != samples).any()


def test_resume_has_the_same_bits(tmp_path: Path, settings: Path) -> None:
    source = idx_file(tmp_path / "digits")
    settings.write_text(SETTINGS.replace("[training]", "[training]\ncosine = false"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = ("train", "--data", source, "--config", settings)
    assert run(*common, "--out", whole) == 0
    assert run(*common, "--out", cut, "--steps", 3) == 0
    # The data may have moved.
    moved = source.rename(tmp_path / "moved")
    assert run("train", "--data", moved, "--config", settings, "--out", cut, "--resume") == 0
    a, b = (checkpoint.read(p / "checkpoint.pt") for p in (whole, cut))
    for name in ("net", "ema"):
        assert all(torch.equal(a[name][k], b[name][k]) for k in a[name])
    assert torch.equal(a["losses"], b["losses"])
    assert (whole / "samples.png").read_bytes() == (cut / "samples.png").read_bytes()


def test_sheets_on_the_way(tmp_path: Path, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draw(net: Any, about: Any, count: int, **options: Any) -> torch.Tensor:
        drawn.append(count)
        return draw_samples(net, about, count, **options)

    monkeypatch.setattr("score_kernels.cli.train.draw_samples", draw)
    settings.write_text(SETTINGS.replace("count = 5", "count = 5\nevery = 3"))
    source = folder_of_images(tmp_path / "f")
    assert run("train", "--data", source, "--config", settings, "--out", tmp_path / "o") == 0
    assert png(tmp_path / "o" / "samples-00000003.png").ndim == 3
    assert (tmp_path / "o" / "samples-00000006.png").exists()
    assert drawn == [5, 5]


def test_the_printed_settings_are_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("train", "--print-config", "--seed", 7) == 0
    (tmp_path / "c.toml").write_text(capsys.readouterr().out)
    assert config.load(tmp_path / "c.toml").training.seed == 7
    # What is given on the command line goes before the file, zeros too.
    given = ("--config", tmp_path / "c.toml", "--seed", 0, "--steps", 0, "--device", "cpu:0")
    assert run("train", "--print-config", *given) == 0
    text = capsys.readouterr().out
    assert "\nseed = 0\n" in text and "\nsteps = 0\n" in text and 'device = "cpu:0"' in text


def test_nothing_is_overwritten(
    tmp_path: Path, settings: Path, capsys: pytest.CaptureFixture
) -> None:
    source, out = idx_file(tmp_path / "digits"), tmp_path / "run"
    common = ("train", "--data", source, "--config", settings, "--out", out)
    assert run(*common) == 0
    before = {p: p.read_bytes() for p in out.iterdir()}
    path = out / "checkpoint.pt"

    def fails(*arguments: Any) -> str:
        capsys.readouterr()
        assert run(*arguments) == 1
        assert {p: p.read_bytes() for p in out.iterdir()} == before
        out_text, text = capsys.readouterr()
        last = text.strip().splitlines()[-1]
        assert last.startswith(f"score-kernels {arguments[0]}: ") and "Traceback" not in text
        return last

    assert f"{path} exists" in fails(*common)
    settings.write_text(SETTINGS.replace("width = 8", "width = 16"))
    assert "[network] width was 8 and is 16" in fails(*common, "--resume")
    settings.write_text(SETTINGS)
    assert "[training] seed was 0 and is 1" in fails(*common, "--resume", "--seed", 1)
    assert "[training] steps was 6 and is 9" in fails(*common, "--resume", "--steps", 9)
    idx_file(source)
    assert "are not those it began with" in fails(*common, "--resume")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    before[path] = path.read_bytes()
    assert f"checkpoint {path}: cut short" in fails(*common, "--resume")
    assert f"checkpoint {path}: cut short" in fails("sample", path, "--out", tmp_path / "s")
    path.write_bytes(whole)
    before[path] = whole
    assert run("sample", path, "--num", 1, "--out", tmp_path / "s") == 0
    words = "settings: seed was 0 and is 1; name another --out, or start afresh with --overwrite"
    assert words in fails("sample", path, "--num", 1, "--out", tmp_path / "s", "--seed", 1)
    assert run("sample", path, "--num", 2, "--out", tmp_path / "s", "--overwrite") == 0
    assert len(sampled(tmp_path / "s")) == 2
    for option in ("--num", "--batch-size"):
        assert "got 0, expected at least 1" in fails("sample", path, option, 0, "--out", "never")
    checkpoint.write(tmp_path / "other.pt", {"about": {}})
    assert "not written by score-kernels train" in fails("sample", tmp_path / "other.pt")


def test_bad_data_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each names the file; no output folder is made."""
    empty = tmp_path / "empty"
    empty.mkdir()
    mixed = folder_of_images(tmp_path / "mixed")
    Image.fromarray(images(1, (9, 9, 3))[0]).save(mixed / "odd.png")
    cut = folder_of_images(tmp_path / "cut")
    (cut / "3.png").write_bytes((cut / "3.png").read_bytes()[:-30])
    idx = idx_file(tmp_path / "short")
    idx.write_bytes(gzip.decompress(idx.read_bytes())[:-5])
    nan = tmp_path / "nan.npy"
    values = np.random.default_rng().normal(size=(5, 4)).astype(np.float32)
    values[2, 1] = np.nan
    np.save(nan, values)
    constant = tmp_path / "constant.npy"
    np.save(constant, np.full((5, 4), 3, dtype=np.uint8))
    for source, words in (
        (tmp_path / "missing", "missing"),
        (empty, "empty"),
        (mixed, "odd.png"),
        (cut, "3.png"),
        (idx, "short"),
        (nan, "nan.npy"),
        (constant, "constant.npy"),
    ):
        assert run("train", "--data", source, "--out", tmp_path / "run") == 1
        text = capsys.readouterr().err
        lines = [line for line in text.splitlines() if line.startswith("score-kernels train: ")]
        assert len(lines) == 1 and words in lines[0], text
        assert "Traceback" not in text and not (tmp_path / "run").exists()
    assert run("train", "--out", tmp_path / "run") == 1
    assert "--data PATH" in capsys.readouterr().err


def rate(trainer: Trainer) -> float:
    group = trainer.optimizer.param_groups[0]
    return group.get("initial_lr", group["lr"])


# A setting, a value that is not its default, and what it must be of the trainer.
EFFECTS: dict[str, tuple[Any, Callable[[Trainer], Any], Any]] = {
    "data.key": ("b", lambda t: t.about["data"]["shape"], [2]),
    "network.kind": ("mlp", lambda t: type(t.net).__name__, "MLPScore"),
    "network.width": (24, lambda t: t.net.layers[0].out_features, 24),
    "network.depth": (4, lambda t: len(t.net.layers), 4),
    "noise.sigma_max": (9.0, lambda t: float(t.sigmas[0]), 9.0),
    "noise.sigma_min": (0.5, lambda t: float(t.sigmas[-1]), 0.5),
    "noise.levels": (7, lambda t: len(t.sigmas), 7),
    "noise.steps_per_level": (3, lambda t: t.about["schedule"]["steps_per_level"], 3),
    "noise.step_size": (1e-4, lambda t: t.about["schedule"]["step_size"], 1e-4),
    "training.loss": ("ssm", lambda t: t.loss, "ssm"),
    "training.steps": (3, lambda t: t.step, 3),
    "training.batch_size": (6, lambda t: t.batch_size, 6),
    "training.accumulate": (2, lambda t: t.accumulate, 2),
    "training.learning_rate": (0.25, rate, 0.25),
    "training.warmup_steps": (1, lambda t: t.warmup_steps, 1),
    "training.cosine": (False, lambda t: t.scheduler, None),
    "training.clip_norm": (0.5, lambda t: t.clip_norm, 0.5),
    "training.ema_decay": (0.5, lambda t: t.ema_decay, 0.5),
    "training.ema_warmup": (False, lambda t: t.ema_warmup, False),
    "training.precision": ("bfloat16", lambda t: t.precision, "bfloat16"),
    "training.seed": (9, lambda t: t.seed, 9),
    "training.save_every": (8, lambda t: t.saves, 3),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_setting_reaches_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of a training of 20 steps; `data.path` and `training.device` are refused elsewhere."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(30, 2))
    if name == "network.kind":
        a = rng.normal(size=(30, 4, 4))
    np.savez(tmp_path / "two.npz", a=a, b=b)
    tables: dict[str, dict[str, Any]] = {
        "data": {"path": str(tmp_path / "two.npz"), "key": "a"},
        "noise": {"levels": 5},
        "training": {"steps": 20, "batch_size": 8},
    }
    saves, save = [], Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self, path: (saves.append(path), save(self, path)))

    def trained(out: str) -> Trainer:
        trainer = train(config.from_dict(tables, "here"), tmp_path / out, progress=False)
        trainer.saves = len(saves)
        saves.clear()
        return trainer

    value, seen, expected = EFFECTS[name]
    before = seen(trained("default"))
    section, key = name.split(".")
    tables.setdefault(section, {})[key] = value
    after = trained("changed")
    assert seen(after) == expected != before
    if name == "training.learning_rate":
        assert after.scheduler.T_max == 20
    if name == "training.steps":
        assert len(after.losses) == 3


def on_points(folder: Path, **training: Any) -> dict[str, dict[str, Any]]:
    """Settings of a training on points."""
    path = str(npy_file(folder / "points.npy"))
    return {
        "data": {"path": path},
        "noise": {"levels": 5},
        "training": {"batch_size": 8, **training},
    }


def test_settings_for_none_and_by_themselves(tmp_path: Path) -> None:
    tables = on_points(tmp_path, steps=25, clip_norm=0)
    trainer = train(config.from_dict(tables, "here"), tmp_path / "out", progress=False)
    assert trainer.clip_norm is None
    # A tenth of the training, in place of 200.
    assert trainer.warmup_steps == 2
    tables["network"] = {"kind": "conv"}
    with pytest.raises(ValueError, match="network kind: got conv for samples of shape"):
        train(config.from_dict(tables, "here"), tmp_path / "conv", progress=False)


def test_the_network_s_first_weights_are_the_seed_s(tmp_path: Path) -> None:
    tables = on_points(tmp_path, steps=0, seed=3)
    trainer = train(config.from_dict(tables, "here"), tmp_path / "out", progress=False)
    torch.manual_seed(3)
    values = np.load(tmp_path / "points.npy").astype(np.float64)
    middle, half = (values.max() + values.min()) / 2, (values.max() - values.min()) / 2
    std = math.sqrt((((values - middle) / half) ** 2).mean())
    net = MLPScore(3, 32, depth=3, data_std=trainer.net.data_std)
    # The root mean square around 0, which is not the standard deviation.
    assert math.isclose(net.data_std, std, rel_tol=1e-5)
    for got, want in zip(trainer.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(got, want)


def test_defaults_of_the_commands() -> None:
    def defaults(*command: str) -> dict[str, Any]:
        return vars(cli._parser().parse_args(command))

    assert defaults("info") == {"command": "info"}
    assert defaults("selfcheck") == {"command": "selfcheck", "device": "cpu", "quick": False}
    assert defaults("train") == {
        "command": "train", "data": None, "out": Path("run"), "config": None, "steps": None,
        "seed": None, "device": None, "resume": False, "start": None, "print_config": False,
    }  # fmt: skip
    assert defaults("sample", "c.pt") == {
        "command": "sample", "path": Path("c.pt"), "count": 64, "out": Path("samples"),
        "format": "npz", "shard_size": 1024, "seed": 0, "first_sample": 0, "weights": "ema",
        "batch_size": 64, "device": "cpu", "sampler": None, "calls": None, "clamp": True,
        "animate": False, "overwrite": False,
    }  # fmt: skip


def test_every_flag_reaches_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the functions do with them: test_shards.py and test_selfcheck.py."""
    calls: list[Any] = []
    for target in ("sample.sample", "selfcheck.run"):
        monkeypatch.setattr(
            f"score_kernels.cli.{target}", lambda *a, **k: calls.append((*a, k)) or 0
        )
    assert run("sample", "c.pt", "--num", 5, "--out", "o", "--format", "png", "--shard-size", 7,
               "--seed", 3, "--first", 9, "--weights", "raw", "--batch-size", 2,
               "--device", "cuda:1", "--sampler", "dpm", "--calls", 30, "--no-clamp", "--animate",
               "--overwrite") == 0  # fmt: skip
    assert run("selfcheck", "--device", "cuda:1", "--quick") == 0
    given = {
        "path": Path("c.pt"), "count": 5, "out": Path("o"), "format": "png", "shard_size": 7,
        "seed": 3, "first_sample": 9, "weights": "raw", "batch_size": 2, "device": "cuda:1",
        "sampler": "dpm", "calls": 30, "clamp": False, "animate": True, "overwrite": True,
    }  # fmt: skip
    assert calls == [(given,), ("cuda:1", {"quick": True})]


def test_stopping_by_hand_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("score_kernels.cli.train.train", stop)
    assert run("train", "--data", tmp_path) == 130
    assert "score-kernels train: stopped" in capsys.readouterr().err
