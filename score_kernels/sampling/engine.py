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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from score_kernels import checks, ops
from score_kernels.backends import choose
from score_kernels.backends.reference import NO_END
from score_kernels.bars import progress_bar
from score_kernels.fused import FusedScore
from score_kernels.noise import Key, NoiseKey, Purpose, addressed, fresh_seed
from score_kernels.ops._dispatch import check_addresses
from score_kernels.ops._formulas import segment_sums
from score_kernels.ops.langevin import step_end
from score_kernels.sampling import graph
from score_kernels.sampling.model import Score, ScoreModel
from score_kernels.sampling.monitor import CHECK_EVERY, DivergenceMonitor

# The public function wraps this one, for a twentieth of a small step.
increment_version = torch._C._increment_version

__all__ = ["PLAN", "Chain", "Options", "Phase", "Plan", "Progress", "run"]


class Options(TypedDict, total=False):
    """The keyword arguments that every sampler takes besides its own.

    Attributes:
        seed: 64 bits, names all noise of the run; default: drawn from torch's default generator,
            which ``torch.manual_seed`` seeds.
        generator: draw the seed from this torch.Generator instead.
        first_sample: global index of row 0. Rows are the same bits however a run is split into
            batches, if score treats rows independently.
        samples, draws, pieces: what rows are instead, int64 ``[B]`` on x's device: row r is the
            ``pieces[r]``-th run of sample ``samples[r]``, with draws moved on by ``draws[r]``; see
            :meth:`score_kernels.NoiseKey.rows`. Any of them may be left out; rows of one sample and
            piece have the same noise, so that packed atoms need pieces.
        init: how a shape is filled: "normal", with the standard deviation of the largest noise
            level, or "uniform" on [0, 1], as the authors' code of NCSN does.
        first_step: resume: the index of the first step to do, when shape_or_init is the state after
            that many steps of a run with the same seed, which must be given.
        aux: resume a sampler that has auxiliary tensors: those of `Progress` after that step.
        callback: called with a `Progress` after each update step. It may change the state, with
            operations of torch in place: ``progress.x.clamp_(-1, 1)``; those of ``.data`` and of
            NumPy are not seen by `on_nan`. The chain ends where it returns True, without denoising.
        record_every: return the trajectory, on the CPU, ``[n, B, ...]``: x after every so many
            steps and, last, the result, once.
        progress: show a progress bar.
        device: where to start from a shape; default: torch's default device.
        cuda_graph: capture one call of score and one update as a CUDA graph and replay it for every
            step: for small networks, which spend their time on launches. The bits are the same.
            score must do the same work on the same memory at every call, whatever sigma holds, and
            not wait for the device.
        conditions: further keyword arguments of score at every call: classes, say.
        guidance: ``guidance(x, sigma)`` or ``guidance(x, sigma, score)``, in x's shape, is added
            to every score: the gradient of a log likelihood of what was observed, say. The denoised
            estimate is ``x + sigma^2 score``. Enable gradients inside where it needs them.
        clip_score: the largest norm of the score (guidance included); a longer one is shortened.
        clip_over: what the norm is of: "row" of the batch (default; packed atoms are rows), "last"
            (the last dimension: atoms of ``[B, N, 3]``), "element", or int64 ``[B]``, the segments
            of packed rows as in `center`.
        clip_x0: the score's estimate of the data, ``x + sigma^2 score``, is limited to (low, high);
            or one number below 1, a quantile: that of each sample's absolute values, at least 1,
            limits it and is scaled to 1 (dynamic thresholding, Saharia et al. 2022, arXiv
            2205.11487).
        clamp: (low, high); every step ends with x limited to it.
        wrap: a period P; every step ends with x moved into [0, P).
        center: int64 ``[B]``, rows of one number, 0 to B - 1, are one segment (the atoms of one
            molecule): after every step its mean over them is subtracted.
        project: ``project(x, sigma)`` changes the state in place after every step, last of all;
            sigma ``[B]`` is the noise level after the step. x is the state itself, which a
            diffusion with a mean scales; score and guidance see it divided by that.
        known, mask: inpainting (Song and Ermon 2019, arXiv 1907.05600, appendix B): where mask is
            true, x is known plus noise of the chain's current level, and exactly known at the end.
            Both are broadcast to the state's shape; mask is bool.
        known_noise: False: known without noise, at every level, also where a sampler adds noise
            before its score.
        on_nan: what to do when the state is not finite, which is checked every 50 steps and at the
            end: "raise" (the default) a FloatingPointError that names level, step and the first
            such sample; "stop" there with a warning, and return the last finite state; or "ignore"
            it. To find the step, those since the last check are repeated with the same noise from a
            copy of the state, which all but "ignore" keep. A state that a callback has changed is
            checked and copied at once.

    A network is called in the mode, train or eval, that it is in. A complex state is sampled as its
    real and imaginary parts, each with noise of its own of the level's deviation (that of
    torch.randn has 0.7 a part); scores, known elements and functions take and give complex numbers,
    `clip_score` is for their absolute values, `clamp`, `wrap` and `clip_x0` for each part.
    """

    seed: int | None
    generator: torch.Generator | None
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
    guidance: Callable[..., Tensor] | None
    clip_score: float | None
    clip_over: str | Tensor
    clip_x0: float | tuple[float, float] | None
    clamp: tuple[float, float] | None
    wrap: float | None
    center: Tensor | None
    project: Callable[[Tensor, Tensor], object] | None
    known: Tensor | None
    mask: Tensor | None
    known_noise: bool
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
                    after = phase.level_after()[0]
                    sigma = model.sigmas.get(after)
                    self.project(torch.full_like(model.sigma, after) if sigma is None else sigma)
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
        x = _start(shape_or_init, scale, key, options)
        shown = torch.view_as_complex(x) if paired else x
        aux = {} if init_aux is None else init_aux(x, key)
        _resume(aux, options.get("aux"), first_step)
        model = ScoreModel(score, x, options.get("conditions"), options.get("guidance"), paired)
        model.clip(options.get("clip_score"), options.get("clip_over", "row"))
        model.clip_estimate(options.get("clip_x0"))
        chain = Chain(model, x, aux, plan, key, denoise)
        _bind(chain, shown, options, precondition, checks.flag("noise_first", noise_first))
        known = chain.known
        if known is not None and not first_step:
            # Known elements at the noise level of the first phase.
            row = x.new_tensor([Phase(plan[0].sigma, mean=plan[0].mean).row()])
            row[0, 4] *= known[2]
            start = key.for_purpose(Purpose.KNOWN)
            chain.backend.table_step(x, x, x, row, None, start, *known[:2])
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
                if _is_new(result, x) or seen.x is not shown:
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


