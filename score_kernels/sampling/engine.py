"""The engine of the samplers: a plan of affine steps ``x <- a x + b score + c z``, run as a chain.

The noise of step ``t`` of a chain is draw ``t`` of the chain's key, and rows are global samples
``first_sample + row``: a chain does not depend on how a batch is split or where it is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.backends import choose
from score_kernels.noise import NoiseKey, Purpose, fresh_seed
from score_kernels.sampling.steps import Network, Phase, Score, Steps, Update
from score_kernels.sampling.watch import Watch

__all__ = ["Options", "Progress", "run"]


class Options(TypedDict, total=False):
    """The keyword arguments that every sampler takes besides its own.

    Attributes:
        seed: 64 bits, names all noise of the run; default: drawn from torch's default generator,
            so that ``torch.manual_seed`` rules it.
        first_sample: global index of row 0. Rows are the same bits however a run is split into
            batches, if score treats rows independently.
        init: how a shape is filled: "normal", of the largest noise level, or "uniform" on [0, 1],
            as the authors' code of NCSN does.
        first_step: resume: the index of the first step to do, when shape_or_init is the state after
            that many steps of a run with the same seed.
        callback: called with a `Progress` after each update step.
        record_every: return, on the CPU, ``[n, B, ...]``: the state after every so many steps and,
            last, the result.
        progress: show a progress bar.
        device: where to start from a shape; default: torch's default device.
        cuda_graph: capture one call of score and one update as a CUDA graph and replay it for every
            step: for small networks, whose time goes into launches. The noise is the same bits.
            score must do the same work on the same memory at every call, whatever sigma holds, and
            not wait for the device.
        conditions: further keyword arguments of score at every call: classes, say.
        guidance: ``guidance(x, sigma)``, in x's shape, is added to every score: the gradient of a
            log likelihood of what was observed, say. Enable gradients inside where it needs them.
        known, mask: inpainting (Song and Ermon 2019, arXiv 1907.05600, appendix B): where mask is
            true the state is kept at known, with noise of the level that the chain is at, and
            exactly known at the end. Both are broadcast to the state's shape; mask is bool.
        on_nan: what to do about a state that is not finite, which is looked for every 50 steps and
            at the end: "raise" (the default) a FloatingPointError that names level, step and the
            first such sample; "stop" there with a warning, and return the last state that was seen
            to be finite; or "ignore" it. To find the step, those since the last look are done again
            with the same noise from a copy of the state, which all but "ignore" keep.
    """

    seed: int | None
    first_sample: int
    init: str
    first_step: int
    callback: Callable[[Progress], object] | None
    record_every: int | None
    progress: bool
    device: torch.device | str | None
    cuda_graph: bool
    conditions: Mapping[str, Any] | None
    guidance: Callable[[Tensor, Tensor], Tensor] | None
    known: Tensor | None
    mask: Tensor | None
    on_nan: str


@dataclass(slots=True)
class Progress:
    """What a callback sees after each update step. One object serves a whole chain.

    Attributes:
        step: index of the step just done, from 0 for the chain's first.
        level: index of its noise level.
        sigma: that noise level (``nan`` for Langevin dynamics without one).
        x: the state itself, ``[B, ...]``; it changes with the next step, so copy what you keep.
    """

    step: int
    level: int
    sigma: float
    x: Tensor


def run(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    plan: list[Phase],
    *,
    scale: float,
    denoise: bool = False,
    seed: int | None = None,
    first_sample: int = 0,
    init: str = "normal",
    first_step: int = 0,
    callback: Callable[[Progress], object] | None = None,
    record_every: int | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    cuda_graph: bool = False,
    conditions: Mapping[str, Any] | None = None,
    guidance: Callable[[Tensor, Tensor], Tensor] | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    on_nan: str = "raise",
) -> Tensor:
    """Run a plan from the prior of standard deviation `scale`, or from a state; see `Options`.

    With `denoise` it ends with ``x + sigma^2 score(x, sigma)``, sigma that of the last phase's end
    and x in the data's scale.
    """
    checks.function("score", score)
    flags = {"denoise": denoise, "progress": progress, "cuda_graph": cuda_graph}
    for name, value in flags.items():
        checks.flag(name, value)
    if on_nan not in ("raise", "stop", "ignore"):
        raise ValueError(f"on_nan: got {on_nan!r}, expected 'raise', 'stop' or 'ignore'")
    seed = fresh_seed() if seed is None else seed
    noise = NoiseKey(seed, purpose=Purpose.LANGEVIN, first_sample=first_sample)
    total = sum(phase.steps for phase in plan)
    first_step = checks.count("first_step", first_step, least=0)
    if first_step > total:
        raise ValueError(
            f"first_step: got {first_step}, expected at most the chain's {total} steps"
        )
    if total > 2**32:
        raise ValueError(f"steps: got {total} steps in all, expected at most 2**32, one draw each")
    if callback is not None:
        checks.function("callback", callback)
    every = (
        total + 1 if record_every is None else checks.count("record_every", record_every, least=1)
    )
    with torch.no_grad():
        x = _start(shape_or_init, scale, init, noise, device)
        if first_step and not isinstance(shape_or_init, Tensor):
            raise ValueError(
                f"first_step: got {first_step} with a shape, expected the state after "
                "that many steps as shape_or_init"
            )
        network = Network(score, x, conditions, guidance)
        update = Update(choose(x.device, x.dtype), x, plan, known, mask)
        steps = Steps(network, update, plan, noise, denoise)
        if not first_step:
            update.start(x, noise.for_purpose(Purpose.KNOWN))
        before = first_step // every
        frames = 0 if record_every is None else total // every - before + 1
        film = x.new_empty((frames, *x.shape), device="cpu")
        seen = Progress(step=0, level=-1, sigma=math.nan, x=x)
        step = steps.captured(x, first_step) if cuda_graph else steps
        watch = None if on_nan == "ignore" else Watch(steps, x, first_step, stop=on_nan == "stop")
        done = total
        for t, index in _steps(plan, first_step, progress):
            step(x, t, index)
            if watch is not None and watch.due(t + 1) and not watch.finite(x, t + 1):
                done = watch.done
                break
            if callback is not None:
                seen.step, seen.level, seen.sigma = t, index, plan[index].sigma
                callback(seen)
            if (t + 1) % every == 0:
                film[(t + 1) // every - before - 1].copy_(x)
        else:
            steps.end(x)
            if watch is not None and not watch.finite(x, total + 1):
                done = watch.done
        if record_every is None:
            return x
        last = done // every - before
        film[last].copy_(x)
        return film[: last + 1]


def _steps(plan: list[Phase], first_step: int, progress: bool) -> Iterator[tuple[int, int]]:
    """(step, index of its phase) from first_step on."""

    def pairs() -> Iterator[tuple[int, int]]:
        start = 0
        for index, phase in enumerate(plan):
            for t in range(max(start, first_step), start + phase.steps):
                yield t, index
            start += phase.steps

    if not progress:
        return pairs()
    from tqdm.auto import tqdm

    total = sum(phase.steps for phase in plan)
    bar: Iterable[tuple[int, int]] = tqdm(
        pairs(), total=total, initial=first_step, unit="step", desc="sampling"
    )
    return iter(bar)


def _start(
    shape_or_init: Sequence[int] | Tensor,
    scale: float,
    init: str,
    noise: NoiseKey,
    device: torch.device | str | None,
) -> Tensor:
    if isinstance(shape_or_init, Tensor):
        checks.state("shape_or_init", shape_or_init)
        checks.noise_shape(shape_or_init.shape)
        checks.sample_range(noise.first_sample, shape_or_init.shape[0])
        wanted = checks.device("device", device) or shape_or_init.device
        if wanted.type != shape_or_init.device.type or (
            wanted.index is not None and wanted.index != shape_or_init.device.index
        ):
            raise ValueError(
                f"device: got {device} with a state on {shape_or_init.device}, "
                "expected the state's device or none"
            )
        if shape_or_init.is_meta:
            raise ValueError("shape_or_init: got a tensor on meta, expected one with values")
        return shape_or_init.detach().clone(memory_format=torch.contiguous_format)
    home = checks.device("device", device)
    if (home or torch.get_default_device()).type == "meta":
        raise ValueError("device: got meta, expected one that computes")
    prior = noise.for_purpose(Purpose.PRIOR)
    if init == "normal":
        return ops.normal(shape_or_init, prior, device=home).mul_(scale)
    if init == "uniform":
        return ops.uniform(shape_or_init, prior, device=home)
    raise ValueError(f"init: got {init!r}, expected 'normal' or 'uniform'")
