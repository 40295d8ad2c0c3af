"""Runs plans of affine steps ``x <- a x + b score + c z``.

The noise of step ``t`` of a chain is draw ``t`` of the chain's key, and rows are global samples
``first_sample + row``, or have addresses of their own: a chain does not depend on how a batch is
split or where it is resumed.
"""

from __future__ import annotations

import inspect
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from score_kernels import checks
from score_kernels.backends import choose
from score_kernels.backends.reference import NO_END
from score_kernels.bars import progress_bar
from score_kernels.fused import FusedScore
from score_kernels.noise import Key, NoiseKey, Purpose, addressed, fresh_seed
from score_kernels.sampling import graph
from score_kernels.sampling.model import Score, ScoreModel
from score_kernels.sampling.monitor import CHECK_EVERY, DivergenceMonitor
from score_kernels.sampling.options import Options, Progress, bind, is_new, resume, start_of

# The public function wraps this one, for a twentieth of a small step.
increment_version = torch._C._increment_version

__all__ = ["PLAN", "Chain", "Phase", "Plan", "run"]


@dataclass(slots=True)
class Phase:
    """`steps` equal steps ``x <- a x + b score + c z`` at one noise level, one kernel each.

    Attributes:
        sigma: the level that is passed to the score; nan: none is.
        a, b, c: see above.
        steps: their number.
        mean: the score is called at ``x / mean``: m(t) of :mod:`score_kernels.diffusion.sde`.
        next_level: noise level and mean of the state after a step, where a step changes them.
        pre_step: what a step does before its kernel, where one call of the score is not all:
            ``pre_step(chain, key)``, key naming the step's noise, may write to ``chain.x`` and
            ``chain.aux`` and returns the score for the kernel and, if samples have step sizes of
            their own, factors r, ``[B]`` or ``[1]``: ``x <- a x + r b score + sqrt(r) c z``.
    """

    sigma: float
    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    steps: int = 1
    mean: float = 1.0
    next_level: tuple[float, float] | None = None
    pre_step: Callable[[Chain, Key], tuple[Tensor, Tensor | None]] | None = None

    def level_after(self) -> tuple[float, float]:
        """Noise level and mean of the state after a step."""
        return self.next_level or (self.sigma, self.mean)

    def row(self) -> tuple[float, ...]:
        """a, b and c, and the factors of known elements and of their noise after a step."""
        sigma, mean = self.level_after()
        # Langevin dynamics without noise levels adds none to known elements.
        return self.a, self.b, self.c, mean, 0.0 if math.isnan(sigma) else mean * sigma


@dataclass(slots=True)
class Plan:
    """What a sampler gives for the state `PLAN`: its phases, and the prior's deviation."""

    phases: list[Phase]
    scale: float


# In the place of a state: the sampler returns its plan and runs nothing.
PLAN: Any = object()


def denoising(plan: list[Phase]) -> Phase:
    """The step ``x <- x / m + sigma^2 score(x / m, sigma)`` from where a plan ends."""
    sigma, mean = plan[-1].level_after()
    return Phase(sigma, 1 / mean, sigma**2, mean=mean, next_level=(0.0, 1.0))


