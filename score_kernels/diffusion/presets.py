"""Published settings of NCSN and NCSNv2, by name."""

from __future__ import annotations

from dataclasses import dataclass

from score_kernels import checks
from score_kernels.diffusion.sigmas import Schedule, geometric_sigmas

__all__ = ["Preset", "preset", "presets"]


@dataclass(frozen=True, eq=False)
class Preset(Schedule):
    """Published settings; a :class:`Schedule` with how its network was trained.

    ``annealed_langevin(net, shape, p.sigmas, steps_per_level=p.steps_per_level,
    step_size=p.step_size)`` samples with the preset p. The data are images in [0, 1].

    Attributes:
        sigmas: ``[L]`` float32, geometric.
        steps_per_level: T.
        step_size: of ``x + (alpha/2) score + sqrt(alpha) z``: twice the published epsilon, which is
            that of ``x + alpha score + sqrt(2 alpha) z``.
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


_SIGMA_MIN = 0.01
_V1 = "Song and Ermon 2019, arXiv 1907.05600, section 5 and appendix B"
_V2 = "Song and Ermon 2020, arXiv 2006.09011, configuration file"
# Name: channels, side, sigma_max, L, T, epsilon, iterations, learning rate, batch, source.
_TABLE = {
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
    """Published settings for images in [0, 1], by name; see :class:`Preset`.

    Raises:
        TypeError, ValueError: there is no preset of that name.
    """
    checks.choice("name", name, _TABLE)
    channels, side, sigma_max, levels, steps, epsilon, iterations, rate, batch, source = _TABLE[
        name
    ]
    why = f"""\
{name}: published settings for {channels} x {side} x {side} images in [0, 1]
  source           {source}
  sigmas           {levels} from {sigma_max} to {_SIGMA_MIN}, geometric
  steps_per_level  {steps}
  step_size        {2 * epsilon:g} for x + (alpha/2) score + sqrt(alpha) z; published
                   as {epsilon:g} for x + alpha score + sqrt(2 alpha) z
  training         {iterations} batches of {batch}, Adam at {rate:g}
  network calls    {levels * steps} for each batch of samples"""
    return Preset(
        sigmas=geometric_sigmas(sigma_max, _SIGMA_MIN, levels),
        steps_per_level=steps,
        step_size=2 * epsilon,
        why=why,
        name=name,
        dim=channels * side**2,
        iterations=iterations,
        learning_rate=rate,
        batch=batch,
        source=source,
    )
