"""A step of a chain as a CUDA graph: captured once, replayed for every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from score_kernels.sampling.engine import Chain, State

__all__ = ["captured", "replayed"]

# cuDNN, cuBLAS and lazily loaded kernels settle in the first calls, which must not be captured.
_WARM_UPS = 3


def replayed(chain: Chain, state: State, first_step: int) -> Callable[[State, int, int], None]:
    """``chain.advance`` for the steps from first_step on, replayed from a graph of one.

    Raises:
        ValueError: the steps, or the backend, cannot be captured.
        RuntimeError: the score does something that cannot be captured.
    """
    x, model, backend = state.x, chain.model, chain.backend
    if not backend.capturable:
        raise ValueError(
            f"cuda_graph: got True with a state of {x.dtype} on {x.device}, which the backend "
            f"{backend.name!r} serves; expected float32 on a CUDA device and a backend of kernels"
        )
    if any(phase.pre_step is not None for phase in chain.plan):
        raise ValueError(
            "cuda_graph: got True with steps that are more than one call of score and one "
            "affine step, which are not captured"
        )
    if first_step >= chain.steps:
        return chain.advance
    # What changes from step to step is in tables, with a row for each step.
    repeats = torch.tensor([phase.steps for phase in chain.plan]).to(x.device)
    table = chain.table.repeat_interleave(repeats, 0)
    levels = torch.tensor([(phase.sigma, 1 / phase.mean) for phase in chain.plan])
    sigmas, scales = levels.to(x.device).repeat_interleave(repeats, 0).unbind(1)
    counter = torch.full((), first_step, dtype=torch.int64, device=x.device)
    seed, purpose, _, first_sample = chain.key
    model.set_level(chain.plan[0].sigma)
    scaled = any(phase.mean != 1.0 for phase in chain.plan)
    known, mask = chain.known or (None, None)

    def step() -> None:
        at = counter.view(1)
        model.sigma.copy_(sigmas.index_select(0, at).expand_as(model.sigma))
        if scaled:
            model.scale = scales.index_select(0, at).view(())
        key = (seed, purpose, 0, first_sample)
        backend.table_step(x, x, model(x), table, counter, key, known, mask)
        counter.add_(1)

    replay = captured(step, x, counter)
    # The graph writes to sigma behind the model's back.
    model.level = None

    def advance(_: State, t: int, stop: int) -> None:
        for _step in range(t, stop):
            replay()

    return advance


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
