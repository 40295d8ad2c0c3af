"""The engine of the samplers: a plan of affine steps ``x <- a x + b score + c z``, run as a chain.

The noise of step ``t`` of a chain is draw ``t`` of the chain's key, and rows are global samples
``first_sample + row``: a chain does not depend on how a batch is split or where it is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from score_kernels import _capture, _check, ops
from score_kernels.backends import Backend, choose
from score_kernels.noise import Key, NoiseKey, Purpose, fresh_seed

__all__ = ["Network", "Options", "Phase", "Progress", "Score", "run"]

Score = Callable[..., Tensor]


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


@dataclass(frozen=True, slots=True)
class Phase:
    """`steps` equal steps ``x <- a x + b score + c z`` at one noise level, one kernel each.

    Attributes:
        sigma: the level that the score is told; nan: it is told none.
        a, b, c: see above.
        steps: their number.
        mean: the score sees ``x / mean``: m(t) of :mod:`score_kernels.sde`.
        after: noise level and mean of the state after a step, where they are others than before.
        move: what comes before the kernel where one call of the score is not all.
    """

    sigma: float
    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    steps: int = 1
    mean: float = 1.0
    after: tuple[float, float] | None = None
    move: Move | None = None

    @property
    def end(self) -> tuple[float, float]:
        """Noise level and mean of the state after a step."""
        return self.after or (self.sigma, self.mean)


class Move(Protocol):
    """What comes before a step's kernel; key names the step's noise.

    It may change x, and returns the score for the kernel and, if these are not the phase's own, the
    coefficients ``[B, 3]`` of each sample.
    """

    def __call__(
        self, network: Network, backend: Backend, x: Tensor, key: Key
    ) -> tuple[Tensor, Tensor | None]: ...


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
) -> Tensor:
    """Run a plan from the prior of standard deviation `scale`, or from a state; see `Options`.

    With `denoise` it ends with ``x + sigma^2 score(x, sigma)``, sigma that of the last phase's end
    and x in the data's scale.
    """
    if not callable(score):
        raise TypeError(f"score: got {type(score).__name__} {score!r}, expected a function")
    seed = fresh_seed() if seed is None else seed
    noise = NoiseKey(seed, purpose=Purpose.LANGEVIN, first_sample=first_sample)
    total = sum(phase.steps for phase in plan)
    first_step = _check.count("first_step", first_step, least=0)
    if first_step > total:
        raise ValueError(
            f"first_step: got {first_step}, expected at most the chain's {total} steps"
        )
    if total > 2**32:
        raise ValueError(f"steps: got {total} steps in all, expected at most 2**32, one draw each")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: got {type(callback).__name__}, expected a function")
    if record_every is not None:
        record_every = _check.count("record_every", record_every, least=1)
    with torch.no_grad():
        x = _start(shape_or_init, scale, init, noise, device)
        if first_step and not isinstance(shape_or_init, Tensor):
            raise ValueError(
                f"first_step: got {first_step} with a shape, expected the state after "
                "that many steps as shape_or_init"
            )
        network = Network(score, x, conditions, guidance)
        update = _Update(choose(x.device, x.dtype), x, plan, known, mask)
        if not first_step:
            update.start(x, noise.for_purpose(Purpose.KNOWN).fields())
        seed, purpose, _, first_sample = noise.fields()
        film = x.new_empty((_frame_count(record_every, first_step, total), *x.shape), device="cpu")
        frames = iter(film)
        seen = Progress(step=0, level=-1, sigma=math.nan, x=x)
        replay = None
        if cuda_graph:
            _capture.check(update.backend, x)
            if any(phase.move is not None for phase in plan):
                raise ValueError(
                    "cuda_graph: got True with steps that are more than one call of score and one "
                    "affine step, which are not captured"
                )
            if first_step < total:
                replay = _replay(network, x, plan, noise, first_step, update)
        for t, index in _steps(plan, first_step, progress):
            phase = plan[index]
            if replay is not None:
                seen.level, seen.sigma = index, phase.sigma
                replay()
            else:
                if index != seen.level:
                    seen.level, seen.sigma = index, phase.sigma
                    network.at(phase.sigma, phase.mean)
                key = (seed, purpose, t, first_sample)
                if phase.move is None:
                    update(x, network(x), index, key)
                else:
                    value, coefficients = phase.move(network, update.backend, x, key)
                    update(x, value, index, key, coefficients)
            # A score that is itself a gradient may have saved x: let autograd notice the change.
            torch.autograd.graph.increment_version(x)
            if callback is not None:
                seen.step = t
                callback(seen)
            if record_every is not None and (t + 1) % record_every == 0:
                next(frames).copy_(x)
        if denoise:
            network.at(*plan[-1].end)
            update(x, network(x), _DENOISE, noise.fields())
        else:
            update.finish(x)
        if record_every is None:
            return x
        next(frames).copy_(x)
        return film


class Network:
    """The score as the kernels take it: told its level, guided, checked, contiguous."""

    def __init__(
        self,
        score: Score,
        x: Tensor,
        conditions: Mapping[str, Any] | None,
        guidance: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.score = score
        self.sigma = x.new_empty(x.shape[0], dtype=torch.float32)
        self.conditions = dict(conditions or {})
        self.guidance = guidance
        self.told = True
        # What x is multiplied by: a number or, under a captured graph, a tensor of x's dtype.
        self.scale: float | Tensor = 1.0

    def at(self, sigma: float, mean: float) -> None:
        """Move to another noise level."""
        self.told = not math.isnan(sigma)
        self.sigma.fill_(sigma)
        self.scale = 1 / mean

    def __call__(self, x: Tensor) -> Tensor:
        seen = x if isinstance(self.scale, float) and self.scale == 1.0 else x * self.scale
        told = (self.sigma,) if self.told else ()
        value = self.score(seen, *told, **self.conditions)
        _check.score_like(x, value)
        if self.guidance is not None:
            added = self.guidance(seen, self.sigma)
            _check.score_like(x, added, "guidance")
            value = value + added
        return value.contiguous().resolve_neg()


# The line of the denoising step in a plan's table: its last.
_DENOISE = -1


class _Update:
    """The kernel that ends every step of a plan.

    Known data makes it a step by a table: a line for every phase, of a, b, c and the scale and
    spread of the known part after the step, and one for the denoising at the end.
    """

    def __init__(
        self,
        backend: Backend,
        x: Tensor,
        plan: list[Phase],
        known: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self.backend = backend
        sigma, mean = plan[-1].end
        last = Phase(sigma, 1 / mean, sigma**2, after=(0.0, 1.0))
        self.plan = [*plan, last]
        self.known: Tensor | None
        self.mask: Tensor | None
        self.known, self.mask = _given(x, known, mask)
        if self.known is not None:
            self.table = self.lines(x, self.plan)
            first = Phase(math.nan, after=(plan[0].sigma, plan[0].mean))
            self.first = self.lines(x, [first])

    def lines(self, x: Tensor, plan: list[Phase]) -> Tensor:
        """[phases, 3 or 5]: the coefficients on x's device."""
        columns = 3 if self.known is None else 5
        lines = [(p.a, p.b, p.c, p.end[1], p.end[1] * _spread(p.end[0]))[:columns] for p in plan]
        return torch.tensor(lines, dtype=x.dtype).to(x.device)

    def __call__(
        self, x: Tensor, score: Tensor, index: int, key: Key, coefficients: Tensor | None = None
    ) -> None:
        """The step of phase number `index`, in place on x."""
        if self.known is not None:
            line = self.table[index].unsqueeze(0)
            if coefficients is not None:
                line = torch.cat((coefficients, line[:, 3:].expand(x.shape[0], 2)), 1)
            self.backend.table_step(x, x, score, line, None, key, self.known, self.mask)
        elif coefficients is not None:
            self.backend.table_step(x, x, score, coefficients, None, key)
        else:
            phase = self.plan[index]
            self.backend.affine_step(x, x, score, phase.a, phase.b, phase.c, key)

    def start(self, x: Tensor, key: Key) -> None:
        """Known parts at the level that a plan begins at."""
        if self.known is not None:
            self.backend.table_step(x, x, x, self.first, None, key, self.known, self.mask)

    def finish(self, x: Tensor) -> None:
        """Known parts exact."""
        if self.known is not None and self.mask is not None:
            torch.where(self.mask, self.known, x, out=x)


