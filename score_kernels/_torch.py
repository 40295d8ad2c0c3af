"""What may be listening to torch when an op is called, in torch's own names for it."""

from __future__ import annotations

import torch

is_compiling = torch.compiler.is_dynamo_compiling
transforms_active = torch._C._are_functorch_transforms_active
modes_active = torch._C._len_torch_dispatch_stack
profiler_enabled = torch.autograd._profiler_enabled
