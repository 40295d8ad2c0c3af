"""The commands' samplers, animations, sheets, warm starts and the time they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_samples import write_checkpoint
from PIL import Image
from torch import Tensor

import score_kernels as sk
from score_kernels.cli import data, plots, samplers
from score_kernels.cli import train as command
from score_kernels.cli.main import main
from score_kernels.training import checkpoint

SETTINGS = """
[network]
kind = 'mlp'
width = 8
depth = 1
[noise]
levels = 3
[training]
batch_size = 4
warmup_steps = 0
steps = 4
"""
HIGH, LOW = 2.0, 0.05
SCHEDULE = {"sigmas": [HIGH, 0.3, LOW], "steps_per_level": 2, "step_size": 0.001}


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    return tmp_path / "images.npy"


def trained(images: Path, out: Path, more: str = "", *flags: Any) -> int:
    """Train by the settings and more keys of [training] or sections after it."""
    toml = out.with_suffix(".toml")
    toml.write_text(SETTINGS + more)
    return run("train", "--data", images, "--config", toml, "--out", out, *flags)


def samples_of(out: Path) -> np.ndarray:
    return np.concatenate([np.load(p)["samples"] for p in sorted((out / "shards").iterdir())])


class Counted:
    """The score of N(0, I / 4) that counts its calls and notes their levels."""

    def __init__(self) -> None:
        self.levels: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.levels.append(float(sigma[0]))
        return -x / (0.25 + sigma[:, None] ** 2)


def by_hand(name: str, net: Any, shape: tuple[int, ...]) -> Tensor:
    """Samples for 10 calls of the network, or 9 where they come in pairs, by the library itself."""
    levels = sk.geometric_sigmas(HIGH, LOW, 10)
    if name == "consistent":
        return sk.consistent_annealed(net, shape, levels, seed=1)
    if name == "annealed":
        size = sk.best_step_size((HIGH / LOW) ** 0.5, LOW, 3)
        sigmas = sk.geometric_sigmas(HIGH, LOW, 3)
        return sk.annealed_langevin(net, shape, sigmas, steps_per_level=3, step_size=size, seed=1)
    if name == "pc":
        return sk.predictor_corrector(net, shape, sk.VE(LOW, HIGH), steps=4, end=0.0, seed=1)
    if name == "flow":
        return sk.probability_flow(net, shape, sk.edm_sigmas(HIGH, LOW, 5), seed=1)
    return {"ddpm": sk.ddpm, "ddim": sk.ddim, "dpm": sk.dpm_solver}[name](
        net, shape, levels, seed=1
    )


@pytest.mark.parametrize("name", samplers.NAMES)
def test_a_sampler_makes_no_more_calls_than_it_may(name: str) -> None:
    for calls in (3, 4, 10, 31, None):
        net, chosen = Counted(), samplers.choose(SCHEDULE, name, calls)
        chosen.draw(net, (2, 3), seed=1)
        most = calls or (7 if name == "annealed" else 100)
        assert len(net.levels) == chosen.calls == chosen.described()["calls"]
        assert most - (1 if name in ("pc", "flow") else 0) <= chosen.calls <= most, calls
        assert max(net.levels) == pytest.approx(HIGH) and min(net.levels) == pytest.approx(LOW)
    got = samplers.choose(SCHEDULE, name, 10).draw(Counted(), (50, 3), seed=1)
    assert torch.equal(got, by_hand(name, Counted(), (50, 3)))


@pytest.mark.parametrize(("sampler", "calls"), [("ddim", 10), ("flow", 9), ("annealed", None)])
def test_sampler_and_calls_reach_the_samples(
    tmp_path: Path, sampler: str, calls: int | None
) -> None:
    path, out = write_checkpoint(tmp_path / "c.pt"), tmp_path / "out"
    flags = ["--sampler", sampler, *(["--calls", calls] if calls else [])]
    assert run("sample", path, "--num", 3, "--seed", 5, "--out", out, *flags) == 0
    loaded = sk.load(path)
    chosen = samplers.choose(loaded.about["schedule"], sampler, calls)
    x = chosen.draw(loaded.net, (3, 1, 6, 7), seed=5)
    assert np.array_equal(samples_of(out), loaded.data.unscale(x).numpy())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sampler"] == chosen.described() and chosen.calls == (calls or 7)


def test_what_a_sampler_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, points = write_checkpoint(tmp_path / "c.pt"), write_checkpoint(tmp_path / "p.pt", (7,))
    for where, flags, words in (
        (path, ["--calls", 2], "calls: got 2, expected at least 3"),
        (path, ["--no-clamp"], "clamp: got False for samples in uint8, expected True"),
        (points, ["--animate"], "animate: got samples of shape (7,), expected images [C, H, W]"),
    ):
        assert run("sample", where, "--out", tmp_path / "out", *flags) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="sampler: got 'dmp', expected one of"):
        samplers.choose(SCHEDULE, "dmp")


def test_samples_are_clamped_unless_not_wanted(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c.pt", (5,), "float32", (-2.0, 6.0))
    for flag in ("--clamp", "--no-clamp"):
        assert run("sample", path, "--out", tmp_path / flag, "--num", 40, flag) == 0
    free, clamped = samples_of(tmp_path / "--no-clamp"), samples_of(tmp_path / "--clamp")
    assert free.min() < -2.1 and free.max() > 6.1
    assert np.array_equal(clamped, free.clip(-2, 6))


def test_an_animation_ends_with_the_samples(tmp_path: Path) -> None:
    path, out = write_checkpoint(tmp_path / "c.pt"), tmp_path / "out"
    flags = ["--num", 30, "--seed", 2, "--sampler", "consistent", "--calls", 130, "--out", out]
    assert run("sample", path, *flags) == 0
    plain = samples_of(out)
    assert not (out / "samples.gif").exists()
    assert run("sample", path, *flags, "--animate") == 0
    assert np.array_equal(samples_of(out), plain)
    with Image.open(out / "samples.gif") as gif:
        # Every third of 129 states, and the result.
        assert gif.n_frames == 44 and gif.info["loop"] == 0
        times, pictures = [], []
        for k in range(gif.n_frames):
            gif.seek(k)
            times.append(gif.info["duration"])
            pictures.append(np.asarray(gif.convert("L")).astype(float))
    assert times == [110] * 43 + [3000]
    stored = data.Data(torch.from_numpy(plain[:25]), 0.0, 255.0, "")
    plots.save_sheet(tmp_path / "25.png", stored.scaled(torch.arange(25)))
    wanted = np.asarray(Image.open(tmp_path / "25.png")).astype(float)
    differences = [abs(picture - wanted).mean() for picture in pictures]
    # A GIF has 256 colours; batches of another size may round otherwise.
    assert differences[-1] < 1 < differences[-20] < differences[0]
    # Noise of sigma = 1 over sqrt(1 + sigma^2): mid-tones, not black and white alone.
    assert 40 < pictures[0].std() < 110
    assert run("sample", path, *flags, "--overwrite") == 0
    assert not (out / "samples.gif").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "samples.gif").write_bytes(b"mine")
    assert run("sample", path, "--num", 2, "--out", other) == 1
    assert (other / "samples.gif").read_bytes() == b"mine"


def test_the_settings_of_a_training_choose_the_sampler(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "run"
    more = "[sampling]\nsampler = 'ddim'\ncalls = 4\ncount = 6\n"
    assert trained(images, out, more) == 0
    loaded = sk.load(out / "checkpoint.pt")
    levels = sk.geometric_sigmas(*loaded.schedule.sigmas[[0, -1]].tolist(), 4)
    plots.save_sheet(tmp_path / "s.png", sk.ddim(loaded.net, (6, 1, 4, 4), levels, seed=0))
    assert (out / "samples.png").read_bytes() == (tmp_path / "s.png").read_bytes()

    def used(*flags: Any) -> tuple[str, int]:
        path = out / "checkpoint.pt"
        assert run("sample", path, "--num", 2, "--out", tmp_path / "s", "--overwrite", *flags) == 0
        sampler = json.loads((tmp_path / "s" / "manifest.json").read_text())["sampler"]
        return sampler["name"], sampler["calls"]

    assert used() == ("ddim", 4)
    assert used("--calls", 5) == ("ddim", 5)
    # Another sampler has its own number of calls.
    assert used("--sampler", "dpm") == ("dpm_solver", 100)
    assert used("--sampler", "ddpm", "--calls", 3) == ("ddpm", 3)
    assert trained(images, out, "[sampling]\nsampler = 'flow'\n", "--resume") == 0
    assert used() == ("probability_flow", 99)


def test_more_steps_than_planned(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "run", tmp_path / "run" / "checkpoint.pt"
    assert trained(images, out, "cosine = false\n") == 0
    assert trained(images, out, "cosine = false\n", "--resume", "--steps", 7) == 0
    text = capsys.readouterr().out
    assert "resumes at step 4 of 7, at a constant learning rate" in text
    assert checkpoint.read(path)["step"] == 7
    assert trained(images, out, "cosine = false\n", "--resume", "--steps", 6) == 1
    assert "steps: got 6, expected at least 7, those done" in capsys.readouterr().err
    whole = tmp_path / "whole"
    assert trained(images, whole, "cosine = false\n", "--steps", 7) == 0
    assert torch.equal(
        checkpoint.read(path)["losses"], checkpoint.read(whole / "checkpoint.pt")["losses"]
    )

    fallen = tmp_path / "fallen"
    assert trained(images, fallen) == 0
    assert trained(images, fallen, "", "--resume", "--steps", 7) == 1
    error = capsys.readouterr().err
    assert "[training] steps was 4 and is 7" in error
    assert f"--from {fallen / 'checkpoint.pt'} --out ANOTHER" in error


def test_a_training_begins_with_the_weights_of_another(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, path = tmp_path / "run", tmp_path / "run" / "checkpoint.pt"
    assert trained(images, out, "learning_rate = 0.1\n") == 0
    before = checkpoint.read(path)
    # Data of another scale: the network's own stays.
    darker = tmp_path / "darker.npy"
    np.save(darker, np.load(images) // 3)
    begun = tmp_path / "begun"
    assert trained(darker, begun, "", "--from", path, "--steps", 1) == 0
    assert f"begins with the weights and averaged weights of {path}, step 4" in (
        capsys.readouterr().out
    )
    after = checkpoint.read(begun / "checkpoint.pt")
    assert after["step"] == 1 and after["about"]["data"]["std"] == before["about"]["data"]["std"]
    weight = "layers.0.weight"
    change = (after["net"][weight] - before["net"][weight]).abs().max()
    # One step of Adam at its first learning rate, 0.001.
    assert 0.0005 < float(change) < 0.0011
    average = 0.999 * before["ema"][weight] + 0.001 * after["net"][weight]
    assert torch.allclose(after["ema"][weight], average, atol=1e-6)

    # Stopped and resumed by the same command, it has the bits of one that was not.
    flags = ("--from", path, "--steps")
    for name, steps in (("whole", [6]), ("cut", [3, 6])):
        for n in steps:
            more = "cosine = false\n"
            assert trained(images, tmp_path / name, more, "--resume", *flags, n) == 0
    whole, cut = (checkpoint.read(tmp_path / n / "checkpoint.pt") for n in ("whole", "cut"))
    assert torch.equal(whole["ema"][weight], cut["ema"][weight]) and whole["step"] == 6

    def error(*arguments: Any) -> str:
        capsys.readouterr()
        assert trained(*arguments) == 1
        return capsys.readouterr().err

    assert "was not begun with weights" in error(images, out, "", "--resume", "--from", path)
    wide = tmp_path / "wide"
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", SETTINGS.replace("= 8", "= 16"))
    text = error(images, wide, "", "--from", path)
    assert f"checkpoint {path}: of another network: [network] width was 8 and is 16" in text
    monkeypatch.undo()
    points = tmp_path / "points.npy"
    np.save(points, np.random.default_rng(0).normal(size=(20, 3)).astype("f4"))
    text = error(points, wide, "", "--from", path)
    assert "layers.0.weight is (8, 16) in the file and (8, 3) in the network" in text
    assert "none.pt, expected a file" in error(images, wide, "", "--from", tmp_path / "none.pt")
    assert not wide.exists()


def test_sheets_come_with_checkpoints_and_the_first_one_early(tmp_path: Path, images: Path) -> None:
    more = "save_every = 20\n[sampling]\ncount = {}\ncalls = 3\n"
    for count in (4, 0):
        assert trained(images, tmp_path / f"{count}", more.format(count), "--steps", 43) == 0
    names = sorted(p.name for p in (tmp_path / "4").glob("samples*"))
    numbered = [f"samples-{step:08d}.png" for step in (2, 20, 40)]
    assert names == [*numbered, "samples.png"]
    assert not list((tmp_path / "0").glob("samples*"))


def test_how_long_a_training_takes_is_said_before_it(
    tmp_path: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A sheet of 12 samples of 10 calls is 10 steps' worth of calls, every 20 steps.
    more = "save_every = 20\n[sampling]\ncount = 12\ncalls = 10\n"
    assert trained(images, tmp_path / "quick", more) == 0
    assert "this will take" not in capsys.readouterr().out
    timed, measure = [], command._seconds_a_step

    def two_seconds(*arguments: Any) -> float:
        timed.append(measure(*arguments))
        return 2.0

    monkeypatch.setattr(command, "_seconds_a_step", two_seconds)
    monkeypatch.setattr(command, "_WORTH_TIMING", 4)
    assert trained(images, tmp_path / "timed", more) == 0
    assert "this will take about 12 s on cpu" in capsys.readouterr().out
    assert len(timed) == 1 and 0 < timed[0] < 10
    states = [checkpoint.read(tmp_path / n / "checkpoint.pt") for n in ("quick", "timed")]
    assert torch.equal(states[0]["losses"], states[1]["losses"])
    words = [command._duration(s) for s in (12.4, 150.0, 90 * 60.0, 2.5 * 3600)]
    assert words == ["12 s", "2 min", "90 min", "2.5 h"]


@pytest.mark.parametrize(("loss", "zero"), [("dsm", 8.0), ("ssm", None)])
def test_the_chart_of_losses_is_as_old_as_the_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, zero: float | None
) -> None:
    """With the loss of a network that answers 0, D / 2, where that is known."""
    charts: list[tuple[int, float | None]] = []

    def drawn(path: Path, losses: Tensor, zero_network: float | None) -> None:
        charts.append((len(losses), zero_network))

    monkeypatch.setattr(plots, "draw_losses", drawn)
    monkeypatch.setattr(command, "_REPORT_EVERY", 5)
    more = f"save_every = 10\nloss = '{loss}'\n[sampling]\ncount = 0\n"
    assert trained(images, tmp_path / loss, more, "--steps", 25) == 0
    assert charts == [(10, zero), (20, zero), (25, zero)]
