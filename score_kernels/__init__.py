"""Fast, reproducible score-based generative modelling: fused kernels with the noise made inside."""

from score_kernels import ops
from score_kernels.backends import backends, use_backend
from score_kernels.noise import NoiseKey

__version__ = "0.1.0"
__all__ = ["NoiseKey", "backends", "ops", "use_backend"]
