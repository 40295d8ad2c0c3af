"""The ops: checks, dispatch and autograd over the backends.

Every op is a torch custom op (``torch.ops.score_kernels.*``) with a fake implementation, so that
``torch.compile``, ``torch.export`` and fake tensors see it. Called eagerly on plain tensors, the
functions here go to the backend directly, which is where small batches are fast. Under
``torch.compile`` a new key compiles nothing anew; a new step size does, because torch makes a
Python float that only an op sees a constant.

Noise is named by a :class:`score_kernels.NoiseKey` and made inside the kernel. Samples are rows:
``x`` is ``[B, ...]`` with any number of further dimensions, and element ``i`` of a sample is the
``i``-th in C order whatever the memory layout. Non-contiguous inputs are copied once.
"""

from score_kernels.ops import dsm, langevin, random, sliced
from score_kernels.ops.dsm import *
from score_kernels.ops.langevin import *
from score_kernels.ops.random import *
from score_kernels.ops.sliced import *

__all__ = [*dsm.__all__, *langevin.__all__, *random.__all__, *sliced.__all__]
