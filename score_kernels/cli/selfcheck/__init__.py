"""What to run after installing, or to send with a bug report: ``score-kernels selfcheck``.

Compares the backend that serves a device (on a CPU, every instruction set) with the reference on
the CPU, with constants, and with closed forms.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

import score_kernels
from score_kernels.cli.selfcheck import bits, gpu, laws
from score_kernels.cli.selfcheck.kit import Kit, NotHere

__all__ = ["Check", "kit_of", "name_of", "only", "run", "selfcheck"]

CHECKS = {**bits.CHECKS, **laws.CHECKS, **gpu.CHECKS}
# Longer figures, the messages of errors, do not widen the table.
_WIDEST = 60


@dataclass(frozen=True)
class Check:
    """What came of one check.

    Attributes:
        name: what was looked at.
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
        return {True: "ok", False: "FAILED", None: "not here"}[self.ok]


def selfcheck(device: torch.device | str = "cpu", *, quick: bool = False) -> list[Check]:
    """Check the installation on a device.

    Bits, values, derivatives, statistics and closed forms, in the backend that serves the device,
    against the reference backend on the CPU. Under a minute on a CPU. An error within a check is
    that check's failure; the rest goes on.

    Args:
        device: "cpu", "cuda" or one of several GPUs, "cuda:1".
        quick: a tenth of the numbers, in seconds.

    Returns:
        The checks in the order they were run, those that cannot be run here included.

    Raises:
        ValueError: there is no such device here, or a forced backend cannot serve it.
    """
    return list(_each(kit_of(device, quick)))


def run(device: str, *, quick: bool) -> int:
    """The command: prints each check as it is done, then the table. Returns the exit code.

    Raises:
        ValueError: as `selfcheck`.
    """
    kit, start = kit_of(device, quick), time.perf_counter()
    print(f"checking {kit.backend.name} on {kit.device}: {name_of(kit.device)}\n", flush=True)
    done = []
    # Without a terminal there is no bar.
    for check in tqdm(_each(kit), total=len(CHECKS), desc="selfcheck", leave=False, disable=None):
        done.append(check)
        tqdm.write(f"{check.result:8}  {check.name}", file=sys.stdout)
    print(f"\n{_table(done)}\n")
    count = {ok: sum(check.ok is ok for check in done) for ok in (True, False, None)}
    seconds = time.perf_counter() - start
    print(f"{count[True]} ok, {count[False]} FAILED, {count[None]} not here, in {seconds:.0f} s")
    return 1 if count[False] else 0


def only(kit: Kit, names: Collection[str]) -> list[Check]:
    """Some of the checks, by name."""
    return list(_each(kit, names))


def _each(kit: Kit, names: Collection[str] = CHECKS.keys()) -> Iterator[Check]:
    for name, check in CHECKS.items():
        if name not in names:
            continue
        try:
            yield Check(name, *check(kit))
        except NotHere as why:
            yield Check(name, None, str(why), "")
        except torch.cuda.OutOfMemoryError as error:
            yield Check(name, None, f"not enough memory: {_line(error)}", "")
        except Exception as error:
            yield Check(name, False, f"{type(error).__name__}: {_line(error)}", "no error")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def kit_of(device: torch.device | str, quick: bool) -> Kit:
    """What checks on a device are given. Raises ValueError as `selfcheck`."""
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
    kit = Kit(found, quick)
    # Refuses a forced backend that cannot serve the device.
    _ = kit.backend
    return kit


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


def _table(checks: list[Check]) -> str:
    rows = [("check", "result", "figure", "expected")]
    rows += [(check.name, check.result, check.figure, check.expected) for check in checks]
    widths = [max(len(row[i]) for row in rows if len(row[i]) <= _WIDEST) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )
