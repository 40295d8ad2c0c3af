"""Samplers: each a plan of affine steps ``x <- a x + b score + c z`` for one engine."""

from score_kernels.sampling.chain import Options, Progress
from score_kernels.sampling.diffusion import ddim, ddpm
from score_kernels.sampling.flow import log_likelihood, probability_flow
from score_kernels.sampling.guidance import classifier_free, interpolate
from score_kernels.sampling.langevin import annealed_langevin, consistent_annealed, langevin
from score_kernels.sampling.reverse import euler_maruyama, predictor_corrector

__all__ = [
    "Options",
    "Progress",
    "annealed_langevin",
    "classifier_free",
    "consistent_annealed",
    "ddim",
    "ddpm",
    "euler_maruyama",
    "interpolate",
    "langevin",
    "log_likelihood",
    "predictor_corrector",
    "probability_flow",
]
