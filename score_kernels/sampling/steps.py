"""What a chain is made of: phases of equal steps, the score, and the kernel that ends a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import Backend
from score_kernels.noise import Key, NoiseKey
from score_kernels.ops.langevin import readable
from score_kernels.sampling import graph

__all__ = ["Network", "Phase", "Score", "Steps", "Update"]

Score = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Phase:
    """`steps` equal steps ``x <- a x + b score + c z`` at one noise level, one kernel each.

    Attributes:
        sigma: the level that the score is told; nan: it is told none.
        a, b, c: see above.
        steps: their number.
        mean: the score sees ``x / mean``: m(t) of :mod:`score_kernels.diffusion.sde`.
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
        self.conditions = {} if conditions is None else checks.keywords("conditions", conditions)
        if guidance is not None:
            checks.function("guidance", guidance)
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
        checks.score_like(x, value)
        if self.guidance is not None:
            added = self.guidance(seen, self.sigma)
            checks.score_like(x, added, "guidance")
            value = value + added
        return readable(x, (value))


# The line of the denoising step in a plan's table: its last.
DENOISE = -1


class Update:
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
    for name, value in (("known", known), ("mask", mask)):
        checks.instance(name, value, Tensor, "a tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected torch.bool, true where known")
    parts = []
    for name, value in (("known", known.to(x.dtype)), ("mask", mask)):
        try:
            parts.append(value.to(x.device).expand(x.shape))
        except RuntimeError:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected one that broadcasts to the "
                f"state's, {tuple(x.shape)}"
            ) from None
    if not bool((parts[0].isfinite() | ~parts[1]).all()):
        raise ValueError("known: not finite where mask is true, expected finite numbers there")
    return parts[0], parts[1]


class Steps:
    """The steps of a plan, by number, in place on a state; after them comes the end."""

    def __init__(
        self, network: Network, update: Update, plan: list[Phase], noise: NoiseKey, denoise: bool
    ) -> None:
        self.network = network
        self.update = update
        self.plan = plan
        self.seed, self.purpose, _, self.first_sample = noise
        self.denoise = denoise
        self._index = -1

    def __call__(self, x: Tensor, t: int, index: int) -> None:
        """Step t, which is of phase number `index`."""
        phase = self.plan[index]
        if index != self._index:
            self._index = index
            self.network.at(phase.sigma, phase.mean)
        key = (self.seed, self.purpose, t, self.first_sample)
        if phase.move is None:
            self.update(x, self.network(x), index, key)
        else:
            value, coefficients = phase.move(self.network, self.update.backend, x, key)
            self.update(x, value, index, key, coefficients)
        # A score that is itself a gradient may have saved x: let autograd notice the change.
        torch.autograd.graph.increment_version(x)

    def end(self, x: Tensor) -> None:
        """The denoising, if there is one, and known parts exact."""
        if not self.denoise:
            self.update.finish(x)
            return
        self._index = -1
        self.network.at(*self.plan[-1].end)
        key = (self.seed, self.purpose, 0, self.first_sample)
        self.update(x, self.network(x), DENOISE, key)
        torch.autograd.graph.increment_version(x)

    def captured(self, x: Tensor, first_step: int) -> Callable[[Tensor, int, int], None]:
        """The same steps from first_step on, replayed from a graph of one.

        Raises:
            ValueError: the steps, or the backend, cannot be captured.
            RuntimeError: the score does something that cannot be captured.
        """
        graph.check(self.update.backend, x)
        if any(phase.move is not None for phase in self.plan):
            raise ValueError(
                "cuda_graph: got True with steps that are more than one call of score and one "
                "affine step, which are not captured"
            )
        if first_step >= sum(phase.steps for phase in self.plan):
            return self
        # What changes from step to step is in tables.
        network, update = self.network, self.update
        steps = torch.tensor([phase.steps for phase in self.plan]).to(x.device)
        table = update.lines(x, self.plan).repeat_interleave(steps, 0)
        seen = [(phase.sigma, 1 / phase.mean) for phase in self.plan]
        told = torch.tensor(seen, dtype=torch.float32).to(x.device)
        sigmas, scales = told.repeat_interleave(steps, 0).unbind(1)
        counter = torch.full((), first_step, dtype=torch.int64, device=x.device)
        key = (self.seed, self.purpose, 0, self.first_sample)
        network.at(self.plan[0].sigma, 1.0)
        scaled = any(phase.mean != 1.0 for phase in self.plan)

        def step() -> None:
            at = counter.view(1)
            network.sigma.copy_(sigmas.index_select(0, at).expand_as(network.sigma))
            if scaled:
                network.scale = scales.index_select(0, at).view(())
            value = network(x)
            known, mask = update.known, update.mask
            update.backend.table_step(x, x, value, table, counter, key, known, mask)
            counter.add_(1)

        replay = graph.captured(step, x, counter)
        return lambda x, t, index: replay()
