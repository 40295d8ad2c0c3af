"""Noise levels, published settings, diffusions, and what networks predict."""

from score_kernels.diffusion.prediction import as_score, by_label, by_sigma, convert, unconditional
from score_kernels.diffusion.presets import Preset, preset, presets
from score_kernels.diffusion.sde import SDE, VE, VP, DDPMSchedule, SubVP

__all__ = [
    "SDE",
    "VE",
    "VP",
    "DDPMSchedule",
    "Preset",
    "SubVP",
    "as_score",
    "by_label",
    "by_sigma",
    "convert",
    "preset",
    "presets",
    "unconditional",
]
