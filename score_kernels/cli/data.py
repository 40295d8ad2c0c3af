"""Training data from disk: folders of images, NumPy files, IDX files (MNIST's format)."""

from __future__ import annotations

import io
import math
import operator
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from score_kernels import checks
from score_kernels.cli import arrays

__all__ = ["Data", "load"]

# A fixed list, so that what a folder holds does not depend on Pillow's version. Left out are
# formats that Pillow cuts to 8 bits or fills up where a file is truncated without a word (AVIF,
# JPEG 2000), that have no signature (TGA) or that start other programs (EPS).
_IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp"),
    *(".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
}
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# float64 holds every integer up to here, and `scaled` computes in it.
_LARGEST = 2**53


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Samples in memory, in the type they were stored in; also a map-style data set of torch's.

    With ``m = (low + high) / 2`` and ``h = (high - low) / 2``, a network sees
    ``clamp((value - m) / h, -1, 1)`` in float32, and `unscale` is the way back. As a data set,
    ``data[i]`` is sample i so scaled.

    Attributes:
        values: ``[N, ...]`` on the CPU, images as ``[N, C, H, W]``: uint8, int8, int16, int32,
            int64 or float32.
        low, high: what -1 and 1 stand for.
        source: where the samples came from, in words.
        names: the images' paths inside their folder, with "/", or None.
    """

    values: Tensor
    low: float
    high: float
    source: str
    names: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return (
            f"Data({len(self)} samples of shape {self.shape}, {self.values.dtype}, "
            f"{self.low:g} to {self.high:g}, from {self.source})"
        )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return self._scale(self.values[operator.index(index)])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.values.shape[1:])

    def scaled(self, rows: Tensor) -> Tensor:
        """The samples of these indices, scaled to [-1, 1].

        Args:
            rows: ``[B]``, integers; negative ones count from the end.

        Returns:
            ``[B, ...]`` float32 on the CPU.

        Raises:
            TypeError, ValueError: rows is no tensor of integers, or not ``[B]``.
            IndexError: an index is out of range.
        """
        checks.instance("rows", rows, Tensor, "a tensor of indices [B]")
        if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
            raise TypeError(f"rows: got dtype {rows.dtype}, expected integers")
        if rows.dim() != 1:
            raise ValueError(f"rows: got shape {tuple(rows.shape)}, expected [B]")
        # uint8 indices would be taken for a mask.
        return self._scale(self.values[rows.to("cpu", torch.int64)])

    def unscale(self, x: Tensor) -> Tensor:
        """From [-1, 1] back to the stored range and type; what is outside is clamped.

        Integers are rounded to the nearest; ``unscale(scaled(rows))`` is ``values[rows]`` to the
        bit for integers with ``high - low <= 2**23``, so for 8- and 16-bit pixels.

        Args:
            x: any shape and device, floating point.

        Returns:
            x's shape and device in the dtype of `values`.

        Raises:
            TypeError, ValueError: x is no floating-point tensor, or holds NaN.
        """
        checks.instance("x", x, Tensor, "a tensor")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: got dtype {x.dtype}, expected a floating one")
        if bool(x.isnan().any()):
            raise ValueError("x: got NaN, which stands for no value of the data")
        middle, half = self._range()
        x = (x.detach().to(self._wide()) * half + middle).clamp_(self.low, self.high)
        dtype = self.values.dtype
        return x.to(dtype) if dtype.is_floating_point else x.round_().to(dtype)

    def _scale(self, values: Tensor) -> Tensor:
        middle, half = self._range()
        return values.to(self._wide()).sub_(middle).div_(half).clamp_(-1, 1).float()

    def _range(self) -> tuple[float, float]:
        return (self.low + self.high) / 2, (self.high - self.low) / 2

    def _wide(self) -> torch.dtype:
        # For 8 bits float32 is as good as exact, and on every device.
        return torch.float32 if self.values.dtype == torch.uint8 else torch.float64


def load(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    channels: str | None = None,
    progress: bool = False,
) -> Data:
    """Read training data into memory, once.

    Files are known by their first bytes, not by their names:

    - **A folder of images**, with its subfolders, sorted by relative path, character by character
      (code points, with "/"). Read are files named .png, .apng, .jpg, .jpeg, .jpe, .jfif, .bmp,
      .dib, .gif, .webp, .tif, .tiff, .pbm, .pgm, .ppm, .pnm or .pfm in any case; passed over are
      all other files, which `Data.source` counts, and whatever begins with a dot. All images have
      one size and one kind: 8-bit grey (1-bit too, as 0 and 255) or RGB (palettes and GIFs too)
      become uint8 ``[N, 1 or 3, H, W]``, 16-bit grey becomes int32 and float grey float32. They are
      turned upright as their EXIF orientation says; colour profiles are not applied. Refused are
      transparency, CMYK and other modes, 16-bit colour, plain-text PNM and files of several
      frames. A truncated file is an error unless what is missing holds nothing of the image, such
      as the checksum of a PNG's empty last chunk. Needs Pillow (``pip install
      score-kernels[images]``).
    - **.npy**, or **.npz** with one array or with `key` to choose one. Pickles are never read.
    - **IDX**, the format of MNIST and Fashion-MNIST, as it is or gzipped.
    - **A folder without images** in which, subfolders included, exactly one IDX file is named
      ``train-images...``: that file.

    Arrays: ``[N, D]`` are points. ``[N, H, W]`` are grey images and become ``[N, 1, H, W]``. Four
    dimensions are images: 1, 3 or 4 in the second place only are channels first, in the last place
    only channels last, which is turned into channels first; neither: channels first; both: an
    error, and `channels` decides. More dimensions stay as they are. Integers keep their type, but
    uint16 becomes int32 and uint32 and uint64 int64; bool becomes uint8 0 and 1; floats become
    float32.

    The range ``low``, ``high`` is 0 to 255 for uint8 images, 0 to 65535 for 16-bit image files, and
    the data's own least and largest value for everything else.

    Args:
        path: of the file or folder.
        key: the array of an .npz to take.
        channels: "first" or "last", for arrays of four dimensions.
        progress: show a progress bar.

    Raises:
        FileNotFoundError, PermissionError: path, or a file in it, is not there or not readable.
        ValueError: the data cannot be used; the message names the file and what is wrong: nothing
            to read, several candidates, a damaged or truncated file, a decompression bomb, images
            that differ, NaN or infinity (also from a float64 beyond float32), fewer than 2
            samples, no values or only equal ones, integers beyond 2**53, a type or shape that
            holds no samples.
        TypeError: an argument is of the wrong kind.
        ImportError: a folder of images, without Pillow.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: got {type(path).__name__}, expected a string or a Path")
    if key is not None:
        checks.instance("key", key, str, "the name of an array")
    if channels not in (None, "first", "last"):
        raise ValueError(f"channels: got {channels!r}, expected 'first', 'last' or None")
    where = Path(path)
    if not stat.S_ISDIR(os.stat(where).st_mode):
        return _read_file(where, key, channels, progress)
    files = sorted(_walk(os.fspath(where), "", frozenset()))
    images = [name for name in files if Path(name).suffix.lower() in _IMAGE_SUFFIXES]
    if not images:
        return _read_file(_only_training_file(where, files), key, channels, progress)
    for name, value in (("key", key), ("channels", channels)):
        if value is not None:
            raise ValueError(f"{name}: got {value!r} with {where}, a folder of images")
    return _read_images(where, images, set(files).difference(images), progress)


