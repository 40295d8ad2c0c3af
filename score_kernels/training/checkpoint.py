"""Checkpoints: written atomically, and read without running code from the file."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from score_kernels import checks

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic", "load_weights", "locked", "read", "remove", "write"]

# Bumped when what a file holds changes its meaning.
FORMAT = 1


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, and dictionaries and lists of them, atomically.

    Whatever fails, path is the earlier file or the new one. A symbolic link is followed.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic(Path(path).resolve()) as temporary:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A hidden name beside path; what is written there is renamed to path at the end."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            # A folder is renamed to a free name only. Its checksum shows what a crash has lost.
            remove(path)
        else:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, until the block or this process ends.

    A record lock, which workers do not inherit. Without `fcntl` (Windows) nothing is held.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(f"{folder}: another process is writing to it") from None
        yield


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write` wrote, on the CPU; ``weights_only=True`` runs nothing in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, damaged (by its checksums), of another kind or format.
    """
    with opened(path) as file:
        return parse(path, file)


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A checkpoint's file: one that is replaced meanwhile is still the one that was opened."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a file")
    return open(path, "rb")


def parse(path: str | os.PathLike[str], file: BinaryIO) -> dict[str, Any]:
    """:func:`read` for an open file."""
    # Damaged bytes raise many kinds of errors in zipfile, zlib and pickle.
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            # torch would read nothing where a damaged attribute calls a part a folder.
            damaged = damaged or next(
                (p.filename for p in archive.infolist() if p.external_attr), None
            )
        if damaged is not None:
            raise ValueError(f"its part {damaged} is damaged")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"checkpoint {path}: cut short, damaged, or no checkpoint of score_kernels ({error})"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"checkpoint {path}: a file of another kind, it has no 'format'")
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint {path}: got format {state['format']}, expected {FORMAT}; it was written "
            "by another version of score_kernels"
        )
    return state


def load_weights(path: str | os.PathLike[str], net: nn.Module, *, which: str = "ema") -> None:
    """Load weights and buffers from a :class:`score_kernels.Trainer`'s checkpoint.

    Args:
        path: the checkpoint.
        net: a network of the trained one's shape, on any device.
        which: ``"ema"``, the averaged weights, or ``"raw"``, those of the last step.

    Raises:
        FileNotFoundError, ValueError: as :func:`read`; or the file is of another network: the first
            entries that differ are named, and net is as it was.
    """
    restore(path, net, weights_of(path, read(path), which))


def weights_of(path: str | os.PathLike[str], state: dict[str, Any], which: str) -> dict[str, Any]:
    """The averaged or the raw weights of a checkpoint."""
    checks.choice("weights", which, ("ema", "raw"))
    weights = state.get("net" if which == "raw" else "ema")
    if not isinstance(weights, Mapping):
        raise ValueError(f"checkpoint {path}: has no {which} weights, expected one of a Trainer")
    return dict(weights)


def _described(name: str, value: Any) -> Any:
    """What must be equal: shapes of weights, and values of what else a module keeps."""
    if not isinstance(value, Tensor):
        return value
    return value.tolist() if name.endswith("_extra_state") else tuple(value.shape)


def restore(path: str | os.PathLike[str], net: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a state dictionary from a file, or name what does not fit and change nothing."""
    own, found = (
        {name: _described(name, value) for name, value in state.items()}
        for state in (net.state_dict(), weights)
    )
    differ = [
        f"{name} is {found.get(name, 'missing')} in the file and {own.get(name, 'missing')} in the "
        "network"
        for name in {**own, **found}
        if own.get(name) != found.get(name)
    ]
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise ValueError(f"checkpoint {path}: of another network: {'; '.join(differ[:3])}{more}")
    net.load_state_dict(weights)
