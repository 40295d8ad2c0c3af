from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from score_kernels.cli.data import Data, load

IDX_TYPES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
# Of what is written, what is kept.
KEPT = {
    "?": "uint8",
    "u1": "uint8",
    "i1": "int8",
    "<i2": "int16",
    ">i2": "int16",
    "<i4": "int32",
    ">i4": "int32",
    "<i8": "int64",
    "<u2": "int32",
    ">u2": "int32",
    "<u4": "int64",
    "<u8": "int64",
    "<f2": "float32",
    "<f4": "float32",
    ">f4": "float32",
    "<f8": "float32",
    ">f8": "float32",
}
RNG = np.random.default_rng()


def random(shape: tuple[int, ...], dtype: str = "u1") -> np.ndarray:
    """Fresh values over much of the type's range; never constant."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        values = RNG.normal(size=shape).astype(kind)
    elif kind.kind == "b":
        values = RNG.integers(0, 2, shape).astype(kind)
    else:
        info = np.iinfo(kind)
        low, high = max(info.min, -(2**53)), min(info.max, 2**53)
        values = RNG.integers(low, high, shape, endpoint=True).astype(kind)
    values.flat[0], values.flat[-1] = 0, 1
    return values


def idx(values: np.ndarray, dtype: str = "u1") -> bytes:
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, IDX_TYPES[dtype], values.ndim, *values.shape)
    return head + values.astype(dtype).tobytes()


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def encoded(image: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, form, **options)
    return stream.getvalue()


def png(values: np.ndarray, depth: int, colour: int) -> bytes:
    """A PNG that Pillow cannot write: any bit depth and colour type."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def assert_values(data: Data, want: np.ndarray) -> None:
    assert data.values.is_contiguous()
    assert data.values.numpy().dtype == want.dtype.newbyteorder("=")
    np.testing.assert_array_equal(data.values.numpy(), want)


@pytest.mark.parametrize("dtype", KEPT)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7), (5, 3, 7, 9), (2, 3, 2, 5, 3)])
def test_npy(tmp_path: Path, dtype: str, order: Any, shape: tuple[int, ...]) -> None:
    written = random(shape, dtype)
    # No name helps: files are known by their first bytes.
    data = load(put(tmp_path / "x", npy(np.asarray(written, order=order))))
    want = written.astype(KEPT[dtype])
    assert_values(data, want[:, None] if len(shape) == 3 else want)
    if dtype == "u1" and len(shape) > 2:
        assert (data.low, data.high) == (0, 255)
    else:
        assert (data.low, data.high) == (want.min(), want.max())
    assert len(data) == shape[0] and data.shape == tuple(data.values.shape[1:])
    assert data.names is None and data.source == str(tmp_path / "x")


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path: Path, compressed: bool) -> None:
    a, b = random((5, 3)), random((3, 9, 7))
    one = put(tmp_path / "one.npz", npz(compressed, train=a))
    assert_values(load(one), a)
    assert_values(load(one, key="train"), a)
    two = put(tmp_path / "two.npz", npz(compressed, a=a, b=b))
    data = load(two, key="b")
    assert_values(data, b[:, None])
    assert data.source == f"{two}[b]"
    large = put(tmp_path / "large.npz", npz(compressed, a=np.full((3, 2), 2**63, np.uint64)))
    with pytest.raises(ValueError, match=r"large.npz: got 9223372036854775808, expected"):
        load(large)


@pytest.mark.parametrize("dtype", IDX_TYPES)
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7), (5, 3, 7, 9), (2, 3, 2, 5, 3)])
def test_idx(tmp_path: Path, dtype: str, zipped: bool, shape: tuple[int, ...]) -> None:
    written = random(shape, dtype)
    content = idx(written, dtype)
    data = load(put(tmp_path / "t10k-images", gzip.compress(content) if zipped else content))
    want = written.astype(KEPT.get(dtype, "float32"))
    assert_values(data, want[:, None] if len(shape) == 3 else want)