class Chain:
    """The steps of a plan, by number, in place on x and its auxiliary tensors.

    With denoise, one more step ends it; see `denoising`.

    Attributes:
        known: values, mask, and whether the values get noise of the level; or None.
        end: the last operation of a step's kernel.
        gain: the preconditioner in x's shape, or a function of sigma that gives it, or None.
        noise_first: the noise of a step comes before its score.
        project: called with the sigma of the state after every step, or None.
    """

    def __init__(
        self,
        model: ScoreModel,
        x: Tensor,
        aux: dict[str, Tensor],
        plan: list[Phase],
        key: NoiseKey,
        denoise: bool,
    ) -> None:
        self.model, self.x, self.aux, self.key = model, x, aux, key
        self.plan = [*plan, denoising(plan)] if denoise else plan
        self.tensors = (x, *aux.values())
        self.backend = choose(x.device, x.dtype)
        self.known: tuple[Tensor, Tensor, bool] | None = None
        self.end = NO_END
        self.gain: Tensor | Callable[[float], Tensor] | None = None
        self.noise_first = False
        self.project: Callable[[Tensor], object] | None = None
        most = checks.LARGEST if x.dtype == torch.float32 else math.inf
        for p in self.plan:
            if not (-most <= p.a <= most and -most <= p.b <= most and -most <= p.c <= most):
                raise ValueError(
                    f"step at sigma = {p.sigma:g}: got coefficients {p.a:g}, {p.b:g}, {p.c:g}, "
                    "expected numbers within float32's range"
                )
        # Of each phase: the number of steps up to its end.
        self.ends = list(accumulate(phase.steps for phase in self.plan))
        self.steps = self.ends[-1] - denoise
        levels = list({s: None for p in self.plan for s in (p.sigma, p.level_after()[0])})
        table = torch.tensor(levels, dtype=torch.float32, device="cpu").to(x.device)
        model.sigmas = dict(zip(levels, table[:, None].expand(-1, len(x)).unbind(), strict=True))
        self.lines: Tensor | None = None

    @property
    def affine(self) -> bool:
        """Whether its steps are affine steps with an end, and nothing else."""
        more = self.known, self.gain, self.project
        return not self.noise_first and all(part is None for part in more)

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """The coefficients of each phase on the device: ``[1, 3]``, with known elements 5."""
        rows = [list(phase.row()) for phase in self.plan]
        for row in rows:
            # Noise that comes first is not the kernel's.
            row[2] *= not self.noise_first
            row[4] *= self.known is not None and self.known[2]
        table = torch.tensor(rows, dtype=self.x.dtype, device="cpu")
        return table[:, : 3 if self.known is None else 5].contiguous().to(self.x.device).split(1)

    def phase_of(self, t: int) -> int:
        """The index of step t's phase."""
        return bisect_right(self.ends, t)

    def advance(self, t: int, stop: int) -> None:
        """Do the steps from t up to and without stop."""
        x, model, step = self.x, self.model, self.backend.affine_step
        seed, purpose, _, first_sample, addresses = self.key
        known, mask, _ = self.known or (None, None, False)
        first, gain, end = self.noise_first, self.gain, self.end
        by_table = known is not None or gain is not None or end != NO_END
        # Noise that comes first is added by the kernel of the step before, where there is one and
        # nothing else comes between.
        ahead = first and not by_table and self.project is None
        index, changed, noisy = self.phase_of(t), (x,), False
        while t < stop:
            phase, last = self.plan[index], min(stop, self.ends[index])
            model.set_level(phase.sigma, phase.mean)
            a, b, c, pre_step, factors = phase.a, phase.b, phase.c, phase.pre_step, None
            while t < last:
                key = (seed, purpose, t, first_sample, addresses)
                if first:
                    if not noisy and phase.c:
                        self.add_noise(phase.c, key)
                    noisy = ahead and t + 1 < stop
                    c = self.plan[self.phase_of(t + 1)].c if noisy else 0.0
                    key = (seed, purpose, t + noisy, first_sample, addresses)
                if pre_step is None:
                    score = model(x)
                else:
                    score, factors = pre_step(self, key)
                if factors is None and not by_table:
                    step(x, x, score, a, b, c, key)
                else:
                    table = self.rows[index]
                    if factors is not None:
                        table = self._scaled(table, factors)
                    # The denoising at the end has none.
                    g = None if t >= self.steps else gain(phase.sigma) if callable(gain) else gain
                    self.backend.table_step(x, x, score, table, None, key, known, mask, g, end)
                # A score that is itself a gradient may have saved x: let autograd notice.
                increment_version(changed)
                if self.project is not None:
                    self.project(model.level_of(phase.level_after()[0]))
                t += 1
            index += 1

    def add_noise(self, scale: float, key: Key) -> None:
        """``x <- x + scale z``, before a score is taken; clean known elements stay."""
        x = self.x
        self.backend.affine_step(x, x, x, 1.0, 0.0, scale, key)
        if self.known is not None and not self.known[2]:
            torch.where(self.known[1], self.known[0], x, out=x)

    def _scaled(self, row: Tensor, factors: Tensor) -> Tensor:
        """The row for each sample, with the factors of its step size."""
        if self.lines is None or len(self.lines) != len(factors):
            self.lines = row.repeat(len(factors), 1)
            self.b, self.c = self.lines.unbind(1)[1:3]
        self.lines.copy_(row)
        self.b.mul_(factors)
        self.c.mul_(factors.sqrt())
        return self.lines


