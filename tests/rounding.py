"""Bounds on what the order of a sum can change, from the sizes of its own terms."""

from __future__ import annotations

import math

import torch
from conftest import filled
from torch import Tensor

from score_kernels import NoiseKey
from score_kernels.backends.compiled import native


def probe_terms(kind: str, a: Tensor, b: Tensor | None, differences: bool, key: NoiseKey) -> Tensor:
    """[4, B]: the sums of |v v|, |v a|, |v b| and |a a| that `probe_sums` takes without the bars.

    A sum is within its depth times the unit roundoff, 2^-24, times this, whatever cancels.
    """
    v = filled(native, kind, a.shape, key).double()
    p, q = a.double(), torch.zeros_like(v) if b is None else b.double()
    if differences:
        p, q = 0.5 * (p + q), p - q
    shape = (len(a), math.prod(a.shape[1:]))
    pairs = ((v, v), (v, p), (v, q), (p, p))
    return torch.stack([(s * t).abs().reshape(shape).sum(1) for s, t in pairs])
