"""The samplers of the commands, each for a number of network calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from score_kernels import checks, sampling
from score_kernels.diffusion.sde import VE
from score_kernels.diffusion.sigmas import best_step_size, edm_sigmas, geometric_sigmas

__all__ = ["DEFAULT_CALLS", "NAMES", "Sampler", "choose"]

NAMES = ("consistent", "annealed", "pc", "ddpm", "ddim", "flow", "dpm")
# Of all but annealed, which takes the steps that the training's schedule has.
DEFAULT_CALLS = 100
# Those of one call a level.
_OVER_LEVELS: dict[str, Callable[..., Tensor]] = {
    "consistent": sampling.consistent_annealed,
    "ddpm": sampling.ddpm,
    "ddim": sampling.ddim,
    "dpm": sampling.dpm_solver,
}


@dataclass(frozen=True)
class Sampler:
    """A sampler with its settings; see :func:`choose`.

    Attributes:
        function: of `score_kernels.sampling`.
        over: its noise levels, or a diffusion.
        options: its other settings, by name.
        levels: how many noise levels there are.
        calls: how often a sample calls the network.
    """

    function: Callable[..., Tensor]
    over: Any
    options: dict[str, Any]
    levels: int
    calls: int

    def draw(self, net: nn.Module, shape: tuple[int, ...], **options: Any) -> Tensor:
        """Samples, in the scale of the network; options as the sampler's."""
        return self.function(net, shape, self.over, **self.options, **options)

    def described(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        name = self.function.__name__
        return {"name": name, "calls": self.calls, "levels": self.levels, **self.options}


def choose(schedule: dict[str, Any], name: str, calls: int | None = None) -> Sampler:
    """A sampler that calls the network at most so often for a sample.

    Levels go from the largest to the smallest of the schedule:

    - "consistent", "ddpm", "ddim", "dpm": `calls` geometric levels, one call each;
    - "annealed": geometric levels, about as many as the schedule has, with as many steps each as
      there are calls for and the step size of technique 4; without `calls`, the schedule itself;
    - "pc": predictor and corrector of the variance-exploding diffusion, two calls a step;
    - "flow": Heun's method on the levels of :func:`score_kernels.edm_sigmas`, two calls a level.

    Args:
        schedule: ``sigmas``, ``steps_per_level`` and ``step_size``.
        name: of the sampler, as above.
        calls: at least 3; default: 100.

    Raises:
        ValueError: an argument is none of these.
    """
    checks.choice("sampler", name, NAMES)
    if calls is not None:
        checks.count("calls", calls, least=3)
    sigmas, high, low = schedule["sigmas"], schedule["sigmas"][0], schedule["sigmas"][-1]
    if name == "annealed":
        options = {key: schedule[key] for key in ("steps_per_level", "step_size")}
        if calls is not None:
            # The last call is for denoising.
            steps = max(1, (calls - 1) // len(sigmas))
            sigmas = geometric_sigmas(high, low, (calls - 1) // steps).tolist()
            size = best_step_size((high / low) ** (1 / (len(sigmas) - 1)), low, steps)
            options = {"steps_per_level": steps, "step_size": size}
        calls = len(sigmas) * options["steps_per_level"] + 1
        return Sampler(sampling.annealed_langevin, sigmas, options, len(sigmas), calls)
    calls = DEFAULT_CALLS if calls is None else calls
    if name == "pc":
        steps = (calls - 1) // 2
        options = {"steps": steps, "end": 0.0}
        return Sampler(
            sampling.predictor_corrector, VE(low, high), options, steps + 1, 2 * steps + 1
        )
    if name == "flow":
        count = (calls + 1) // 2
        levels = edm_sigmas(high, low, count).tolist()
        return Sampler(sampling.probability_flow, levels, {}, count, 2 * count - 1)
    levels = geometric_sigmas(high, low, calls).tolist()
    return Sampler(_OVER_LEVELS[name], levels, {}, calls, calls)