def run(
    sampler: str,
    score: Score,
    shape_or_init: Sequence[int] | Tensor,
    plan: list[Phase],
    scale: float,
    options: Options,
    *,
    denoise: bool = False,
    init_aux: Callable[[Tensor, NoiseKey], dict[str, Tensor]] | None = None,
    precondition: Tensor | Callable[[float], Tensor] | None = None,
    noise_first: bool = False,
) -> Any:
    """Run a plan from the prior of standard deviation `scale`, or from a state; see `Options`.

    With `denoise` it ends with ``x + sigma^2 score(x, sigma)``, sigma that of the last phase's end
    and x in the data's scale. `init_aux(x, key)` makes the auxiliary tensors at the chain's start;
    `sampler` is the name of the function for an error.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(
                f"{sampler}: got an unexpected keyword argument {name!r}{_samplers_with(name)}"
            )
    denoise = checks.flag("denoise", denoise)
    if shape_or_init is PLAN:
        for name in options:
            raise ValueError(f"arguments: got {name!r}, expected the sampler's own alone")
        if precondition is not None or noise_first:
            name = "noise_first" if noise_first else "precondition"
            raise ValueError(f"{name}: got it for a plan, expected steps of one kernel alone")
        return Plan([*plan, denoising(plan)] if denoise else plan, scale)
    progress = checks.flag("progress", options.get("progress", False))
    cuda_graph = checks.flag("cuda_graph", options.get("cuda_graph", False))
    on_nan = checks.choice("on_nan", options.get("on_nan", "raise"), ("raise", "stop", "ignore"))
    callback, record_every = options.get("callback"), options.get("record_every")
    if callback is not None:
        checks.function("callback", callback)
    total = sum(phase.steps for phase in plan)
    if total > 2**32:
        raise ValueError(f"steps: got {total}, expected at most 2**32, one draw each")
    first_step = checks.count("first_step", options.get("first_step", 0), least=0)
    if first_step > total:
        raise ValueError(f"first_step: got {first_step}, expected at most {total} steps")
    if first_step and not isinstance(shape_or_init, Tensor):
        raise ValueError(f"first_step: got {first_step} with a shape, expected the state there")
    seed, generator = options.get("seed"), options.get("generator")
    if generator is not None:
        checks.instance("generator", generator, torch.Generator, "a torch.Generator")
        if seed is not None:
            raise ValueError("generator: got one beside a seed, expected one of the two")
    if first_step and seed is None:
        raise ValueError(f"first_step: got {first_step} without a seed, expected that of the run")
    every = total + 1
    if record_every is not None:
        every = checks.count("record_every", record_every, least=1)
    if "init" in options and isinstance(shape_or_init, Tensor):
        raise ValueError(f"init: got {options['init']!r} beside a state, expected it with a shape")
    first_sample = options.get("first_sample", 0)
    seed = fresh_seed(generator) if seed is None else seed
    key = NoiseKey(seed, purpose=Purpose.LANGEVIN, first_sample=first_sample)
    rows = options.get("samples"), options.get("draws"), options.get("pieces")
    key = addressed(key, *rows)
    warn_of_training_mode(score, stacklevel=4)
    # Not in inference mode, whose tensors have no versions and give a score no gradients.
    with torch.inference_mode(False), torch.no_grad():
        # A complex state is its parts, one more dimension; shown is what callers see of it.
        paired = isinstance(shape_or_init, Tensor) and shape_or_init.is_complex()
        if isinstance(shape_or_init, Tensor) and paired:
            shape_or_init = torch.view_as_real(shape_or_init.detach().resolve_conj())
        x = start_of(shape_or_init, scale, key, options)
        shown = torch.view_as_complex(x) if paired else x
        aux = {} if init_aux is None else init_aux(x, key)
        resume(aux, options.get("aux"), first_step)
        model = ScoreModel(score, x, options.get("conditions"), options.get("guidance"), paired)
        model.clip(options.get("clip_score"), options.get("clip_over", "row"))
        model.clip_estimate(options.get("clip_x0"))
        chain = Chain(model, x, aux, plan, key, denoise)
        bind(chain, shown, options, precondition, checks.flag("noise_first", noise_first))
        known = chain.known
        if known is not None and not first_step:
            # Known elements at the noise level of the first phase.
            row = x.new_tensor([Phase(plan[0].sigma, mean=plan[0].mean).row()])
            row[0, 4] *= known[2]
            renoised = key.for_purpose(Purpose.KNOWN)
            chain.backend.table_step(x, x, x, row, None, renoised, *known[:2])
        advance = graph.replayed(chain, first_step) if cuda_graph else chain.advance
        if isinstance(score, FusedScore):
            advance = score.chain(chain) or advance
        monitor = None
        if on_nan != "ignore":
            monitor = DivergenceMonitor(chain, first_step, stop=on_nan == "stop")
        skipped = first_step // every
        # The result, unless it is the state after the last step recorded: known elements are exact
        # at the end, and before that as they are after the last step.
        settled = not denoise and (known is None or chain.rows[-1][0, 3:].tolist() == [1.0, 0.0])
        extra = bool(total % every) or not settled or first_step == total
        frames = 0 if record_every is None else total // every - skipped + extra
        trajectory = x.new_empty((frames, *x.shape), device="cpu")
        seen = Progress(step=0, level=-1, sigma=math.nan, x=shown, aux=aux)
        bar = None
        if progress:
            bar = progress_bar(total=total, initial=first_step, unit="step", desc="sampling")
        t, check, ended = first_step, first_step + CHECK_EVERY, False
        while t < total:
            # Up to the next step after which something is to be done.
            stop = min(total, check, t - t % every + every)
            if callback is not None or bar is not None:
                stop = t + 1
            advance(t, stop)
            t = stop
            if t == check:
                check += CHECK_EVERY
                if monitor is not None and not monitor.finite(t):
                    t = monitor.done
                    break
            if callback is not None:
                seen.step, seen.level = t - 1, chain.phase_of(t - 1)
                seen.sigma = plan[seen.level].sigma
                versions = [value._version for value in chain.tensors]
                result = callback(seen)
                if is_new(result, x) or seen.x is not shown:
                    raise TypeError(
                        "callback: returned a new tensor or set progress.x, which changes nothing; "
                        "expected changes in place: progress.x.clamp_(-1, 1), and True to end"
                    )
                changed = versions != [value._version for value in chain.tensors]
                if changed and monitor is not None and not monitor.finite(t, by_callback=True):
                    t = monitor.done
                    break
                if result is True or (isinstance(result, np.bool_) and result):
                    ended = True
                    break
            if t % every == 0:
                trajectory[t // every - skipped - 1].copy_(x)
            if bar is not None:
                bar.update()
        else:
            if denoise:
                chain.advance(total, total + 1)
            if known is not None:
                torch.where(known[1], known[0], x, out=x)
            if monitor is not None and not monitor.finite(total + denoise):
                t = monitor.done
        if bar is not None:
            bar.close()
        if record_every is None:
            # Without the flag that a score may have set: x.requires_grad_().
            return shown.detach()
        last = frames - 1
        if ended or (monitor is not None and monitor.stopped):
            # The last finite state, which may have been recorded.
            last = max(0, t // every - skipped - (t % every == 0))
        trajectory[last].copy_(x)
        trajectory = trajectory[: last + 1]
        return torch.view_as_complex(trajectory) if paired else trajectory


def _samplers_with(option: str) -> str:
    """The samplers that have an option of their own, for an error."""
    from score_kernels import sampling

    functions = {name: getattr(sampling, name) for name in sampling.__all__}
    names = [
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and {option, "options"} <= inspect.signature(function).parameters.keys()
    ]
    return f", which {' and '.join(names)} take" if names else ""


def warn_of_training_mode(score: Any, stacklevel: int) -> None:
    """Dropout and batch normalisation would make samples random, or depend on each other."""
    parts = score.modules() if isinstance(score, nn.Module) else ()
    if any(part.training and isinstance(part, (_DropoutNd, _BatchNorm)) for part in parts):
        warnings.warn(
            "score: a network in training mode, with dropout or batch normalisation; expected "
            "net.eval()",
            stacklevel=stacklevel,
        )
