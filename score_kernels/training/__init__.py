"""The trainer, its checkpoints, and training on several processes."""

from score_kernels.training.trainer import Trainer

__all__ = ["Trainer"]
