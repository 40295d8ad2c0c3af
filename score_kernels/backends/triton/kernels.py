"""All kernels, under one import."""

from score_kernels.backends.triton import dsm, noise, ssm, update

__all__ = ["dsm", "noise", "ssm", "update"]
