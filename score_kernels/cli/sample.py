"""The command ``sample``: from a checkpoint of ``train`` to any number of samples, in shards."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import score_kernels
from score_kernels import checks
from score_kernels.cli import data, plots
from score_kernels.cli import shards as files
from score_kernels.cli.shards import Damaged, NpzStore, PngStore, Shard, Store
from score_kernels.cli.trained import draw_samples, network, read_about, stored
from score_kernels.training import checkpoint
from score_kernels.training.distributed import Ranks, joined

__all__ = ["sample"]

# Bumped when a folder's layout or the meaning of a key of its manifest changes.
FORMAT = 1
MANIFEST, SHEET, SHARDS = "manifest.json", "samples.png", "shards"
# Images on a sheet.
_ON_SHEET = 100
_ELSE = "name another --out, or start afresh with --overwrite"
_T = TypeVar("_T")


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
    """Sample a checkpoint of :func:`train` by annealed Langevin dynamics and write to a folder:

    - ``shards/shard-000000.npz``, ...: ``samples`` ``[n, ...]`` in the shape, range and type of the
      training data, their ``ids`` ``[n]`` int64, and ``settings``, the checksum of what decides
      them; or, as ``"png"``, folders ``shards/shard-000000`` of images ``000000000000.png``, ...,
      named by id, with the same in their text: of 8 bits, the data's range being black to white,
      and of 16 bits where the data were 16-bit grey images;
    - ``manifest.json``: all settings and each shard's sha256 (of a folder of images, what
      ``sha256sum *.png | sha256sum`` prints in it), with ``"complete": true`` at the end;
    - of images, ``samples.png``, a sheet of the first 100.

    The same run again goes on: shards that are there are checked (by checksums, ids and settings),
    good ones stay, the others are made again. With a larger count, shards that stay the same stay.
    Memory holds a batch and one shard, whatever the count.

    Under torchrun the processes share the shards out, which changes no bit: a shard holds a fixed
    range of ids, and its batches begin where it does. Sample n of a seed has the same noise
    whatever the count, the batch size and the processes. Its last bits can still depend on torch's
    own sums: on a CPU, matrix products and convolutions round differently, by less than 1e-6 of
    the largest value, for small batches (and a shard's last one can be small). Where this was
    measured, with one and two threads, batches of 16 and more gave one result and some smaller
    ones others; which, depends on the threads (``OMP_NUM_THREADS``, which torchrun makes 1 where it
    is not set). GPUs choose by size too. For equal files keep batch_size, shard_size, threads, kind
    of processor and versions; a PNG's bytes are up to Pillow's version too.

    Args:
        path: the checkpoint.
        out: the folder, made if it is not there.
        count: number of samples.
        seed: 64 bits, names all noise.
        weights: ``"ema"``, the averaged ones, or ``"raw"``.
        batch_size: samples at a time.
        first_sample: id of the first one.
        format: ``"npz"``, or ``"png"`` for images with 1 or 3 channels.
        shard_size: samples a shard.
        device: where the network runs; "cuda" is each process's own GPU.
        overwrite: start afresh: remove an earlier run's shards, manifest and sheet.
        progress: whether to show a progress bar (on stderr).

    Returns:
        The manifest.

    Raises:
        FileExistsError: the folder holds a run with other settings (the message says which), or
            one of more samples, and overwrite is False.
        FloatingPointError: a sample came out as NaN or infinite; the message names it.
        ImportError: images, without Pillow or Matplotlib.
        OSError, ValueError: the checkpoint is not usable, an argument out of range, or a file
            cannot be written. Under torchrun, also: another process failed.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("shard_size", shard_size)):
        checks.count(name, value, least=1)
    checks.unsigned("seed", seed, 64)
    checks.sample_range(checks.unsigned("first_sample", first_sample, 56), count)
    if format not in ("npz", "png"):
        raise ValueError(f"format: got {format!r}, expected 'npz' or 'png'")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected cpu, cuda, cuda:1, ...") from None
    with joined(device) as ranks:
        settings = {"weights": weights, "seed": seed, "first": first_sample}
        settings |= {"shard_size": shard_size, "batch_size": batch_size}
        settings |= {"format": format, "device": kind}
        run = _on_all(ranks, lambda: _Run(path, out, settings, count, ranks.device(device)))
        return run.complete(ranks, overwrite=overwrite, progress=progress)


