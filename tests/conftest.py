from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from fibers.build import COMPILER, fibers
from torch import Tensor

import score_kernels
from score_kernels import NoiseKey
from score_kernels.backends import Backend, registry
from score_kernels.backends.compiled import native

# Triton's interpreter is chosen when Triton is imported: its tests have a run of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]

# "native-avx512", "native-avx2", ... for every instruction set of this machine, and the reference.
NATIVE = [] if native.unavailable() else [f"native-{isa}" for isa in native.kernels.isas()]
# The CUDA kernels on CPU tensors.
FIBERS = ["fibers"] if COMPILER else []
BACKENDS = ["reference", *NATIVE, *FIBERS]


_fibers = cache(fibers)


@pytest.fixture(scope="session", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the test run, which its processes share."""
    base = tmp_path_factory.getbasetemp()
    _Backend.root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return _Backend.root


class _Backend:
    """Switches backend and instruction set by one name, and back."""

    root: Path

    def __init__(self, name: str) -> None:
        self.name, _, self.isa = name.partition("-")

    def __enter__(self) -> None:
        if self.isa:
            self.before = native.kernels.isa()
            native.kernels.set_isa(self.isa)
        if self.name == "fibers":
            registry._BACKENDS["fibers"] = _fibers(self.root)
        self.forced = score_kernels.use_backend(self.name)
        self.forced.__enter__()

    def __exit__(self, *_: object) -> None:
        self.forced.__exit__(None, None, None)
        if self.name == "fibers":
            registry._BACKENDS.pop("fibers")
        if self.isa:
            native.kernels.set_isa(self.before)


on_backend = _Backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with on_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an element a kernel forgets to write is seen."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def filled(backend: Backend, kind: str, shape: Sequence[int], key: NoiseKey) -> Tensor:
    """Noise of a backend, in a new tensor of NaNs or ones."""
    words = kind == "words"
    out = torch.full(tuple(shape), 1 if words else math.nan, dtype=torch.int64 if words else None)
    backend.fill(out, kind, key)
    return out


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
