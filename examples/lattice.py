"""Lattice field theory: the magnetisation of phi^4 on 16 x 16 sites, by fused Langevin chains.

    S(phi) = sum_x [ -2 kappa phi_x (phi_{x+1} + phi_{x+2}) + (1 - 2 lambda) phi_x^2
                     + lambda phi_x^4 ]

The score is -grad S. Chains of 256 numbers start ordered and at random; the mean of |phi| over the
lattice, m, grows from 0 where kappa passes the critical hopping. Two things to compare with:
without lambda phi is Gaussian, so that the mean is known; and Metropolis' algorithm, written here
in NumPy, samples exp(-S) without the bias of a step size.

    python examples/lattice.py --out lattice.png
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import score_kernels as sk

SIDE = 16
COUPLING = 0.02


def action(phi: Tensor, hopping: float, coupling: float) -> Tensor:
    """S of each row of SIDE x SIDE sites, periodic."""
    phi = phi.view(-1, SIDE, SIDE)
    near = phi.roll(1, 1) + phi.roll(1, 2)
    site = -2 * hopping * phi * near + (1 - 2 * coupling) * phi**2 + coupling * phi**4
    return site.sum((1, 2))


def langevin(hopping: float, coupling: float, chains: int, steps: int) -> tuple[float, float]:
    """Mean of |phi| and its standard error, by fused chains, half of them started ordered."""
    score = sk.fused.score(lambda x: action(x, hopping, coupling), SIDE**2, kind="energy")
    start = sk.ops.normal((chains, SIDE**2), sk.NoiseKey(1)) + (torch.arange(chains) % 2)[:, None]
    x = sk.langevin(score, start, step_size=0.02, steps=steps, seed=2)
    m = x.mean(1).abs()
    return float(m.mean()), float(m.std()) / math.sqrt(chains)


def metropolis(hopping: float, coupling: float, chains: int, sweeps: int) -> tuple[float, float]:
    """The same by Metropolis' algorithm on a checkerboard, in NumPy."""
    rng = np.random.default_rng(3)
    phi = rng.normal(size=(chains, SIDE, SIDE)) + np.arange(chains)[:, None, None] % 2
    black = np.indices((SIDE, SIDE)).sum(0) % 2 == 0
    for _ in range(sweeps):
        for colour in (black, ~black):
            near = sum(np.roll(phi, by, axis) for by in (1, -1) for axis in (1, 2))
            new = phi + rng.uniform(-1.5, 1.5, phi.shape)
            change = -2 * hopping * near * (new - phi)
            change += (1 - 2 * coupling) * (new**2 - phi**2) + coupling * (new**4 - phi**4)
            taken = colour & (rng.exponential(size=phi.shape) > change)
            phi = np.where(taken, new, phi)
    m = np.abs(phi.mean((1, 2)))
    return float(m.mean()), float(m.std(ddof=1)) / math.sqrt(chains)


def free(hopping: float) -> float:
    """Where lambda is 0: m is normal, with variance 1 / (2 V (1 - 4 kappa)) of V sites."""
    return math.sqrt(1 / (math.pi * SIDE**2 * (1 - 4 * hopping)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="draw a picture into this file")
    parser.add_argument("--chains", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20000, help="Langevin steps of 0.02")
    parser.add_argument("--sweeps", type=int, default=1000, help="Metropolis sweeps")
    arguments = parser.parse_args(argv)
    mean, error = langevin(0.2, 0.0, arguments.chains, arguments.steps)
    print(f"free field, kappa 0.2: |m| {mean:.4f} +- {error:.4f}, exactly {free(0.2):.4f}")
    rows = []
    for hopping in tqdm((0.20, 0.23, 0.25, 0.26, 0.27, 0.28, 0.30), unit="hopping"):
        began = time.perf_counter()
        chain = langevin(hopping, COUPLING, arguments.chains, arguments.steps)
        seconds = time.perf_counter() - began
        walk = metropolis(hopping, COUPLING, arguments.chains, arguments.sweeps)
        rows.append((hopping, *chain, *walk))
        tqdm.write(
            f"kappa {hopping:.2f}: |m| {chain[0]:.3f} +- {chain[1]:.3f} in {seconds:.1f} s, "
            f"Metropolis {walk[0]:.3f} +- {walk[1]:.3f}"
        )
    if arguments.out:
        draw(np.array(rows), arguments.out)


def draw(rows: np.ndarray, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(rows[:, 0], rows[:, 1], 2 * rows[:, 2], marker="o", label="fused Langevin")
    axes.errorbar(rows[:, 0], rows[:, 3], 2 * rows[:, 4], fmt="x", capsize=3, label="Metropolis")
    axes.set(xlabel="hopping κ", ylabel="mean of |m|", title=f"φ⁴, {SIDE} x {SIDE}, λ = {COUPLING}")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
