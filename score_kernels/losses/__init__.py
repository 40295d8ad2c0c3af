"""Training objectives of score networks."""

from score_kernels.losses.dsm import dsm_loss
from score_kernels.losses.sliced import exact_score_loss, sliced_score_loss

__all__ = ["dsm_loss", "exact_score_loss", "sliced_score_loss"]
