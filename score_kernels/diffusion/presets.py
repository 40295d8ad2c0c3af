"""Published settings of NCSN and NCSNv2, by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import NamedTuple

from score_kernels.diffusion.sigmas import Schedule, geometric_sigmas

__all__ = ["Preset", "preset", "presets"]


@dataclass(frozen=True, eq=False)
class Preset(Schedule):
    """Published settings; a :class:`Schedule` with how it was trained.

    ``annealed_langevin(net, shape, p.sigmas, steps_per_level=p.steps_per_level,
    step_size=p.step_size)`` samples with the preset p. The data are images in [0, 1].

    Attributes:
        sigmas: ``[L]`` float32, geometric.
        steps_per_level: T.
        step_size: epsilon of form A, ``x + (alpha/2) score + sqrt(alpha) z``: twice the published
            one, which is of form B, ``x + alpha score + sqrt(2 alpha) z``.
        why: the settings and their source as text.
        name: as in `presets`.
        dim: D, numbers in a sample.
        iterations: training steps.
        learning_rate: Adam's.
        batch: samples in a training batch.
        source: the paper, and where in it or in its code.
    """

    name: str
    dim: int
    iterations: int
    learning_rate: float
    batch: int
    source: str


class _Row(NamedTuple):
    side: int
    channels: int
    sigma_max: float
    levels: int
    steps_per_level: int
    # Form B, as published.
    epsilon: float
    iterations: int
    learning_rate: float
    batch: int
    source: str


_NCSN = "Song and Ermon 2019, arXiv 1907.05600, section 5 and appendix B"
_NCSNV2 = "Song and Ermon 2020, arXiv 2006.09011, configuration file"
_SIGMA_MIN = 0.01
_ROWS = {
    "ncsn-cifar10": _Row(32, 3, 1, 10, 100, 2e-5, 200_000, 1e-3, 128, _NCSN),
    "ncsn-mnist": _Row(28, 1, 1, 10, 100, 2e-5, 200_000, 1e-3, 128, _NCSN),
    "ncsn-celeba32": _Row(32, 3, 1, 10, 100, 2e-5, 200_000, 1e-3, 128, _NCSN),
    "ncsnv2-cifar10": _Row(32, 3, 50, 232, 5, 6.2e-6, 300_000, 1e-4, 128, f"{_NCSNV2} cifar10.yml"),
    "ncsnv2-celeba64": _Row(64, 3, 90, 500, 5, 3.3e-6, 210_000, 1e-4, 128, f"{_NCSNV2} celeba.yml"),
    "ncsnv2-church96": _Row(
        96, 3, 140, 788, 4, 4.9e-6, 200_000, 1e-4, 128, f"{_NCSNV2} church.yml"
    ),
    "ncsnv2-bedroom128": _Row(
        128, 3, 190, 1086, 3, 1.8e-6, 150_000, 1e-4, 128, f"{_NCSNV2} bedroom.yml"
    ),
    "ncsnv2-tower128": _Row(
        128, 3, 190, 1086, 3, 1.8e-6, 150_000, 1e-4, 128, f"{_NCSNV2} tower.yml"
    ),
    "ncsnv2-ffhq256": _Row(256, 3, 348, 2311, 3, 0.9e-6, 80_000, 1e-4, 32, f"{_NCSNV2} ffhq.yml"),
}


def presets() -> tuple[str, ...]:
    """The names that `preset` takes."""
    return tuple(_ROWS)


def preset(name: str) -> Preset:
    """Published settings for images in [0, 1], by name.

    Published step sizes are converted from form B to ours, form A; see :class:`Preset`.

    Raises:
        ValueError: there is no preset of that name.
    """
    row = _ROWS.get(name) if isinstance(name, str) else None
    if row is None:
        close = difflib.get_close_matches(str(name), _ROWS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(_ROWS)}{hint}")
    step_size = 2 * row.epsilon
    shape = f"{row.channels} x {row.side} x {row.side}"
    why = "\n".join(
        [
            f"{name}: published settings for {shape} images in [0, 1]",
            f"  source           {row.source}",
            f"  sigmas           {row.levels} from {row.sigma_max:g} to {_SIGMA_MIN:g}, geometric",
            f"  steps_per_level  {row.steps_per_level}",
            f"  step_size        {step_size:g} for x + (alpha/2) score + sqrt(alpha) z; published",
            f"                   as {row.epsilon:g} for x + alpha score + sqrt(2 alpha) z",
            f"  training         {row.iterations} batches of {row.batch}, Adam at "
            f"{row.learning_rate:g}",
            f"  network calls    {row.levels * row.steps_per_level} for each batch of samples",
        ]
    )
    return Preset(
        sigmas=geometric_sigmas(row.sigma_max, _SIGMA_MIN, row.levels),
        steps_per_level=row.steps_per_level,
        step_size=step_size,
        why=why,
        name=name,
        dim=row.channels * row.side**2,
        iterations=row.iterations,
        learning_rate=row.learning_rate,
        batch=row.batch,
        source=row.source,
    )
