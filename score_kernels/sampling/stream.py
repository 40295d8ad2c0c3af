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
from score_kernels.sampling.engine import PLAN, Plan, warn_of_training_mode
from score_kernels.sampling.model import Score, ScoreModel

__all__ = ["Request", "stream"]


@dataclass(frozen=True, eq=False)
class Request:
    """A sample to be made.

    Attributes:
        sample: its id, 56 bits, which names its noise.
        sampler: one whose steps are one call of the score each: `annealed_langevin`, `ddpm`,
            `ddim`, `langevin` with a sigma, `consistent_annealed`, `euler_maruyama`, and
            `predictor_corrector` with the corrector "ald" or None.
        arguments: the sampler's own, by name: sigmas, steps, step sizes.
        conditions: further keyword arguments of the score, tensors without a batch dimension; of
            the same names, shapes and dtypes in all requests of a stream.
    """

    sample: int
    sampler: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Tensor] = field(default_factory=dict)


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
    samples=torch.tensor([request.sample]), conditions=..., **request.arguments)``, where the score
    of a row has the same bits in any batch: that of matrix products may differ in the last ones.
    The batch has always the same shape, so that compiled networks stay valid.

    Args:
        score: ``score(x, sigma)`` as samplers take it, with x ``[slots, *shape]``.
        requests: a sequence, of which the longest come first, or an iterator, in its order. One
            that yields None has no request for the moment, and the batch goes on without; where the
            batch is empty it is asked again at once, so that it should wait then.
        shape: of one sample.
        seed: 64 bits, for all requests.
        slots: rows of the batch.
        device: where; default: torch's default device.

    Yields:
        A request and its sample, of the shape, as soon as that is done.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or a request, which is named.
        FloatingPointError: a sample is not finite.

    An error of a request ends that one alone: the others go on with the next ``next()``.
    """
    slots = checks.count("slots", slots, least=1)
    size = (slots, *checks.noise_shape((1, *shape) if isinstance(shape, Sequence) else shape)[1:])
    checks.instance("requests", requests, Iterable, "a sequence or an iterator of requests")
    key = NoiseKey(seed, purpose=Purpose.LANGEVIN)
    place = checks.device("device", device)
    warn_of_training_mode(score, stacklevel=3)
    with torch.inference_mode(False):
        x = torch.zeros(size, dtype=torch.float32, device=place)
    return _Stream(score, requests, x, key)


class _Steps:
    """A request with the steps of its plan: coefficients, noise level and scale of each."""

    def __init__(self, request: Request, score: Score) -> None:
        checks.unsigned("sample", request.sample, 56)
        checks.function("sampler", request.sampler)
        checks.keywords("conditions", request.conditions)
        for name, value in request.conditions.items():
            checks.instance(f"conditions[{name!r}]", value, Tensor, "a tensor")
        arguments = checks.keywords("arguments", request.arguments)
        self.request, self.done = request, 0
        plan = request.sampler(score, PLAN, **arguments)
        checks.instance("sampler", plan, Plan, "a sampler of this library")
        if any(phase.pre_step is not None for phase in plan.phases):
            raise ValueError("sampler: its steps are not one call of the score each")
        if any(math.isnan(phase.sigma) for phase in plan.phases):
            raise ValueError("sampler: got one without a noise level, expected sigma")
        self.prior = plan.scale
        self.lines: list[tuple[float, ...]] = []
        for phase in plan.phases:
            line = phase.a, phase.b, phase.c, phase.sigma, 1 / phase.mean
            self.lines += [line] * phase.steps


# Of a slot without a request, whose state stays as it is.
_IDLE = (1.0, 0.0, 0.0, 1.0, 1.0)


class _Stream(Iterator[tuple[Request, Tensor]]):
    """An iterator that goes on after an error, which a generator does not."""

    def __init__(
        self, score: Score, requests: Iterable[Request | None], x: Tensor, key: NoiseKey
    ) -> None:
        self.score, self.x, self.key = score, x, key
        self.backend, self.model = choose(x.device, x.dtype), ScoreModel(score, x)
        self.batch: list[_Steps | None] = [None] * len(x)
        self.more = True
        # Shapes and dtypes of the conditions of the first request.
        self.kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] | None = None
        self.requests: Iterator[Request | _Steps | None] = iter(requests)
        if isinstance(requests, Sequence):
            planned = [self._plan(request) for request in requests if request is not None]
            planned.sort(key=lambda steps: -len(steps.lines))
            self.requests = iter(planned)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __next__(self) -> tuple[Request, Tensor]:
        while True:
            for row, steps in enumerate(self.batch):
                if steps is not None and steps.done == len(steps.lines):
                    self.batch[row] = None
                    if not bool(self.x[row].isfinite().all()):
                        raise FloatingPointError(f"x: sample {steps.request.sample} is not finite")
                    return steps.request, self.x[row].clone()
            if self._fill():
                continue
            if any(self.batch):
                self._advance()
            elif not self.more:
                raise StopIteration

    def _plan(self, request: Any) -> _Steps:
        checks.instance("requests", request, Request, "requests or None")
        try:
            return _Steps(request, self.score)
        except (TypeError, ValueError) as error:
            raise type(error)(f"request {request.sample}: {error}") from error

    def _fill(self) -> bool:
        """Let the next request enter an empty slot; whether one did."""
        if not self.more or None not in self.batch:
            return False
        try:
            found = next(self.requests)
        except StopIteration:
            self.more = False
            return False
        if found is None:
            return False
        row = self.batch.index(None)
        steps = found if isinstance(found, _Steps) else self._plan(found)
        self._keep_conditions(row, steps.request)
        sample = torch.tensor([steps.request.sample], device=self.x.device)
        prior = self.key.for_purpose(Purpose.PRIOR).rows(sample)
        start = ops.normal((1, *self.x.shape[1:]), prior, device=self.x.device)
        self.x[row] = start[0].mul_(steps.prior)
        self.batch[row] = steps
        return True

    def _keep_conditions(self, row: int, request: Request) -> None:
        kept = self.model.conditions
        kinds = {n: (tuple(value.shape), value.dtype) for n, value in request.conditions.items()}
        if self.kinds is None:
            self.kinds = kinds
            for name, (shape, dtype) in kinds.items():
                kept[name] = torch.zeros((len(self.x), *shape), dtype=dtype, device=self.x.device)
        if kinds != self.kinds:
            raise ValueError(
                f"request {request.sample}: got conditions {kinds}, expected those of the first "
                f"request, {self.kinds}"
            )
        for name, value in request.conditions.items():
            kept[name][row] = value

    def _advance(self) -> None:
        """One step of every slot."""
        x, model = self.x, self.model
        lines = [steps.lines[steps.done] if steps else _IDLE for steps in self.batch]
        values = torch.tensor(lines, dtype=torch.float32, device="cpu").to(x.device)
        identities = [(s.request.sample, s.done) if s else (0, 0) for s in self.batch]
        samples, draws = torch.tensor(identities, device="cpu").to(x.device).unbind(1)
        model.sigma = values[:, 3].contiguous()
        model.scale = values[:, 4].view(-1, *[1] * (x.dim() - 1))
        table, key = values[:, :3].contiguous(), self.key.rows(samples, draws=draws)
        self.backend.table_step(x, x, model(x), table, None, key)
        torch.autograd.graph.increment_version(x)
        for steps in self.batch:
            if steps is not None:
                steps.done += 1
