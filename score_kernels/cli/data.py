"""Training data from image folders, NumPy and IDX (MNIST) files."""

from __future__ import annotations

import glob
import gzip
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from score_kernels.bars import progress_bar

__all__ = ["Data", "load"]

# A fixed list, so that what a folder holds does not depend on Pillow's version.
_IMAGE_SUFFIXES = set(
    ".png .apng .jpg .jpeg .jpe .jfif .bmp .dib .gif .webp .tif .tiff .pbm .pgm .ppm .pnm".split()
)
# The third byte of an IDX file is the type of its elements, stored big-endian.
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# Types that are kept as another one: torch supports wide unsigned integers only in part.
_KEPT = {"b1": "u1", "u2": "i4", "u4": "i8", "u8": "i8", "f2": "f4", "f8": "f4"}


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Samples in memory in their stored type; a map-style data set.

    ``data[i]``, what a network sees of sample i, is ``clamp((value - m) / h, -1, 1)`` in float32
    with ``m = (low + high) / 2`` and ``h = (high - low) / 2``; `unscale` is the inverse.

    Attributes:
        values: ``[N, ...]`` on the CPU, images as ``[N, C, H, W]``: uint8, int8, int16, int32,
            int64 or float32.
        low, high: the values that become -1 and 1.
        source: where the samples are from, in words.
        names: the images' paths inside their folder, with "/", or None.
    """

    values: Tensor
    low: float
    high: float
    source: str
    names: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        kind = f"{len(self)} samples of shape {self.shape}, {self.values.dtype}"
        return f"Data({kind}, {self.low:g} to {self.high:g}, from {self.source})"

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        wide, middle, half = self._scaling()
        return self.values[index].to(wide).sub_(middle).div_(half).clamp_(-1, 1).float()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.values.shape[1:])

    def scaled(self, rows: Tensor) -> Tensor:
        """Samples by index ``[B]`` int64, in [-1, 1], float32, on the CPU."""
        return self[rows.cpu()]

    def unscale(self, x: Tensor, clamp: bool = True) -> Tensor:
        """From [-1, 1] to the stored range and type, rounded and clamped.

        x is floating point of any shape and device, and the result has both; NaN is a ValueError.
        Real numbers stay beyond the range where clamp is False.
        For integers with ``high - low <= 2**23`` ``unscale(scaled(rows))`` is ``values[rows]``.
        """
        if bool(x.isnan().any()):
            raise ValueError("x: got NaN, expected numbers")
        wide, middle, half = self._scaling()
        x = x.detach().to(wide) * half + middle
        x = x.clamp_(self.low, self.high) if clamp else x
        dtype = self.values.dtype
        return x.to(dtype) if dtype.is_floating_point else x.round_().to(dtype)

    def _scaling(self) -> tuple[torch.dtype, float, float]:
        # For 8 bits float32 is as good as exact, and on every device.
        wide = torch.float32 if self.values.dtype == torch.uint8 else torch.float64
        return wide, (self.low + self.high) / 2, (self.high - self.low) / 2


def load(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    channels: str | None = None,
    progress: bool = False,
) -> Data:
    """Read training data into memory.

    - **A folder of images** (png, apng, jpg, jpeg, jpe, jfif, bmp, dib, gif, webp, tif, tiff, pbm,
      pgm, ppm, pnm) with its subfolders, sorted by relative path; hidden files are skipped. All
      have one size and kind: 8-bit grey (1-bit too, as 0 and 255) or RGB (palettes too) become
      uint8 ``[N, 1 or 3, H, W]``, 16-bit grey becomes int32; transparency, CMYK and other modes are
      errors. Pillow (``pip install score-kernels[images]``) reads the first frame, turned upright.
    - **.npy**, or **.npz** with one array or with `key` to choose one. Pickles are never read.
    - **IDX**, the format of MNIST, plain or gzipped. Arrays are known by their first bytes.
    - **A folder without images** with exactly one file named ``train-images...``: that file.

    Arrays: ``[N, D]`` are points, ``[N, H, W]`` grey images, which become ``[N, 1, H, W]``. Four
    dimensions are images, channels last (and become channels first) where only the last dimension
    is 1, 3 or 4; where the second is too, `channels` decides. More dimensions stay as they are.
    bool becomes uint8, uint16 int32, uint32 and uint64 int64, and floats float32.

    ``low``, ``high`` are 0, 255 of uint8 images, 0, 65535 of 16-bit image files, and otherwise the
    data's own least and largest value.

    Args:
        path: of the file or folder.
        key: the array of an .npz to take.
        channels: "first" or "last", for arrays of four dimensions.
        progress: show a progress bar for a folder of images.

    Raises:
        FileNotFoundError, PermissionError: path, or a file in it, is missing or not readable.
        ValueError: the data cannot be used; the message begins with the file's name.
        ImportError: a folder of images, without Pillow.
    """
    path = Path(path)
    if not path.is_dir():
        return _load_array(path, key, channels)
    found = glob.glob("**", root_dir=path, recursive=True)
    files = sorted(Path(name).as_posix() for name in found if not (path / name).is_dir())
    images = [name for name in files if Path(name).suffix.lower() in _IMAGE_SUFFIXES]
    if images:
        if key is not None or channels is not None:
            raise ValueError(
                f"key, channels: got {key!r}, {channels!r} with {path}, a folder of images"
            )
        return _load_images(path, images, len(files) - len(images), progress)
    training = [name for name in files if Path(name).name.startswith("train-images")]
    if len(training) != 1:
        words = f"got no images and {len(training)} files named train-images..., expected one"
        raise ValueError(f"{path}: {words}; it holds {', '.join(files[:10]) or 'nothing'}")
    return _load_array(path / training[0], key, channels)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """One kind of error, with the file's name, whatever its bytes make parsers raise."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


