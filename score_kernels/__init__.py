"""Fast, reproducible score-based generative modelling: fused kernels with the noise made inside."""

from score_kernels import ops
from score_kernels.backends import backends, use_backend
from score_kernels.losses import dsm_loss
from score_kernels.noise import NoiseKey
from score_kernels.sampling import annealed_langevin, langevin
from score_kernels.schedules import geometric_sigmas
from score_kernels.sliced import exact_score_loss, sliced_score_loss
from score_kernels.training import Trainer

__version__ = "0.1.0"
__all__ = [
    "NoiseKey",
    "Trainer",
    "annealed_langevin",
    "backends",
    "dsm_loss",
    "exact_score_loss",
    "geometric_sigmas",
    "langevin",
    "ops",
    "sliced_score_loss",
    "use_backend",
]
