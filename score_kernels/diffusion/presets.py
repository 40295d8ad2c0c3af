"""Published settings of NCSN and NCSNv2, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from score_kernels import checks
from score_kernels.diffusion.sigmas import Schedule, geometric_sigmas

__all__ = ["Preset", "preset", "presets"]


@dataclass(frozen=True, eq=False)
class Preset(Schedule):
    """Published settings of sampling and training for images in [0, 1].

    ``annealed_langevin(net, shape, p.sigmas, steps_per_level=p.steps_per_level,
    step_size=p.step_size)`` samples with the preset p. Its step_size is twice the published
    epsilon, which is that of ``x + alpha score + sqrt(2 alpha) z``.

    Attributes:
        sigmas, steps_per_level, step_size, why: as in :class:`Schedule`.
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


_V1 = "Song and Ermon 2019, arXiv 1907.05600, section 5 and appendix B"
_V2 = "Song and Ermon 2020, arXiv 2006.09011, configuration file"
# channels, side, sigma_max (sigma_min: 0.01), L, T, epsilon, iterations, rate, batch, source
_TABLE: dict[str, tuple[Any, ...]] = {
    "ncsn-cifar10": (3, 32, 1, 10, 100, 2e-5, 200_000, 1e-3, 128, _V1),
    "ncsn-mnist": (1, 28, 1, 10, 100, 2e-5, 200_000, 1e-3, 128, _V1),
    "ncsn-celeba32": (3, 32, 1, 10, 100, 2e-5, 200_000, 1e-3, 128, _V1),
    "ncsnv2-cifar10": (3, 32, 50, 232, 5, 6.2e-6, 300_000, 1e-4, 128, f"{_V2} cifar10.yml"),
    "ncsnv2-celeba64": (3, 64, 90, 500, 5, 3.3e-6, 210_000, 1e-4, 128, f"{_V2} celeba.yml"),
    "ncsnv2-church96": (3, 96, 140, 788, 4, 4.9e-6, 200_000, 1e-4, 128, f"{_V2} church.yml"),
    "ncsnv2-bedroom128": (3, 128, 190, 1086, 3, 1.8e-6, 150_000, 1e-4, 128, f"{_V2} bedroom.yml"),
    "ncsnv2-tower128": (3, 128, 190, 1086, 3, 1.8e-6, 150_000, 1e-4, 128, f"{_V2} tower.yml"),
    "ncsnv2-ffhq256": (3, 256, 348, 2311, 3, 0.9e-6, 80_000, 1e-4, 32, f"{_V2} ffhq.yml"),
}


def presets() -> tuple[str, ...]:
    """The names that `preset` takes."""
    return tuple(_TABLE)


def preset(name: str) -> Preset:
    """Published settings by name; any other name raises a ValueError."""
    checks.choice("name", name, _TABLE)
    channels, side, sigma_max, levels, steps, epsilon, *training = _TABLE[name]
    iterations, rate, batch, source = training
    why = f"""\
{name}: published settings for {channels} x {side} x {side} images in [0, 1]
  source           {source}
  sigmas           {levels} from {sigma_max} to 0.01, geometric
  steps_per_level  {steps}
  step_size        {2 * epsilon:g} for x + (alpha/2) score + sqrt(alpha) z; published
                   as {epsilon:g} for x + alpha score + sqrt(2 alpha) z
  training         {iterations} batches of {batch}, Adam at {rate:g}
  network calls    {levels * steps} for each batch of samples"""
    sigmas = geometric_sigmas(sigma_max, 0.01, levels)
    dim = channels * side**2
    return Preset(sigmas, steps, 2 * epsilon, why, name, dim, *training)
