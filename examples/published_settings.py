"""Published settings of NCSN and NCSNv2 beside what this package computes for them.

    python examples/published_settings.py

One row a preset. From the published levels (D numbers a sample, L levels from sigma_1 to 0.01): the
ratio gamma of neighbours and their overlap (technique 2 of NCSNv2, which asks for about 0.5), and
the number of levels that an overlap of 0.5 would take. From the published steps (T a level): the
published epsilon, our step_size, which is twice that, and the epsilon of technique 4 with the ratio
r of variances there, which should be 1. NCSNv2 is arXiv 2006.09011, NCSN arXiv 1907.05600.
"""

from __future__ import annotations

from score_kernels.diffusion.presets import preset, presets
from score_kernels.diffusion.sigmas import (
    best_step_size,
    level_count,
    level_overlap,
    sigma_ratio,
    variance_ratio,
)

SIGMA_MIN = 0.01
COLUMNS = (
    "preset", "D", "sigma_1", "L", "gamma", "overlap", "L at overlap 0.5", "T", "epsilon",
    "step_size", "r", "epsilon by technique 4", "r there",
)  # fmt: skip


def row(name: str) -> tuple[str, ...]:
    p = preset(name)
    sigma_max, levels, steps = float(p.sigmas[0]), len(p.sigmas), p.steps_per_level
    gamma = (sigma_max / SIGMA_MIN) ** (1 / (levels - 1))
    best = best_step_size(gamma, SIGMA_MIN, steps)
    return (
        name,
        f"{p.dim}",
        f"{sigma_max:g}",
        f"{levels}",
        f"{gamma:.6f}",
        f"{level_overlap(p.dim, gamma):.3g}",
        f"{level_count(sigma_max, SIGMA_MIN, sigma_ratio(p.dim))}",
        f"{steps}",
        f"{p.step_size / 2:.3g}",
        f"{p.step_size:.3g}",
        f"{variance_ratio(p.step_size, gamma, SIGMA_MIN, steps):.4f}",
        f"{best / 2:.3g}",
        f"{variance_ratio(best, gamma, SIGMA_MIN, steps):.4f}",
    )


def main() -> None:
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for name in presets():
        print("| " + " | ".join(row(name)) + " |")
    gamma = sigma_ratio(3072, 0.5)
    print(
        f"\nCIFAR-10 (D = 3072) at overlap 0.5 exactly: gamma = {gamma:.6f}, so from 50 to 0.01 "
        f"L = {level_count(50, SIGMA_MIN, gamma)}."
    )


if __name__ == "__main__":
    main()
