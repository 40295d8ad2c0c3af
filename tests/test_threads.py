"""Python threads and processes beside the native kernels' own threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import NATIVE
from torch import Tensor

import score_kernels
from score_kernels import NoiseKey, ops
from score_kernels.backends.compiled import native

pytestmark = pytest.mark.skipif(not NATIVE, reason="needs the native module")

KEY = NoiseKey(2**63 + 5, purpose=2, first_sample=2**32 - 2)
# Shared by two threads of a kernel, and too small to be.
SHAPES = [(3, 50_000), (40, 3, 32, 32), (9, 7), (1, 64)]


def chain(seed: int) -> list[Tensor]:
    """Every kind of kernel, with and without OpenMP's threads."""
    key, results = NoiseKey(seed, first_sample=2**32 - 2), []
    for shape in SHAPES:
        x, sigma = ops.normal(shape, key), torch.linspace(0.1, 1, shape[0])
        for t in range(6):
            ops.langevin_step_(x, -x, 0.1, key.at(t))
        noisy = ops.perturb(x, sigma, key)
        results += [x, noisy, ops.dsm_loss_from_score(noisy, sigma, key), ops.probe_dot(x, key)]
        results += [ops.fd_pair(x, sigma, key), ops.ssm_reduce(noisy, x, key, probe="gaussian")]
    return results


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_python_threads_at_once_change_no_bit() -> None:
    want = [chain(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(chain, range(4)), want, strict=True):
                assert same(got, expected)


def test_threads_that_change_backend_and_instruction_set_change_no_bit() -> None:
    stop, before = threading.Event(), native.kernels.isa()

    def change() -> None:
        while not stop.is_set():
            for isa in native.kernels.isas():
                native.kernels.set_isa(isa)
                for name in ("native", None):
                    score_kernels.set_backend(name)

    want = [chain(seed) for seed in range(2)]
    restless = threading.Thread(target=change)
    restless.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            for _ in range(3):
                for got, expected in zip(pool.map(chain, range(2)), want, strict=True):
                    assert same(got, expected)
    finally:
        stop.set()
        restless.join()
        score_kernels.set_backend(None)
        native.kernels.set_isa(before)


@contextlib.contextmanager
def ticking() -> Iterator[Callable[[], int]]:
    """Count the turns of another Python thread, which get none but when a lock is released."""
    count, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(1e-4)

    before = sys.getswitchinterval()
    # Nobody is made to give way.
    sys.setswitchinterval(1000)
    ticker = threading.Thread(target=tick)
    try:
        ticker.start()
        yield lambda: count
    finally:
        stop.set()
        sys.setswitchinterval(before)
        ticker.join()


class Watched:
    """The native kernels, with the turns that another thread had inside of them."""

    def __init__(self, turns: Callable[[], int]) -> None:
        self.kernels, self.turns, self.inside = native.kernels, turns, 0

    def __getattr__(self, name: str) -> Callable[..., object]:
        kernel = getattr(self.kernels, name)

        def call(*arguments: object) -> object:
            before = self.turns()
            try:
                return kernel(*arguments)
            finally:
                self.inside += self.turns() - before

        return call


def test_other_python_threads_run_during_a_long_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sigma = torch.zeros(4, 2**20), torch.ones(4)
    table = torch.ones(4, 3)
    long: dict[str, Callable[[], object]] = {
        "fill": lambda: ops.normal(x.shape, KEY),
        "affine_step": lambda: ops.langevin_step_(x, x, 0.1, KEY),
        "table_step": lambda: ops.table_step_(x, x, table, None, KEY),
        "perturb": lambda: ops.perturb(x, sigma, KEY),
        "dsm": lambda: ops.dsm_loss_from_score(x, sigma, KEY),
        "probe": lambda: ops.probe_dot(x, KEY),
    }
    with ticking() as turns:
        kernels = Watched(turns)
        monkeypatch.setattr(native, "kernels", kernels)
        # The one kernel that the backend keeps at hand.
        monkeypatch.setattr(native, "_affine_step", kernels.affine_step)
        for name, work in long.items():
            kernels.inside, deadline = 0, time.monotonic() + 60
            # As often as it takes a busy machine to let another thread in.
            while kernels.inside < 3 and time.monotonic() < deadline:
                work()
            assert kernels.inside >= 3, name
        # What is too short to be worth the hand-over keeps the lock.
        kernels.inside = 0
        for _ in range(2000):
            ops.perturb(x[:, :64], sigma, KEY)
        assert kernels.inside == 0


def python(code: str, tmp_path: Path, *, timeout: float = 60) -> None:
    """Run a program that may hang."""
    path = tmp_path / "program.py"
    path.write_text(PRELUDE + code)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    # A group of its own, so that children that hang end with it.
    with subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            said = f"hung\n{process.communicate()[0]}"
        assert process.returncode == 0, said


PRELUDE = """
import multiprocessing, os, sys, threading
import torch
from torch.utils.data import DataLoader, Dataset
from score_kernels import NoiseKey, ops
from score_kernels.backends.compiled import native

def noise(seed=1):
    key = NoiseKey(seed)
    x = ops.normal((64, 4096), key)
    return x, ops.dsm_loss_from_score(x, torch.ones(64), key)

def check(want, seed=1):
    assert all(map(torch.equal, noise(seed), want))

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

torch.set_num_threads(2)
"""
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@FORKS
def test_a_forked_child_runs_kernels_of_several_threads(tmp_path: Path) -> None:
    """GNU's OpenMP alone would wait in the child for threads that only the parent has."""
    python(
        """
want = noise()

def child():
    assert native.kernels.openmp_threads() == torch.get_num_threads() == 2
    check(want)
    # torch's own kernels share the pool.
    assert torch.ones(4_000_000).exp().sum() > 0
    # And a child of the child.
    forked(lambda: check(want))

for _ in range(3):
    forked(child)
    check(want)
""",
        tmp_path,
    )


@FORKS
def test_a_child_forked_beside_busy_threads(tmp_path: Path) -> None:
    python(
        """
want, stop = noise(), threading.Event()

def busy():
    while not stop.is_set():
        check(want)

others = [threading.Thread(target=busy) for _ in range(2)]
for other in others:
    other.start()
try:
    for _ in range(5):
        forked(lambda: check(want))
finally:
    stop.set()
    for other in others:
        other.join()
check(want)
""",
        tmp_path,
    )


def test_workers_of_a_data_loader_and_of_multiprocessing(tmp_path: Path) -> None:
    ways = [way for way in ("fork", "spawn") if way in multiprocessing.get_all_start_methods()]
    code = f"""
class Noisy(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        torch.set_num_threads(2)
        return noise(i)

def work(seed):
    torch.set_num_threads(2)
    return [t.clone() for t in noise(seed)]

if __name__ == "__main__":
    wants = [noise(i) for i in range(6)]
    for way in {ways}:
        loader = DataLoader(Noisy(), None, num_workers=2, multiprocessing_context=way)
        for got, want in zip(loader, wants, strict=True):
            assert all(map(torch.equal, got, want))
        with multiprocessing.get_context(way).Pool(2) as pool:
            for got, want in zip(pool.map(work, range(6)), wants, strict=True):
                assert all(map(torch.equal, got, want))
    check(wants[1])
"""
    python(code, tmp_path, timeout=120)
