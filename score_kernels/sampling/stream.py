"""In-flight batching: samples of different plans in one batch that is kept full."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.backends import choose
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.sampling.engine import PLAN, Plan, Score, ScoreModel, warn_of_training_mode

__all__ = ["Request", "stream"]


@dataclass(frozen=True, eq=False)
class Request:
    """A sample to be made.

    Attributes:
        sample: its id, 56 bits, which names its noise: a user's own seed, say.
        sampler: one whose steps are one call of the score each, such as
            :func:`score_kernels.annealed_langevin` or :func:`score_kernels.ddim`.
        arguments: the sampler's own, by name: sigmas, steps, step sizes.
        conditions: further keyword arguments of the score, tensors without a batch dimension; the
            same names in all requests.
    """

    sample: int
    sampler: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Tensor] = field(default_factory=dict)


class _Steps:
    """A request with the steps of its plan: coefficients, noise level and scale of each."""

    def __init__(self, request: Request, score: Score) -> None:
        checks.instance("requests", request, Request, "requests or None")
        checks.unsigned("sample", request.sample, 56)
        self.request, self.done = request, 0
        plan = request.sampler(score, PLAN, **request.arguments)
        checks.instance("sampler", plan, Plan, "a sampler of this library")
        if any(phase.pre_step is not None for phase in plan.phases):
            raise ValueError("sampler: got one whose steps are more than one call of the score")
        if any(math.isnan(phase.sigma) for phase in plan.phases):
            raise ValueError("sampler: got one without a noise level, expected sigma")
        self.prior = plan.scale
        self.lines: list[tuple[float, ...]] = []
        for phase in plan.phases:
            line = phase.a, phase.b, phase.c, phase.sigma, 1 / phase.mean
            self.lines += [line] * phase.steps


# Of a slot without a request, whose state stays as it is.
_IDLE = (1.0, 0.0, 0.0, 1.0, 1.0)


def stream(
    score: Score,
    requests: Iterable[Request | None],
    shape: Sequence[int],
    *,
    seed: int,
    slots: int = 64,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Request, Tensor]]:
    """Samples of many requests, ``slots`` at a time, each at its own step of its own plan.

    A finished sample leaves the batch and the next request enters it between two calls of the
    score. Each has the bits that it has alone, of ``request.sampler(score, (1, *shape), seed=seed,
    samples=torch.tensor([request.sample]), ...)``, if the score treats rows independently. The
    batch has always the same shape, so that compiled networks and CUDA graphs stay valid.

    Args:
        score: ``score(x, sigma)`` as samplers take it, with x ``[slots, *shape]``.
        requests: a sequence, of which the longest come first, or an iterator, in its order. One
            that yields None has no request for the moment: the batch goes on without.
        shape: of one sample.
        seed: 64 bits, for all requests.
        slots: rows of the batch.
        device: where; default: torch's default device.

    Yields:
        A request and its sample, of the shape, as soon as that is done.

    Raises:
        TypeError, ValueError: a request or an argument is of the wrong kind.
        FloatingPointError: a sample is not finite.
    """
    slots = checks.count("slots", slots, least=1)
    size = (slots, *checks.noise_shape((1, *shape))[1:])
    key = NoiseKey(seed, purpose=Purpose.LANGEVIN)
    place = checks.device("device", device)
    warn_of_training_mode(score, stacklevel=3)
    return _run(score, requests, size, key, place)


def _run(
    score: Score,
    requests: Iterable[Request | None],
    size: tuple[int, ...],
    key: NoiseKey,
    device: torch.device | None,
) -> Iterator[tuple[Request, Tensor]]:
    with torch.inference_mode(False):
        x = torch.zeros(size, dtype=torch.float32, device=device)
    backend, model = choose(x.device, x.dtype), ScoreModel(score, x)
    waiting: Iterator[_Steps | None]
    waiting = (None if request is None else _Steps(request, score) for request in requests)
    if isinstance(requests, Sequence):
        there = [steps for steps in waiting if steps is not None]
        there.sort(key=lambda steps: -len(steps.lines))
        waiting = iter(there)
    batch: list[_Steps | None] = [None] * len(x)
    more = True
    while more or any(batch):
        for row, steps in enumerate(batch):
            if steps is None and more:
                try:
                    steps = next(waiting)
                except StopIteration:
                    more = False
                if steps is None:
                    break
                batch[row] = steps
                _enter(x[row : row + 1], steps, key)
                for name, value in steps.request.conditions.items():
                    checks.instance(f"conditions[{name!r}]", value, Tensor, "a tensor")
                    if name not in model.conditions:
                        shape, dtype = (len(x), *value.shape), value.dtype
                        model.conditions[name] = torch.zeros(shape, dtype=dtype, device=x.device)
                    model.conditions[name][row] = value
        if any(batch):
            _advance(x, batch, model, backend, key)
        for row, steps in enumerate(batch):
            if steps is not None and steps.done == len(steps.lines):
                if not bool(x[row].isfinite().all()):
                    raise FloatingPointError(f"x: sample {steps.request.sample} is not finite")
                batch[row] = None
                yield steps.request, x[row].clone()


def _enter(x: Tensor, steps: _Steps, key: NoiseKey) -> None:
    """Start a request in a slot ``[1, ...]`` from its prior."""
    sample = torch.tensor([steps.request.sample], device=x.device)
    prior = key.for_purpose(Purpose.PRIOR).rows(sample)
    x.copy_(ops.normal(x.shape, prior, device=x.device).mul_(steps.prior))


@torch.inference_mode(False)
@torch.no_grad()
def _advance(
    x: Tensor, batch: list[_Steps | None], model: ScoreModel, backend: Any, key: NoiseKey
) -> None:
    """One step of every slot."""
    lines = [steps.lines[steps.done] if steps else _IDLE for steps in batch]
    values = torch.tensor(lines, dtype=torch.float32, device="cpu").to(x.device)
    identities = [(s.request.sample, s.done) if s else (0, 0) for s in batch]
    samples, draws = torch.tensor(identities, device="cpu").to(x.device).unbind(1)
    model.sigma = values[:, 3].contiguous()
    model.scale = values[:, 4].view(-1, *[1] * (x.dim() - 1))
    table = values[:, :3].contiguous()
    backend.table_step(x, x, model(x), table, None, key.rows(samples, draws=draws))
    torch.autograd.graph.increment_version(x)
    for steps in batch:
        if steps is not None:
            steps.done += 1
