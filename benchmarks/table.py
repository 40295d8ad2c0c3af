"""The command ``bench``: ops and samplers against PyTorch and peers, on the machine at hand.

No figure without a green check: before an op is timed, the checks of ``score-kernels selfcheck``
that cover it are run on the device, and it is left out where one fails.
"""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import score_kernels
from benchmarks.cases import OPS, Case, cases
from benchmarks.timing import Times, floor, measure
from score_kernels.backends import choose
from score_kernels.cli import plots, selfcheck

__all__ = ["bench"]

COLUMNS = (
    "op", "variant", "shape", "dtype", "device", "backend", "threads", "p20_us", "p50_us", "p80_us",
    "ns_per_element", "bytes_per_element", "over_floor", "over_ours", "versions", "machine",
)  # fmt: skip


def bench(
    out: Path,
    *,
    device: str = "cpu",
    names: Sequence[str] = (),
    threads: int | None = None,
    rounds: int = 15,
    quick: bool = False,
    compiled: bool = True,
    progress: bool = True,
) -> int:
    """Measure, print the table, append to ``bench.csv`` and draw ``bench.png`` in a folder.

    Every variant of a case takes its turn in every round; a figure is the median over the rounds,
    with the 20th and 80th percentiles. The floor is the time that the bytes of a step take when the
    device copies a tensor of theirs.

    Args:
        out: the folder, made if it is not there; an earlier ``bench.csv`` is added to.
        device: "cpu", "cuda", "cuda:1": there with events, and also from a captured graph.
        names: of ops; default: all.
        threads: of torch; default: as they are.
        rounds: how often each variant takes its turn.
        quick: fewer shapes and rounds.
        compiled: measure torch.compile of eager too.
        progress: show a progress bar.

    Returns:
        0, or 1 if an op was left out because a check failed.

    Raises:
        ImportError: without Matplotlib.
        ValueError: there is no such device or op.
    """
    plots.require()
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise ValueError(f"names: got {unknown[0]!r}, expected some of: {', '.join(OPS)}")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected at least 1")
    kit = selfcheck.kit_of(device, quick=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rows, failed = _measured(
            list(names or OPS), kit, 5 if quick else rounds, quick, compiled, progress
        )
    finally:
        torch.set_num_threads(before)
    print(_table(rows))
    out.mkdir(parents=True, exist_ok=True)
    _append(out / "bench.csv", rows)
    if rows:
        _draw(out / "bench.png", rows)
    for op, names_of in failed.items():
        print(f"{op}: not measured, failed: {', '.join(names_of)}")
    print(f"{len(rows)} rows added to {out / 'bench.csv'}; drawn in {out / 'bench.png'}")
    return 1 if failed else 0


def _measured(
    names: list[str], kit: Any, rounds: int, quick: bool, compiled: bool, progress: bool
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    about = {
        "device": selfcheck.name_of(kit.device),
        "backend": choose(kit.device, torch.float32).name,
        "threads": torch.get_num_threads(),
        "versions": f"score_kernels {score_kernels.__version__}, torch {torch.__version__}",
        "machine": f"{platform.system()} {platform.machine()}",
    }
    needed = {check for name in names for check in OPS[name][1]}
    green = {c.name: c.ok for c in selfcheck.only(kit, needed)}
    failed = {
        name: bad for name in names if (bad := [c for c in OPS[name][1] if green[c] is False])
    }
    rows: list[dict[str, Any]] = []
    wanted = [name for name in names if name not in failed]
    makers = list(cases(wanted, kit.device, quick=quick, compiled=compiled))
    for make in tqdm(makers, desc="bench", unit="row", disable=not progress):
        case = make()
        times = measure(case, kit.device, rounds)
        low = floor(case, kit.device, rounds)
        rows += [_row(case, name, times, low, about) for name in times]
    return rows, failed


def _row(
    case: Case, name: str, times: dict[str, Times], low: float, about: dict[str, Any]
) -> dict[str, Any]:
    t = times[name]
    return {
        "op": case.op,
        "variant": name,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "p20_us": t.p20 * 1e6,
        "p50_us": t.p50 * 1e6,
        "p80_us": t.p80 * 1e6,
        "ns_per_element": t.p50 * 1e9 / math.prod(case.shape),
        "bytes_per_element": case.bytes,
        "over_floor": t.p50 / low,
        "over_ours": t.p50 / times["ours"].p50,
        **about,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "microseconds a step, median (20th to 80th percentile); ns an element; times the floor, "
        "which is the device's own copy of the same bytes; times ours",
    ]
    last = None
    for row in rows:
        head = f"{row['op']}, {row['shape']}, {row['dtype']}"
        if head != last:
            lines.append(head)
            last = head
        spread = f"({row['p20_us']:.2f} to {row['p80_us']:.2f})"
        lines.append(
            f"  {row['variant']:18} {row['p50_us']:12.2f} us {spread:24} "
            f"{row['ns_per_element']:9.3f} ns {row['over_floor']:8.1f} x floor "
            f"{row['over_ours']:7.2f} x ours"
        )
    return "\n".join(lines)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if tuple(found) != COLUMNS:
            raise ValueError(
                f"{path}: has other columns than this version writes; name another --out"
            )
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Times the floor, by op, for the largest shape of each in float32."""
    largest: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["dtype"] != "float32":
            continue
        size = math.prod(map(int, row["shape"].split("x")))
        found = largest.setdefault(row["op"], {"size": 0})
        if size > found["size"]:
            largest[row["op"]] = found = {"size": size, "shape": row["shape"]}
        if size == found["size"]:
            found[row["variant"]] = row["ns_per_element"]
            found["floor"] = row["ns_per_element"] / row["over_floor"]
    variants = list(
        dict.fromkeys(k for f in largest.values() for k in f if k not in ("size", "shape"))
    )
    variants.sort(key=lambda name: (name != "floor", name != "ours"))
    figure = plots.figure(9, 0.55 * len(largest) + 1.6)
    axes = figure.subplots()
    height = 0.8 / len(variants)
    for v, name in enumerate(variants):
        at = [
            (i + (v - (len(variants) - 1) / 2) * height, found[name])
            for i, found in enumerate(largest.values())
            if name in found
        ]
        axes.barh([p for p, _ in at], [w for _, w in at], height, label=name)
    axes.set_yticks(range(len(largest)), [f"{op}\n{f['shape']}" for op, f in largest.items()])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("nanoseconds an element and step")
    axes.legend(fontsize=8)
    figure.savefig(path)
