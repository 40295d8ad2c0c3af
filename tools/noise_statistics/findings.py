"""What one test found, and when a run has failed."""

from __future__ import annotations

from dataclasses import dataclass

# A right generator with keys drawn anew would fail one run in 10,000; the tests share it equally.
ALPHA = 1e-4


@dataclass(frozen=True)
class Finding:
    """One test: its name, what came, what was expected, and how surprising that is."""

    name: str
    figure: str
    expected: str
    p: float


def level(findings: list[Finding]) -> float:
    """The level of each test (Bonferroni)."""
    return ALPHA / len(findings)


def failed(findings: list[Finding]) -> list[Finding]:
    # Not p < level, so that NaN fails.
    return [f for f in findings if not f.p >= level(findings)]
