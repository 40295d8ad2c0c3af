"""The settings of ``score-kernels train``: one TOML file, every key documented and checked."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from score_kernels import checks
from score_kernels.cli.samplers import NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Config", "from_dict", "load", "to_dict", "to_toml"]


def _key(
    default: Any, words: str, *choices: str, least: float | None = None, above: float | None = None
) -> Any:
    """A key of the file: its default (None: not set), what it means, and its allowed values."""
    allowed = {"choices": choices, "least": least, "above": above}
    return field(default=default, metadata={"words": words, **allowed})


@dataclass(frozen=True)
class DataConfig:
    """Where the training data are."""

    path: str | None = _key(None, "folder of images, .npy, .npz or IDX file (--data)")
    key: str | None = _key(None, "the array to take of an .npz with several")


@dataclass(frozen=True)
class NetworkConfig:
    """The score network."""

    kind: str = _key("auto", "conv for images, mlp for anything", "auto", "conv", "mlp")
    width: int = _key(32, "channels of conv (a multiple of 8), or of a hidden layer", least=1)
    depth: int = _key(3, "resolutions of conv, or hidden layers of mlp", least=1)


@dataclass(frozen=True)
class NoiseConfig:
    """Noise levels and sampling steps, for data in [-1, 1].

    Keys that are not set are chosen from the data by the techniques of NCSNv2 (arXiv 2006.09011),
    and the run prints why."""

    sigma_max: float | None = _key(
        None, "largest level; unset: the data's largest distance", above=0
    )
    sigma_min: float | None = _key(None, "smallest level; unset: 1/100 of the range", above=0)
    levels: int | None = _key(None, "their number; unset: from neighbours' overlap", least=2)
    steps_per_level: int = _key(5, "Langevin steps at each level", least=1)
    step_size: float | None = _key(None, "alpha of the smallest level; unset: technique 4", above=0)


@dataclass(frozen=True)
class TrainingConfig:
    """The training."""

    loss: str = _key("dsm", "denoising or sliced score matching", "dsm", "ssm")
    steps: int = _key(20_000, "optimiser steps in all", least=0)
    batch_size: int = _key(64, "samples a step", least=1)
    accumulate: int = _key(1, "parts a batch is split into to save memory", least=1)
    learning_rate: float = _key(1e-3, "learning rate of Adam", above=0)
    warmup_steps: int = _key(200, "steps over which the learning rate rises from 0", least=0)
    cosine: bool = _key(True, "let the learning rate fall to 0 along a cosine")
    clip_norm: float = _key(1.0, "largest norm of the gradient; 0 for none", least=0)
    ema_decay: float = _key(0.999, "m of ema <- m ema + (1 - m) weights", least=0)
    ema_warmup: bool = _key(True, "average over less at the start")
    precision: str = _key("float32", "under autocast", "float32", "bfloat16", "float16")
    seed: int = _key(0, "decides everything random, 0 to 2^63 - 1", least=0)
    device: str = _key("cpu", "cpu, cuda, cuda:1, ...")
    save_every: int = _key(1000, "steps between checkpoints", least=1)


@dataclass(frozen=True)
class SamplingConfig:
    """The sampler of a training's sheets, and of `sample` where it names no other."""

    sampler: str = _key("consistent", "of the sheets and of `sample`", *NAMES)
    calls: int | None = _key(
        None, "of the network for a sample; unset: 100, annealed: those of [noise]", least=3
    )
    count: int = _key(64, "samples on a sheet; 0 for no sheets", least=0)
    every: int = _key(0, "training steps between sheets; 0: one with each checkpoint", least=0)


@dataclass(frozen=True)
class Config:
    """All settings of a training, by section; see :func:`to_toml`."""

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    noise: NoiseConfig = NoiseConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()


def load(path: str | os.PathLike[str]) -> Config:
    """The settings of a TOML file, with defaults for missing keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, or a key is unknown, of the wrong type or not among its choices.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config {path}: no TOML ({error})") from error
    return from_dict(tables, str(path))


def from_dict(tables: dict[str, Any], source: str) -> Config:
    """Settings from nested dictionaries, checked as :func:`load` does; source is for messages."""
    config = Config()
    for section, table in tables.items():
        where = f"config {source}: [{section}]"
        _check_known(where, section, vars(config))
        if not isinstance(table, dict):
            raise ValueError(f"{where}: got {table!r}, expected a section [{section}]")
        keys = {key.name: key for key in fields(getattr(config, section))}
        values = {}
        for name, value in table.items():
            _check_known(f"{where} {name}", name, keys)
            # Annotations are strings here: "int", "float | None", ...
            wanted, choices = str(keys[name].type).split(" | ")[0], keys[name].metadata["choices"]
            value = float(value) if wanted == "float" and type(value) is int else value
            if type(value).__name__ != wanted or (choices and value not in choices):
                expected = f"one of {', '.join(choices)}" if choices else wanted
                raise ValueError(f"{where} {name}: got {value!r}, expected {expected}")
            if isinstance(value, float):
                checks.number(f"{where} {name}", value)
            _check_range(f"{where} {name}", value, **keys[name].metadata)
            values[name] = value
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The inverse of :func:`from_dict`; keys that are not set are left out."""
    return {
        section: {key: value for key, value in table.items() if value is not None}
        for section, table in asdict(config).items()
    }


def to_toml(config: Config) -> str:
    """Settings as TOML: every key with its meaning, unset ones commented."""
    lines = ["# Settings of `score-kernels train`. Every key may be left out.", ""]
    for section, table in vars(config).items():
        lines.append(f"[{section}]")
        for key in fields(table):
            value, choices = getattr(table, key.name), ", ".join(key.metadata["choices"])
            lines.append(f"# {key.metadata['words']}" + (f" ({choices})" if choices else ""))
            # A JSON string, number or truth value is TOML's too.
            text = f"{key.name} = {json.dumps(value, ensure_ascii=False)}"
            lines.append(text if value is not None else f"# {key.name} =")
        lines.append("")
    return "\n".join(lines)


def _check_range(where: str, value: Any, *, least: Any, above: Any, **_: Any) -> None:
    if least is not None and value < least:
        raise ValueError(f"{where}: got {value}, expected at least {least}")
    if above is not None and value <= above:
        raise ValueError(f"{where}: got {value}, expected a number above {above}")


def _check_known(where: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"{where} is unknown; {hint}")
