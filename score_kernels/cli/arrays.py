"""Array files: IDX (the format of MNIST), .npy and .npz, read into memory of the right layout.

Everything wrong with a file's bytes is a ValueError that begins with its name.
"""

from __future__ import annotations

import gzip
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from tqdm.auto import tqdm

__all__ = ["Array", "holds_samples", "kind", "naming", "read"]

# The third byte of an IDX file names the type of its elements; all are stored big-endian.
_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# Bytes read at a time: what a conversion needs beside the array itself.
_CHUNK = 1 << 20
# What most DEFLATE can shrink data by.
_DEFLATE = 1032


@dataclass(frozen=True)
class Array:
    """What a file holds: samples ``[N, ...]``, how they were stored, and where, in words."""

    samples: np.ndarray
    stored: np.dtype
    dims: int
    source: str


class _Stream(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


def kind(path: Path) -> str:
    """What a file's first bytes say: "npy", "npz", "gz", "idx", or "" for something else.

    Raises:
        ValueError: path is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: is neither a file nor a folder")
    with open(path, "rb") as file:
        head = file.read(6)
    if head == b"\x93NUMPY":
        return "npy"
    # The second is a zip without members.
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return "npz"
    if head[:2] == b"\x1f\x8b":
        return "gz"
    return "idx" if head[:2] == b"\0\0" else ""


def holds_samples(path: Path) -> str:
    """The kind of a file that may hold samples, "" for all others and for labels."""
    found = kind(path) if path.is_file() else ""
    if found not in ("idx", "gz"):
        return found
    with open(path, "rb") as file:
        try:
            head = _unzipped(file, found).read(4)
        except (OSError, EOFError, zlib.error):
            # Damaged: a candidate, and reading it says what is wrong.
            return found
    return found if _is_idx(head) and head[3] > 1 else ""


def read(path: Path, found: str, *, key: str | None, channels: str | None, progress: bool) -> Array:
    """Read a file of that `kind`; see `score_kernels.cli.data.load`.

    Raises:
        ValueError: the file is damaged, or its array cannot hold samples.
    """
    size = path.stat().st_size
    with open(path, "rb") as file, naming(path):
        if found == "npz":
            return _read_npz(path, file, key, channels, progress)
        known, most = (None, _DEFLATE * size) if found == "gz" else (size, size)
        stream = _unzipped(file, found)
        form = "npy" if found == "npy" else "idx"
        return _read_array(str(path), form, stream, known, most, channels, progress)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """One kind of error that begins with the file's name, whatever its bytes make parsers raise."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def _unzipped(file: IO[bytes], found: str) -> _Stream:
    return gzip.GzipFile(fileobj=file) if found == "gz" else file


def _read_npz(
    path: Path, file: IO[bytes], key: str | None, channels: str | None, progress: bool
) -> Array:
    with zipfile.ZipFile(file) as archive:
        members = {
            info.filename.removesuffix(".npy"): info
            for info in archive.infolist()
            if info.filename.endswith(".npy")
        }
        names = ", ".join(sorted(members)) or "none"
        if key is None and len(members) != 1:
            choose = "; choose one with key" if members else ""
            raise ValueError(f"got {len(members)} arrays ({names}), expected one{choose}")
        if key is not None and key not in members:
            raise ValueError(f"key: got {key!r}, expected one of its arrays: {names}")
        name = next(iter(members)) if key is None else key
        info = members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{name}: got compression method {info.compress_type}, expected one that NumPy "
                "writes: 0 (none) or 8 (DEFLATE)"
            )
        known, most = info.file_size, _DEFLATE * info.compress_size
        with archive.open(info) as stream:
            return _read_array(f"{path}[{name}]", "npy", stream, known, most, channels, progress)


def _read_array(
    source: str,
    form: str,
    stream: _Stream,
    size: int | None,
    most: int,
    channels: str | None,
    progress: bool,
) -> Array:
    """The array in a stream of `size` bytes (None: not known) that cannot have more than `most`."""
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=not progress) as bar:
        data = _Bytes(stream, bar.update)
        dtype, shape, fortran = _idx_header(data) if form == "idx" else _npy_header(data)
        if dtype.kind not in "buif":
            never = "; pickled objects are never read" if dtype.hasobject else ""
            raise ValueError(
                f"got an array of {dtype}, expected integers, floating point or bool{never}"
            )
        if len(shape) < 2:
            raise ValueError(
                f"got shape {shape}, expected [N, D], [N, H, W] or more dimensions "
                "(one dimension holds labels, not samples)"
            )
        if min(shape) < 1 or shape[0] < 2:
            raise ValueError(f"got shape {shape}, expected at least 2 samples and no empty ones")
        expected = data.count + math.prod(shape) * dtype.itemsize
        # Before memory is asked for.
        if size not in (None, expected):
            raise _wrong_length(str(size), expected, size > expected, shape, dtype)
        if expected > most:
            raise _wrong_length(f"at most {most}", expected, False, shape, dtype)
        samples, view = _allocate(shape, _kept(dtype), channels)
        # A float64 beyond float32 becomes an infinity, which the caller looks for.
        with np.errstate(over="ignore"):
            complete = _fill(view.transpose() if fortran else view, data, dtype)
        # Compressed streams check their sums when they are read to the end.
        while data.read():
            pass
        if not complete or data.count > expected:
            raise _wrong_length(str(data.count), expected, complete, shape, dtype)
    return Array(samples, dtype, len(shape), source)