def _bind(
    chain: Chain,
    shown: Tensor,
    options: Options,
    precondition: Tensor | Callable[[float], Tensor] | None,
    noise_first: bool,
) -> None:
    """Give a chain what a user's options add to its steps."""
    x, pairs = chain.x, shown is not chain.x
    chain.end = step_end(options.get("clamp"), options.get("wrap"))
    known, mask = options.get("known"), options.get("mask")
    if pairs and isinstance(known, Tensor) and isinstance(mask, Tensor):
        known, mask = torch.view_as_real(known.to(shown.dtype)), mask.unsqueeze(-1)
    copies = _known_elements(x, known, mask)
    if copies is not None:
        chain.known = *copies, checks.flag("known_noise", options.get("known_noise", True))
    elif "known_noise" in options:
        raise ValueError("known_noise: got it without known and mask, expected it beside them")
    chain.noise_first = noise_first
    if precondition is not None:
        if noise_first:
            raise ValueError("noise_first: got True beside a precondition, expected one of the two")
        chain.gain = _preconditioner(precondition, x, pairs)
    parts: list[Callable[[Tensor], object]] = []
    segments, project = options.get("center"), options.get("project")
    if segments is not None:
        checks.segments(segments, x, "center")
        counts = segment_sums(x.new_ones(len(x)), segments).clamp_(min=1)

        def subtract_means(_: Tensor) -> None:
            means = segment_sums(x.flatten(1) if x.dim() > 1 else x[:, None], segments)
            means /= counts[:, None]
            x.sub_(means.index_select(0, segments).view(x.shape))

        parts.append(subtract_means)
    if project is not None:
        checks.function("project", project)

        def projected(sigma: Tensor) -> None:
            result = project(shown, sigma)
            if _is_new(result, x):
                raise TypeError(
                    "project: returned a new tensor, which changes nothing; expected changes in "
                    "place: x.copy_(...)"
                )

        parts.append(projected)
    if parts:
        chain.project = lambda sigma: [part(sigma) for part in parts]


def _is_new(result: Any, x: Tensor) -> bool:
    """Whether a function has returned a tensor that is not in the state's memory."""
    if not isinstance(result, Tensor):
        return False
    return result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def _preconditioner(
    given: Tensor | Callable[[float], Tensor], x: Tensor, pairs: bool
) -> Tensor | Callable[[float], Tensor]:
    """A preconditioner, checked, in the shape of x; of a function's the last one is kept."""

    def checked(value: Any) -> Tensor:
        if isinstance(value, (float, int)):
            value = x.new_tensor([value])
        checks.instance("precondition", value, Tensor, "a tensor, or a function of sigma")
        value = value.unsqueeze(-1) if pairs else value
        try:
            gain = torch.empty_like(x).copy_(value)
        except RuntimeError:
            got, shape = tuple(value.shape), tuple(x.shape)
            raise ValueError(f"precondition: got shape {got}, expected a part of {shape}") from None
        if not bool((gain.isfinite() & (gain >= 0)).all()):
            raise ValueError("precondition: got numbers below 0 or not finite, expected at least 0")
        return gain

    if not callable(given):
        return checked(given)
    last: dict[float, Tensor] = {}

    def at(sigma: float) -> Tensor:
        if sigma not in last:
            last.clear()
            last[sigma] = checked(given(sigma))
        return last[sigma]

    return at


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