def _read_file(path: Path, key: str | None, channels: str | None, progress: bool) -> Data:
    found = arrays.kind(path)
    if not found:
        image = path.suffix.lower() in _IMAGE_SUFFIXES
        raise ValueError(
            f"{path}: is neither .npy, .npz nor IDX (or gzipped IDX) by its first bytes"
            f"{'; of images, name the folder that holds them' if image else ''}"
        )
    if key is not None and found != "npz":
        raise ValueError(f"key: got {key!r} with {path}, expected none: it is no .npz")
    array = arrays.read(path, found, key=key, channels=channels, progress=progress)
    with arrays.naming(path):
        if array.stored == np.uint64 and array.samples.min() < 0:
            raise ValueError("got unsigned integers of 2**63 or more, expected none beyond 2**53")
        image = array.stored == np.uint8 and array.dims > 2
        return _data(array.samples, array.source, (0.0, 255.0) if image else None)


def _data(
    samples: np.ndarray,
    source: str,
    bounds: tuple[float, float] | None,
    names: tuple[str, ...] | None = None,
) -> Data:
    """The last checks, which all data share."""
    values = torch.from_numpy(samples)
    # NaN and infinities come through: no second pass and no mask as large as the data.
    low, high = (value.item() for value in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = next(i for i, sample in enumerate(samples) if not np.isfinite(sample).all())
        name = f" ({names[bad]})" if names else ""
        raise ValueError(f"sample {bad}{name} holds NaN, infinity or a value beyond float32")
    if max(-low, high) > _LARGEST and not values.dtype.is_floating_point:
        raise ValueError(f"got integers from {low} to {high}, expected none beyond 2**53")
    if low == high:
        raise ValueError(f"every value is {low}: there is nothing to learn from constant data")
    low, high = bounds or (float(low), float(high))
    return Data(values, low, high, source, names)


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """The relative paths of all files below a folder but hidden ones. Links are followed."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder}: is a link to a folder that it is in")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {here})
            else:
                yield prefix + entry.name


def _only_training_file(folder: Path, files: list[str]) -> Path:
    if not files:
        raise ValueError(f"{folder}: is an empty folder, expected images or an IDX file")
    kinds = {name: arrays.holds_samples(folder / name) for name in files}
    candidates = [name for name in files if kinds[name]]
    training = [
        name
        for name in candidates
        if kinds[name] in ("idx", "gz") and Path(name).name.startswith("train-images")
    ]
    if len(training) == 1:
        return folder / training[0]
    if not candidates:
        raise ValueError(
            f"{folder}: none of its {len(files)} files can be read ({_suffixes(files)}), expected "
            f"images ({', '.join(sorted(_IMAGE_SUFFIXES))}) or an IDX file"
        )
    listed = ", ".join(candidates[:10]) + (", ..." if len(candidates) > 10 else "")
    raise ValueError(
        f"{folder}: has no images and {len(training)} IDX files named train-images..., expected "
        f"one; name the file to read instead of the folder. It holds {listed}"
    )


def _suffixes(names: Iterable[str]) -> str:
    counts = Counter(Path(name).suffix.lower() or "no suffix" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))


def _read_images(folder: Path, names: list[str], others: set[str], progress: bool) -> Data:
    pillow = _pillow()
    if len(names) < 2:
        raise ValueError(f"{folder}: got 1 image ({names[0]}), expected at least 2 samples")
    sizes: Counter[tuple[tuple[int, ...], np.dtype]] = Counter()
    samples = np.empty(0)
    odd: int | None = None
    with _strict(pillow):
        for i, name in enumerate(tqdm(names, desc="reading", unit="image", disable=not progress)):
            pixels = _pixels(folder / name, pillow)
            sizes[pixels.shape, pixels.dtype] += 1
            if i == 0:
                samples = np.empty((len(names), *pixels.shape), pixels.dtype)
            if (pixels.shape, pixels.dtype) == (samples.shape[1:], samples.dtype):
                samples[i] = pixels
            elif odd is None:
                # Read on, to say how many images there are of each size.
                odd, different = i, (pixels.shape, pixels.dtype)
    if odd is not None:
        counts = ", ".join(f"{n} of {_words(*kind)}" for kind, n in sizes.most_common(10))
        raise ValueError(
            f"{folder / names[odd]}: got {_words(*different)}, expected "
            f"{_words(samples.shape[1:], samples.dtype)} as in {names[0]}; make all images one "
            f"size and kind. The folder holds {counts}{', ...' if len(sizes) > 10 else ''}"
        )
    bounds = {"uint8": (0.0, 255.0), "int32": (0.0, 65535.0)}.get(samples.dtype.name)
    ignored = f", {len(others)} other files passed over: {_suffixes(others)}" if others else ""
    source = f"{folder} ({len(names)} images{ignored})"
    with arrays.naming(folder):
        return _data(samples, source, bounds, tuple(names))


def _words(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{shape[0]}x{shape[1]}x{shape[2]} {dtype.name}"


def _pillow() -> ModuleType:
    try:
        from PIL import Image, ImageFile, ImageOps  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "a folder of images needs Pillow: pip install score-kernels[images]"
        ) from error
    import PIL

    return PIL


@contextmanager
def _strict(pillow: ModuleType) -> Iterator[None]:
    """Pillow as it should be while data are read: no half images, no bombs."""
    before = pillow.ImageFile.LOAD_TRUNCATED_IMAGES
    pillow.ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.Image.DecompressionBombWarning)
            yield
    finally:
        pillow.ImageFile.LOAD_TRUNCATED_IMAGES = before


def _pixels(path: Path, pillow: ModuleType) -> np.ndarray:
    """One image as ``[C, H, W]``: uint8, int32 (16-bit grey) or float32."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: is not a file")
    data = path.read_bytes()
    with arrays.naming(path):
        with _open(data, pillow) as image:
            if image.format == "PNG":
                # Pillow stops at the last pixel: this reads every chunk's checksum. Only the last
                # four bytes of the file, the checksum of nothing, can be missing after it.
                image.verify()
        with _open(data, pillow) as image:
            # The second picture of a phone's JPEG is a preview or a depth map.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise ValueError(f"got {frames} frames, expected a still image")
            if any(tile[0] == "ppm_plain" for tile in image.tile):
                raise ValueError(
                    "got an image in plain text, expected a binary one: whether its last number "
                    "is whole cannot be known"
                )
            deep = any(_is_deep(tile[0], tile[3]) for tile in image.tile)
            image.load()
            pillow.ImageOps.exif_transpose(image, in_place=True)
            return _channels_first(image, deep)