def _spread(sigma: float) -> float:
    """The known part's noise at a level; Langevin dynamics without levels has none."""
    return 0.0 if math.isnan(sigma) else sigma


def _given(
    x: Tensor, known: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The known part of a state in its shape, checked."""
    if known is None and mask is None:
        return None, None
    if known is None or mask is None:
        missing = "mask" if mask is None else "known"
        raise ValueError(f"{missing}: got none, expected it beside the other of known and mask")
    _check.instance("known", known, Tensor, "a tensor")
    _check.instance("mask", mask, Tensor, "a tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected torch.bool, true where known")
    parts = []
    for name, value in (("known", known.to(x.dtype)), ("mask", mask)):
        try:
            parts.append(value.to(x.device).expand(x.shape).contiguous())
        except RuntimeError:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected one that broadcasts to the "
                f"state's, {tuple(x.shape)}"
            ) from None
    return parts[0], parts[1]


def _replay(
    network: Network,
    x: Tensor,
    plan: list[Phase],
    noise: NoiseKey,
    first_step: int,
    update: _Update,
) -> Callable[[], None]:
    """One step of the chain as a captured graph. What changes from step to step is in tables."""
    steps = torch.tensor([phase.steps for phase in plan]).to(x.device)
    table = update.lines(x, plan).repeat_interleave(steps, 0)
    seen = torch.tensor([(phase.sigma, 1 / phase.mean) for phase in plan], dtype=torch.float32)
    sigmas, scales = seen.to(x.device).repeat_interleave(steps, 0).unbind(1)
    counter = torch.full((), first_step, dtype=torch.int64, device=x.device)
    network.at(plan[0].sigma, 1.0)
    scaled = any(phase.mean != 1.0 for phase in plan)

    def step() -> None:
        at = counter.view(1)
        network.sigma.copy_(sigmas.index_select(0, at).expand_as(network.sigma))
        if scaled:
            network.scale = scales.index_select(0, at).view(())
        value = network(x)
        update.backend.table_step(
            x, x, value, table, counter, noise.fields(), update.known, update.mask
        )
        counter.add_(1)

    return _capture.captured(step, x, counter)


def _frame_count(record_every: int | None, first_step: int, total: int) -> int:
    return 0 if record_every is None else total // record_every - first_step // record_every + 1


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
        _check.state("shape_or_init", shape_or_init)
        _check.noise_shape(shape_or_init.shape)
        _check.sample_range(noise.first_sample, shape_or_init.shape[0])
        wanted = shape_or_init.device if device is None else torch.device(device)
        if wanted.type != shape_or_init.device.type or (
            wanted.index is not None and wanted.index != shape_or_init.device.index
        ):
            raise ValueError(
                f"device: got {device} with a state on {shape_or_init.device}, "
                "expected the state's device or none"
            )
        return shape_or_init.detach().clone(memory_format=torch.contiguous_format)
    prior = noise.for_purpose(Purpose.PRIOR)
    if init == "normal":
        return ops.normal(shape_or_init, prior, device=device).mul_(scale)
    if init == "uniform":
        return ops.uniform(shape_or_init, prior, device=device)
    raise ValueError(f"init: got {init!r}, expected 'normal' or 'uniform'")
