"""The settings' file: every key documented, typos refused by name, and the way back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from score_kernels.cli import config
from score_kernels.cli.config import Config


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path)


def test_round_trip_and_every_key_is_in_the_text(tmp_path: Path) -> None:
    text = config.to_toml(Config())
    assert read(tmp_path, text) == Config()
    changed = dataclasses.replace(
        Config(),
        data=config.DataConfig(path='a "b"\\ü\n', key="x"),
        noise=config.NoiseConfig(sigma_max=3.0, sigma_min=1e-5, levels=7, step_size=2e-9),
        training=config.TrainingConfig(cosine=False, seed=2**63 - 1),
    )
    assert read(tmp_path, config.to_toml(changed)) == changed
    assert config.from_dict(config.to_dict(changed), "x") == changed
    for section in dataclasses.fields(Config):
        assert f"[{section.name}]" in text
        for key in dataclasses.fields(getattr(Config(), section.name)):
            assert f"\n{key.name} = " in text or f"\n# {key.name} =" in text
            assert f"\n# {key.metadata['words']}" in text
    assert "# denoising or sliced score matching (dsm, ssm)\n" in text
    assert "# optimiser steps in all\n" in text
    assert "ü" in config.to_toml(changed)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training = config.TrainingConfig()
    assert read(tmp_path, "") == Config()
    assert read(tmp_path, "[training]\nlearning_rate = 1").training.learning_rate == 1.0


def test_defaults() -> None:
    assert dataclasses.asdict(Config()) == {
        "data": {"path": None, "key": None},
        "network": {"kind": "auto", "width": 32, "depth": 3},
        "noise": {
            "sigma_max": None, "sigma_min": None, "levels": None, "steps_per_level": 5,
            "step_size": None,
        },
        "training": {
            "loss": "dsm", "steps": 20_000, "batch_size": 64, "accumulate": 1,
            "learning_rate": 1e-3, "warmup_steps": 200, "cosine": True, "clip_norm": 1.0,
            "ema_decay": 0.999, "ema_warmup": True, "precision": "float32", "seed": 0,
            "device": "cpu", "save_every": 1000,
        },
        "sampling": {"sampler": "consistent", "calls": None, "count": 64, "every": 0},
    }  # fmt: skip


LEAST = {
    "network.width": 1, "network.depth": 1, "noise.levels": 2, "noise.steps_per_level": 1,
    "training.steps": 0, "training.batch_size": 1, "training.accumulate": 1,
    "training.warmup_steps": 0, "training.clip_norm": 0, "training.ema_decay": 0,
    "training.seed": 0, "training.save_every": 1, "sampling.calls": 3, "sampling.count": 0,
    "sampling.every": 0,
}  # fmt: skip
POSITIVE = ("noise.sigma_max", "noise.sigma_min", "noise.step_size", "training.learning_rate")


def test_bounds() -> None:
    for name, least in LEAST.items():
        section, key = name.split(".")
        config.from_dict({section: {key: least}}, "here")
        with pytest.raises(ValueError, match=f"{key}: got .*, expected at least {least}"):
            config.from_dict({section: {key: least - 1}}, "here")
    for name in POSITIVE:
        section, key = name.split(".")
        config.from_dict({section: {key: 1e-9}}, "here")
        with pytest.raises(ValueError, match=f"{key}: got 0.0, expected a number above 0"):
            config.from_dict({section: {key: 0}}, "here")


CASES: list[tuple[str, str]] = [
    ("[trainig]\nsteps = 3", r"\[trainig\] is unknown; did you mean training\?"),
    ("[training]\nstesp = 3", r"\[training\] stesp is unknown; did you mean steps\?"),
    ("[data]\nzzz = 3", r"\[data\] zzz is unknown; known are path, key"),
    ("steps = 3", r"\[steps\] is unknown"),
    ("training = 3", r"got 3, expected a section \[training\]"),
    ("[training]\nsteps = 3.5", r"\[training\] steps: got 3.5, expected int"),
    ("[training]\nsteps = true", r"\[training\] steps: got True, expected int"),
    ("[training]\nlearning_rate = '1'", r"learning_rate: got '1', expected float"),
    ("[training]\nlearning_rate = nan", "learning_rate: got nan, expected a finite number"),
    ("[training]\ncosine = 1", "cosine: got 1, expected bool"),
    ("[training]\nloss = 'mse'", "loss: got 'mse', expected one of dsm, ssm"),
    ("[noise]\nsigma_max = [1]", r"sigma_max: got \[1\], expected float"),
    ("[data\n", "no TOML"),
]


@pytest.mark.parametrize(("text", "words"), CASES)
def test_what_is_refused_names_the_file_and_the_key(tmp_path: Path, text: str, words: Any) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "run.toml") in str(caught.value)


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.toml"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no TOML"):
        config.load(tmp_path / "b.toml")
