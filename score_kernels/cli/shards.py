"""Shards of samples, .npz files or folders of PNGs, written atomically."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from score_kernels.training.checkpoint import atomic

__all__ = ["checksum", "read", "write"]


def write(path: Path, samples: np.ndarray, first: int, settings: str) -> str:
    """Write a shard in place of what is there, and return its checksum.

    An .npz has the arrays ``samples``, ``ids`` ``[n]`` int64 and ``settings``, a checksum. Without
    a suffix it is a folder of PNGs of samples ``[n, C, H, W]`` (uint8, C 1 or 3; 16-bit, C 1),
    named by id, with the texts "sample", the id, and "settings".
    """
    ids = np.arange(first, first + len(samples), dtype=np.int64)
    with atomic(path) as temporary:
        if path.suffix == ".npz":
            with open(temporary, "wb") as file:
                np.savez(file, samples=samples, ids=ids, settings=np.array(settings))
        else:
            temporary.mkdir()
            for id_, image in zip(ids.tolist(), samples, strict=True):
                _write_png(temporary / f"{id_:012d}.png", image, id_, settings)
        return checksum(temporary)


def read(path: Path) -> np.ndarray:
    """The samples of a shard."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return arrays["samples"]
    from PIL import Image

    images = [np.atleast_3d(np.asarray(Image.open(name))) for name in sorted(path.iterdir())]
    return np.stack(images).transpose(0, 3, 1, 2)


def checksum(path: Path) -> str:
    """The sha256 of a file; of a folder, what ``sha256sum *.png | sha256sum`` prints in it."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [f"{checksum(file)}  {file.name}\n" for file in sorted(path.glob("*.png"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _write_png(path: Path, image: np.ndarray, id_: int, settings: str) -> None:
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("sample", str(id_))
    text.add_text("settings", settings)
    pixels = image if image.dtype == np.uint8 else image.astype(np.uint16)
    pixels = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=text)
