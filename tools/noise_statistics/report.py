"""What was found, as a table, a file and a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from score_kernels.cli import plots
from tools.noise_statistics import laws
from tools.noise_statistics.dependence import Repeats
from tools.noise_statistics.findings import ALPHA, Finding, failed, level

if TYPE_CHECKING:
    from tools.noise_statistics.run import Result


def table(findings: list[Finding]) -> str:
    """Markdown."""
    bad = failed(findings)
    lines = ["| test | found | expected | p |", "|---|---|---|---|"]
    for f in findings:
        p = f"{f.p:.2g} FAILED" if f in bad else f"{f.p:.2g}"
        lines.append(f"| {f.name} | {f.figure} | {f.expected} | {p} |")
    return "\n".join(lines)


def map_table() -> str:
    """The tails of the contract's own map beside those of the normal law, as Markdown."""
    lines = ["| t | P(z > t), normal | P(z > t), 32-bit words | ratio - 1 |", "|---|---|---|---|"]
    for t in (4.0, 5.0, 5.5, 6.0, 6.25, 6.5, 6.7, 6.77):
        normal, words = float(stats.norm.sf(t)), laws.map_tail(t)
        lines.append(f"| {t:g} | {normal:.4g} | {words:.4g} | {words / normal - 1:+.1g} |")
    return "\n".join(lines)


def summary(result: Result) -> str:
    findings, bad = result.findings, failed(result.findings)
    least = min(findings, key=lambda f: f.p)
    verdict = "all passed" if not bad else f"FAILED: {', '.join(f.name for f in bad)}"
    return (
        f"{result.count:,} normals ({result.backend}), {len(findings)} tests, each at "
        f"{level(findings):.2g} ({ALPHA:g} for the whole run): {verdict}. "
        f"Least p {least.p:.2g} ({least.name}). "
        f"{result.seconds:.0f} s, {1e9 * result.seconds / result.count:.0f} ns a normal."
    )


def save_json(path: str | os.PathLike[str], result: Result) -> None:
    document: dict[str, Any] = {
        "count": result.count,
        "seed": result.seed,
        "backend": result.backend,
        "seconds": round(result.seconds, 1),
        "alpha": ALPHA,
        "level": level(result.findings),
        "failed": [f.name for f in failed(result.findings)],
        "findings": [asdict(f) for f in result.findings],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def save_markdown(path: str | os.PathLike[str], result: Result) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{summary(result)}\n\n{table(result.findings)}\n")


def draw(path: str | os.PathLike[str], result: Result) -> None:
    """Tail counts beside what the normal law expects, and the p-values of all tests in order."""
    plot = plots.figure(9, 3.8)
    left, right = plot.subplots(1, 2)
    t, count = result.tails, result.count
    for counts, color, marker, name in (
        (result.above, plots.BLUE, "^", "z > t"),
        (result.below, plots.ORANGE, "v", "z < -t"),
    ):
        seen = counts > 0
        left.plot(t[seen], counts[seen], marker, color=color, markersize=5, label=name)
    x = np.linspace(t[0], t[-1], 200)
    expected = count * stats.norm.sf(x)
    left.plot(x, expected, color=plots.GREY, linewidth=1, label="expected")
    low, high = stats.poisson.ppf(0.025, expected), stats.poisson.ppf(0.975, expected)
    left.fill_between(
        x, np.maximum(low, 0.3), high, color=plots.GREY, alpha=0.3, linewidth=0, label="95%"
    )
    left.set_yscale("log")
    left.set_ylim(0.5, None)
    left.set_xlabel("t, deviations")
    left.set_ylabel(f"of {count:,} normals")
    left.legend(frameon=False)
    p = np.sort([f.p for f in result.findings if f.name != Repeats.NAME])
    middle = (np.arange(len(p)) + 0.5) / len(p)
    right.plot([0, 1], [0, 1], color=plots.GREY, linewidth=1, label="uniform")
    right.plot(middle, p, ".", color=plots.BLUE, markersize=6, label=f"{len(p)} tests")
    right.set_xlabel("share of the tests")
    right.set_ylabel("p-value")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    plot.savefig(path, format="png")