@pytest.mark.parametrize(
    "shape, channels, want",
    [
        ((2, 1, 8, 9), None, (2, 1, 8, 9)),
        ((2, 3, 8, 9), None, (2, 3, 8, 9)),
        ((2, 4, 8, 9), None, (2, 4, 8, 9)),
        ((2, 8, 9, 1), None, (2, 1, 8, 9)),
        ((2, 8, 9, 3), None, (2, 3, 8, 9)),
        ((2, 8, 9, 4), None, (2, 4, 8, 9)),
        ((2, 8, 3, 9), None, (2, 8, 3, 9)),
        ((2, 16, 8, 9), None, (2, 16, 8, 9)),
        ((2, 3, 8, 3), "first", (2, 3, 8, 3)),
        ((2, 1, 8, 3), "last", (2, 3, 1, 8)),
        ((2, 8, 9, 2), "last", (2, 2, 8, 9)),
        ((2, 8, 9, 3), "first", (2, 8, 9, 3)),
        ((4, 8, 3), None, (4, 1, 8, 3)),
        ((9, 3), None, (9, 3)),
    ],
)
def test_place_of_channels(
    tmp_path: Path, shape: tuple[int, ...], channels: str | None, want: tuple[int, ...]
) -> None:
    written = random(shape)
    data = load(put(tmp_path / "x.npy", npy(written)), channels=channels)
    assert data.values.shape == want
    moved = want[1:] != shape[1:] and len(shape) == 4
    expected = np.moveaxis(written, 3, 1) if moved else written.reshape(want)
    assert_values(data, expected)


@pytest.mark.parametrize("shape", [(2, 3, 8, 1), (2, 1, 4, 4), (3, 4, 5, 3)])
def test_ambiguous_channels_are_asked_for(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = put(tmp_path / "x.npy", npy(random(shape)))
    with pytest.raises(
        ValueError, match=f"x.npy: channels: got None with shape {re.escape(str(shape))}"
    ):
        load(path)


# Name, encoder of [H, W] or [H, W, 3] values, and what they are.
LOSSLESS: list[tuple[str, Callable[[np.ndarray], bytes], str]] = [
    ("png", lambda a: encoded(a, "PNG"), "grey"),
    ("PNG", lambda a: encoded(a, "PNG"), "rgb"),
    ("png", lambda a: png(a.astype(">u2"), 16, 0), "grey16"),
    ("bmp", lambda a: encoded(a, "BMP"), "grey"),
    ("bmp", lambda a: encoded(a, "BMP"), "rgb"),
    ("webp", lambda a: encoded(a, "WEBP", lossless=True), "rgb"),
    ("tif", lambda a: encoded(a, "TIFF"), "grey"),
    ("tiff", lambda a: encoded(a, "TIFF", compression="tiff_lzw"), "rgb"),
    ("tif", lambda a: encoded(a.astype(np.uint16), "TIFF"), "grey16"),
    ("pgm", lambda a: encoded(a, "PPM"), "grey"),
    ("ppm", lambda a: encoded(a, "PPM"), "rgb"),
    ("pgm", lambda a: b"P5 9 7 65535\n" + a.astype(">u2").tobytes(), "grey16"),
]


@pytest.mark.parametrize("suffix, encode, kind", LOSSLESS)
def test_image_folder(
    tmp_path: Path, suffix: str, encode: Callable[[np.ndarray], bytes], kind: str
) -> None:
    size = (5, 7, 9, 3) if kind == "rgb" else (5, 7, 9)
    dtype = "<u2" if kind == "grey16" else "u1"
    written = random(size, dtype)
    for i, image in enumerate(written):
        put(tmp_path / f"{i}.{suffix}", encode(image))
    data = load(tmp_path)
    want = written.transpose(0, 3, 1, 2) if kind == "rgb" else written[:, None]
    assert_values(data, want.astype(KEPT[dtype]))
    assert (data.low, data.high) == (0, 65535 if kind == "grey16" else 255)
    assert data.names == tuple(f"{i}.{suffix}" for i in range(5))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    written = random((2, 5, 7), "?")
    for i, image in enumerate(written):
        put(tmp_path / f"{i}.png", encoded(Image.fromarray(image), "PNG"))
        put(tmp_path / "more" / f"{i}.pbm", encoded(Image.fromarray(image), "PPM"))
    want = written[:, None].astype(np.uint8) * 255
    assert_values(load(tmp_path), np.concatenate([want, want]))


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palettes_become_rgb(tmp_path: Path, form: str) -> None:
    palette = random((16, 3))
    index = RNG.integers(0, 16, (3, 5, 7)).astype(np.uint8)
    for i, image in enumerate(index):
        picture = Image.fromarray(image, "P")
        picture.putpalette(palette.tobytes())
        put(tmp_path / f"{i}.{form.lower()}", encoded(picture, form))
    assert_values(load(tmp_path), palette[index].transpose(0, 3, 1, 2))


def test_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"{i}.jpeg", encoded(random((9, 11, 3)), "JPEG", progressive=i == 1))
    want = [np.asarray(Image.open(tmp_path / f"{i}.jpeg")) for i in range(3)]
    assert_values(load(tmp_path), np.stack(want).transpose(0, 3, 1, 2))


