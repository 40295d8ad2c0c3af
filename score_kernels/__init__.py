"""Fast, reproducible score-based generative modelling: fused kernels with the noise made inside."""

from score_kernels import fused, networks, ops
from score_kernels import integrations as integrations
from score_kernels.backends import backends, set_backend, use_backend
from score_kernels.cli.trained import load
from score_kernels.diffusion.prediction import as_score, by_label, by_sigma, convert, unconditional
from score_kernels.diffusion.presets import preset, presets
from score_kernels.diffusion.sde import VE, VP, DDPMSchedule, SubVP
from score_kernels.diffusion.sigmas import (
    Schedule,
    best_step_size,
    edm_sigmas,
    geometric_sigmas,
    level_count,
    level_overlap,
    max_pairwise_distance,
    pairwise_distance_bounds,
    sigma_ratio,
    suggest_schedule,
    variance_ratio,
)
from score_kernels.losses import dsm_loss
from score_kernels.losses.sliced import exact_score_loss, sliced_score_loss
from score_kernels.noise import NoiseKey, Purpose, include
from score_kernels.sampling import (
    annealed_langevin,
    classifier_free,
    consistent_annealed,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    langevin,
    log_likelihood,
    predictor_corrector,
    probability_flow,
    random_rotation,
    slerp_noise,
)
from score_kernels.training import Trainer

__version__ = "0.2.0.dev0"
__all__ = [
    "VE",
    "VP",
    "DDPMSchedule",
    "NoiseKey",
    "Purpose",
    "Schedule",
    "SubVP",
    "Trainer",
    "annealed_langevin",
    "as_score",
    "backends",
    "best_step_size",
    "by_label",
    "by_sigma",
    "classifier_free",
    "consistent_annealed",
    "convert",
    "ddim",
    "ddpm",
    "dpm_solver",
    "dsm_loss",
    "edm_sigmas",
    "euler_maruyama",
    "exact_score_loss",
    "fused",
    "geometric_sigmas",
    "include",
    "langevin",
    "level_count",
    "level_overlap",
    "load",
    "log_likelihood",
    "max_pairwise_distance",
    "networks",
    "ops",
    "pairwise_distance_bounds",
    "predictor_corrector",
    "preset",
    "presets",
    "probability_flow",
    "random_rotation",
    "set_backend",
    "sigma_ratio",
    "slerp_noise",
    "sliced_score_loss",
    "suggest_schedule",
    "unconditional",
    "use_backend",
    "variance_ratio",
]
