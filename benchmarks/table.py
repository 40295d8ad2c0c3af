"""Every op and sampler against PyTorch and peers: a table, ``bench.csv``, ``bench.png``."""

from __future__ import annotations

import csv
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import score_kernels
from benchmarks.cases import Case, cases
from benchmarks.harness import captured, interleaved
from score_kernels.backends import choose
from score_kernels.cli import plots, selfcheck

__all__ = ["COLUMNS", "bench", "measure"]

COLUMNS = (
    "op", "variant", "shape", "dtype", "device", "backend", "threads", "p20_us", "p50_us", "p80_us",
    "ns_per_element", "bytes_per_element", "over_floor", "over_ours", "versions", "machine",
)  # fmt: skip


def bench(
    out: Path, names: list[str], device: torch.device, *, rounds: int, quick: bool, compiled: bool
) -> None:
    """Measure, print the table, append to ``bench.csv`` and draw ``bench.png`` in a folder.

    A figure is the median over the rounds, with the 20th and 80th percentiles. The floor is the
    time in which the device copies as many bytes as the step must move.

    Args:
        out: the folder, made if it is not there; an earlier ``bench.csv`` is added to.
        names: of ops.
        device: on a GPU ours is also timed from a captured graph.
        rounds: how often each variant takes its turn.
        quick: fewer shapes.
        compiled: measure torch.compile of eager too.

    Raises:
        ImportError: without Matplotlib.
        ValueError: an earlier ``bench.csv`` has other columns.
    """
    plots.require()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bench.csv"
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(COLUMNS):
        raise ValueError(f"{path}: has other columns than this version writes; name another --out")
    rows: list[dict[str, Any]] = []
    for make in tqdm(list(cases(names, device, quick=quick)), desc="bench", unit="case"):
        rows += measure(make(), device, rounds, compiled)
    print(_table(rows))
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    _draw(out / "bench.png", rows)
    print(f"{len(rows)} rows added to {path}; drawn in {out / 'bench.png'}")


def measure(case: Case, device: torch.device, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """The rows of one case, a row a variant."""
    variants = {k: v for k, v in case.variants.items() if compiled or not k.startswith("compiled")}
    if device.type == "cuda" and case.capturable:
        variants["ours, graph"] = captured(variants["ours"])
    elements = math.prod(case.shape)
    source, target = (
        torch.zeros(max(1, elements * case.bytes // 8), device=device) for _ in range(2)
    )
    floor = statistics.median(
        interleaved({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]
    )
    with torch.set_grad_enabled(case.grad):
        seconds = interleaved(variants, rounds, device)
    medians = {name: statistics.median(values) / case.steps for name, values in seconds.items()}
    rows = []
    for name, median in medians.items():
        # Two rounds at least, or there are no percentiles.
        cuts = statistics.quantiles(seconds[name] * 2, n=10, method="inclusive")
        rows.append(
            {
                "op": case.op,
                "variant": name,
                "shape": "x".join(map(str, case.shape)),
                "dtype": case.dtype,
                "device": selfcheck.name_of(device),
                "backend": choose(device, torch.float32).name,
                "threads": torch.get_num_threads(),
                "p20_us": cuts[1] / case.steps * 1e6,
                "p50_us": median * 1e6,
                "p80_us": cuts[7] / case.steps * 1e6,
                "ns_per_element": median * 1e9 / elements,
                "bytes_per_element": case.bytes,
                "over_floor": median / floor,
                "over_ours": median / medians["ours"],
                "versions": f"score_kernels {score_kernels.__version__}, torch {torch.__version__}",
                "machine": f"{platform.system()} {platform.machine()}",
            }
        )
    return rows


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
        percentiles = f"({row['p20_us']:.2f} to {row['p80_us']:.2f})"
        lines.append(
            f"  {row['variant']:27} {row['p50_us']:12.2f} us {percentiles:24} "
            f"{row['ns_per_element']:9.3f} ns {row['over_floor']:8.1f} x floor "
            f"{row['over_ours']:7.2f} x ours"
        )
    return "\n".join(lines)


def _draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Nanoseconds an element, by op, for the largest shape of each in float32."""

    def size(shape: str) -> int:
        return math.prod(map(int, shape.split("x")))

    largest: dict[str, str] = {}
    for row in rows:
        largest[row["op"]] = max(largest.get(row["op"], "0"), row["shape"], key=size)
    positions = {op: i for i, op in enumerate(largest)}
    bars: dict[str, dict[int, float]] = {"floor": {}, "ours": {}}
    for row in rows:
        if row["dtype"] != "float32" or row["shape"] != largest[row["op"]]:
            continue
        bars.setdefault(row["variant"], {})[positions[row["op"]]] = row["ns_per_element"]
        bars["floor"][positions[row["op"]]] = row["ns_per_element"] / row["over_floor"]
    figure = plots.figure(9, 0.55 * len(largest) + 1.6)
    axes = figure.subplots()
    height = 0.8 / len(bars)
    for bar, (name, found) in enumerate(bars.items()):
        offset = (bar - (len(bars) - 1) / 2) * height
        axes.barh([i + offset for i in found], list(found.values()), height, label=name)
    axes.set_yticks(range(len(largest)), [f"{op}\n{shape}" for op, shape in largest.items()])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("nanoseconds an element and step")
    axes.legend(fontsize=8)
    figure.savefig(path)
