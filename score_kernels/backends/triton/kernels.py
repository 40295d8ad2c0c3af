"""All kernels, under one import."""

from score_kernels.backends.triton import dsm, fill, noise, ssm, update

__all__ = ["dsm", "fill", "noise", "ssm", "update"]
