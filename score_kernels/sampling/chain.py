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
    """`steps` equal steps ``x <- a x + b score + c z`` at one noise level.

    Attributes:
        sigma: the level that the score is told; nan: it is told none.
        a, b, c: see above.
        steps: their number.
        mean: the score sees ``x / mean``: m(t) of :mod:`score_kernels.sde`.
        after: noise level and mean of the state after a step, where they are others than before.
        move: a step of another form, in place of a, b and c.
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
    """A step that is not one affine step, in place on x; key is that of its noise."""

    def __call__(self, network: Network, backend: Backend, x: Tensor, key: Key) -> None: ...


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
        kept = None if known is None and mask is None else _Known(x, known, mask, noise)
        if kept is not None and not first_step:
            kept.put(x, plan[0].sigma, plan[0].mean, draw=total)
        backend = choose(x.device, x.dtype)
        step = backend.affine_step
        seed, purpose, _, first_sample = noise.fields()
        film = x.new_empty((_frame_count(record_every, first_step, total), *x.shape), device="cpu")
        frames = iter(film)
        seen = Progress(step=0, level=-1, sigma=math.nan, x=x)
        replay = None
        if cuda_graph:
            _capture.check(backend, x)
            _check_capturable(plan, kept)
            if first_step < total:
                replay = _replay(network, x, plan, noise, first_step, backend)
        for t, index in _steps(plan, first_step, progress):
            phase = plan[index]
            if replay is not None:
                seen.level, seen.sigma = index, phase.sigma
                replay()
            else:
                if index != seen.level:
                    seen.level, seen.sigma = index, phase.sigma
                    network.at(phase.sigma, phase.mean)
                    a, b, c = phase.a, phase.b, phase.c
                key = (seed, purpose, t, first_sample)
                if phase.move is None:
                    step(x, x, network(x), a, b, c, key)
                else:
                    phase.move(network, backend, x, key)
            if kept is not None:
                kept.put(x, *phase.end, draw=t)
            # A score that is itself a gradient may have saved x: let autograd notice the change.
            torch.autograd.graph.increment_version(x)
            if callback is not None:
                seen.step = t
                callback(seen)
            if record_every is not None and (t + 1) % record_every == 0:
                next(frames).copy_(x)
        if denoise:
            last, mean = plan[-1].end
            network.at(last, mean)
            step(x, x, network(x), 1 / mean, last**2, 0.0, noise.fields())
        if kept is not None:
            kept.put(x, 0.0, 1.0, draw=0)
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
        self.mean = 1.0

    def at(self, sigma: float, mean: float) -> None:
        """Move to another noise level."""
        self.told = not math.isnan(sigma)
        self.sigma.fill_(sigma)
        self.mean = mean

    def __call__(self, x: Tensor) -> Tensor:
        seen = x if self.mean == 1.0 else x / self.mean
        told = (self.sigma,) if self.told else ()
        value = self.score(seen, *told, **self.conditions)
        _check.score_like(x, value)
        if self.guidance is not None:
            added = self.guidance(seen, self.sigma)
            _check.score_like(x, added, "guidance")
            value = value + added
        return value.contiguous().resolve_neg()


class _Known:
    """The part of the state that is given: inpainting."""

    def __init__(
        self, x: Tensor, known: Tensor | None, mask: Tensor | None, noise: NoiseKey
    ) -> None:
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
        self.known, self.mask = parts
        # What is not kept may hold anything, NaN too.
        self.known = torch.where(self.mask, self.known, 0.0)
        self.noise = noise.for_purpose(Purpose.KNOWN)

    def put(self, x: Tensor, sigma: float, mean: float, draw: int) -> None:
        """Known parts with the noise of a level, in place; with none (0 or nan) they are exact."""
        if sigma > 0:
            level = x.new_full(x.shape[:1], sigma, dtype=torch.float32)
            value = ops.perturb(self.known, level, self.noise.at(draw % 2**32))
            value = value if mean == 1.0 else value.mul_(mean)
        else:
            value = self.known
        torch.where(self.mask, value, x, out=x)


def _check_capturable(plan: list[Phase], kept: _Known | None) -> None:
    for what, found in (
        ("known and mask", kept is not None),
        ("steps that are not affine", any(phase.move is not None for phase in plan)),
        ("a diffusion that scales the data", any(phase.mean != 1.0 for phase in plan)),
    ):
        if found:
            raise ValueError(f"cuda_graph: got True with {what}, which is not captured yet")


def _replay(
    network: Network,
    x: Tensor,
    plan: list[Phase],
    noise: NoiseKey,
    first_step: int,
    backend: Backend,
) -> Callable[[], None]:
    """One step of the chain as a captured graph. What changes from step to step is in tables."""
    steps = torch.tensor([phase.steps for phase in plan])
    rows = torch.tensor(
        [(phase.sigma, phase.a, phase.b, phase.c) for phase in plan], dtype=torch.float32
    )
    rows = rows.repeat_interleave(steps, 0).to(x.device)
    sigmas, table = rows[:, 0].contiguous(), rows[:, 1:].contiguous()
    counter = torch.full((), first_step, dtype=torch.int64, device=x.device)
    network.at(plan[0].sigma, 1.0)

    def step() -> None:
        network.sigma.copy_(sigmas.index_select(0, counter.view(1)).expand_as(network.sigma))
        backend.table_step(x, x, network(x), table, counter, noise.fields())
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