def _load_array(path: Path, key: str | None, channels: str | None) -> Data:
    with _naming(path):
        with open(path, "rb") as file:
            head = file.read(2)
        source = str(path)
        if head == b"PK":
            array, source = _read_npz(path, key)
        elif key is not None:
            raise ValueError(f"key: got {key!r}, expected none: it is no .npz")
        elif head == b"\x93N":
            # Mapped, so that memory holds the converted array only.
            array = np.load(path, mmap_mode="r")
        else:
            array = _read_idx(path, gzipped=head == b"\x1f\x8b")
        images = array.dtype == np.uint8 and array.ndim > 2
        if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
            raise ValueError(f"got {array.max()}, expected integers below 2**63")
        kept = _KEPT.get(array.dtype.str[1:], array.dtype.newbyteorder("="))
        values = torch.from_numpy(_channels_first(array, channels).astype(kept, order="C"))
        low, high = _bounds(values)
        return Data(values, 0.0, 255.0, source) if images else Data(values, low, high, source)


def _read_npz(path: Path, key: str | None) -> tuple[np.ndarray, str]:
    with np.load(path) as arrays:
        name = arrays.files[0] if key is None and len(arrays.files) == 1 else key
        if name not in arrays.files:
            names = ", ".join(arrays.files)
            raise ValueError(f"key: got {key!r}, expected one of its arrays: {names}")
        return arrays[name], f"{path}[{name}]"


def _read_idx(path: Path, *, gzipped: bool) -> np.ndarray:
    with gzip.open(path) if gzipped else open(path, "rb") as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES:
            raise ValueError("is no .npy, .npz or IDX file; of images, name their folder")
        shape = np.frombuffer(file.read(4 * head[3]), ">u4")
        return np.frombuffer(file.read(), _IDX_TYPES[head[2]]).reshape(shape)


def _channels_first(array: np.ndarray, channels: str | None) -> np.ndarray:
    """``[N, H, W]`` and ``[N, H, W, C]`` as ``[N, C, H, W]``."""
    if array.ndim != 4:
        if channels is not None:
            raise ValueError(f"channels: got {channels!r}, expected none with shape {array.shape}")
        return array[:, None] if array.ndim == 3 else array
    first, last = (array.shape[dim] in (1, 3, 4) for dim in (1, 3))
    if channels not in ("first", "last") and (channels is not None or (first and last)):
        got = f"{channels!r} with shape {array.shape}"
        raise ValueError(f"channels: got {got}, expected 'first' or 'last'")
    if channels is None:
        channels = "last" if last else "first"
    return np.moveaxis(array, 3, 1) if channels == "last" else array


def _bounds(values: Tensor) -> tuple[float, float]:
    """Least and largest value, of data that can be learnt from."""
    if values.dim() < 2 or len(values) < 2:
        shape = tuple(values.shape)
        raise ValueError(f"got shape {shape}, expected [N, D], [N, H, W] or more, N > 1")
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"sample {bad} holds NaN, infinity or a value beyond float32")
    low, high = (value.item() for value in values.aminmax())
    if low == high:
        raise ValueError(f"every value is {low}: there is nothing to learn from constant data")
    return float(low), float(high)


def _load_images(folder: Path, names: list[str], others: int, progress: bool) -> Data:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("images need Pillow: pip install score-kernels[images]") from error
    samples = np.empty(0)
    for i, name in enumerate(
        progress_bar(names, desc="reading", unit="image", disable=not progress)
    ):
        with _naming(folder / name):
            pixels = _pixels(folder / name)
            if i == 0:
                samples = np.empty((len(names), *pixels.shape), pixels.dtype)
            if (pixels.shape, pixels.dtype) != (samples.shape[1:], samples.dtype):
                wanted = f"{samples.shape[1:]} {samples.dtype} as in {names[0]}"
                raise ValueError(f"got {pixels.shape} {pixels.dtype}, expected {wanted}")
            samples[i] = pixels
    values = torch.from_numpy(samples)
    with _naming(folder):
        _bounds(values)
    high = 255.0 if samples.dtype == np.uint8 else 65535.0
    ignored = f", {others} other files not read" if others else ""
    return Data(values, 0.0, high, f"{folder} ({len(names)} images{ignored})", tuple(names))


def _pixels(path: Path) -> np.ndarray:
    """One image as ``[C, H, W]``: uint8, or int32 for 16-bit grey."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if image.has_transparency_data:
            raise ValueError(f"got transparency (mode {image.mode}), expected opaque images")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("1", "P"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        pixels = np.asarray(image)
    if image.mode in ("L", "RGB"):
        return np.atleast_3d(pixels).transpose(2, 0, 1)
    if not image.mode.startswith("I") or pixels.min() < 0 or pixels.max() > 65535:
        expected = "8-bit grey, RGB, a palette or 16-bit grey; convert it to one of them"
        raise ValueError(f"got mode {image.mode}, expected {expected}")
    return pixels.astype(np.int32)[None]
