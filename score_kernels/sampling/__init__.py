"""Samplers: each a plan of affine steps ``x <- a x + b score + c z`` for one engine."""

from score_kernels.sampling.ddpm import ddim, ddpm
from score_kernels.sampling.dpm import dpm_solver
from score_kernels.sampling.guidance import classifier_free, random_rotation, slerp_noise
from score_kernels.sampling.langevin import annealed_langevin, consistent_annealed, langevin
from score_kernels.sampling.ode import log_likelihood, probability_flow
from score_kernels.sampling.options import Options, Progress
from score_kernels.sampling.sde import euler_maruyama, predictor_corrector
from score_kernels.sampling.stream import Request, stream

__all__ = [
    "Options",
    "Progress",
    "Request",
    "annealed_langevin",
    "classifier_free",
    "consistent_annealed",
    "ddim",
    "ddpm",
    "dpm_solver",
    "euler_maruyama",
    "random_rotation",
    "slerp_noise",
    "langevin",
    "log_likelihood",
    "predictor_corrector",
    "probability_flow",
    "stream",
]