def _wrong_length(
    got: str, expected: int, long: bool, shape: tuple[int, ...], dtype: np.dtype
) -> ValueError:
    return ValueError(
        f"got {got} bytes, expected {expected} (shape {shape} of {dtype.name}): the file is "
        f"{'too long' if long else 'truncated'}"
    )


class _Bytes:
    """A stream that counts what was read from it, and reads all it is asked for."""

    def __init__(self, stream: _Stream, seen: Callable[[int], object]) -> None:
        self._stream, self._seen, self.count = stream, seen, 0

    def read(self, size: int = _CHUNK, /) -> bytes:
        """`size` bytes, fewer only where the stream ends."""
        parts = []
        while size:
            part = self._stream.read(size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
            self.count += len(part)
            self._seen(len(part))
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_idx(head: bytes) -> bool:
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in _TYPES and head[3] > 0


def _idx_header(data: _Bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    head = data.read(4)
    if len(head) == 4 and not _is_idx(head):
        types = ", ".join(f"{code:02x}" for code in _TYPES)
        raise ValueError(
            f"got the magic number {head.hex()}, expected 0000, an element type ({types}) and the "
            "number of dimensions, as IDX files begin"
        )
    # A header holds at least one dimension.
    whole = 4 + 4 * head[3] if len(head) == 4 else 8
    sizes = data.read(whole - 4) if len(head) == 4 else b""
    if data.count < whole:
        raise ValueError(
            f"got {data.count} bytes, expected at least {whole}, an IDX header: the file is "
            "truncated"
        )
    return np.dtype(_TYPES[head[2]]), struct.unpack(f">{head[3]}I", sizes), False


def _npy_header(data: _Bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    try:
        version = np.lib.format.read_magic(data)
        # Version 3 is written for the field names of records alone.
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}, expected (1, 0) or (2, 0)")
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(data)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(data)
    # NumPy parses the header as a Python literal, which can fail in any of a parser's ways.
    except Exception as error:
        raise ValueError(f"got a broken .npy header: {error}") from error
    return dtype, shape, fortran


def _kept(dtype: np.dtype) -> np.dtype:
    """The type to keep values of a stored type in; torch does little with wide unsigned ones."""
    if dtype.kind == "f":
        return np.dtype(np.float32)
    if dtype.kind == "u" and dtype.itemsize > 1:
        return np.dtype(np.int32 if dtype.itemsize == 2 else np.int64)
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def _allocate(
    shape: tuple[int, ...], dtype: np.dtype, channels: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Memory for samples stored in this shape: as they will be, and a view of it as stored."""
    if channels is not None and len(shape) != 4:
        raise ValueError(
            f"channels: got {channels!r} with shape {shape}, expected none: only images in four "
            "dimensions have a place of channels to choose"
        )
    if len(shape) == 3:
        samples = np.empty((shape[0], 1, *shape[1:]), dtype)
        return samples, samples[:, 0]
    if len(shape) == 4 and channels is None:
        first, last = shape[1] in (1, 3, 4), shape[3] in (1, 3, 4)
        if first and last:
            raise ValueError(
                f"got shape {shape}: both [N, C, H, W] and [N, H, W, C] are possible; say "
                "channels='first' or channels='last'"
            )
        channels = "last" if last else "first"
    if channels == "last":
        n, h, w, c = shape
        samples = np.empty((n, c, h, w), dtype)
        return samples, samples.transpose(0, 2, 3, 1)
    samples = np.empty(shape, dtype)
    return samples, samples


def _fill(target: np.ndarray, data: _Bytes, dtype: np.dtype) -> bool:
    """Fill a view of any layout and dtype with a stream in C order; whether there was enough."""
    row = math.prod(target.shape[1:]) * dtype.itemsize
    if target.ndim > 1 and row > _CHUNK:
        return all(_fill(part, data, dtype) for part in target)
    rows = max(1, _CHUNK // row)
    for start in range(0, len(target), rows):
        part = target[start : start + rows]
        values = data.read(part.size * dtype.itemsize)
        if len(values) < part.size * dtype.itemsize:
            return False
        part[...] = np.frombuffer(values, dtype).reshape(part.shape)
    return True
