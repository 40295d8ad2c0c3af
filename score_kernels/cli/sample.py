"""The command ``sample``: from a checkpoint of ``train`` to any number of samples, in shards."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import score_kernels
from score_kernels import checks
from score_kernels.cli import data, plots, shards
from score_kernels.cli.trained import draw_samples, empty_data, network, read_about
from score_kernels.training import checkpoint
from score_kernels.training.distributed import Ranks, joined

__all__ = ["sample"]

# Bumped when a folder's layout or the meaning of a key of its manifest changes.
FORMAT = 1
# Images on a sheet.
_ON_SHEET = 100
_ELSE = "name another --out, or start afresh with --overwrite"


def sample(
    path: Path,
    out: Path,
    *,
    count: int = 64,
    seed: int = 0,
    weights: str = "ema",
    batch_size: int = 64,
    first_sample: int = 0,
    format: str = "npz",
    shard_size: int = 1024,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample a checkpoint of :func:`train` by annealed Langevin dynamics into a folder.

    - ``shards/shard-000000.npz``, ...: ``samples`` ``[n, ...]`` in the shape, range and type of the
      training data, their ``ids`` ``[n]`` int64, and ``settings``, a checksum; or, as ``"png"``,
      folders ``shards/shard-000000`` of images ``000000000000.png``, ..., named by id: 8 bits, from
      black to white over the data's range, or 16 bits where the data were 16-bit grey images;
    - ``manifest.json``: all settings and each shard's sha256 (of a folder of images, what
      ``sha256sum *.png | sha256sum`` prints in it), with ``"complete": true`` at the end;
    - of images, ``samples.png``, a sheet of the first 100.

    The same call again goes on: shards with the manifest's checksum stay, the others are made. A
    larger count keeps the shards that do not change. Memory holds a batch and a shard. Under
    torchrun each process makes every n-th shard, which changes no bit.

    Sample n of a seed has the same noise whatever the count, the batch size and the processes. Its
    last bits can still depend on torch's own sums, which on a CPU round differently (by less than
    1e-6 of the largest value) for batches below about 16 and other numbers of threads (torchrun
    sets ``OMP_NUM_THREADS`` to 1). For equal files keep batch_size, shard_size, threads, kind of
    processor and versions (for PNGs Pillow's too).

    Args:
        path: the checkpoint.
        out: the folder, made where it is missing.
        count: number of samples.
        seed: 64 bits, of all noise.
        weights: ``"ema"``, the averaged ones, or ``"raw"``.
        batch_size: samples at a time.
        first_sample: id of the first one.
        format: ``"npz"``, or ``"png"`` for images with 1 or 3 channels.
        shard_size: samples a shard.
        device: of the network; "cuda" is each process's own GPU.
        overwrite: remove an earlier run's shards, manifest and sheet first.
        progress: whether to show a progress bar (on stderr).

    Returns:
        The manifest.

    Raises:
        FileExistsError: the folder holds a run with other settings, which are named.
        FloatingPointError: a sample is not finite.
        OSError, ValueError: the checkpoint, the folder or an argument cannot be used.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("shard_size", shard_size)):
        checks.count(name, value, least=1)
    checks.unsigned("seed", seed, 64)
    checks.sample_range(checks.unsigned("first_sample", first_sample, 56), count)
    checks.choice("format", format, ("npz", "png"))
    with joined(device) as ranks:
        checks.device("device", device)
        kind = torch.device(device).type
        settings = {"weights": weights, "seed": seed, "first": first_sample}
        settings |= {"shard_size": shard_size, "batch_size": batch_size}
        settings |= {"format": format, "device": kind}
        run = _Run(path, out, settings, count, ranks.device(device))
        return run.complete(ranks, overwrite, progress and ranks.first)


@dataclass(frozen=True)
class _Shard:
    name: str
    first: int
    count: int


class _Run:
    """A network, the settings of its samples, and the folder to write them to."""

    def __init__(
        self, path: Path, out: Path, settings: dict[str, Any], count: int, device: torch.device
    ) -> None:
        before = shards.checksum(path)
        self.about = read_about(path)
        self.net = network(self.about).eval().to(device)
        checkpoint.load_weights(path, self.net, which=settings["weights"])
        if shards.checksum(path) != before:
            raise ValueError(f"checkpoint {path}: changed while it was read; try again")
        schedule = self.about["schedule"]
        self.data = _written_data(self.about, settings["format"])
        self.dtype = self.data.values.numpy().dtype
        self.settings = {
            "format_version": FORMAT,
            "score_kernels": score_kernels.__version__,
            "torch": torch.__version__,
            "checkpoint_sha256": before,
            **settings,
            "sampler": {
                "name": "annealed_langevin",
                "sigmas": len(schedule["sigmas"]),
                "steps_per_level": schedule["steps_per_level"],
                "step_size": schedule["step_size"],
            },
            "data": {
                "shape": list(self.data.shape),
                "dtype": self.dtype.name,
                "low": self.data.low,
                "high": self.data.high,
            },
        }
        # Without the batch size, a shard's bytes depend on it only as far as its samples do.
        decide = {name: value for name, value in self.settings.items() if name != "batch_size"}
        self.checksum = hashlib.sha256(json.dumps(decide, sort_keys=True).encode()).hexdigest()
        self.count = count
        self.manifest = out / "manifest.json"
        self.sheet = out / "samples.png"
        self.folder = out / "shards"
        size, suffix = settings["shard_size"], "" if settings["format"] == "png" else ".npz"
        self.shards = [
            _Shard(f"shard-{k:06d}{suffix}", settings["first"] + at, min(size, count - at))
            for k, at in enumerate(range(0, count, size))
        ]
        self.images = len(self.data.shape) == 3
        if self.images:
            plots.require()

    def complete(self, ranks: Ranks, overwrite: bool, progress: bool) -> dict[str, Any]:
        """Make what is missing, on all ranks, and return the manifest."""
        if len(set(ranks.all_gather((self.checksum, self.count)))) > 1:
            raise ValueError("the processes have different checkpoints, arguments or versions")
        known = _on_first(ranks, self.prepare, overwrite)
        mine = self.shards[ranks.rank :: ranks.size]
        made: dict[str, str] = {}
        started = time.perf_counter()
        total = sum(shard.count for shard in mine)
        with tqdm(total=total, desc="sampling", unit="sample", disable=not progress) as bar:
            # A shard on each rank, then the manifest, from which a stopped run goes on.
            for turn in range(math.ceil(len(self.shards) / ranks.size)):
                news = _on_all(ranks, self.make, mine[turn : turn + 1], known, bar)
                for new in news:
                    made |= new
                if any(news):
                    _on_first(ranks, self.write_manifest, known | made, False)
        manifest = _on_first(ranks, self.finish, known | made)
        if ranks.first:
            again = [name for name in made if name in known]
            if again:
                print(f"missing or damaged, made again: {', '.join(again)}")
            count = sum(shard.count for shard in self.shards if shard.name in made)
            by = f" by {ranks.size} processes" if ranks.size > 1 else ""
            rate = count / (time.perf_counter() - started)
            print(
                f"{self.count} samples of the {self.settings['weights']} weights in "
                f"{len(self.shards)} shards: {self.folder}; {len(self.shards) - len(made)} were "
                f"there, {len(made)} made{by}, {rate:.4g} samples/s"
            )
        return manifest

    def prepare(self, overwrite: bool) -> dict[str, str]:
        """Make the folder ready, and return the sha256 of the shards that an earlier run made."""
        if overwrite:
            for old in (*self.folder.glob("shard-*"), self.manifest, self.sheet):
                shards.remove(old)
        known = {}
        if self.manifest.exists():
            known = self.compare_manifest()
        elif any(self.folder.glob("shard-*")):
            raise FileExistsError(f"{self.folder}: holds shards without a manifest; {_ELSE}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".shard-*.tmp"):
            shards.remove(left)
        self.write_manifest(known, False)
        return known

    def compare_manifest(self) -> dict[str, str]:
        """The known sha256 by name, of an earlier run with these settings."""
        try:
            before = json.loads(self.manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileExistsError(f"{self.manifest}: no manifest ({error}); {_ELSE}") from error
        differ = [
            f"{name} was {before.get(name)} and is {value}"
            for name, value in self.settings.items()
            if before.get(name) != value
        ]
        if before.get("num", 0) > self.count:
            differ.append(f"num was {before['num']} and is {self.count}, expected no less")
        if differ:
            raise FileExistsError(
                f"{self.manifest}: of a run with other settings: {'; '.join(differ)}; {_ELSE}"
            )
        # The last shard may have been a smaller one.
        same = {shard.name: shard.count for shard in self.shards}
        return {
            shard["name"]: shard["sha256"]
            for shard in before["shards"]
            if shard["sha256"] is not None and same.get(shard["name"]) == shard["count"]
        }

    def make(self, mine: list[_Shard], known: dict[str, str], bar: tqdm) -> dict[str, str]:
        """Draw and write the shards that are not as the manifest says. Returns their sha256."""
        size, seed, made = self.settings["batch_size"], self.settings["seed"], {}
        for shard in mine:
            path = self.folder / shard.name
            if shard.name in known and path.exists():
                if shards.checksum(path) == known[shard.name]:
                    bar.update(shard.count)
                    continue
            samples = np.empty((shard.count, *self.data.shape), self.dtype)
            for at in range(0, shard.count, size):
                rows, first = min(size, shard.count - at), shard.first + at
                x = draw_samples(self.net, self.about, rows, seed=seed, first=first)
                samples[at : at + rows] = self.data.unscale(x).numpy()
                bar.update(rows)
            made[shard.name] = shards.write(path, samples, shard.first, self.checksum)
        return made

    def finish(self, sums: dict[str, str]) -> dict[str, Any]:
        if self.images:
            self.draw_sheet()
        return self.write_manifest(sums, True)

    def write_manifest(self, sums: dict[str, str], complete: bool) -> dict[str, Any]:
        listed = [{**vars(shard), "sha256": sums.get(shard.name)} for shard in self.shards]
        manifest = {
            **self.settings,
            "settings_sha256": self.checksum,
            "num": self.count,
            "complete": complete,
            "shards": listed,
        }
        with shards.atomic(self.manifest) as temporary:
            text = json.dumps(manifest, indent=2) + "\n"
            temporary.write_text(text, encoding="utf-8", newline="\n")
        return manifest

    def draw_sheet(self) -> None:
        parts, missing = [], _ON_SHEET
        for shard in self.shards:
            if missing > 0:
                stored = shards.read(self.folder / shard.name)[:missing].astype(self.dtype)
                parts.append(torch.from_numpy(stored))
                missing -= len(stored)
        values = torch.cat(parts)
        images = replace(self.data, values=values).scaled(torch.arange(len(values)))
        with shards.atomic(self.sheet) as temporary:
            plots.save_sheet(temporary, images)


def _on_all(ranks: Ranks, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of all ranks; where one fails all fail, so that none waits for it."""
    try:
        result: Any = work(*arguments)
    except Exception as error:
        result = error
    results = ranks.all_gather(result)
    for one in results:
        if isinstance(one, Exception):
            raise one
    return results


def _on_first(ranks: Ranks, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the first rank, on all."""
    return _on_all(ranks, lambda: work(*arguments) if ranks.first else None)[0]


def _written_data(about: dict[str, Any], format: str) -> data.Data:
    """The type and range that samples are written in, without samples."""
    trained = empty_data(about)
    if format == "npz":
        return trained
    shape = trained.shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"format: got png for samples of shape {shape}, expected images of 1 or 3 channels "
            "[C, H, W]; take --format npz"
        )
    if trained.values.dtype == torch.int32 and trained.high == 65535 and shape[0] == 1:
        return trained
    return data.Data(torch.empty(0, *shape, dtype=torch.uint8), 0.0, 255.0, "a checkpoint")
