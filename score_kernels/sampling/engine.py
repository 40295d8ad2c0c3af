"""Runs plans of affine steps ``x <- a x + b score + c z``.

The noise of step ``t`` of a chain is draw ``t`` of the chain's key, and rows are global samples
``first_sample + row``, or have addresses of their own: a chain does not depend on how a batch is
split or where it is resumed.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from score_kernels import checks, ops
from score_kernels.backends import choose
from score_kernels.bars import progress_bar
from score_kernels.fused import FusedScore
from score_kernels.noise import Key, NoiseKey, Purpose, addressed, fresh_seed
from score_kernels.ops._dispatch import check_addresses
from score_kernels.sampling import graph
from score_kernels.sampling.monitor import CHECK_EVERY, DivergenceMonitor

# The public function wraps this one, for a twentieth of a small step.
increment_version = torch._C._increment_version

__all__ = ["PLAN", "Chain", "Options", "Phase", "Plan", "Progress", "Score", "ScoreModel", "run"]

Score = Callable[..., Tensor]


class Options(TypedDict, total=False):
    """The keyword arguments that every sampler takes besides its own.

    Attributes:
        seed: 64 bits, names all noise of the run; default: drawn from torch's default generator,
            which ``torch.manual_seed`` seeds.
        first_sample: global index of row 0. Rows are the same bits however a run is split into
            batches, if score treats rows independently.
        samples, draws, pieces: what rows are instead, int64 ``[B]`` on x's device: row r is the
            ``pieces[r]``-th run of sample ``samples[r]``, with draws moved on by ``draws[r]``; see
            :meth:`score_kernels.NoiseKey.rows`. Any of them may be left out.
        init: how a shape is filled: "normal", with the standard deviation of the largest noise
            level, or "uniform" on [0, 1], as the authors' code of NCSN does.
        first_step: resume: the index of the first step to do, when shape_or_init is the state after
            that many steps of a run with the same seed, which must be given.
        aux: resume a sampler that has auxiliary tensors: those of `Progress` after that step.
        callback: called with a `Progress` after each update step. It may change the state, with
            operations of torch in place: ``progress.x.clamp_(-1, 1)``; those of ``.data`` and of
            NumPy are not seen by `on_nan`.
        record_every: return the trajectory, on the CPU, ``[n, B, ...]``: x after every so many
            steps and, last, the result, once.
        progress: show a progress bar.
        device: where to start from a shape; default: torch's default device.
        cuda_graph: capture one call of score and one update as a CUDA graph and replay it for every
            step: for small networks, which spend their time on launches. The bits are the same.
            score must do the same work on the same memory at every call, whatever sigma holds, and
            not wait for the device.
        conditions: further keyword arguments of score at every call: classes, say.
        guidance: ``guidance(x, sigma)``, in x's shape, is added to every score: the gradient of a
            log likelihood of what was observed, say. Enable gradients inside where it needs them.
        known, mask: inpainting (Song and Ermon 2019, arXiv 1907.05600, appendix B): where mask is
            true, x is known plus noise of the chain's current level, and exactly known at the end.
            Both are broadcast to the state's shape; mask is bool.
        on_nan: what to do when the state is not finite, which is checked every 50 steps and at the
            end: "raise" (the default) a FloatingPointError that names level, step and the first
            such sample; "stop" there with a warning, and return the last finite state; or "ignore"
            it. To find the step, those since the last check are repeated with the same noise from a
            copy of the state, which all but "ignore" keep. A state that a callback has changed is
            checked and copied at once.

    A network is called in the mode, train or eval, that it is in.
    """

    seed: int | None
    first_sample: int
    samples: Tensor | None
    draws: Tensor | None
    pieces: Tensor | None
    init: str
    first_step: int
    aux: Mapping[str, Tensor] | None
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
    """The argument of a callback, one object for a whole chain.

    Attributes:
        step: index of the step just done, from 0 for the chain's first.
        level: index of its noise level.
        sigma: that noise level (``nan`` for Langevin dynamics without one).
        x: the state itself, ``[B, ...]``; it changes with the next step, so copy what you keep.
        aux: the sampler's auxiliary tensors by name, which change too.
    """

    step: int
    level: int
    sigma: float
    x: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)


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

    def row(self) -> tuple[float, ...]:
        """a, b and c, and the factors of known elements and of their noise after a step."""
        sigma, mean = self.next_level or (self.sigma, self.mean)
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
    sigma, mean = plan[-1].next_level or (plan[-1].sigma, plan[-1].mean)
    return Phase(sigma, 1 / mean, sigma**2, mean=mean, next_level=(0.0, 1.0))


class ScoreModel:
    """A score at a noise level, as kernels take it: guided, checked, contiguous."""

    def __init__(
        self,
        score: Score,
        x: Tensor,
        conditions: Mapping[str, Any] | None = None,
        guidance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        checks.function("score", score)
        if guidance is not None:
            checks.function("guidance", guidance)
        self.score, self.guidance = score, guidance
        self.conditions = checks.keywords("conditions", {} if conditions is None else conditions)
        # The noise levels ``[B]`` of a plan, each one number in memory.
        self.sigmas: dict[float, Tensor] = {}
        self.sigma = x.new_empty(x.shape[0], dtype=torch.float32)
        self.level: tuple[float, float] | None = None
        # Whether the score takes sigma, and what x is multiplied by (a tensor in a CUDA graph).
        self.pass_sigma = True
        self.scale: float | Tensor | None = None
        self.shape, self.device = x.shape, x.device
        # The dtype of scores that kernels can read as they are.
        self.dtype: torch.dtype | None = None

    def set_level(self, sigma: float, mean: float = 1.0) -> None:
        """Move to a noise level, if the model is not there yet."""
        if self.level != (sigma, mean):
            self.level = sigma, mean
            self.pass_sigma = not math.isnan(sigma)
            level = self.sigmas.get(sigma)
            self.sigma = torch.full_like(self.sigma, sigma) if level is None else level
            self.scale = None if mean == 1.0 else 1 / mean

    def __call__(self, x: Tensor) -> Tensor:
        """The score at x."""
        seen = x if self.scale is None else x * self.scale
        version, level = seen._version, self.sigma._version
        if self.pass_sigma:
            try:
                value = self.score(seen, self.sigma, **self.conditions)
            except TypeError as error:
                checks.takes_sigma("score", self.score, error)
                raise
        else:
            value = self.score(seen, **self.conditions)
        if self.guidance is not None:
            checks.score_like(x, value)
            added = self.guidance(seen, self.sigma)
            checks.score_like(x, added, "guidance")
            value = value + added
        if self.sigma._version != level:
            raise checks.changed("score", "sigma")
        if seen._version != version:
            raise checks.changed("score", "x")
        # Checked in full only where it is not like the last one.
        if (
            type(value) is Tensor
            and value.dtype is self.dtype
            and value.shape == self.shape
            and value.device == self.device
            and value.is_contiguous()
        ):
            return value
        checks.score_like(x, value)
        # What torch's derivatives may give: zeros without memory, and lazy negations.
        score = torch.zeros_like(x) if value._is_zerotensor() else value.resolve_neg().contiguous()
        self.dtype = value.dtype if score is value else None
        return score


class Chain:
    """The steps of a plan, by number, in place on x and its auxiliary tensors.

    With denoise, one more step ends it; see `denoising`.
    """

    def __init__(
        self,
        model: ScoreModel,
        x: Tensor,
        aux: dict[str, Tensor],
        plan: list[Phase],
        key: NoiseKey,
        known: tuple[Tensor, Tensor] | None,
        denoise: bool,
    ) -> None:
        self.model, self.x, self.aux, self.key, self.known = model, x, aux, key, known
        self.tensors = (x, *aux.values())
        self.backend = choose(x.device, x.dtype)
        self.plan = plan
        if denoise:
            self.plan = [*plan, denoising(plan)]
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
        levels = list({phase.sigma: None for phase in self.plan})
        table = torch.tensor(levels, dtype=torch.float32, device="cpu").to(x.device)
        model.sigmas = dict(zip(levels, table[:, None].expand(-1, len(x)).unbind(), strict=True))
        self.lines: Tensor | None = None

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """The coefficients of each phase on the device: ``[1, 3]``, with known elements 5."""
        columns = 3 if self.known is None else 5
        rows = [phase.row()[:columns] for phase in self.plan]
        table = torch.tensor(rows, dtype=self.x.dtype, device="cpu")
        return table.to(self.x.device).split(1)

    def phase_of(self, t: int) -> int:
        """The index of step t's phase."""
        return bisect_right(self.ends, t)

    def advance(self, t: int, stop: int) -> None:
        """Do the steps from t up to and without stop."""
        x, model, step = self.x, self.model, self.backend.affine_step
        seed, purpose, _, first_sample, addresses = self.key
        known, mask = self.known or (None, None)
        index, changed = self.phase_of(t), (x,)
        while t < stop:
            phase, end = self.plan[index], min(stop, self.ends[index])
            model.set_level(phase.sigma, phase.mean)
            a, b, c, pre_step, factors = phase.a, phase.b, phase.c, phase.pre_step, None
            while t < end:
                key = (seed, purpose, t, first_sample, addresses)
                if pre_step is None:
                    score = model(x)
                else:
                    score, factors = pre_step(self, key)
                if factors is None and known is None:
                    step(x, x, score, a, b, c, key)
                else:
                    table = self.rows[index]
                    if factors is not None:
                        table = self._scaled(table, factors)
                    self.backend.table_step(x, x, score, table, None, key, known, mask)
                # A score that is itself a gradient may have saved x: let autograd notice.
                increment_version(changed)
                t += 1
            index += 1

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
) -> Any:
    """Run a plan from the prior of standard deviation `scale`, or from a state; see `Options`.

    With `denoise` it ends with ``x + sigma^2 score(x, sigma)``, sigma that of the last phase's end
    and x in the data's scale. `init_aux(x, key)` makes the auxiliary tensors at the chain's start;
    `sampler` is the name of the function for an error.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(f"{sampler}: got an unexpected keyword argument {name!r}")
    denoise = checks.flag("denoise", denoise)
    if shape_or_init is PLAN:
        for name in options:
            raise ValueError(f"arguments: got {name!r}, expected the sampler's own alone")
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
    if first_step and options.get("seed") is None:
        raise ValueError(f"first_step: got {first_step} without a seed, expected that of the run")
    every = total + 1
    if record_every is not None:
        every = checks.count("record_every", record_every, least=1)
    if "init" in options and isinstance(shape_or_init, Tensor):
        raise ValueError(f"init: got {options['init']!r} beside a state, expected it with a shape")
    seed, first_sample = options.get("seed"), options.get("first_sample", 0)
    seed = fresh_seed() if seed is None else seed
    key = NoiseKey(seed, purpose=Purpose.LANGEVIN, first_sample=first_sample)
    rows = options.get("samples"), options.get("draws"), options.get("pieces")
    key = addressed(key, *rows)
    warn_of_training_mode(score, stacklevel=4)
    # Not in inference mode, whose tensors have no versions and give a score no gradients.
    with torch.inference_mode(False), torch.no_grad():
        x = _start(shape_or_init, scale, key, options)
        aux = {} if init_aux is None else init_aux(x, key)
        _resume(aux, options.get("aux"), first_step)
        model = ScoreModel(score, x, options.get("conditions"), options.get("guidance"))
        known = _known_elements(x, options.get("known"), options.get("mask"))
        chain = Chain(model, x, aux, plan, key, known, denoise)
        if known is not None and not first_step:
            # Known elements at the noise level of the first phase.
            row = x.new_tensor([Phase(plan[0].sigma, mean=plan[0].mean).row()])
            chain.backend.table_step(x, x, x, row, None, key.for_purpose(Purpose.KNOWN), *known)
        advance = graph.replayed(chain, first_step) if cuda_graph else chain.advance
        if isinstance(score, FusedScore):
            advance = score.chain(chain) or advance
        monitor = None
        if on_nan != "ignore":
            monitor = DivergenceMonitor(chain, first_step, stop=on_nan == "stop")
        skipped = first_step // every
        # The result, unless it is the state after the last step recorded: known elements are exact
        # at the end, and before that as they are after the last step.
        settled = not denoise and (known is None or plan[-1].row()[3:] == (1.0, 0.0))
        extra = bool(total % every) or not settled or first_step == total
        frames = 0 if record_every is None else total // every - skipped + extra
        trajectory = x.new_empty((frames, *x.shape), device="cpu")
        seen = Progress(step=0, level=-1, sigma=math.nan, x=x, aux=aux)
        bar = None
        if progress:
            bar = progress_bar(total=total, initial=first_step, unit="step", desc="sampling")
        t, check = first_step, first_step + CHECK_EVERY
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
                if isinstance(result, Tensor) or seen.x is not x:
                    raise TypeError(
                        "callback: returned a tensor or set progress.x, which changes nothing; "
                        "expected changes in place: progress.x.clamp_(-1, 1)"
                    )
                changed = versions != [value._version for value in chain.tensors]
                if changed and monitor is not None and not monitor.finite(t, by_callback=True):
                    t = monitor.done
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
            return x.detach()
        last = frames - 1
        if monitor is not None and monitor.stopped:
            # The last finite state, which may have been recorded.
            last = max(0, t // every - skipped - (t % every == 0))
        trajectory[last].copy_(x)
        return trajectory[: last + 1]


def warn_of_training_mode(score: Any, stacklevel: int) -> None:
    """Dropout and batch normalisation would make samples random, or depend on each other."""
    parts = score.modules() if isinstance(score, nn.Module) else ()
    if any(part.training and isinstance(part, (_DropoutNd, _BatchNorm)) for part in parts):
        warnings.warn(
            "score: a network in training mode, with dropout or batch normalisation; expected "
            "net.eval()",
            stacklevel=stacklevel,
        )


def _start(
    shape_or_init: Sequence[int] | Tensor, scale: float, key: NoiseKey, options: Options
) -> Tensor:
    """The state that a chain starts from."""
    device = checks.device("device", options.get("device"))
    init = checks.choice("init", options.get("init", "normal"), ("normal", "uniform"))
    if isinstance(shape_or_init, Tensor):
        checks.state("shape_or_init", shape_or_init)
        checks.noise_shape(shape_or_init.shape)
        checks.sample_range(key.first_sample, shape_or_init.shape[0])
        here = shape_or_init.device
        if device and (device.type != here.type or device.index not in (None, here.index)):
            raise ValueError(f"device: got {device}, expected the state's, {here}, or none")
        x = shape_or_init.detach().clone(memory_format=torch.contiguous_format)
    else:
        shape_or_init = checks.noise_shape(shape_or_init)
        prior = key.for_purpose(Purpose.PRIOR)
        if init == "uniform":
            x = ops.uniform(shape_or_init, prior, device=device)
        else:
            x = ops.normal(shape_or_init, prior, device=device).mul_(scale)
    if key.addresses is not None:
        check_addresses(key.addresses, x)
    if x.is_meta:
        raise ValueError("device: got meta, expected one that computes")
    return x


def _known_elements(
    x: Tensor, known: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Copies of a user's known and mask in the shape of x and on its device, if there are any."""
    if known is None and mask is None:
        return None
    copies = []
    value: Any
    for name, value, dtype in (("known", known, x.dtype), ("mask", mask, torch.bool)):
        checks.instance(name, value, Tensor, "a tensor: known and mask go together")
        if dtype == torch.bool and value.dtype != dtype:
            raise TypeError(f"mask: got dtype {value.dtype}, expected torch.bool, true where known")
        try:
            copies.append(torch.empty_like(x, dtype=dtype).copy_(value))
        except RuntimeError:
            got, shape = tuple(value.shape), tuple(x.shape)
            raise ValueError(f"{name}: got shape {got}, expected a part of {shape}") from None
    values, where = copies
    if not bool((values.isfinite() | ~where).all()):
        raise ValueError("known: not finite where mask is true, expected finite numbers there")
    return values, where


def _resume(made: dict[str, Tensor], aux: Mapping[str, Tensor] | None, first_step: int) -> None:
    """Give the auxiliary tensors the values that they are resumed with."""
    if aux is None and made and first_step:
        raise ValueError(f"aux: got none with first_step {first_step}, expected Progress.aux there")
    values = made if aux is None else checks.keywords("aux", aux)
    if values.keys() != made.keys():
        raise ValueError(f"aux: got {sorted(values)}, expected {sorted(made)}")
    for name, value in values.items():
        checks.instance(f"aux[{name!r}]", value, Tensor, "a tensor")
        got, expected = tuple(value.shape), tuple(made[name].shape)
        if got != expected:
            raise ValueError(f"aux[{name!r}]: got shape {got}, expected {expected}")
        made[name].copy_(value)