def test_exif_orientation(tmp_path: Path) -> None:
    image = random((5, 7))
    exif = Image.Exif()
    # 6: the picture has to be turned 90 degrees clockwise.
    exif[0x0112] = 6
    put(tmp_path / "a.png", encoded(np.rot90(image, 1), "PNG", exif=exif))
    put(tmp_path / "b.tif", encoded(image, "TIFF"))
    assert_values(load(tmp_path), np.stack([image, image])[:, None])


def test_order_subfolders_and_files_passed_over(tmp_path: Path) -> None:
    names = [
        "B-1.png",
        "B/1.png",
        "B/10.png",
        "B/2.PNG",
        "a.png",
        "b/c/x.png",
        "b0.png",
        "\u00e9.png",
    ]
    images = {name: random((3, 5)) for name in names}
    for name in RNG.permutation(names):
        put(tmp_path / str(name), encoded(images[str(name)], "PNG"))
    for name in ("notes.txt", "b/labels.csv", "README", "d.txt"):
        put(tmp_path / name, b"words")
    for name in (".DS_Store", "._a.png", ".hidden/x.png"):
        put(tmp_path / name, b"no image")
    data = load(tmp_path)
    # Code points: capitals first, "-" before "/" before "0", no locale.
    assert data.names == tuple(names)
    assert_values(data, np.stack([images[name] for name in names])[:, None])
    assert data.source == f"{tmp_path} (8 images, 4 other files not read)"
    assert len(repr(data)) < 400 and "8 samples of shape (1, 3, 5)" in repr(data)


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    for i in range(2):
        put(tmp_path / "real" / f"{i}.png", encoded(random((3, 5)), "PNG"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "class").symlink_to(tmp_path / "real")
    assert load(tmp_path / "data").names == ("class/0.png", "class/1.png")


def test_folder_of_idx_files(tmp_path: Path) -> None:
    train, test = random((5, 3, 7)), random((2, 3, 7))
    labels = gzip.compress(idx(random((5,))))
    put(tmp_path / "train-images-idx3-ubyte.gz", gzip.compress(idx(train)))
    put(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    put(tmp_path / "t10k-images-idx3-ubyte.gz", gzip.compress(idx(test)))
    put(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    data = load(tmp_path)
    assert_values(data, train[:, None])
    assert data.source.endswith("train-images-idx3-ubyte.gz") and data.names is None
    # With the same file unpacked beside it, there are two: the user has to say which.
    put(tmp_path / "train-images-idx3-ubyte", idx(train))
    with pytest.raises(ValueError, match="2 files named train-images.*it holds t10k-images-idx3"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", "<u2"])
def test_scaled_and_back_is_exact(tmp_path: Path, dtype: str) -> None:
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1).astype(dtype).reshape(-1, 2, 2)
    data = load(put(tmp_path / "x.npy", npy(every)))
    rows = torch.randperm(len(data))
    x = data.scaled(rows)
    assert x.dtype == torch.float32 and x.shape == (len(data), 1, 2, 2)
    assert x.min() == -1 and x.max() == 1
    back = data.unscale(x)
    assert back.dtype == data.values.dtype
    assert torch.equal(back, data.values[rows])
    # Against the formula; float32 keeps 24 bits of a value of at most 1.
    want = 2 * (every.astype(float) - info.min) / (float(info.max) - info.min) - 1
    np.testing.assert_allclose(x, want[rows.numpy()][:, None], rtol=0, atol=2**-24)


def test_scaled_floats(tmp_path: Path) -> None:
    written = random((50, 3), "<f4") + np.float32(1000)
    data = load(put(tmp_path / "x.npy", npy(written)))
    assert (data.low, data.high) == (written.min(), written.max())
    x = data.scaled(torch.arange(50))
    assert x.min() == -1 and x.max() == 1
    back = data.unscale(x)
    assert back.dtype == torch.float32
    # Scaling rounds to 2**-25 of the half range, and the way back to 2**-25 of the value.
    half, largest = (data.high - data.low) / 2, np.abs(written).max()
    bound = (half + largest) * 2**-24
    np.testing.assert_allclose(back, written, rtol=0, atol=bound)


def test_extreme_floats_do_not_overflow(tmp_path: Path) -> None:
    top = np.finfo(np.float32).max
    written = np.array([[-top, top], [0, 1e-45]], np.float32)
    data = load(put(tmp_path / "x.npy", npy(written)))
    assert data.scaled(torch.tensor([0, 1])).tolist() == [[-1, 1], [0, 0]]
    assert torch.equal(data.unscale(torch.tensor([-1.0, 1.0])), torch.tensor([-top, top]))


def test_values_outside_the_range_are_clamped() -> None:
    data = Data(torch.tensor([[-3.0], [2.0], [11.0]]), 0.0, 8.0, "here")
    assert data.scaled(torch.arange(3)).tolist() == [[-1.0], [-0.5], [1.0]]
    # Integers that float32 does not hold.
    data = Data(
        torch.tensor([[2**30 + 1], [2**30 + 8]], dtype=torch.int32), 2.0**30, 2.0**30 + 8, ""
    )
    assert data.scaled(torch.arange(2)).tolist() == [[-0.75], [1.0]]


def test_unscale_clamps_and_rounds(tmp_path: Path) -> None:
    data = load(put(tmp_path / "x.npy", npy(random((3, 5, 7)))))
    x = torch.tensor([-torch.inf, -1.5, -1, 1, 1.5, torch.inf, 0.49 / 127.5, 0.51 / 127.5])
    assert data.unscale(x).tolist() == [0, 0, 0, 255, 255, 255, 128, 128]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert data.unscale(x.to(dtype)).dtype == torch.uint8
    assert data.unscale(torch.zeros(2, 1, 4, 4, requires_grad=True)).shape == (2, 1, 4, 4)


def test_as_a_data_set(tmp_path: Path) -> None:
    data = load(put(tmp_path / "x.npy", npy(random((11, 5, 7)))))
    assert len(list(data)) == 11
    assert torch.equal(data[3], data.scaled(torch.tensor([3]))[0])
    assert torch.equal(data[-1], data.scaled(torch.tensor([10]))[0])
    batches = list(torch.utils.data.DataLoader(data, batch_size=4))
    assert torch.equal(torch.cat(batches), data.scaled(torch.arange(11)))
    same = pickle.loads(pickle.dumps(data))
    assert torch.equal(same.values, data.values)
    with pytest.raises(AttributeError):
        data.low = 1.0


def test_wrong_arguments(tmp_path: Path) -> None:
    path = put(tmp_path / "x.npy", npy(random((3, 5))))
    images = put(tmp_path / "i.npy", npy(random((3, 5, 7, 2))))
    data = load(path)
    for call, error, match in [
        (lambda: load(path, key="a"), ValueError, "x.npy: key: got 'a', .*no .npz"),
        (lambda: load(images, channels="middle"), ValueError, "i.npy: channels: got 'middle'"),
        # torch says these in its own words, and no value is wrong in silence.
        (lambda: data.scaled(torch.tensor([1.0])), IndexError, "int"),
        (lambda: data.scaled(torch.tensor([True])), IndexError, "mask"),
        (lambda: data.scaled(torch.tensor([3])), IndexError, "out of bounds"),
        (lambda: data[3], IndexError, "3"),
        (lambda: data.unscale(torch.tensor([torch.nan])), ValueError, "x: got NaN"),
    ]:
        with pytest.raises(error, match=match):
            call()


DAMAGED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello, world",
    "short-idx": lambda: idx(random((3, 2, 5)))[:-1],
    "header-idx": lambda: idx(random((3, 2, 5)))[:7],
    "long-idx": lambda: idx(random((3, 2, 5))) + b"xy",
    "short.gz": lambda: gzip.compress(idx(random((3, 2, 5))))[:-9],
    "text.gz": lambda: gzip.compress(b"hello, world"),
    "short.npy": lambda: npy(random((3, 2, 5)))[:-1],
    "header.npy": lambda: npy(random((3, 2, 5)))[:50],
    "short.npz": lambda: npz(a=random((3, 2, 5)))[:-1],
    "flipped.npz": lambda: npz(True, a=random((90, 50))).replace(b"PK\1\2", b"PK\1\3"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, DAMAGED[name]())
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .") as caught:
        load(path)
    assert "\n" not in str(caught.value)


BAD_ARRAYS: dict[str, tuple[Callable[[], bytes], str]] = {
    "one.png": (lambda: encoded(random((3, 5)), "PNG"), "of images, name their folder"),
    "labels": (lambda: idx(random((50,))), r"got shape \(50,\)"),
    "object.npy": (lambda: npy(np.array([[1, "a"], [2, {}]], object)), "Python objects"),
    "object.npz": (lambda: npz(a=np.array([[1, "a"], [2, {}]], object)), "allow_pickle=False"),
    "complex.npy": (lambda: npy(np.ones((3, 5), complex)), "."),
    "text.npy": (lambda: npy(np.array([["a", "b"]] * 3)), "str_"),
    "single.npy": (lambda: npy(random((1, 5))), r"got shape \(1, 5\).*N > 1"),
    "scalar.npy": (lambda: npy(np.array(3.0)), r"got shape \(\)"),
    "constant.npy": (lambda: npy(np.full((3, 5), 7)), "every value is 7"),
    "nan.npy": (lambda: npy(np.array([[1, 2], [3, 4], [5, np.nan]])), "sample 2 holds NaN"),
    "inf-idx": (lambda: idx(np.array([[1, 2], [-np.inf, 4]]), ">f4"), "sample 1 holds NaN, inf"),
    "wide.npy": (lambda: npy(np.array([[1, 1e300], [3, 4]])), "sample 0 .*beyond float32"),
    "two.npz": (
        lambda: npz(b=random((3, 5)), a=random((3, 5))),
        "key: got None, expected one of its arrays: b, a",
    ),
    "none.npz": (lambda: npz(), "key: got None"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path: Path, name: str) -> None:
    make, match = BAD_ARRAYS[name]
    path = put(tmp_path / name, make())
    with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(path))}: .*{match}"):
        load(path)


def test_missing_key_lists_what_is_there(tmp_path: Path) -> None:
    path = put(tmp_path / "x.npz", npz(a=random((3, 5)), b=random((3, 5))))
    with pytest.raises(ValueError, match="x.npz: key: got 'c', expected one of its arrays: a, b"):
        load(path, key="c")


BAD_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "cannot identify image file"),
    "text.png": (lambda: b"words", "cannot identify image file"),
    "short.png": (lambda: encoded(random((3, 5)), "PNG")[:-25], "."),
    "short.jpg": (lambda: encoded(random((50, 50, 3)), "JPEG")[:-500], "truncated"),
    "rgba.png": (lambda: encoded(random((3, 5, 4)), "PNG"), r"transparency \(mode RGBA\)"),
    "key.png": (lambda: encoded(random((3, 5)), "PNG", transparency=7), r"transparency \(mode L\)"),
    "clear.gif": (lambda: encoded(random((3, 5)), "GIF", transparency=1), "transparency"),
    "cmyk.jpg": (
        lambda: encoded(Image.fromarray(random((3, 5, 3))).convert("CMYK"), "JPEG"),
        "got mode CMYK.*convert",
    ),
    "float.tif": (lambda: encoded(random((3, 5), "<f4"), "TIFF"), "got mode F"),
    "int.tif": (
        lambda: encoded(np.arange(15, dtype=np.int32).reshape(3, 5) * -9999, "TIFF"),
        "got mode I, expected .*16-bit grey",
    ),
    "size.png": (
        lambda: encoded(random((5, 3)), "PNG"),
        r"got \(1, 5, 3\) uint8, expected \(1, 3, 5\) uint8 as in 0.png",
    ),
    "kind.png": (lambda: encoded(random((3, 5, 3)), "PNG"), r"got \(3, 3, 5\) uint8"),
    "deep.png": (lambda: png(random((3, 5), ">u2"), 16, 0), r"got \(1, 3, 5\) int32"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_named(tmp_path: Path, name: str) -> None:
    make, match = BAD_IMAGES[name]
    put(tmp_path / "0.png", encoded(random((3, 5)), "PNG"))
    path = put(tmp_path / name, make())
    with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(path))}: .*{match}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "files, match",
    [
        ({}, "it holds nothing"),
        ({".hidden.png": b""}, "it holds nothing"),
        ({"a.txt": b"words", "b/c.TXT": b""}, "0 files named train-images.*it holds a.txt, b/c"),
        ({"images-idx3": idx(random((5, 3, 7)))}, "0 files .*it holds images-idx3"),
        ({"train-images": gzip.compress(idx(random((5, 3))))[:-9]}, "end-of-stream"),
        ({"a.png": encoded(random((3, 5)), "PNG")}, r"got shape \(1, 1, 3, 5\)"),
        ({f"{i}.png": encoded(np.full((3, 5), 7, np.uint8), "PNG") for i in "ab"}, "value is 7"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, files: dict[str, bytes], match: str) -> None:
    for name, content in files.items():
        put(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*: .*{match}"):
        load(tmp_path)


def test_missing_and_forbidden_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.npy"):
        load(tmp_path / "nowhere.npy")
    for i in range(2):
        put(tmp_path / f"{i}.png", encoded(random((3, 5)), "PNG"))
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="2.png"):
        load(tmp_path)
    (tmp_path / "2.png").unlink()
    if os.geteuid():
        (tmp_path / "1.png").chmod(0)
        with pytest.raises(PermissionError, match="1.png"):
            load(tmp_path)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    for i in range(2):
        put(images / f"{i}.png", encoded(random((3, 5)), "PNG"))
    path = put(tmp_path / "x.npy", npy(random((3, 5))))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install score-kernels\[images\]"):
        load(images)
    assert len(load(path)) == 3


def test_progress_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        put(tmp_path / f"{i}.png", encoded(random((3, 5)), "PNG"))
    load(tmp_path)
    assert capfd.readouterr() == ("", "")
    load(tmp_path, progress=True)
    assert "3/3" in capfd.readouterr().err
