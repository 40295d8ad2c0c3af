"""What to run after installing, or to send with a bug report: ``score-kernels selfcheck``.

Compares the backend that serves a device (on a CPU, every instruction set) with the reference on
the CPU, with constants, and with closed forms.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import score_kernels
from score_kernels.cli.selfcheck import parity, statistics
from score_kernels.cli.selfcheck.context import CheckContext, Skipped

__all__ = ["Check", "name_of", "run", "selfcheck"]

CHECKS = {**parity.CHECKS, **statistics.CHECKS}


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        ok: whether it was as expected; None if it could not be run here.
        figure: what was found, or why the check failed or could not be run.
        expected: what the figure should be.
    """

    name: str
    ok: bool | None
    figure: str
    expected: str

    @property
    def result(self) -> str:
        """ok in words."""
        return {True: "ok", False: "FAILED", None: "skipped"}[self.ok]


def selfcheck(device: torch.device | str = "cpu", *, quick: bool = False) -> list[Check]:
    """Check the installation on a device.

    Bits, values, derivatives, statistics and closed forms, in the backend that serves the device,
    against the reference backend on the CPU. Under a minute on a CPU. An error within a check is
    that check's failure, and the rest is run.

    Args:
        device: "cpu", "cuda" or one of several GPUs, "cuda:1".
        quick: a tenth of the numbers, in seconds.

    Returns:
        The checks in the order they were run, with those that cannot be run here.

    Raises:
        ValueError: there is no such device here, or a forced backend cannot serve it.
    """
    return list(_results(_context(device, quick)))


def run(device: str, *, quick: bool) -> int:
    """The command: prints the table, each check as it is done. Returns the exit code.

    Raises:
        ValueError: as `selfcheck`.
    """
    context, start = _context(device, quick), time.perf_counter()
    print(f"checking {context.backend.name} on {context.device}: {name_of(context.device)}\n")
    row = f"{{:{max(map(len, CHECKS))}}}  {{:7}}  {{:36}}  {{}}".format
    print(row("check", "result", "figure", "expected"), flush=True)
    done = []
    for check in _results(context):
        done.append(check.result)
        print(row(check.name, check.result, check.figure, check.expected).rstrip(), flush=True)
    counts = ", ".join(f"{done.count(result)} {result}" for result in ("ok", "FAILED", "skipped"))
    print(f"\n{counts}, in {time.perf_counter() - start:.0f} s")
    return int("FAILED" in done)


def _results(context: CheckContext) -> Iterator[Check]:
    for name, check in CHECKS.items():
        try:
            yield Check(name, *check(context))
        except Skipped as why:
            yield Check(name, None, str(why), "")
        except torch.cuda.OutOfMemoryError as error:
            yield Check(name, None, f"not enough memory: {_line(error)}", "")
        except Exception as error:
            yield Check(name, False, f"{type(error).__name__}: {_line(error)}", "no error")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _context(device: torch.device | str, quick: bool) -> CheckContext:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {str(device)!r}, expected cpu, cuda, or cuda:1 and so on")
    if found.type == "cpu":
        found = torch.device("cpu")
    elif not torch.cuda.is_available():
        why = score_kernels.backends()["cuda"]
        raise ValueError(f"device: got {str(device)!r}, but torch finds no GPU; cuda is {why}")
    else:
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= count:
            raise ValueError(f"device: got {str(device)!r}, expected cuda:0 to cuda:{count - 1}")
        found = torch.device("cuda", index)
    context = CheckContext(found, quick)
    # Refuses a forced backend that cannot serve the device.
    _ = context.backend
    return context


def name_of(device: torch.device) -> str:
    """The name of the card or the processor."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        return f"{card.name}, compute capability {card.major}.{card.minor}, {memory}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