class _Run:
    """A network, what its samples are to be, and the folder that they go to."""

    def __init__(
        self, path: Path, out: Path, settings: dict[str, Any], count: int, device: torch.device
    ) -> None:
        checksum = _sha256_of_checkpoint(path)
        self.about = read_about(path)
        self.net = _moved(network(self.about).eval(), device)
        checkpoint.load_weights(path, self.net, which=settings["weights"])
        if _sha256_of_checkpoint(path) != checksum:
            raise ValueError(f"checkpoint {path}: changed while it was read; try again")
        schedule = self.about["schedule"]
        self.kept = _as_kept(self.about, settings["format"])
        self.settings = {
            "format_version": FORMAT,
            "score_kernels": score_kernels.__version__,
            "torch": torch.__version__,
            "checkpoint_sha256": checksum,
            **settings,
            "sampler": {
                "name": "annealed_langevin",
                "sigmas": len(schedule["sigmas"]),
                "steps_per_level": schedule["steps_per_level"],
                "step_size": schedule["step_size"],
            },
            "data": {
                "shape": list(self.kept.shape),
                "dtype": str(self.kept.values.dtype).removeprefix("torch."),
                "low": self.kept.low,
                "high": self.kept.high,
            },
        }
        # Without the batch size, a shard's bytes depend on it only as far as its samples do.
        decide = {name: value for name, value in self.settings.items() if name != "batch_size"}
        text = json.dumps(decide, sort_keys=True).encode()
        self.checksum = hashlib.sha256(text).hexdigest()
        self.out = out
        self.count = count
        self.shards = files.cut(settings["first"], count, settings["shard_size"])
        kind = PngStore if settings["format"] == "png" else NpzStore
        dtype = self.kept.values.numpy().dtype
        self.store: Store = kind(out / SHARDS, self.kept.shape, dtype, self.checksum)
        self.pictures = len(self.kept.shape) == 3
        if self.pictures:
            plots.require()

    def complete(self, ranks: Ranks, *, overwrite: bool, progress: bool) -> dict[str, Any]:
        """Make what is missing, say what was done, and return the manifest. On every rank."""
        if len(set(_gathered(ranks, (self.checksum, self.count)))) > 1:
            raise ValueError("the processes have different checkpoints, arguments or versions")
        progress = progress and ranks.first
        known = _on_all(ranks, lambda: self.prepared(overwrite) if ranks.first else {})
        known = _gathered(ranks, known)[0]
        mine = self.shards[ranks.rank :: ranks.size]
        good, bad = _on_all(ranks, lambda: self.checked(mine, known, progress))
        sums, told = _merged(_gathered(ranks, good)), _merged(_gathered(ranks, bad))
        _on_all(ranks, lambda: self.begin(sums, told) if ranks.first else None)
        todo = [shard for shard in mine if shard.index not in good]
        started = time.perf_counter()
        new = _merged(_gathered(ranks, self.make(todo, progress)))
        seconds = time.perf_counter() - started
        manifest = self.manifest(sums | new, complete=True)
        _on_all(ranks, lambda: self.finish(manifest) if ranks.first else None)
        if ranks.first:
            made = sum(self.shards[index].count for index in new)
            by = f" by {ranks.size} processes" if ranks.size > 1 else ""
            rate = f"{made} made in {seconds:.1f} s{by}, {made / seconds:.4g} samples/s"
            print(
                f"{self.count} samples of the {self.settings['weights']} weights in "
                f"{len(self.shards)} shards: {self.store.folder}; "
                f"{rate if new else 'all were there'}"
            )
        return manifest

    def begin(self, sums: dict[int, str], told: dict[int, str]) -> None:
        """Say what is there, and what is not as it should be."""
        for index in sorted(told):
            print(f"{self.store.name(self.shards[index])}: made again: {told[index]}")
        if len(sums) < len(self.shards):
            if sums:
                print(f"{len(sums)} of {len(self.shards)} shards are there")
            self.write(self.manifest(sums, complete=False))

    def finish(self, manifest: dict[str, Any]) -> None:
        if self.pictures:
            self.draw_sheet()
        self.write(manifest)

    def manifest(self, sums: dict[int, str], *, complete: bool) -> dict[str, Any]:
        return {
            **self.settings,
            "settings_sha256": self.checksum,
            "num": self.count,
            "complete": complete,
            "shards": [
                {
                    "name": self.store.name(shard),
                    "first": shard.first,
                    "count": shard.count,
                    "sha256": sums.get(shard.index),
                }
                for shard in self.shards
            ],
        }

    def write(self, manifest: dict[str, Any]) -> None:
        with files.whole(self.out / MANIFEST) as temporary:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                json.dump(manifest, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())

    def prepared(self, overwrite: bool) -> dict[int, str]:
        """Make the folder ready. Returns the sha256 known of each shard.

        Raises:
            FileExistsError: what is there is of another run.
        """
        path, shards = self.out / MANIFEST, self.out / SHARDS
        if overwrite:
            for old in (*shards.glob("shard-*"), path, self.out / SHEET):
                files.remove(old)
        known = self.known(path) if path.exists() else {}
        names = {self.store.name(shard) for shard in self.shards}
        other = sorted(p.name for p in shards.glob("shard-*") if p.name not in names)
        if other:
            raise FileExistsError(f"{shards}: holds {other[0]}, which is not of this run; {_ELSE}")
        shards.mkdir(parents=True, exist_ok=True)
        for left in (
            *files.leftovers(shards, "shard-*"),
            *files.leftovers(self.out, MANIFEST),
            *files.leftovers(self.out, SHEET),
        ):
            files.remove(left)
            print(f"{left.name}: removed, left by a run that was stopped")
        return known

    def known(self, path: Path) -> dict[int, str]:
        """From the manifest of an earlier run with these settings."""
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            listed = {s["name"]: (s["first"], s["count"], s["sha256"]) for s in before["shards"]}
            count = int(before["num"])
        except (ValueError, KeyError, TypeError) as error:
            raise FileExistsError(
                f"{path}: damaged, or no manifest of score-kernels sample; remove it to have the "
                f"shards checked without it, or {_ELSE}"
            ) from error
        old, new = _flat(before), _flat(self.settings)
        differ = [f"{n} was {old.get(n)} and is {new[n]}" for n in new if old.get(n) != new[n]]
        if count > self.count:
            differ.append(f"num was {count} and is {self.count}, expected at least as many")
        if differ:
            raise FileExistsError(
                f"{self.out}: holds a run with other settings: {'; '.join(differ)}; {_ELSE}"
            )
        found = {}
        for shard in self.shards:
            first, number, checksum = listed.get(self.store.name(shard), (None, None, None))
            if (first, number) == (shard.first, shard.count) and checksum is not None:
                found[shard.index] = checksum
        return found

    def checked(
        self, shards: list[Shard], known: dict[int, str], progress: bool
    ) -> tuple[dict[int, str], dict[int, str]]:
        """By index: the sha256 of those that are right, and why others are not, but for those that
        nobody expects to be there yet."""
        good, bad = {}, {}
        there = [s for s in shards if self.store.path(s).exists() or s.index in known]
        hidden = not (progress and there)
        for shard in tqdm(there, desc="checking", unit="shard", disable=hidden):
            try:
                good[shard.index] = self.store.check(shard, known.get(shard.index))
            except Damaged as why:
                bad[shard.index] = " ".join(str(why).split())
        return good, bad

    def make(self, shards: list[Shard], progress: bool) -> dict[int, str]:
        """Draw shards and write them. Returns their sha256 by index."""
        made = {}
        size, seed = self.settings["batch_size"], self.settings["seed"]
        total = sum(shard.count for shard in shards)
        hidden = not (progress and shards)
        with tqdm(total=total, desc="sampling", unit="sample", disable=hidden) as bar:
            for number, shard in enumerate(shards, 1):
                bar.set_postfix_str(f"shard {number} of {len(shards)}")
                samples = np.empty((shard.count, *self.kept.shape), self.store.dtype)
                for at in range(0, shard.count, size):
                    rows = min(size, shard.count - at)
                    first = shard.first + at
                    x = draw_samples(self.net, self.about, rows, seed=seed, first=first)
                    samples[at : at + rows] = self.kept.unscale(x).numpy()
                    bar.update(rows)
                made[shard.index] = self.store.write(shard, samples)
        return made

    def draw_sheet(self) -> None:
        images: list[Tensor] = []
        for shard in self.shards:
            values = torch.from_numpy(self.store.read(shard)[: _ON_SHEET - len(images)])
            kept = data.Data(values, self.kept.low, self.kept.high, "a shard")
            images.extend(kept.scaled(torch.arange(len(values))))
            if len(images) == _ON_SHEET:
                break
        with files.whole(self.out / SHEET) as temporary:
            plots.save_sheet(temporary, torch.stack(images))


