"""The command ``sample``: samples of a checkpoint, in shards."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import score_kernels
from score_kernels import checks
from score_kernels.bars import progress_bar
from score_kernels.cli import data, plots, shards
from score_kernels.cli.samplers import Sampler
from score_kernels.cli.trained import Trained, draw_samples, load, sampler_of
from score_kernels.sampling import Progress
from score_kernels.training import checkpoint
from score_kernels.training.distributed import Ranks, joined

__all__ = ["sample"]

# Bumped when a folder's layout or the meaning of a key of its manifest changes.
FORMAT = 2
# Images on a sheet, and of the animation, and the animation's frames before the last one.
_ON_SHEET, _MOVING, _FRAMES = 100, 25, 60
_PICTURES = ("samples.png", "samples.gif")
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
    sampler: str | None = None,
    calls: int | None = None,
    clamp: bool = True,
    animate: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample a checkpoint of :func:`train` into a folder.

    - ``shards/shard-000000.npz``, ...: ``samples`` ``[n, ...]`` in the shape, range and type of the
      training data, their ``ids`` ``[n]`` int64, and ``settings``, a checksum; or, as ``"png"``,
      folders ``shards/shard-000000`` of images ``000000000000.png``, ..., named by id: 8 bits, from
      black to white over the data's range, or 16 bits where the data were 16-bit grey images;
    - ``manifest.json``: all settings and each shard's sha256 (of a folder of images, what
      ``sha256sum *.png | sha256sum`` prints in it), with ``"complete": true`` at the end;
    - of images, ``samples.png``, a sheet of the first 100, and with `animate` ``samples.gif``, the
      chain of the first 25 from noise on, each state divided by ``sqrt(1 + sigma^2)``.

    The same call again, or with a larger count, keeps shards that have the manifest's checksum and
    makes the others. Memory holds a batch and a shard. Under torchrun each process makes every n-th
    shard, which changes no bit. Sample n of a seed has the same noise whatever the count, the batch
    size and the processes; torch's own sums round differently on a CPU (by less than 1e-6 of the
    largest value) for batches below about 16 and other numbers of threads (torchrun sets
    ``OMP_NUM_THREADS`` to 1). For equal files keep batch_size, shard_size, threads, kind of
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
        sampler: one of :func:`score_kernels.cli.samplers.choose`; default: that of the settings
            ([sampling]) of the training, with their calls.
        calls: of the network for a sample, at most.
        clamp: samples to the data's range; False: real numbers beyond it stay.
        animate: draw the animation.
        overwrite: remove an earlier run's shards, manifest and pictures first.
        progress: whether to show a progress bar (on stderr).

    Returns:
        The manifest.

    Raises:
        BlockingIOError: another process is sampling into the folder.
        FileExistsError: the folder holds a run with other settings, which are named.
        FloatingPointError: a sample is not finite.
        OSError, ValueError: the checkpoint, the folder or an argument cannot be used.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("shard_size", shard_size)):
        checks.count(name, value, least=1)
    checks.unsigned("seed", seed, 64)
    checks.sample_range(checks.unsigned("first_sample", first_sample, 56), count)
    checks.choice("format", format, ("npz", "png"))
    if (out / "checkpoint.pt").exists():
        raise FileExistsError(f"{out}: is the folder of a training; name another --out")
    with joined(device) as ranks:
        checks.device("device", device)
        trained = load(path, weights=weights, device=ranks.device(device))
        kept = _written_as(trained.about["data"], format)
        chosen = sampler_of(trained.about, sampler, calls)
        if not clamp and kept["dtype"] != "float32":
            raise ValueError(
                f"clamp: got False for samples in {kept['dtype']}, expected True: only those in "
                "float32 can be beyond the data's range"
            )
        if animate and len(kept["shape"]) != 3:
            shape = tuple(kept["shape"])
            raise ValueError(f"animate: got samples of shape {shape}, expected images [C, H, W]")
        settings = {
            "format_version": FORMAT,
            "score_kernels": score_kernels.__version__,
            "torch": torch.__version__,
            "checkpoint_sha256": trained.checksum,
            "weights": weights,
            "seed": seed,
            "first": first_sample,
            "shard_size": shard_size,
            "batch_size": batch_size,
            "format": format,
            "device": torch.device(device).type,
            "sampler": chosen.described(),
            "clamp": clamp,
            "data": {key: kept[key] for key in ("shape", "dtype", "low", "high")},
        }
        # Without the batch size, a shard's bytes depend on it only as far as its samples do.
        decide = {name: value for name, value in settings.items() if name != "batch_size"}
        checksum = hashlib.sha256(json.dumps(decide, sort_keys=True).encode()).hexdigest()
        suffix = ".npz" if format == "npz" else ""
        listed = [
            {
                "name": f"shard-{at // shard_size:06d}{suffix}",
                "first": first_sample + at,
                "count": min(shard_size, count - at),
                "sha256": None,
            }
            for at in range(0, count, shard_size)
        ]
        manifest = settings | {"settings_sha256": checksum, "num": count, "complete": False}
        manifest["shards"] = listed
        if any(other != manifest for other in ranks.all_gather(manifest)):
            raise ValueError("the processes have different checkpoints, arguments or versions")
        values = trained.data.values.to(getattr(torch, kept["dtype"]))
        stored = data.Data(values, kept["low"], kept["high"], str(path))
        if len(stored.shape) == 3:
            plots.require()
        out.mkdir(parents=True, exist_ok=True)
        with checkpoint.locked(out) if ranks.first else nullcontext():
            manifest = _on_first(ranks, _prepare, out, manifest, settings.keys(), overwrite)
            _make(ranks, out, trained, chosen, manifest, stored, progress)
            if animate:
                _on_first(ranks, _animate, out, trained, chosen, manifest)
        return manifest


def _make(
    ranks: Ranks,
    out: Path,
    trained: Trained,
    sampler: Sampler,
    manifest: dict[str, Any],
    stored: data.Data,
    progress: bool,
) -> None:
    """Draw and write the shards of a manifest that are not there, and complete it."""
    folder, listed, batch_size = out / "shards", manifest["shards"], manifest["batch_size"]
    count, weights, seed = manifest["num"], manifest["weights"], manifest["seed"]
    checksum, dtype = manifest["settings_sha256"], manifest["data"]["dtype"]
    net, about = trained.net, trained.about
    total = sum(shard["count"] for shard in listed[ranks.rank :: ranks.size])
    hidden = not (progress and ranks.first)
    bar = progress_bar(total=total, desc="sampling", unit="sample", disable=hidden)

    def make(k: int) -> str | None:
        """The checksum of shard k, drawn and written, or None if the one on disk is good."""
        if k >= len(listed):
            return None
        shard, target = listed[k], folder / listed[k]["name"]
        if shard["sha256"] and target.exists() and shards.checksum(target) == shard["sha256"]:
            bar.update(shard["count"])
            return None
        samples = np.empty((shard["count"], *stored.shape), dtype)
        for at in range(0, len(samples), batch_size):
            part, first = samples[at : at + batch_size], shard["first"] + at
            x = draw_samples(net, about, len(part), sampler, seed=seed, first_sample=first)
            part[:] = stored.unscale(x, manifest["clamp"]).numpy()
            bar.update(len(part))
        return shards.write(target, samples, shard["first"], checksum)

    started, made, again = time.perf_counter(), [], []
    with bar:
        # A shard on each rank, then the manifest, from which a stopped run goes on.
        for turn in range(0, len(listed), ranks.size):
            news = _on_all(ranks, make, turn + ranks.rank)
            for shard, new in zip(listed[turn:], news, strict=False):
                if new:
                    made.append(shard["count"])
                    again += [shard["name"]] if shard["sha256"] else []
                    shard["sha256"] = new
            if any(news):
                _on_first(ranks, _write, out, manifest)
    if len(stored.shape) == 3:
        _on_first(ranks, _draw_sheet, out, listed, stored)
    manifest["complete"] = True
    _on_first(ranks, _write, out, manifest)
    if again and ranks.first:
        print(f"missing or damaged, made again: {', '.join(again)}")
    if ranks.first:
        by = f" by {ranks.size} processes" if ranks.size > 1 else ""
        print(
            f"{count} samples of the {weights} weights in {len(listed)} shards, "
            f"{sampler.function.__name__} with {sampler.calls} network calls: {folder}; "
            f"{len(listed) - len(made)} were there, {len(made)} made{by}, "
            f"{sum(made) / (time.perf_counter() - started):.4g} samples/s"
        )


def _written_as(found: dict[str, Any], format: str) -> dict[str, Any]:
    """The shape, type and range of the training data, or of the pixels of a PNG."""
    shape = tuple(found["shape"])
    if format == "npz" or (shape[0], found["dtype"], found["high"]) == (1, "int32", 65535):
        return found
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"format: got png for samples of shape {shape}, expected images of 1 or 3 channels "
            "[C, H, W]; take --format npz"
        )
    return found | {"dtype": "uint8", "low": 0.0, "high": 255.0}


def _prepare(out: Path, manifest: dict[str, Any], same: Any, overwrite: bool) -> dict[str, Any]:
    """Make the folder ready; the manifest with the checksums of shards from an earlier run."""
    path, folder = out / "manifest.json", out / "shards"
    if overwrite:
        for old in (*folder.glob("shard-*"), path, *(out / name for name in _PICTURES)):
            checkpoint.remove(old)
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            _ = before["num"], before["shards"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged, or of another program ({error}); {_ELSE}") from None
        changed = [name for name in same if before.get(name) != manifest[name]]
        differ = [f"{name} was {before.get(name)} and is {manifest[name]}" for name in changed]
        if before["num"] > manifest["num"]:
            differ.append(f"num was {before['num']} and is {manifest['num']}, expected no less")
        if differ:
            words = f"of a run with other settings: {'; '.join(differ)}"
            raise FileExistsError(f"{path}: {words}; {_ELSE}")
        # The last shard may have been a smaller one.
        for shard, old in zip(manifest["shards"], before["shards"], strict=False):
            if shard["count"] == old["count"]:
                shard["sha256"] = old["sha256"]
    elif any(folder.glob("shard-*")):
        raise FileExistsError(f"{folder}: holds shards without a manifest; {_ELSE}")
    else:
        for picture in (out / name for name in _PICTURES):
            if picture.exists():
                raise FileExistsError(f"{picture}: of something else; name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".shard-*.tmp"):
        checkpoint.remove(left)
    _write(out, manifest)
    return manifest


def _write(out: Path, manifest: dict[str, Any]) -> None:
    with checkpoint.atomic(out / "manifest.json") as temporary:
        text = json.dumps(manifest, indent=2) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _draw_sheet(out: Path, listed: list[dict[str, Any]], stored: data.Data) -> None:
    needed = listed[: math.ceil(_ON_SHEET / listed[0]["count"])]
    samples = np.concatenate([shards.read(out / "shards" / shard["name"]) for shard in needed])
    values = torch.from_numpy(samples[:_ON_SHEET].astype(stored.values.numpy().dtype))
    images = replace(stored, values=values).scaled(torch.arange(len(values)))
    with checkpoint.atomic(out / "samples.png") as temporary:
        plots.save_sheet(temporary, images)


def _animate(out: Path, trained: Trained, sampler: Sampler, manifest: dict[str, Any]) -> None:
    """Draw the first samples again, and write what becomes of them as an animation."""
    every, frames = math.ceil(sampler.calls / _FRAMES), []

    def note(chain: Progress) -> None:
        if chain.step % every == 0:
            # As large as the data, where a level's noise would be all white and black.
            frames.append(chain.x / math.sqrt(1 + chain.sigma**2))

    names = {"seed": manifest["seed"], "first_sample": manifest["first"]}
    count = min(_MOVING, manifest["num"])
    x = draw_samples(trained.net, trained.about, count, sampler, callback=note, **names)
    with checkpoint.atomic(out / "samples.gif") as temporary:
        plots.save_animation(temporary, [*frames, x])


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
