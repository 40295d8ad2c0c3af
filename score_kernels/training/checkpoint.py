"""Files that hold a training: written whole or not at all, and read without running their code."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_weights", "read", "write"]

# Bumped when what a file holds changes its meaning.
FORMAT = 1
_WEIGHTS = {"ema": "ema", "raw": "net"}


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a dictionary of tensors and plain values, atomically.

    The file is complete in a temporary one beside it and on the disk before it takes its name, so
    that a reader, or a crash at any moment, finds the earlier file or the new one, never a part.

    Args:
        path: the file; its folder must exist. A temporary file ``path.tmp`` is written first.
        state: what to save: tensors, numbers, strings, and dictionaries and lists of them.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The rename itself is on the disk once the folder is. Only POSIX can open a folder.
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write` wrote, on the CPU. Nothing in the file is run (``weights_only=True``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, damaged (its checksums are looked at), of another kind,
            or of a later format; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checkpoint {path}: its part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path}: cut short, or no checkpoint of score_kernels ({error})"
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
    """Give a network the weights (and buffers) of a checkpoint of :class:`score_kernels.Trainer`.

    Args:
        path: the checkpoint.
        net: a network of the trained one's shape, on any device.
        which: ``"ema"``, the averaged weights, or ``"raw"``, those of the last step.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of a network of another shape: the message names the
            file and the first entries that differ. The network is then as it was.
    """
    if which not in _WEIGHTS:
        raise ValueError(f"which: got {which!r}, expected 'ema' or 'raw'")
    restore(path, net, read(path)[_WEIGHTS[which]])


def restore(path: str | os.PathLike[str], net: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a state dictionary that came from a file, or say in one line why it does not fit."""
    differences = _differences(net.state_dict(), weights)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ValueError(
            f"checkpoint {path}: of another network: {'; '.join(differences[:3])}{more}"
        )
    net.load_state_dict(dict(weights))


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    lines = [f"{name} is not in the file" for name in wanted if name not in found]
    lines += [f"{name} is in the file only" for name in found if name not in wanted]
    for name, value in wanted.items():
        other = found.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape:
            lines.append(
                f"{name} has shape {tuple(other.shape)} in the file and {tuple(value.shape)} in "
                "the network"
            )
    return lines