def _on_all(ranks: Ranks, work: Callable[[], _T]) -> _T:
    """Do what may fail; where it fails on one rank it fails on all, so that none waits for it."""
    done: list[_T] = []
    failure: Exception | None = None
    try:
        done.append(work())
    except Exception as error:
        failure = error
    for failed in _gathered(ranks, failure):
        if failed is not None:
            raise failed
    return done[0]


def _gathered(ranks: Ranks, value: _T) -> list[_T]:
    """Of all ranks. A rank that failed alone has said why and is gone."""
    try:
        return ranks.all_gather(value)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"stopped: another process failed and has said why, or does not answer ({why})"
        ) from error


def _merged(parts: list[dict[int, str]]) -> dict[int, str]:
    return {index: text for part in parts for index, text in part.items()}


def _as_kept(about: dict[str, Any], format: str) -> data.Data:
    """The type and range that samples are written in, without samples."""
    described = stored(about)
    shape, dtype = described.shape, described.values.dtype
    if format == "npz":
        return described
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"format: got png for samples of shape {tuple(shape)}, expected images of 1 or 3 "
            "channels [C, H, W]; take --format npz"
        )
    bounds = (described.low, described.high)
    if dtype == torch.int32 and bounds == (0.0, 65535.0) and shape[0] == 1:
        return described
    return data.Data(torch.empty(0, *shape, dtype=torch.uint8), 0.0, 255.0, "a checkpoint")


def _sha256_of_checkpoint(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a file")
    return files.sha256(path)


def _moved(net: nn.Module, device: torch.device) -> nn.Module:
    try:
        return net.to(device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device: got {str(device)!r}, which torch cannot use: {why}") from error


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dictionaries inside as "outer.inner"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
