"""The commands ``train`` and ``sample``: from files to a checkpoint, and to new samples."""

from score_kernels.commands._sample import sample
from score_kernels.commands._train import train

__all__ = ["sample", "train"]
