"""A chain's step as a CUDA graph, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from score_kernels.sampling.engine import Chain

__all__ = ["captured", "replayed"]

# cuDNN, cuBLAS and lazily loaded kernels settle in the first calls, which must not be captured.
_WARM_UPS = 3


def replayed(chain: Chain, first_step: int) -> Callable[[int, int], None]:
    """``chain.advance`` for the steps from first_step on, replayed from a graph of one.

    Raises:
        ValueError: the steps, or the backend, cannot be captured.
        RuntimeError: the score does something that cannot be captured.
    """
    x, model, backend, plan = chain.x, chain.model, chain.backend, chain.plan
    if not backend.capturable:
        raise ValueError(
            f"cuda_graph: got True with a state of {x.dtype} on {x.device}, which the backend "
            f"{backend.name!r} serves; expected float32 on a CUDA device and a backend of kernels"
        )
    if any(phase.pre_step is not None for phase in plan):
        raise ValueError("cuda_graph: got True, expected steps of one call of score each")
    if chain.project is not None or chain.noise_first or callable(chain.gain):
        raise ValueError(
            "cuda_graph: got True beside project, center, noise_first or a precondition by sigma, "
            "expected steps of one kernel"
        )
    if first_step >= chain.steps:
        return chain.advance
    # What changes from step to step is in tables, with a row for each step.
    repeats = torch.tensor([phase.steps for phase in plan], device="cpu").to(x.device)
    table = torch.cat(chain.rows).repeat_interleave(repeats, 0)
    rows = [(phase.sigma, 1 / phase.mean) for phase in plan]
    levels = torch.tensor(rows, dtype=torch.float32, device="cpu")
    sigmas, scales = levels.to(x.device).repeat_interleave(repeats, 0).unbind(1)
    counter = torch.full((), first_step, dtype=torch.int64, device=x.device)
    key = chain.key.at(0)
    model.set_level(plan[0].sigma)
    # Memory of its own, for all levels.
    model.sigma = model.sigma.clone(memory_format=torch.contiguous_format)
    scaled = any(phase.mean != 1.0 for phase in plan)
    known, mask, _ = chain.known or (None, None, False)
    more = known, mask, chain.gain, chain.end

    def step() -> None:
        at = counter.view(1)
        model.sigma.copy_(sigmas.index_select(0, at).expand_as(model.sigma))
        if scaled:
            model.scale = scales.index_select(0, at).view(())
        backend.table_step(x, x, model(x), table, counter, key, *more)
        counter.add_(1)

    replay = captured(step, x, counter)
    # The graph's sigma is not that of a level.
    model.level = None

    def advance(t: int, stop: int) -> None:
        for _ in range(t, stop):
            replay()

    return advance


def captured(step: Callable[[], None], x: Tensor, counter: Tensor) -> Callable[[], None]:
    """`step`, which changes x and counter in place, as a function that replays it."""
    before = x.clone(), counter.clone()
    with torch.cuda.device(x.device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
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
                f"cuda_graph: the score cannot be captured ({error}); expected one that does not "
                "read values back (.item(), .cpu(), print), wait for the device, or allocate "
                "outside torch"
            ) from error

    def replay() -> None:
        with torch.cuda.device(x.device):
            graph.replay()

    return replay
