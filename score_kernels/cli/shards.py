"""Shards: what many samples are kept in. Each is written whole or not at all, and can be checked.

A shard is a file of NumPy's or a folder of PNGs. Its bytes are a function of its samples, their ids
and the checksum of the run's settings, and of nothing else: no dates, no names.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

__all__ = [
    "Damaged",
    "NpzStore",
    "PngStore",
    "Shard",
    "Store",
    "cut",
    "leftovers",
    "remove",
    "sha256",
    "whole",
]

# What a damaged file makes zipfile, NumPy and Pillow raise. A disk that cannot be read is damage.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(ValueError, KeyError, IndexError, NotImplementedError, RuntimeError, SyntaxError),
)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """The samples of ids first to first + count - 1, shard number `index` of a run."""

    index: int
    first: int
    count: int

    def __str__(self) -> str:
        return f"samples {self.first} to {self.first + self.count - 1}"


def cut(first: int, count: int, size: int) -> list[Shard]:
    """The ids first to first + count - 1 in shards of `size`; the last may be smaller."""
    starts = range(0, count, size)
    return [Shard(k, first + at, min(size, count - at)) for k, at in enumerate(starts)]


class Damaged(Exception):
    """Why a shard has to be made again."""


class Store(ABC):
    """The shards of a run in their folder.

    Args:
        folder: where they are.
        shape, dtype: of one sample.
        settings: checksum of the run's settings, which every shard holds.
    """

    suffix: str

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype, settings: str):
        self.folder = folder
        self.shape = shape
        self.dtype = dtype
        self.settings = settings

    def name(self, shard: Shard) -> str:
        return f"shard-{shard.index:06d}{self.suffix}"

    def path(self, shard: Shard) -> Path:
        return self.folder / self.name(shard)

    @abstractmethod
    def write(self, shard: Shard, samples: np.ndarray) -> str:
        """Write ``[count, ...]`` in place of what is there. Returns the sha256."""

    @abstractmethod
    def read(self, shard: Shard) -> np.ndarray:
        """The samples of a shard that is right."""

    @abstractmethod
    def check(self, shard: Shard, known: str | None) -> str:
        """The sha256 of a shard that is right, by all that it says of itself and, where there is
        one, by the sha256 known of it.

        Raises:
            Damaged: it is not, or it is missing.
            ValueError: it is whole, and of a run with other settings.
        """

    def _same_settings(self, path: Path, found: str) -> None:
        if found != self.settings:
            raise ValueError(
                f"{path}: of a run with other settings; name another --out, or start afresh with "
                "--overwrite"
            )

    def _same_checksum(self, found: str, known: str | None) -> None:
        if known is not None and found != known:
            raise Damaged("its sha256 is not the one in the manifest")


class NpzStore(Store):
    """``shard-000000.npz``: arrays ``samples`` ``[n, ...]``, ``ids`` ``[n]`` int64 and
    ``settings``, a checksum."""

    suffix = ".npz"

    def write(self, shard: Shard, samples: np.ndarray) -> str:
        with whole(self.path(shard)) as temporary:
            with open(temporary, "wb") as file:
                self._encode(file, shard, samples)
                file.flush()
                os.fsync(file.fileno())
            return sha256(temporary)

    def read(self, shard: Shard) -> np.ndarray:
        with np.load(self.path(shard)) as arrays:
            return arrays["samples"]

    def check(self, shard: Shard, known: str | None) -> str:
        path = self.path(shard)
        if not path.is_file():
            raise Damaged("missing")
        with open(path, "rb") as file:
            try:
                # Every checksum first: a damaged header could ask for any amount of memory.
                with zipfile.ZipFile(file) as archive:
                    part = archive.testzip()
                if part is not None:
                    raise Damaged(f"its part {part} is damaged")
                file.seek(0)
                with np.load(file) as arrays:
                    samples, ids, settings = (arrays[n] for n in ("samples", "ids", "settings"))
            except _DAMAGE as error:
                raise Damaged(f"cut short or damaged ({error})") from error
        self._same_settings(path, str(settings))
        if not np.array_equal(ids, _ids(shard)):
            raise Damaged(f"it does not hold {shard}")
        if (samples.shape, samples.dtype) != ((shard.count, *self.shape), self.dtype):
            raise Damaged(f"it holds {samples.dtype} {samples.shape}")
        found = sha256(path)
        self._same_checksum(found, known)
        if known is None:
            # A zip's checksums do not cover its own headers; writing it again does.
            temporary = _temporary(path)
            with open(temporary, "wb") as file:
                self._encode(file, shard, samples)
            expected = sha256(temporary)
            temporary.unlink()
            if found != expected:
                raise Damaged("its headers are damaged")
        return found

    def _encode(self, file: IO[bytes], shard: Shard, samples: np.ndarray) -> None:
        # Parts written so are dated 1980, whatever the clock says.
        np.savez(file, samples=samples, ids=_ids(shard), settings=np.array(self.settings))


class PngStore(Store):
    """``shard-000000/000000000000.png``, ...: a folder of images named by id, each with its id and
    the checksum of the settings as text ("sample", "settings").

    The sha256 is what ``sha256sum *.png | sha256sum`` prints inside the folder. 8-bit grey and RGB,
    and 16-bit grey, samples being ``[C, H, W]``.
    """

    suffix = ""

    def write(self, shard: Shard, samples: np.ndarray) -> str:
        path = self.path(shard)
        lines = hashlib.sha256()
        with whole(path) as temporary:
            temporary.mkdir()
            for name, id_, image in zip(_names(shard), _ids(shard), samples, strict=True):
                data = self._encode(image, id_)
                with open(temporary / name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                lines.update(_line(data, name))
            _sync(temporary)
            # A folder takes the place of an empty one only.
            remove(path)
        return lines.hexdigest()

    def read(self, shard: Shard) -> np.ndarray:
        files = [self.path(shard) / name for name in _names(shard)]
        return np.stack([self._decode(file.read_bytes())[0] for file in files])

    def check(self, shard: Shard, known: str | None) -> str:
        path = self.path(shard)
        if not path.is_dir():
            raise Damaged("missing")
        names = _names(shard)
        other = {p.name for p in path.glob("*.png")}.symmetric_difference(names)
        if other:
            word = "lacks" if min(other) in names else "should not hold"
            raise Damaged(f"it {word} {min(other)} ({len(other)} files differ from {shard})")
        lines = hashlib.sha256()
        for name, id_ in zip(names, _ids(shard), strict=True):
            data = (path / name).read_bytes()
            try:
                image, text = self._decode(data)
            except _DAMAGE as error:
                raise Damaged(f"{name} is cut short or damaged ({error})") from error
            self._same_settings(path / name, text.get("settings", ""))
            # Covers what no checksum in the file does: shape, id, and bytes after the end.
            if image.shape != self.shape or data != self._encode(image, id_):
                raise Damaged(f"{name} is damaged")
            lines.update(_line(data, name))
        self._same_checksum(lines.hexdigest(), known)
        return lines.hexdigest()

    def _encode(self, image: np.ndarray, id_: int) -> bytes:
        from PIL import Image, PngImagePlugin

        text = PngImagePlugin.PngInfo()
        text.add_text("sample", str(id_))
        text.add_text("settings", self.settings)
        pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        buffer = io.BytesIO()
        deep = self.dtype != np.uint8
        Image.fromarray(pixels.astype(np.uint16) if deep else pixels).save(
            buffer, format="PNG", pnginfo=text
        )
        return buffer.getvalue()

    def _decode(self, data: bytes) -> tuple[np.ndarray, dict[str, str]]:
        from PIL import Image

        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = np.asarray(image).astype(self.dtype)
            text: dict[str, str] = image.text
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), text


def _ids(shard: Shard) -> np.ndarray:
    return np.arange(shard.first, shard.first + shard.count, dtype=np.int64)


def _names(shard: Shard) -> list[str]:
    return [f"{id_:012d}.png" for id_ in _ids(shard)]


def _line(data: bytes, name: str) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def sha256(path: Path) -> str:
    """Of a file, read a piece at a time."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            found.update(piece)
    return found.hexdigest()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside path; what is written to it takes path's place at the end."""
    temporary = _temporary(path)
    remove(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    # The new name itself is on the disk once the folder is.
    _sync(path.parent)


def leftovers(folder: Path, names: str) -> list[Path]:
    """What writes that were stopped left in a folder, for names like "shard-*"."""
    return sorted(folder.glob(f".{names}.tmp"))


def remove(path: Path) -> None:
    """A file, a folder with what is in it, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync(folder: Path) -> None:
    # Only POSIX can open a folder.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
