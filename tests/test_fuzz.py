"""Fuzzing of every public function: the right result, or an error that names an argument.

Each target has arguments that fit together, in several memory layouts and with odd values, some of
which are then replaced by wrong ones. Where a call succeeds, its result is compared with that of
contiguous copies on the reference backend.

FUZZ_CALLS makes more calls of each target than a test run, other ones each time.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import score_kernels as sk
from score_kernels import ops, sampling
from score_kernels.diffusion import sde
from score_kernels.sampling import Options

CALLS = int(os.environ.get("FUZZ_CALLS", "40"))
Draw = Callable[[st.SearchStrategy[Any]], Any]

# --- values -----------------------------------------------------------------------------------

SHAPES = [(1, 1), (3, 5), (2, 3, 4), (7,), (4, 64), (2, 0), (0, 3), (2, 1025), (5, 2), (9, 500)]
# For losses and samplers, which take some milliseconds an element.
SMALL = [(1, 1), (3, 5), (2, 3, 4), (7,), (5, 2), (4, 20)]
HALVES = [torch.bfloat16, torch.float16]
ODD_VALUES = [math.nan, math.inf, -math.inf, -0.0, 1e-45, -1e-38, 65520.0]
KEYS = st.builds(
    sk.NoiseKey,
    st.integers(0, 2**64 - 1),
    purpose=st.integers(0, 255),
    draw=st.integers(0, 2**32 - 1),
    first_sample=st.sampled_from([0, 5, 2**32 - 3, 2**56 - 10]),
)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape),
    "every second": lambda t: torch.stack((t, t), -1)[..., 0],
    "leaf": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "in a graph": lambda t: t.clone().requires_grad_() * 1,
    "one row for all": lambda t: t[:1].expand(t.shape),
}

# What is made of a tensor that fits; much of it is refused, some of it is right.
WRONG_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.float64, *HALVES, torch.complex64)},
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.int32, torch.int64, torch.bool)},
    "meta": lambda t: t.to("meta"),
    "no dimensions": lambda t: torch.tensor(1.0),
    "more samples": lambda t: torch.cat((t, t)),
    "one dimension more": lambda t: t.unsqueeze(-1),
    "flat": lambda t: t.flatten(),
    "numpy": lambda t: t.float().numpy(),
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
    "number": lambda t: 1.0,
    "text": lambda t: "x",
}
WRONG: dict[str, list[Any]] = {
    "number": [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 5e-324, 1e-300, 1e300, 0.5, 7, -1]
    + [True, "0.1", None, 1j, np.float32(0.5), np.float64("nan"), torch.tensor(0.5), [], {}],
    "integer": [-1, 0, 1, 2, 3, True, 2.0, 2.5, math.nan, "3", None, np.int64(2), np.uint8(3), 1j]
    + [2**64, -(2**64), torch.tensor(2), torch.tensor([1, 2]), []],
    "shape": [(), (0,), (-1, 2), (2.5,), (None,), ("3",), (2**40, 2**40), (1, 2**35), (2**64,)]
    + ["23", None, [2, 3], torch.Size((2, 3)), range(1, 4), (np.int64(2), 3)],
    "key": [None, 7, True, "key", (1, 0, 0, 0), sk.NoiseKey],
    "flag": [True, False, np.bool_(True)],
    "name": ["", "normals", None, 3, True],
    "function": [None, 3, "score", lambda *a: None, lambda *a: a[0], lambda *a: 3.0]
    + [lambda *a: a[0].double(), lambda *a: a[0][:1], lambda *a: a[0].to("meta")]
    + [lambda *a: a[0].int(), lambda *a: a[0].numpy(), lambda *a: a[0].half()]
    + [lambda *a: a[0].transpose(0, -1).contiguous().transpose(0, -1), lambda *a: a[0] * math.nan],
    "levels": [None, 3, 1.0, "levels", [], [1.0], [1.0, 2.0], [1.0, 1.0], [2.0, math.nan], [1, "x"]]
    + [[math.inf, 1.0], [1.0, 0.0], [1.0, -1.0], [True, False], torch.tensor(1.0), torch.tensor([])]
    + [torch.tensor([[2.0, 1.0]]), torch.tensor([2, 1]), np.array([2.0, 1.0]), [3.0, 2.0, 1.0]]
    + [[1e300, 1e-300], [1e160, 1.0], [1.0, 1e-200], {3.0: 1}],
    "any": [None, 3, "x", [], {}, torch.zeros(2), math.nan],
}

# --- arguments --------------------------------------------------------------------------------


@dataclass
class Batch:
    """What the tensors of one call share; `dtype` is the scores'."""

    draw: Draw
    shape: tuple[int, ...]
    dtype: torch.dtype

    def values(self, shape: tuple[int, ...], *, odd: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(self.draw(st.integers(0, 2**32)))
        made = torch.randn(shape, generator=generator)
        if odd and made.numel() and self.draw(st.integers(0, 4)) == 0:
            at = self.draw(st.integers(0, made.numel() - 1))
            made.view(-1)[at] = self.draw(st.sampled_from(ODD_VALUES))
        return made


@dataclass(frozen=True)
class Parameter:
    """How a value is made, and by which values of `WRONG` it is replaced ("fixed": by none)."""

    kind: str
    make: Callable[[Batch], Any]
    optional: bool = False


def drawn(kind: str, strategy: st.SearchStrategy[Any]) -> Parameter:
    return Parameter(kind, lambda batch: batch.draw(strategy))


def number(low: float = 0.0, high: float = 2.0) -> Parameter:
    return drawn("number", st.floats(low, high))


def integer(low: int, high: int) -> Parameter:
    return drawn("integer", st.integers(low, high))


def one_of(*values: Any, kind: str = "name") -> Parameter:
    return drawn(kind, st.sampled_from(values))


def tensor(make: Callable[[Batch], Any]) -> Parameter:
    return Parameter("tensor", make)


def maybe(parameter: Parameter) -> Parameter:
    """Given in half of the calls."""
    return Parameter(parameter.kind, parameter.make, optional=True)


KEY, SEED = drawn("key", KEYS), integer(0, 2**64 - 1)
FLAG = one_of(True, False, kind="flag")
SHAPE = Parameter("shape", lambda batch: batch.shape)
STATE = tensor(lambda batch: batch.values(batch.shape))
SCORE_VALUES = tensor(lambda batch: batch.values(batch.shape).to(batch.dtype))
PER_SAMPLE = tensor(lambda batch: batch.values(batch.shape[:1], odd=False).abs() + 0.1)
CLEAN = tensor(lambda batch: batch.values(batch.shape, odd=False))
MASK = tensor(lambda batch: torch.arange(math.prod(batch.shape)).view(batch.shape) % 2 == 0)
PROBE = one_of("rademacher", "gaussian", "sphere")


def table(lines: int | None, columns: int) -> Parameter:
    """A table of so many lines, or of one for each sample."""
    return tensor(
        lambda batch: batch.values((batch.shape[0] if lines is None else lines, columns), odd=False)
    )


# --- targets ----------------------------------------------------------------------------------


@dataclass
class Target:
    """A function, its arguments, and how its result is compared with the reference's:

    bits       the same bits
    chain      the same bits, or a FloatingPointError
    sums       within the rounding of a sum over the elements
    close      within 1e-4
    any        not at all
    """

    function: Callable[..., Any]
    compare: str
    parameters: dict[str, Parameter]
    shapes: list[tuple[int, ...]]


TARGETS: dict[str, Target] = {}


def target(
    name: str,
    function: Callable[..., Any],
    compare: str = "any",
    /,
    *,
    on: list[tuple[int, ...]] = SHAPES,
    **parameters: Parameter,
) -> None:
    TARGETS[name] = Target(function, compare, parameters, on)


WHERE = one_of(None, "cpu", kind="fixed")
DTYPE = one_of(torch.float32, torch.float64, *HALVES, kind="fixed")
target("ops.words", ops.words, "bits", shape=SHAPE, noise=KEY, device=WHERE)
for _kind in ("normal", "uniform", "rademacher"):
    _function = getattr(ops, _kind)
    target(f"ops.{_kind}", _function, "bits", shape=SHAPE, noise=KEY, device=WHERE, dtype=DTYPE)

_step: dict[str, Any] = {"x": STATE, "score": SCORE_VALUES, "noise": KEY}
_abc = {name: number(-2.0) for name in "abc"}
target("ops.affine_step_", ops.affine_step_, "bits", **_step, **_abc)
target("ops.langevin_step_", ops.langevin_step_, "bits", **_step, alpha=number())
target("ops.langevin_step", ops.langevin_step, "bits", **_step, alpha=number())
_line = tensor(lambda batch: torch.tensor(batch.draw(st.integers(0, 3))))
_known: dict[str, Any] = {"known": STATE, "mask": MASK}
_none = one_of(None, kind="fixed")
_table = ops.table_step_
target("ops.table_step_", _table, "bits", **_step, table=table(4, 3), step=_line)
target("ops.table_step_ by row", _table, "bits", **_step, table=table(None, 3), step=_none)
target("ops.table_step_ known", _table, "bits", **_step, **_known, table=table(4, 5), step=_line)

target("ops.perturb", ops.perturb, "bits", x=STATE, sigma=PER_SAMPLE, noise=KEY)
_dsm = {"score": SCORE_VALUES, "sigma": PER_SAMPLE, "noise": KEY, "weight": maybe(PER_SAMPLE)}
target("ops.dsm_loss_from_score", ops.dsm_loss_from_score, "sums", **_dsm)
_probe: dict[str, Any] = {"noise": KEY, "probe": PROBE}
_reduce: dict[str, Any] = {**_probe, "variance_reduced": FLAG}
_per_row = tensor(lambda batch: batch.values(batch.shape[:1]))
target("ops.probe_dot", ops.probe_dot, "sums", s=SCORE_VALUES, **_probe)
target("ops.probe_scale", ops.probe_scale, "close", g=_per_row, shape=SHAPE, **_probe)
target("ops.ssm_reduce", ops.ssm_reduce, "sums", g=SCORE_VALUES, s=SCORE_VALUES, **_reduce)
target("ops.fd_pair", ops.fd_pair, "close", x=STATE, step=PER_SAMPLE, **_probe)
_pair = {"above": SCORE_VALUES, "below": SCORE_VALUES, "step": PER_SAMPLE}
target("ops.fd_reduce", ops.fd_reduce, "sums", **_pair, **_reduce)
_fields = {"purpose": integer(0, 255), "draw": integer(0, 9), "first_sample": integer(0, 9)}
target("NoiseKey", sk.NoiseKey, seed=SEED, **_fields)


def gaussian(x: Tensor, sigma: Tensor | None = None) -> Tensor:
    """The score of N(0, 1) plus noise: the same operations for every element."""
    if sigma is None:
        return -x
    return -x / (1 + sigma.view(-1, *[1] * (x.dim() - 1)) ** 2)


SCORE = one_of(gaussian, kind="function")
_levels = ([2.0, 1.0, 0.5], [1.0], [50.0, 0.01], [3.0, 0.1])
_kinds_of_levels = st.sampled_from([list, torch.tensor, np.array])
LEVELS = drawn(
    "levels", st.builds(lambda kind, made: kind(made), _kinds_of_levels, st.sampled_from(_levels))
)
REDUCTION = one_of("mean", "sum", "none")
LABELS = tensor(lambda batch: torch.zeros(batch.shape[0], dtype=torch.int64))

_dsm = {"net": SCORE, "x": CLEAN, "sigmas": LEVELS, "seed": SEED, "labels": maybe(LABELS)}
_dsm |= {"reduction": REDUCTION, "return_per_level": FLAG}
target("dsm_loss", sk.dsm_loss, "close", on=SMALL, **_dsm, weighting=number())
target("dsm_loss weighted", sk.dsm_loss, "close", on=SMALL, **_dsm, weighting=PER_SAMPLE)
_ssm = {"score": SCORE, "x": CLEAN, "seed": SEED, "probe": PROBE, "reduction": REDUCTION}
_ssm |= {"method": one_of("auto", "double_backward", "jvp", "finite_difference")}
_ssm |= {"probes": integer(1, 3), "fd_step": number(0.5), "variance_reduced": FLAG}
_ssm_loss = sk.sliced_score_loss
target("sliced_score_loss", _ssm_loss, "close", on=SMALL, **_ssm, sigma=maybe(number(0.1)))
target("sliced_score_loss per sample", _ssm_loss, "close", on=SMALL, **_ssm, sigma=PER_SAMPLE)
_exact = {"score": SCORE, "x": CLEAN, "sigma": maybe(number(1))}
target("exact_score_loss", sk.exact_score_loss, on=SMALL, **_exact)

# What every sampler takes besides its own.
OPTIONS: dict[str, Any] = {
    "score": SCORE,
    "seed": SEED,
    "first_sample": maybe(integer(0, 9)),
    "record_every": maybe(integer(1, 3)),
    "init": maybe(one_of("normal", "uniform")),
    "callback": maybe(one_of(lambda progress: None, kind="any")),
    "conditions": maybe(one_of({}, kind="any")),
    "guidance": maybe(SCORE),
    "progress": maybe(one_of(False, kind="flag")),
    "first_step": maybe(one_of(0, kind="integer")),
}
# beta stays below 1, so that every number of steps can be asked for.
SDES = [sde.VE(), sde.VP(0.1, 0.9), sde.SubVP(0.1, 0.9)]
CHAIN = sde.DDPMSchedule.linear(20, 0.01, 0.3)


def sampler(name: str, compare: str = "chain", **own: Parameter) -> None:
    """A sampler from a shape, and from a state of which some elements are known."""
    function = getattr(sk, name)
    target(name, function, compare, on=SMALL, shape_or_init=SHAPE, **OPTIONS, **own)
    own = {"shape_or_init": CLEAN, "known": maybe(CLEAN), "mask": maybe(MASK), **own}
    target(f"{name} from a state", function, compare, on=SMALL, **OPTIONS, **own)


_steps = integer(1, 5)
_sde = {"sde": one_of(*SDES, kind="any"), "steps": _steps, "end": number(0.001, 0.5)}
sampler("langevin", step_size=number(0.01), steps=integer(0, 4), sigma=maybe(number(0.1)))
_annealed = {"step_size": number(1e-5, 1e-3), "steps_per_level": integer(1, 3)}
sampler("annealed_langevin", sigmas=LEVELS, denoise=FLAG, **_annealed)
_sigmas = one_of([1.0, 0.9, 0.8], kind="levels")
sampler("consistent_annealed", sigmas=_sigmas, step_size=number(0.5, 1.5), denoise=FLAG)
sampler("euler_maruyama", **_sde, denoise=FLAG)
_corrector = {"snr": number(0.05, 0.2), "corrector_steps": integer(1, 2), "batch_mean": FLAG}
_corrector |= {"predictor": one_of("reverse_diffusion", "ancestral", "euler_maruyama", None)}
_corrector |= {"corrector": one_of("langevin", "ald", None), "corrector_first": FLAG}
_corrector |= {"max_step": maybe(number(0.1, 9.0))}
sampler("predictor_corrector", "close chain", **_sde, **_corrector, denoise=FLAG)
_chain: dict[str, Any] = {"schedule": one_of(CHAIN, [4.0, 2.0, 1.0, 0.1], kind="levels")}
_timesteps = maybe(one_of([3, 1, 0], np.array([2, 0]), range(3, -1, -1), kind="any"))
sampler("ddpm", **_chain, timesteps=_timesteps, variance=one_of("small", "large"))
_chain["eta"] = number(0.0, 1.0)
sampler("ddim", **_chain, steps=maybe(integer(1, 4)), timesteps=_timesteps)
sampler("dpm_solver", sigmas=one_of(CHAIN, [4.0, 1.0, 0.1], kind="levels"), eta=number())
_churn = {"churn": number(), "churn_noise": number(), "step_scale": number(0.5, 2.0)}
_churn |= {"churn_range": one_of((0.0, math.inf), kind="any")}
sampler("probability_flow", sigmas=LEVELS, method=one_of("heun", "euler"), **_churn)
_likelihood = {"score": SCORE, "x": CLEAN, "sigmas": LEVELS, "probe": PROBE, "seed": SEED}
_likelihood |= {"probes": integer(1, 3), "prior_std": number(0.1)}
target("log_likelihood", sk.log_likelihood, "close", on=SMALL, **_likelihood)


class Net(torch.nn.Module):
    """A network that takes any noise level."""

    def forward(self, x: Tensor, *level: Tensor) -> Tensor:
        return -x


def wrapper(name: str, first: str = "net", sigma: Parameter = PER_SAMPLE, **own: Parameter) -> None:
    """A function that wraps a network, and a call of what it returns."""

    def call(x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        network = arguments.pop(first)
        return getattr(sk, name)(network, **arguments)(x, sigma)

    net = Parameter("function", lambda batch: Net() if first == "net" else gaussian)
    inputs = {"x": Parameter("fixed", CLEAN.make), "sigma": Parameter("fixed", sigma.make)}
    target(name, call, "close", on=SMALL, **inputs, **{first: net}, **own)


_kinds = one_of("epsilon", "x0", "v", "score", "denoiser")
wrapper("as_score", kind=_kinds, schedule=one_of(None, *SDES, CHAIN, kind="any"))
wrapper("unconditional")
wrapper("by_sigma", divide=FLAG)
_ones = tensor(lambda batch: torch.ones(batch.shape[:1]))
wrapper("by_label", sigma=_ones, sigmas=one_of([2.0, 1.0], kind="levels"), divide=FLAG)
_empty = one_of({}, kind="any")
wrapper("classifier_free", "score", scale=number(), cond=_empty, uncond=_empty)
_names = one_of("epsilon", "x0", "v", "score")
_values = {"value": STATE, "y": CLEAN, "sigma": PER_SAMPLE, "source": _names, "target": _names}
_schedule = one_of(None, *SDES, kind="any")
target("convert", sk.convert, "close", on=SMALL, **_values, schedule=_schedule)
_shares = tensor(lambda batch: torch.linspace(0, 1, 4))
_dtype = maybe(one_of(torch.float64, torch.float16, kind="fixed"))
target("random_rotation", sk.random_rotation, count=integer(0, 9), noise=KEY, dtype=_dtype)
target("slerp_noise", sk.slerp_noise, "close", on=SMALL, a=STATE, b=CLEAN, shares=_shares)

_ends = {"sigma_max": number(1.0, 50.0), "sigma_min": number(0.01, 0.9)}
_ratio, _dim, _count = number(1.001, 3.0), integer(1, 2**40), integer(2, 30)
_best = {"ratio": _ratio, "sigma_min": number(0.01, 0.9), "steps_per_level": integer(1, 100)}
target("geometric_sigmas", sk.geometric_sigmas, **_ends, levels=_count)
target("edm_sigmas", sk.edm_sigmas, **_ends, levels=_count, rho=number(1.0, 9.0))
target("sigma_ratio", sk.sigma_ratio, dim=_dim, overlap=number(0.01, 0.99))
target("level_overlap", sk.level_overlap, dim=_dim, ratio=_ratio)
target("level_count", sk.level_count, **_ends, ratio=_ratio)
target("best_step_size", sk.best_step_size, **_best)
target("variance_ratio", sk.variance_ratio, **_best, step_size=number(1e-6, 1e-4))
target("max_pairwise_distance", sk.max_pairwise_distance, data=STATE)
_bounds = {"data": STATE, "points": integer(1, 9), "seed": SEED}
target("pairwise_distance_bounds", sk.pairwise_distance_bounds, **_bounds)
_wishes = {"sigma_min": maybe(number(0.001, 0.1)), "sigma_max": maybe(number(0.5, 50.0))}
_wishes |= {"levels": maybe(_count), "overlap": maybe(number(0.1, 0.9))}
_wishes |= {"steps_per_level": maybe(integer(1, 9)), "network_calls": maybe(integer(1, 900))}
target("suggest_schedule", sk.suggest_schedule, data=STATE, **_wishes)
target("preset", sk.preset, name=one_of(*sk.presets()))
target("presets", sk.presets)
target("backends", sk.backends)


def under(name: Any) -> None:
    with sk.use_backend(name):
        ops.normal((2, 3), sk.NoiseKey(0))


def switched(name: Any) -> None:
    try:
        sk.set_backend(name)
        ops.normal((2, 3), sk.NoiseKey(0))
    finally:
        sk.set_backend(None)


for _name, _function in (("use_backend", under), ("set_backend", switched)):
    target(_name, _function, name=one_of("native", "reference", "cuda", "triton", "tpu", None))
_betas = {"beta_min": number(0.01, 0.9), "beta_max": number(1.0, 50.0)}
target("VE", sde.VE, **_ends)
target("VP", sde.VP, **_betas)
target("SubVP", sde.SubVP, **_betas)
target("DDPMSchedule", sde.DDPMSchedule, alphas_bar=one_of([0.9, 0.5, 0.1], kind="levels"))


def trainer(net: Any, sigmas: Any, **settings: Any) -> sk.Trainer:
    parameters = net.parameters() if isinstance(net, torch.nn.Module) else [torch.zeros(1)]
    return sk.Trainer(net, sigmas, torch.optim.SGD(parameters, 0.1), **settings)


_settings = {"batch_size": integer(1, 9), "accumulate": one_of(1, kind="integer")}
_settings |= {"ema_decay": number(0.0, 0.99), "clip_norm": number(0.1), "seed": SEED}
_settings |= {"warmup_steps": integer(0, 9), "precision": one_of("float32", "bfloat16")}
_settings |= {"weighting": number(), "loss": one_of("dsm", "ssm")}
_net = one_of(torch.nn.Linear(2, 2), kind="function")
_optional = {name: maybe(setting) for name, setting in _settings.items()}
target("Trainer", trainer, net=_net, sigmas=LEVELS, **_optional)

# Public names that are no functions: what holds results, options or other functions.
NOT_CALLED = {"Schedule", "ops", "Options", "Progress", "Purpose", "networks", "load"}
# An iterator, with tests of its own.
NOT_CALLED |= {"stream", "Request"}
# Without arguments; with a compiler at each call (test_fused.py).
NOT_CALLED |= {"include", "fused"}
# sampling's functions are score_kernels' own.
PUBLIC = {
    *(name for module in (sk, sampling) for name in module.__all__),
    *(f"ops.{name}" for name in ops.__all__),
} - NOT_CALLED

# --- one call ---------------------------------------------------------------------------------


def arguments_of(draw: Draw, made: Target) -> dict[str, Any]:
    """Arguments that fit, in several layouts, some of them replaced."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, *HALVES]))
    batch = Batch(draw, draw(st.sampled_from(made.shapes)), dtype)
    found: dict[str, Any] = {}
    for name, parameter in made.parameters.items():
        if parameter.optional and draw(st.booleans()):
            continue
        value = parameter.make(batch)
        if parameter.kind == "tensor" and value.is_floating_point() and draw(st.booleans()):
            value = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](value)
        found[name] = value
    # known and mask go together.
    if ("known" in found) != ("mask" in found):
        found.pop("known", None), found.pop("mask", None)
    kinds = {name: made.parameters[name].kind for name in found}
    candidates = sorted(name for name, kind in kinds.items() if kind != "fixed")
    for name in draw(st.sets(st.sampled_from(candidates), max_size=2)) if candidates else ():
        if kinds[name] != "tensor":
            found[name] = draw(st.sampled_from(WRONG[kinds[name]]))
            continue
        change = WRONG_TENSORS[draw(st.sampled_from(sorted(WRONG_TENSORS)))]
        found[name] = change(found[name].detach())
    return found


def plain(value: Any) -> Any:
    """The same values in contiguous memory of their own."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors_of(part)]
    return []


def scale_of(arguments: dict[str, Any]) -> float:
    """A bound of the sum of a sample's terms: of squares of the inputs and of the noise."""
    total, smallest = 0.0, 1.0
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.numel() or not value.is_floating_point():
            continue
        if name == "step":
            smallest = min(smallest, float(value.double().abs().min()) or 1e-300)
            continue
        rows = value.double().nan_to_num(0, 0, 0).reshape(len(value) if value.dim() else 1, -1)
        # Normals are below 6.8.
        total = max(total, 1.0) * (1 + float(rows.square().sum(1).max()) + 47 * rows.shape[1])
    return total * (1 + total) / smallest


def check_result(compare: str, got: Any, want: Any, arguments: dict[str, Any]) -> None:
    for a, b in zip(tensors_of(got), tensors_of(want), strict=True):
        assert a.shape == b.shape, f"got shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"got {a.dtype}, expected {b.dtype}"
        if a.is_meta or b.is_meta:
            assert a.is_meta
            continue
        a, b = a.double(), b.double()
        if compare in ("bits", "chain"):
            same = (a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()
            assert same.all(), f"got {a}, expected the same bits as {b}"
            continue
        finite = a.isfinite() & b.isfinite()
        assert torch.equal(a.isfinite(), b.isfinite()), f"got {a}, expected {b}"
        bound = 1e-4 * b.abs() + 1e-5
        if compare == "sums":
            bound = bound + 1e-6 * scale_of(arguments)
        assert ((a - b).abs() <= bound)[finite].all(), f"got {a}, expected {b}"


# What an allocator that cannot serve says; no argument is wrong.
NO_MEMORY = re.compile(r"allocate memory|not enough memory|Storage size|invalid sizes|overflow")
# What this library leaves to torch to refuse.
TORCHS = re.compile(
    r"leaf|requires grad|does not require grad|no forward-mode|has no derivative|meta tensor"
    r"|finite differences got scores"
)


def incomparable(arguments: dict[str, Any]) -> bool:
    """Another seed at each call, or differences over a small step, which are mostly rounding."""
    step = arguments.get("fd_step")
    rough = step is not None and step < 0.5 and arguments.get("method") != "double_backward"
    return rough or arguments.get("seed", 0) is None


def attempt(name: str, arguments: dict[str, Any]) -> str:
    """Make a call; its outcome in a word, or an assertion that it broke the rule."""
    made = TARGETS[name]
    copies = {n: plain(v) for n, v in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = made.function(**arguments)
    except (ValueError, TypeError) as error:
        names = {*arguments, *inspect.signature(made.function).parameters, *Options.__annotations__}
        # What shape_or_init and steps_per_level are to whom they are handed on; torch calls a
        # shape the size.
        names |= {"shape", "steps", "size"}
        said = re.split(r"\W+", str(error))
        assert names & set(said), f"{name}: {type(error).__name__} names no argument: {error}"
        return type(error).__name__
    except FloatingPointError:
        assert made.compare.endswith("chain")
        return "FloatingPointError"
    except RuntimeError as error:
        for rule, outcome in ((NO_MEMORY, "no memory"), (TORCHS, "refused by torch")):
            if rule.search(str(error)):
                return outcome
        raise
    if made.compare == "any" or incomparable(arguments):
        return "right"
    with sk.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = made.function(**copies)
    # A derivative by sigma is torch's own operations, which round in between.
    formula = getattr(arguments.get("sigma"), "requires_grad", False)
    check_result("close" if formula and made.compare == "bits" else made.compare, got, want, copies)
    return "right"


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """What asks for terabytes is refused, whatever the system would promise."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_every_public_name_is_a_target() -> None:
    assert {name.partition(" ")[0] for name in TARGETS} == PUBLIC


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_right_or_refused(name: str) -> None:
    outcomes: collections.Counter[str] = collections.Counter()

    @hypothesis.settings(
        max_examples=CALLS,
        derandomize="FUZZ_CALLS" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(st.data())
    def call(data: st.DataObject) -> None:
        outcomes[attempt(name, arguments_of(data.draw, TARGETS[name]))] += 1

    call.__name__ = call.hypothesis.inner_test.__name__ = re.sub(r"\W", "_", name)
    # Memory that is filled with NaN takes as long as the calls.
    torch.use_deterministic_algorithms(False)
    with limited_memory():
        call()
    print(dict(outcomes))
    # Arguments that are always refused would test nothing but the refusal.
    assert outcomes["right"]