def _open(data: bytes, pillow: ModuleType) -> Any:
    try:
        return pillow.Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
    except pillow.UnidentifiedImageError as error:
        raise ValueError(
            f"got {len(data)} bytes, expected a whole image ({', '.join(_IMAGE_FORMATS)})"
        ) from error


def _is_deep(decoder: str, arguments: Any) -> bool:
    """Whether one of Pillow's decoders is told of more than 8 bits a channel."""
    if decoder == "ppm":
        return bool(arguments[1] > 255)
    # A raw mode like "RGB;16B", alone or with other settings.
    settings = arguments if isinstance(arguments, tuple) else (arguments,)
    return any(isinstance(value, str) and ";16" in value for value in settings)


def _channels_first(image: Any, deep: bool) -> np.ndarray:
    if image.has_transparency_data:
        raise ValueError(
            f"got transparency (mode {image.mode}), expected opaque images; drop it with "
            "im.convert('RGBA').convert('RGB'), or lay the image over a background first"
        )
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P" or image.format == "GIF":
        # A GIF always has a palette; that Pillow opens some as grey depends on the colours in it.
        image = image.convert("RGB")
    if image.mode == "RGB" and deep:
        raise ValueError(
            "got 16-bit colour, which Pillow cuts to 8 bits; save it with 8 bits, or all images "
            "as one .npy"
        )
    if image.mode == "L":
        return np.asarray(image)[None]
    if image.mode == "RGB":
        return np.asarray(image).transpose(2, 0, 1)
    if image.mode == "F":
        return np.asarray(image, np.float32)[None]
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.int32)[None]
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(
                f"got pixels from {pixels.min()} to {pixels.max()}, expected 0 to 65535 "
                "(16-bit grey); save such images as one .npy"
            )
        return pixels
    raise ValueError(
        f"got mode {image.mode}, expected grey, RGB or a palette; convert it: im.convert('RGB')"
    )
