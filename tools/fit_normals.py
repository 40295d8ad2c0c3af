"""Fit the polynomials of csrc/noise.h: -2 ln(1 + f) / f, cos(pi/2 g) and sin(pi/2 g) / g.

Each fit minimises the largest error of the *normal* that the polynomial causes (a minimax fit on a
grid, as a linear programme), then rounds its coefficients to fp32 one by one from the lowest,
refitting the rest, so that each takes up the rounding of those before it. Prints C hexadecimal
floats, lowest order first, and the error that is left. Needs SciPy.

    python tools/fit_normals.py
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

Array = np.ndarray


def minimax(x: Array, target: Array, weight: Array, degree: int, fixed: list[float]) -> Array:
    """All coefficients of the polynomial with min max |weight (p - target)|, `fixed` first."""
    powers = x[:, None] ** np.arange(degree + 1)
    rest = (target - powers[:, : len(fixed)] @ np.array(fixed)) * weight
    free = powers[:, len(fixed) :] * weight[:, None]
    # Scaled so that the solver's tolerance of 1e-9 is far under the errors of 1e-8 that matter.
    scale = 1e6
    bound = np.full((len(x), 1), -1.0)
    solution = linprog(
        np.r_[np.zeros(free.shape[1]), 1.0],
        np.block([[scale * free, bound], [-scale * free, bound]]),
        scale * np.r_[rest, -rest],
        bounds=[(None, None)] * free.shape[1] + [(0, None)],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if not solution.success:
        raise RuntimeError(f"no fit of degree {degree}: {solution.message}")
    return np.r_[fixed, solution.x[:-1]]


def fit(name: str, x: Array, target: Array, weight: Array, degree: int, *first: float) -> None:
    fixed = list(first)
    while len(fixed) <= degree:
        fixed.append(float(np.float32(minimax(x, target, weight, degree, fixed)[len(fixed)])))
    error = np.abs(weight * (x[:, None] ** np.arange(degree + 1) @ np.array(fixed) - target)).max()
    print(f"{name}: " + ", ".join(f"{c.hex()}f" for c in fixed) + f"   (error {error:.2e})")


def main() -> None:
    f = np.linspace(np.sqrt(0.5) - 1, np.sqrt(2) - 1, 2000)
    # The radius is sqrt(t), so its error is |f| / (2 sqrt t) that of P; u <= 1, so f > 0 comes
    # with at least one factor of 1/2, which is where t is smallest.
    t = -2 * np.log1p(f) + np.where(f > 0, 2 * np.log(2), 0)
    fit("log", f, -2 * np.log1p(f) / f, np.abs(f) / (2 * np.sqrt(t)), 6, -2.0)
    g = np.linspace(1e-6, 1, 2000)
    fit("cos", g**2, np.cos(np.pi / 2 * g), np.ones_like(g), 4, 1.0)
    fit("sin", g**2, np.sin(np.pi / 2 * g) / g, g, 4)


if __name__ == "__main__":
    main()
