"""What every sampler takes besides its own arguments, and how a chain gets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from score_kernels import checks, ops
from score_kernels.noise import NoiseKey, Purpose
from score_kernels.ops._dispatch import check_addresses
from score_kernels.ops._formulas import rows_of, segment_sums
from score_kernels.ops.langevin import step_end

if TYPE_CHECKING:
    from score_kernels.sampling.engine import Chain

__all__ = ["Options", "Progress", "bind", "is_new", "resume", "start_of"]


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


def start_of(
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


def bind(
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
            means = segment_sums(rows_of(x), segments)
            means /= counts[:, None]
            x.sub_(means.index_select(0, segments).view(x.shape))

        parts.append(subtract_means)
    if project is not None:
        checks.function("project", project)

        def projected(sigma: Tensor) -> None:
            result = project(shown, sigma)
            if is_new(result, x):
                raise TypeError(
                    "project: returned a new tensor, which changes nothing; expected changes in "
                    "place: x.copy_(...)"
                )

        parts.append(projected)
    if parts:
        chain.project = lambda sigma: [part(sigma) for part in parts]


def is_new(result: Any, x: Tensor) -> bool:
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
        gain = _spread("precondition", value.unsqueeze(-1) if pairs else value, x, x.dtype)
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
        copies.append(_spread(name, value, x, dtype))
    values, where = copies
    if not bool((values.isfinite() | ~where).all()):
        raise ValueError("known: not finite where mask is true, expected finite numbers there")
    return values, where


def _spread(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a value in the state's shape and on its device."""
    try:
        return torch.empty_like(x, dtype=dtype).copy_(value)
    except RuntimeError:
        got, shape = tuple(value.shape), tuple(x.shape)
        raise ValueError(f"{name}: got shape {got}, expected a part of {shape}") from None


def resume(made: dict[str, Tensor], aux: Mapping[str, Tensor] | None, first_step: int) -> None:
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
