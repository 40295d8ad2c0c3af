"""The torch library that every op is registered in, and noise keys as its schemas take them."""

from __future__ import annotations

import torch

from score_kernels.noise import Key

library = torch.library.Library("score_kernels", "DEF")

# The last four arguments of every op.
KEY = "SymInt seed, SymInt purpose, SymInt draw, SymInt first_sample"


def signed(key: Key) -> Key:
    """A key as an op's arguments: schemas have signed 64-bit integers."""
    return (key[0] - 2**64 if key[0] >= 2**63 else key[0], *key[1:])


def unsigned(key: Key) -> Key:
    """The key again, from an op's arguments."""
    return (key[0] & (2**64 - 1), *key[1:])
