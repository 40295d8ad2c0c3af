"""Checkpoints: written atomically, and read without running code from the file."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["load_weights", "read", "write"]

# Bumped when what a file holds changes its meaning.
FORMAT = 1


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings, and dictionaries and lists of them, atomically.

    They go to ``path.tmp``, which is renamed when it is complete and on the disk: whatever fails,
    path is the earlier file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`write` wrote, on the CPU; ``weights_only=True`` runs nothing in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, damaged (by its checksums), of another kind or format.
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
    """Load weights and buffers from a :class:`score_kernels.Trainer`'s checkpoint.

    Args:
        path: the checkpoint.
        net: a network of the trained one's shape, on any device.
        which: ``"ema"``, the averaged weights, or ``"raw"``, those of the last step.

    Raises:
        FileNotFoundError, ValueError: as :func:`read`; or the file is of another network: the first
            entries that differ are named, and net is as it was.
    """
    if which not in ("ema", "raw"):
        raise ValueError(f"which: got {which!r}, expected 'ema' or 'raw'")
    restore(path, net, read(path)["net" if which == "raw" else "ema"])


def restore(path: str | os.PathLike[str], net: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a state dictionary from a file, or name what does not fit and change nothing."""
    own, found = ({n: tuple(v.shape) for n, v in d.items()} for d in (net.state_dict(), weights))
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
