"""A step of a chain as a CUDA graph: captured once, replayed for every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from score_kernels.backends import Backend

# cuDNN, cuBLAS and lazily loaded kernels settle in the first calls, which must not be captured.
_WARM_UPS = 3


def check(backend: Backend, x: Tensor) -> None:
    """Raise ValueError where a step cannot be captured at all."""
    if not backend.capturable:
        raise ValueError(
            f"cuda_graph: got True with a state of {x.dtype} on {x.device}, which the backend "
            f"{backend.name!r} serves; expected float32 on a CUDA device and a backend of kernels"
        )


def captured(step: Callable[[], None], x: Tensor, counter: Tensor) -> Callable[[], None]:
    """`step`, which changes x and counter in place, as a function that replays it.

    Raises:
        RuntimeError: the score does something that cannot be captured.
    """
    before = x.clone(), counter.clone()
    with torch.cuda.device(x.device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                x.copy_(before[0])
                counter.copy_(before[1])
                step()
            x.copy_(before[0])
            counter.copy_(before[1])
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graph: the score cannot be captured ({error}); it must not read values "
                "back (.item(), .cpu(), print), wait for the device, or allocate outside torch. "
                "Change it or pass cuda_graph=False"
            ) from error

    def replay() -> None:
        with torch.cuda.device(x.device):
            graph.replay()

    return replay
