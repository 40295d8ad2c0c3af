"""The command ``sample``: from a checkpoint of ``train`` to new samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from score_kernels import checkpoint, pictures
from score_kernels.commands._trained import draw_samples, network, read_about, stored

__all__ = ["sample"]

# Images on a sheet.
_ON_SHEET = 100


def sample(
    path: Path,
    out: Path,
    *,
    count: int = 64,
    seed: int = 0,
    weights: str = "ema",
    batch_size: int = 64,
    first_sample: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> Tensor:
    """Sample a checkpoint of :func:`train` by annealed Langevin dynamics and write to a folder:
    ``samples.npz`` (array ``samples``, in the shape, range and type of the training data) and, of
    images, the sheet ``samples.png``.

    Sample n of a seed has the same noise whatever the count and the batch size.

    Args:
        path: the checkpoint.
        out: the folder, made if it is not there.
        count: number of samples.
        seed: names all noise.
        weights: ``"ema"``, the averaged ones, or ``"raw"``.
        batch_size: samples at a time.
        first_sample: index of the first one.
        device: where the network runs.
        overwrite: whether files in the folder may be replaced.
        progress: whether to show progress bars (on stderr).

    Returns:
        ``[count, ...]``, what the file holds.

    Raises:
        FileExistsError: ``samples.npz`` exists and overwrite is False.
        OSError, ValueError: the checkpoint is not usable or an argument out of range.
    """
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    target = out / "samples.npz"
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{target} exists; replace it with --overwrite, or name another --out"
        )
    about = read_about(path)
    net = network(about).to(device).eval()
    checkpoint.load_weights(path, net, which=weights)
    parts = []
    for first in tqdm(range(0, count, batch_size), desc="batches", disable=not progress):
        size = min(batch_size, count - first)
        parts.append(draw_samples(net, about, size, seed=seed, first=first_sample + first))
    scaled = torch.cat(parts)
    out.mkdir(parents=True, exist_ok=True)
    samples = stored(about).unscale(scaled)
    temporary = target.with_name("samples.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, samples=samples.numpy())
    os.replace(temporary, target)
    if scaled.dim() == 4:
        pictures.save_sheet(out / "samples.png", scaled[:_ON_SHEET])
    print(f"{count} samples of the {weights} weights: {target}")
    return samples
