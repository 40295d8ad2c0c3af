"""Samplers: chains of affine steps ``x <- a x + b score + c z`` (form A; see `annealed_langevin`).

The noise of step ``t`` of a chain is draw ``t`` of the chain's key, and rows are global samples
``first_sample + row``: a chain does not depend on how a batch is split or where it is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from score_kernels import _capture, _check, ops
from score_kernels.backends import Backend, choose
from score_kernels.noise import NoiseKey, Purpose, fresh_seed

__all__ = ["Progress", "annealed_langevin", "langevin"]

Score = Callable[..., Tensor]


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
class _Level:
    """`steps` equal steps of ``x <- x + (alpha/2) score + sqrt(alpha) z`` at one sigma."""

    sigma: float
    alpha: float
    steps: int

    @property
    def score(self) -> float:
        """What the score is multiplied with."""
        return 0.5 * self.alpha

    @property
    def noise(self) -> float:
        """What the noise is multiplied with."""
        return math.sqrt(self.alpha)


def langevin(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    *,
    step_size: float,
    steps: int,
    sigma: float | None = None,
    seed: int | None = None,
    first_sample: int = 0,
    init: str = "normal",
    first_step: int = 0,
    callback: Callable[[Progress], object] | None = None,
    record_every: int | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """Langevin dynamics, ``x <- x + (step_size/2) score(x) + sqrt(step_size) z``.

    Form A, as in Song and Ermon (2019, arXiv 1907.05600). On a Gaussian target of variance v the
    chain settles at the variance ``v / (1 - step_size / (4 v))``.

    Args:
        score: ``score(x)``, or ``score(x, sigma)`` when sigma is given; see `annealed_langevin`.
        step_size: in squared units of x, above 0.
        steps: number of update steps of the whole chain.
        sigma: a noise level handed to the score as ``[B]``, for networks that want one.
        init: how a shape is filled: "normal" (standard normals) or "uniform" on [0, 1].
        shape_or_init, seed, first_sample, first_step, callback, record_every, progress, device,
            cuda_graph: as in `annealed_langevin`.

    Returns:
        ``x``, or the recorded states; see ``record_every``.
    """
    level = math.nan if sigma is None else _check.positive("sigma", sigma)
    step_size = _check.positive("step_size", step_size)
    steps = _check.count("steps", steps, least=0)
    return _chain(
        score,
        shape_or_init,
        [_Level(level, step_size, steps)],
        scale=1.0,
        seed=seed,
        first_sample=first_sample,
        init=init,
        first_step=first_step,
        callback=callback,
        record_every=record_every,
        progress=progress,
        device=device,
        cuda_graph=cuda_graph,
        denoise=False,
    )


def annealed_langevin(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    sigmas: Any,
    *,
    steps_per_level: int,
    step_size: float,
    seed: int | None = None,
    first_sample: int = 0,
    denoise: bool = True,
    init: str = "normal",
    first_step: int = 0,
    callback: Callable[[Progress], object] | None = None,
    record_every: int | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """Annealed Langevin dynamics (Algorithm 1 of Song and Ermon 2019, arXiv 1907.05600).

    For each noise level sigma_i, from the largest to the smallest, `steps_per_level` times::

        alpha_i = step_size * sigma_i^2 / sigma_L^2
        x <- x + (alpha_i / 2) score(x, sigma_i) + sqrt(alpha_i) z

    This is form A. Codes that write ``x + alpha score + sqrt(2 alpha) z`` (form B: the NCSN and
    NCSNv2 image code) have half our step_size: their 2e-5 is 4e-5 here.

    Args:
        score: ``score(x, sigma)`` with x the state ``[B, ...]`` and sigma ``[B]`` float32 on x's
            device; returns x's shape in float32, bfloat16 or float16. Called without gradients;
            enable them inside if the score is itself a gradient. The sigma tensor is reused.
        shape_or_init: ``[B, ...]`` to start from the prior, or the initial state itself (float32;
            float64 runs on the reference backend), which is not changed.
        sigmas: noise levels, strictly decreasing: ``[L]`` tensor or a sequence.
        steps_per_level: number T of update steps at each level.
        step_size: epsilon of form A, in squared units of x at the smallest level.
        seed: 64 bits, names all noise of the run; default: drawn from torch's default generator,
            so that ``torch.manual_seed`` rules it.
        first_sample: global index of row 0. Rows are the same bits however a run is split into
            batches, if score treats rows independently.
        denoise: end with ``x + sigma_L^2 score(x, sigma_L)`` (Song and Ermon 2020, arXiv
            2006.09011).
        init: how a shape is filled: "normal", N(0, sigma_1^2), or "uniform" on [0, 1], as the
            authors' code does.
        first_step: resume: the index of the first step to do, ``0 <= first_step <= L T``, when
            shape_or_init is the state after that many steps of a run with the same seed.
        callback: called with a `Progress` after each update step.
        record_every: return, on the CPU, ``[n, B, ...]``: the state after every so many steps
            and, last, the result.
        progress: show a progress bar.
        device: where to start from a shape; default: torch's default device.
        cuda_graph: capture one call of score and one update as a CUDA graph and replay it for
            every step: for small networks, whose time goes into launches. The noise is the same
            bits. score must do the same work on the same memory at every call, whatever sigma
            holds, and not wait for the device.

    Returns:
        ``x``, or the recorded states; see ``record_every``.

    Raises:
        TypeError: an argument, or what score returns, is of the wrong kind or dtype.
        ValueError: sigmas do not decrease, a number is out of range, score returns another shape
            or device, or cuda_graph is asked for where there is no CUDA kernel.
        RuntimeError: cuda_graph is asked for and score cannot be captured.
    """
    levels = _check.noise_levels(sigmas)
    steps = _check.count("steps_per_level", steps_per_level, least=1)
    step_size = _check.positive("step_size", step_size)
    plan = [_Level(s, step_size * (s / levels[-1]) ** 2, steps) for s in levels]
    return _chain(
        score,
        shape_or_init,
        plan,
        scale=levels[0],
        seed=seed,
        first_sample=first_sample,
        init=init,
        first_step=first_step,
        callback=callback,
        record_every=record_every,
        progress=progress,
        device=device,
        cuda_graph=cuda_graph,
        denoise=denoise,
    )


def _chain(
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    plan: list[_Level],
    *,
    scale: float,
    seed: int | None,
    first_sample: int,
    init: str,
    first_step: int,
    callback: Callable[[Progress], object] | None,
    record_every: int | None,
    progress: bool,
    device: torch.device | str | None,
    cuda_graph: bool,
    denoise: bool,
) -> Tensor:
    if not callable(score):
        raise TypeError(f"score: got {type(score).__name__} {score!r}, expected a function")
    seed = fresh_seed() if seed is None else seed
    noise = NoiseKey(seed, purpose=Purpose.LANGEVIN, first_sample=first_sample)
    total = sum(level.steps for level in plan)
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
        backend = choose(x.device, x.dtype)
        step = backend.affine_step
        seed, purpose, _, first_sample = noise.fields()
        sigma = x.new_empty(x.shape[0], dtype=torch.float32)
        film = x.new_empty((_frame_count(record_every, first_step, total), *x.shape), device="cpu")
        frames = iter(film)
        seen = Progress(step=0, level=-1, sigma=math.nan, x=x)
        replay = None
        if cuda_graph:
            _capture.check(backend, x)
            if first_step < total:
                replay = _replay(score, x, sigma, plan, noise, first_step, backend)
        for t, index in _steps(plan, first_step, progress):
            level = plan[index]
            if replay is not None:
                seen.level, seen.sigma = index, level.sigma
                replay()
            else:
                if index != seen.level:
                    seen.level, seen.sigma = index, level.sigma
                    sigma.fill_(level.sigma)
                    b, c = level.score, level.noise
                value = _evaluate(score, x, sigma, level.sigma)
                step(x, x, value, 1.0, b, c, (seed, purpose, t, first_sample))
            # A score that is itself a gradient may have saved x: let autograd notice the change.
            torch.autograd.graph.increment_version(x)
            if callback is not None:
                seen.step = t
                callback(seen)
            if record_every is not None and (t + 1) % record_every == 0:
                next(frames).copy_(x)
        if denoise:
            last = plan[-1].sigma
            sigma.fill_(last)
            step(x, x, _evaluate(score, x, sigma, last), 1.0, last**2, 0.0, noise.fields())
        if record_every is None:
            return x
        next(frames).copy_(x)
        return film


def _replay(
    score: Score,
    x: Tensor,
    sigma: Tensor,
    plan: list[_Level],
    noise: NoiseKey,
    first_step: int,
    backend: Backend,
) -> Callable[[], None]:
    """One step of the chain as a captured graph. What changes from step to step is in tables."""
    steps = torch.tensor([level.steps for level in plan])
    rows = torch.tensor(
        [(level.sigma, 1.0, level.score, level.noise) for level in plan], dtype=torch.float32
    )
    rows = rows.repeat_interleave(steps, 0).to(x.device)
    sigmas, table = rows[:, 0].contiguous(), rows[:, 1:].contiguous()
    counter = torch.full((), first_step, dtype=torch.int64, device=x.device)
    level = plan[0].sigma

    def step() -> None:
        sigma.copy_(sigmas.index_select(0, counter.view(1)).expand_as(sigma))
        value = _evaluate(score, x, sigma, level)
        backend.table_step(x, x, value, table, counter, noise.fields())
        counter.add_(1)

    return _capture.captured(step, x, counter)


def _frame_count(record_every: int | None, first_step: int, total: int) -> int:
    return 0 if record_every is None else total // record_every - first_step // record_every + 1


def _steps(plan: list[_Level], first_step: int, progress: bool) -> Iterator[tuple[int, int]]:
    """(step, index of its level) from first_step on."""

    def pairs() -> Iterator[tuple[int, int]]:
        start = 0
        for index, level in enumerate(plan):
            for t in range(max(start, first_step), start + level.steps):
                yield t, index
            start += level.steps

    if not progress:
        return pairs()
    from tqdm.auto import tqdm

    total = sum(level.steps for level in plan)
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


def _evaluate(score: Score, x: Tensor, sigma: Tensor, level: float) -> Tensor:
    """The score as the kernels take it: checked, contiguous, no lazy negation."""
    value = score(x) if math.isnan(level) else score(x, sigma)
    _check.score_like(x, value)
    return value.contiguous().resolve_neg()
