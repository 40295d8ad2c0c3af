"""Hostile arguments: every public function gives the right answer or an error that names one.

Each target builds arguments that fit together, in odd memory layouts and with odd values, and then
has some of them replaced by what nobody should pass. Where a call succeeds, its result is compared
with that of plain contiguous copies on the reference backend.

``python tests/test_fuzz.py --calls 100000`` makes more calls than a test run, in processes of
their own, so that a crash or a hang is counted and the call that led to it printed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import json
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

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

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Plain(Tensor):
    """A subclass of Tensor that adds nothing."""


# --- values -----------------------------------------------------------------------------------

SHAPES = [(1, 1), (3, 5), (2, 3, 4), (7,), (4, 64), (2, 0), (0, 3), (2, 1025), (5, 2), (9, 500)]
ODD_VALUES = [math.nan, math.inf, -math.inf, -0.0, 1e-45, -1e-38, 65520.0]
KEYS = st.builds(
    sk.NoiseKey,
    st.integers(0, 2**64 - 1),
    purpose=st.integers(0, 255),
    draw=st.integers(0, 2**32 - 1),
    first_sample=st.sampled_from([0, 5, 2**32 - 3, 2**56 - 10]),
)


def values(draw: Draw, shape: tuple[int, ...], *, odd: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    made = torch.randn(shape, generator=generator)
    if odd and made.numel() and draw(st.integers(0, 4)) == 0:
        made.view(-1)[draw(st.integers(0, made.numel() - 1))] = draw(st.sampled_from(ODD_VALUES))
    return made


def positive(draw: Draw, rows: int) -> Tensor:
    return values(draw, (rows,), odd=False).abs() + 0.1


def misaligned(t: Tensor) -> Tensor:
    memory = bytearray(t.nbytes + 1)
    if not t.numel():
        return t
    made = torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape)
    return made.copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape),
    "every second": lambda t: torch.stack((t, t), -1)[..., 0],
    "negated": lambda t: torch._neg_view(-t),
    "subclass": lambda t: t.clone().as_subclass(Plain),
    "leaf": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "in a graph": lambda t: t.clone().requires_grad_() * 1,
    "misaligned": misaligned,
    "copied on write": lambda t: torch._lazy_clone(t),
    "one row for all": lambda t: t[:1].expand(t.shape),
}


# What is made of a tensor that fits; much of it is refused, some of it is right.
BROKEN: dict[str, Callable[[Tensor], Any]] = {
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.float64, torch.bfloat16, torch.float16)},
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.int32, torch.int64, torch.bool)},
    **{str(d): lambda t, d=d: t.to(d) for d in (torch.complex64, torch.float8_e4m3fn)},
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(len(t) if t.dim() else 1, -1).to_sparse_csr(),
    "mkldnn": lambda t: t.float().contiguous().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "jagged": lambda t: torch.nested.nested_tensor(
        [torch.zeros(2), torch.zeros(3)], layout=torch.jagged
    ),
    "zeros without memory": lambda t: torch._efficientzerotensor(tuple(t.shape)),
    "no dimensions": lambda t: torch.tensor(1.0),
    "one more": lambda t: torch.cat((t, t)),
    "one dimension more": lambda t: t.unsqueeze(-1),
    "flat": lambda t: t.flatten(),
    "huge": lambda t: torch.zeros(()).expand(2**40, *t.shape[1:]),
    "huge both ways": lambda t: torch.zeros(()).expand(2**31, 2**31),
    "overlapping": lambda t: torch.zeros(9).as_strided((3, 3), (1, 1)),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "None": lambda t: None,
    "number": lambda t: 1.0,
    "text": lambda t: "x",
    "object": lambda t: object(),
}
NUMBERS = [
    *(math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 5e-324, 1e-300, 1e300, 0.5, 2.0, 7, -1, 0),
    *(True, False, "0.1", b"1", None, 1j, 10**400, -(10**400), 2**63, 2**64),
    *(np.float32(0.5), np.float64("nan"), np.int64(3), np.bool_(True), np.complex64(1)),
    *(np.zeros(3), np.array(0.25), Fraction(1, 3), Decimal("0.1"), Decimal("sNaN")),
    *(torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), [], (), {}, object()),
]
INTEGERS = [
    *(-1, 0, 1, 2, 3, True, 2.0, 2.5, math.nan, "3", b"3", None, np.int64(2), np.uint8(3), 1j),
    *(np.array(2), np.zeros(3), np.bool_(True), 2**31, 2**56, 2**62, 2**63, 2**64, -(2**64)),
    *(10**5000, torch.tensor(2), torch.tensor([1, 2]), [], object()),
]
SHAPE_VALUES = [
    *(
        (),
        (0,),
        (-1, 2),
        (2.5,),
        (True, 2),
        (None,),
        ("3",),
        (2**40, 2**40),
        (2**62, 0),
        (1, 2**35),
    ),
    *((2**20, 2**30), (2**64,), (10**5000,), 3, "23", b"23", None, [2, 3], torch.Size((2, 3))),
    *(range(1, 4), (np.int64(2), 3), (torch.tensor(2), 3), {2, 3}, np.array([2, 3]), object()),
]
HOSTILE: dict[str, list[Any]] = {
    "number": NUMBERS,
    "integer": INTEGERS,
    "shape": SHAPE_VALUES,
    "key": [None, 7, True, "key", (1, 0, 0, 0), sk.NoiseKey, object()],
    "flag": [None, 0, 1, 2.5, "yes", np.bool_(True), torch.tensor(True), torch.zeros(3), []],
    "name": ["", "normals", None, 3, True, b"x", ["normal"], {}, object(), "\udc80", "x" * 9999],
    "device": ["cpu", "meta", "cuda", "cuda:9", "xyz", "", 0, -1, True, 2.5, object(), "vulkan"],
    "dtype": [torch.float16, torch.float8_e4m3fn, torch.float4_e2m1fn_x2, torch.int8, torch.quint8]
    + [torch.complex64, torch.bool, "float32", float, None, np.float32, object()],
    "function": [None, 3, "score", object(), lambda *a: None, lambda *a: a[0]]
    + [lambda *a: a[0].double(), lambda *a: a[0][:1], lambda *a: a[0].to("meta")]
    + [
        lambda *a: torch.zeros(a[0].shape).to_sparse(),
        lambda *a: a[0].int(),
        lambda *a: 3.0,
        lambda *a: a[0].numpy(),
    ]
    + [lambda *a: a[0].transpose(0, -1).contiguous().transpose(0, -1)]
    + [lambda *a: torch._efficientzerotensor(tuple(a[0].shape))]
    + [lambda *a: torch._neg_view(-a[0]), lambda *a: a[0].half(), lambda *a: a[0] * math.nan],
    "levels": [None, 3, 1.0, "levels", [], [1.0], [1.0, 2.0], [1.0, 1.0], [2.0, math.nan], [1, "x"]]
    + [[math.inf, 1.0], [1.0, 0.0], [1.0, -1.0], [True, False], torch.tensor(1.0), torch.tensor([])]
    + [torch.tensor([[2.0, 1.0]]), torch.tensor([2, 1]), torch.tensor([2.0, 1.0]).to("meta")]
    + [np.array([2.0, 1.0]), (x for x in (2.0, 1.0)), [1e300, 1e-300], [1e160, 1.0], [1.0, 1e-200]]
    + [torch.tensor([2.0, 1.0]).to_sparse(), [3.0, 2.0, 1.0], {3.0: 1}, object(), [10**400, 1.0]],
    "callback": [None, 3, "x", object(), []],
    "any": [None, 3, "x", object(), [], {}, torch.zeros(2), math.nan],
}

# --- targets ----------------------------------------------------------------------------------


@dataclass
class Argument:
    value: Any
    kind: str
    written: bool = False
    replaced: bool = False


Arguments = dict[str, Argument]
TARGETS: dict[str, Target] = {}


@dataclass
class Target:
    """A public function, arguments for it, and how a result is compared with the reference's."""

    function: Callable[..., Any]
    build: Callable[[Draw], Arguments]
    compare: str


def target(
    name: str, function: Callable[..., Any], compare: str = "any"
) -> Callable[[Callable[[Draw], Arguments]], Callable[[Draw], Arguments]]:
    def enter(build: Callable[[Draw], Arguments]) -> Callable[[Draw], Arguments]:
        TARGETS[name] = Target(function, build, compare)
        return build

    return enter


def a_shape(draw: Draw) -> tuple[int, ...]:
    return draw(st.sampled_from(SHAPES))


def tensor(value: Tensor, *, written: bool = False) -> Argument:
    return Argument(value, "tensor", written)


def a_score(draw: Draw, shape: tuple[int, ...], *, odd: bool = True) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    return values(draw, shape, odd=odd).to(dtype)


def number(draw: Draw, low: float = 0.0, high: float = 2.0) -> Argument:
    return Argument(draw(st.floats(low, high)), "number")


def integer(draw: Draw, low: int, high: int) -> Argument:
    return Argument(draw(st.integers(low, high)), "integer")


def key(draw: Draw) -> Argument:
    return Argument(draw(KEYS), "key")


def flag(draw: Draw) -> Argument:
    return Argument(draw(st.booleans()), "flag")


def one_of(draw: Draw, *names: Any) -> Argument:
    return Argument(draw(st.sampled_from(names)), "name")


for _kind in ("words", "normal", "uniform", "rademacher"):

    @target(f"ops.{_kind}", getattr(ops, _kind), "bits")
    def _fill(draw: Draw, kind: str = _kind) -> Arguments:
        made = {"shape": Argument(a_shape(draw), "shape"), "noise": key(draw)}
        made["device"] = Argument(draw(st.sampled_from([None, "cpu"])), "device")
        if kind != "words":
            made["dtype"] = Argument(torch.float32, "dtype")
        return made


def alias(draw: Draw, x: Tensor, score: Tensor) -> Tensor:
    """Sometimes a score in x's own memory: x itself, half of it, or shifted against it."""
    way = draw(st.sampled_from(["apart", "apart", "apart", "itself", "half", "shifted"]))
    if way == "itself":
        return x
    if way == "half":
        return x.view(torch.bfloat16).view(-1)[: x.numel()].view(x.shape)
    return score


def pair_in_memory(draw: Draw, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A state and a score, sometimes in overlapping memory."""
    shift = draw(st.sampled_from([0, 0, 0, 1, 17]))
    if not shift:
        x = values(draw, shape)
        return x, alias(draw, x, a_score(draw, shape))
    count = math.prod(shape)
    memory = values(draw, (count + shift,))
    parts = [memory[:count].view(shape), memory[shift:].view(shape)]
    return (parts[0], parts[1]) if draw(st.booleans()) else (parts[1], parts[0])


def _steps(draw: Draw, *, written: bool) -> Arguments:
    x, score = pair_in_memory(draw, a_shape(draw))
    return {"x": tensor(x, written=written), "score": tensor(score)}


@target("ops.affine_step_", ops.affine_step_, "bits")
def _affine(draw: Draw) -> Arguments:
    coefficients = {name: number(draw, -2.0) for name in "abc"}
    return {**_steps(draw, written=True), **coefficients, "noise": key(draw)}


@target("ops.langevin_step_", ops.langevin_step_, "bits")
def _langevin_in_place(draw: Draw) -> Arguments:
    return {**_steps(draw, written=True), "alpha": number(draw), "noise": key(draw)}


@target("ops.langevin_step", ops.langevin_step, "bits")
def _langevin(draw: Draw) -> Arguments:
    return {**_steps(draw, written=False), "alpha": number(draw), "noise": key(draw)}


@target("ops.table_step_", ops.table_step_, "bits")
def _table(draw: Draw) -> Arguments:
    made = _steps(draw, written=True)
    x = made["x"].value
    given, by_step = draw(st.booleans()), draw(st.booleans())
    columns = 5 if given else 3
    lines = draw(st.integers(1, 4)) if by_step else draw(st.sampled_from([1, len(x)]))
    table = values(draw, (lines, columns), odd=False)
    if not by_step and lines == 1 and x.numel() >= columns and draw(st.booleans()):
        table = x.view(-1)[:columns].view(1, columns)
    step = torch.tensor(draw(st.integers(0, lines - 1))) if by_step and lines else None
    made["table"], made["step"] = tensor(table), tensor(step) if by_step else Argument(None, "any")
    made["noise"] = key(draw)
    if given:
        shifted = x if draw(st.booleans()) else values(draw, tuple(x.shape))
        made["known"] = tensor(shifted)
        bytes_of = x.view(torch.bool).view(-1)[: x.numel()].view(x.shape)
        mask = bytes_of if draw(st.integers(0, 3)) == 0 else torch.rand(x.shape) < 0.5
        if mask is bytes_of:
            # Bytes other than 0 and 1 are no bools.
            x.view(torch.uint8).bitwise_and_(1)
        made["mask"] = tensor(mask)
    return made


@target("ops.perturb", ops.perturb, "bits")
def _perturb(draw: Draw) -> Arguments:
    x = values(draw, a_shape(draw))
    return {"x": tensor(x), "sigma": tensor(positive(draw, len(x))), "noise": key(draw)}


@target("ops.dsm_loss_from_score", ops.dsm_loss_from_score, "sums")
def _dsm(draw: Draw) -> Arguments:
    score = a_score(draw, a_shape(draw))
    made = {"score": tensor(score), "sigma": tensor(positive(draw, len(score))), "noise": key(draw)}
    if draw(st.booleans()):
        made["weight"] = tensor(positive(draw, len(score)))
    return made


def probe(draw: Draw) -> Argument:
    return one_of(draw, "rademacher", "gaussian", "sphere")


@target("ops.probe_dot", ops.probe_dot, "sums")
def _dot(draw: Draw) -> Arguments:
    return {"s": tensor(a_score(draw, a_shape(draw))), "noise": key(draw), "probe": probe(draw)}


@target("ops.probe_scale", ops.probe_scale, "close")
def _scale(draw: Draw) -> Arguments:
    shape = a_shape(draw)
    made = {"g": tensor(values(draw, shape[:1])), "shape": Argument(shape, "shape")}
    return {**made, "noise": key(draw), "probe": probe(draw)}


@target("ops.ssm_reduce", ops.ssm_reduce, "sums")
def _ssm(draw: Draw) -> Arguments:
    g = a_score(draw, a_shape(draw))
    s = values(draw, tuple(g.shape)).to(g.dtype)
    made = {"g": tensor(g), "s": tensor(s), "noise": key(draw), "probe": probe(draw)}
    return {**made, "variance_reduced": flag(draw)}


@target("ops.fd_pair", ops.fd_pair, "close")
def _pair(draw: Draw) -> Arguments:
    x = values(draw, a_shape(draw))
    made = {"x": tensor(x), "step": tensor(positive(draw, len(x)))}
    return {**made, "noise": key(draw), "probe": probe(draw)}


@target("ops.fd_reduce", ops.fd_reduce, "sums")
def _reduce(draw: Draw) -> Arguments:
    above = a_score(draw, a_shape(draw))
    below = values(draw, tuple(above.shape)).to(above.dtype)
    made = {"above": tensor(above), "below": tensor(below)}
    made["step"] = tensor(positive(draw, len(above)))
    made["variance_reduced"] = flag(draw)
    return {**made, "noise": key(draw), "probe": probe(draw)}


@target("NoiseKey", sk.NoiseKey)
def _key(draw: Draw) -> Arguments:
    made = {"seed": integer(draw, 0, 2**64 - 1), "purpose": integer(draw, 0, 255)}
    return {**made, "draw": integer(draw, 0, 9), "first_sample": integer(draw, 0, 9)}


def gaussian(x: Tensor, sigma: Tensor | None = None) -> Tensor:
    """The score of N(0, 1) plus noise: the same operations for every element."""
    if sigma is None:
        return -x
    return -x / (1 + sigma.view(-1, *[1] * (x.dim() - 1)) ** 2)


def score(draw: Draw) -> Argument:
    return Argument(gaussian, "function")


def clean(draw: Draw) -> Tensor:
    shape = draw(st.sampled_from([s for s in SHAPES if math.prod(s)]))
    return values(draw, shape, odd=False)[:, :20] if len(shape) > 1 else values(draw, shape)


def levels(draw: Draw) -> Argument:
    made = draw(st.sampled_from([[2.0, 1.0, 0.5], [1.0], [50.0, 0.01], [3.0, 0.1]]))
    return Argument(draw(st.sampled_from([made, torch.tensor(made), np.array(made)])), "levels")


def seed(draw: Draw) -> Argument:
    return integer(draw, 0, 2**64 - 1)


REDUCTIONS = ("mean", "sum", "none")


@target("dsm_loss", sk.dsm_loss, "losses")
def _dsm_loss(draw: Draw) -> Arguments:
    x = clean(draw)
    made = {"net": score(draw), "x": tensor(x), "sigmas": levels(draw), "seed": seed(draw)}
    made["weighting"] = number(draw)
    if draw(st.booleans()):
        made["weighting"] = tensor(positive(draw, len(x)))
    if draw(st.booleans()):
        made["labels"] = tensor(torch.zeros(len(x), dtype=torch.int64))
    made["return_per_level"] = Argument(draw(st.booleans()), "fixed")
    return {**made, "reduction": one_of(draw, *REDUCTIONS)}


@target("sliced_score_loss", sk.sliced_score_loss, "losses")
def _sliced(draw: Draw) -> Arguments:
    x = clean(draw)
    made = {"score": score(draw), "x": tensor(x), "seed": seed(draw), "probe": probe(draw)}
    if draw(st.booleans()):
        made["sigma"] = draw(st.sampled_from([tensor(positive(draw, len(x))), number(draw, 0.1)]))
    methods = ("auto", "double_backward", "jvp", "finite_difference")
    made["method"], made["reduction"] = one_of(draw, *methods), one_of(draw, *REDUCTIONS)
    made["probes"], made["fd_step"] = integer(draw, 1, 3), number(draw, 0.5)
    return {**made, "variance_reduced": flag(draw)}


@target("exact_score_loss", sk.exact_score_loss, "losses")
def _exact(draw: Draw) -> Arguments:
    made = {"score": score(draw), "x": tensor(clean(draw))}
    return {**made, "sigma": number(draw, 0.1)} if draw(st.booleans()) else made


def options(draw: Draw) -> Arguments:
    """What every sampler takes besides its own, and where it starts."""
    init = draw(st.booleans())
    start = values(draw, (3, 5), odd=False)
    made = {
        "score": score(draw),
        "shape_or_init": tensor(start) if init else Argument((3, 5), "shape"),
        "seed": seed(draw),
    }
    more = {
        "first_sample": integer(draw, 0, 9),
        "record_every": integer(draw, 1, 3),
        "init": one_of(draw, "normal", "uniform"),
        "device": Argument("cpu", "device"),
        "callback": Argument(lambda progress: None, "callback"),
        "conditions": Argument({}, "any"),
        "guidance": score(draw),
        "cuda_graph": Argument(False, "flag"),
        "progress": Argument(False, "flag"),
        "first_step": Argument(0, "integer"),
    }
    for name in draw(st.sets(st.sampled_from(sorted(more)), max_size=3)):
        made[name] = more[name]
    if draw(st.integers(0, 3)) == 0:
        made["known"] = tensor(values(draw, (3, 5), odd=False))
        made["mask"] = tensor(torch.arange(15).view(3, 5) % 2 == 0)
    return made


# beta stays below 1, so that every number of steps can be asked for.
SDES = [sde.VE(), sde.VP(0.1, 0.9), sde.SubVP(0.1, 0.9)]


def a_sde(draw: Draw) -> Argument:
    return Argument(draw(st.sampled_from(SDES)), "any")


def a_chain(draw: Draw) -> Argument:
    return Argument(sde.DDPMSchedule.linear(20, 0.01, 0.3), "any")


@target("langevin", sk.langevin, "chain")
def _plain_chain(draw: Draw) -> Arguments:
    made = {**options(draw), "step_size": number(draw, 0.01), "steps": integer(draw, 0, 4)}
    return {**made, "sigma": number(draw, 0.1)} if draw(st.booleans()) else made


@target("annealed_langevin", sk.annealed_langevin, "chain")
def _annealed(draw: Draw) -> Arguments:
    made = {**options(draw), "sigmas": levels(draw), "step_size": number(draw, 1e-5, 1e-3)}
    return {**made, "steps_per_level": integer(draw, 1, 3), "denoise": flag(draw)}


@target("consistent_annealed", sk.consistent_annealed, "chain")
def _consistent(draw: Draw) -> Arguments:
    sigmas = Argument([1.0, 0.9, 0.8], "levels")
    made = {**options(draw), "sigmas": sigmas, "step_size": number(draw, 0.5, 1.5)}
    return {**made, "denoise": flag(draw)}


@target("euler_maruyama", sk.euler_maruyama, "chain")
def _euler(draw: Draw) -> Arguments:
    made = {**options(draw), "sde": a_sde(draw), "steps": integer(draw, 1, 5)}
    return {**made, "end": number(draw, 0.001, 0.5), "denoise": flag(draw)}


@target("predictor_corrector", sk.predictor_corrector, "close chain")
def _pc(draw: Draw) -> Arguments:
    made = {**_euler(draw), "snr": number(draw, 0.05, 0.2), "corrector_steps": integer(draw, 1, 2)}
    made["predictor"] = one_of(draw, "reverse_diffusion", "ancestral", "euler_maruyama", None)
    made["corrector"] = one_of(draw, "langevin", "ald", None)
    return {**made, "corrector_first": flag(draw), "batch_mean": flag(draw)}


@target("ddpm", sk.ddpm, "chain")
def _ddpm(draw: Draw) -> Arguments:
    made = {**options(draw), "schedule": a_chain(draw)}
    return {**made, "variance": one_of(draw, "small", "large")}


@target("ddim", sk.ddim, "chain")
def _ddim(draw: Draw) -> Arguments:
    made = {**options(draw), "schedule": a_chain(draw), "steps": integer(draw, 1, 20)}
    return {**made, "eta": number(draw, 0.0, 1.0)}


@target("probability_flow", sk.probability_flow, "chain")
def _flow(draw: Draw) -> Arguments:
    made = {**options(draw), "sigmas": levels(draw), "method": one_of(draw, "heun", "euler")}
    made["churn"], made["churn_noise"] = number(draw), number(draw)
    return {**made, "churn_range": Argument((0.0, math.inf), "any")}


@target("log_likelihood", sk.log_likelihood, "losses")
def _likelihood(draw: Draw) -> Arguments:
    made = {"score": score(draw), "x": tensor(clean(draw)), "sigmas": levels(draw)}
    made["probe"], made["probes"] = probe(draw), integer(draw, 1, 3)
    return {**made, "seed": seed(draw), "prior_std": number(draw, 0.1)}


def guided(score: Any, scale: Any, cond: Any, uncond: Any, x: Tensor, sigma: Tensor) -> Tensor:
    return sk.classifier_free(score, scale, cond=cond, uncond=uncond)(x, sigma)


@target("classifier_free", guided, "losses")
def _guided(draw: Draw) -> Arguments:
    x = clean(draw)
    made = {"score": score(draw), "scale": number(draw), "x": Argument(x, "fixed")}
    made["cond"] = made["uncond"] = Argument({}, "any")
    return {**made, "sigma": Argument(positive(draw, len(x)), "fixed")}


@target("slerp_noise", sk.slerp_noise, "losses")
def _between(draw: Draw) -> Arguments:
    a, shares = values(draw, (3, 5)), torch.linspace(0, 1, 4)
    return {"a": tensor(a), "b": tensor(values(draw, (3, 5))), "shares": tensor(shares)}


class Told(torch.nn.Module):
    """A network that takes whatever it is told."""

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        return -x


def as_score(net: Any, kind: Any, schedule: Any, x: Tensor, sigma: Tensor) -> Tensor:
    return sk.as_score(net, kind=kind, schedule=schedule)(x, sigma)


def called(wrap: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(net: Any, x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        return wrap(net, **more)(x, sigma)

    return call


def _wrapped(draw: Draw) -> Arguments:
    x = clean(draw)
    made = {"net": Argument(Told(), "function"), "x": Argument(x, "fixed")}
    return {**made, "sigma": Argument(positive(draw, len(x)), "fixed")}


@target("as_score", as_score, "losses")
def _as_score(draw: Draw) -> Arguments:
    schedules = [None, *SDES, sde.DDPMSchedule.linear(20, 0.01, 0.3)]
    kinds = ("epsilon", "x0", "v", "score", "denoiser")
    made = {**_wrapped(draw), "kind": one_of(draw, *kinds)}
    return {**made, "schedule": Argument(draw(st.sampled_from(schedules)), "any")}


@target("unconditional", called(sk.unconditional), "losses")
def _unconditional(draw: Draw) -> Arguments:
    return _wrapped(draw)


@target("by_sigma", called(sk.by_sigma), "losses")
def _by_sigma(draw: Draw) -> Arguments:
    return {**_wrapped(draw), "divide": flag(draw)}


@target("by_label", called(sk.by_label), "losses")
def _by_label(draw: Draw) -> Arguments:
    made = {**_wrapped(draw), "sigmas": Argument([2.0, 1.0], "levels"), "divide": flag(draw)}
    rows = len(made["x"].value)
    made["sigma"] = Argument(torch.full((rows,), draw(st.sampled_from([1.0, 2.0, 3.0]))), "fixed")
    return made


@target("convert", sk.convert, "losses")
def _convert(draw: Draw) -> Arguments:
    y = clean(draw)
    made = {"value": tensor(values(draw, tuple(y.shape))), "y": tensor(y)}
    made["sigma"] = tensor(positive(draw, len(y)))
    names = ("epsilon", "x0", "v", "score")
    made["source"], made["target"] = one_of(draw, *names), one_of(draw, *names)
    return {**made, "schedule": Argument(draw(st.sampled_from([None, *SDES])), "any")}


@target("geometric_sigmas", sk.geometric_sigmas)
def _geometric(draw: Draw) -> Arguments:
    made = {"sigma_max": number(draw, 1.0, 50.0), "sigma_min": number(draw, 0.01, 0.9)}
    return {**made, "levels": integer(draw, 2, 30)}


@target("edm_sigmas", sk.edm_sigmas)
def _edm(draw: Draw) -> Arguments:
    return {**_geometric(draw), "rho": number(draw, 1.0, 9.0)}


@target("sigma_ratio", sk.sigma_ratio)
def _ratio(draw: Draw) -> Arguments:
    return {"dim": integer(draw, 1, 2**40), "overlap": number(draw, 0.01, 0.99)}


@target("level_overlap", sk.level_overlap)
def _overlap(draw: Draw) -> Arguments:
    return {"dim": integer(draw, 1, 2**40), "ratio": number(draw, 1.0, 3.0)}


@target("level_count", sk.level_count)
def _count(draw: Draw) -> Arguments:
    made = {"sigma_max": number(draw, 1.0, 50.0), "sigma_min": number(draw, 0.01, 0.9)}
    return {**made, "ratio": number(draw, 1.001, 3.0)}


@target("best_step_size", sk.best_step_size)
def _best(draw: Draw) -> Arguments:
    made = {"ratio": number(draw, 1.001, 3.0), "sigma_min": number(draw, 0.01, 0.9)}
    return {**made, "steps_per_level": integer(draw, 1, 100)}


@target("variance_ratio", sk.variance_ratio)
def _variance(draw: Draw) -> Arguments:
    return {**_best(draw), "step_size": number(draw, 1e-6, 1e-4)}


@target("max_pairwise_distance", sk.max_pairwise_distance)
def _distance(draw: Draw) -> Arguments:
    return {"data": tensor(values(draw, a_shape(draw)))}


@target("pairwise_distance_bounds", sk.pairwise_distance_bounds)
def _bounds(draw: Draw) -> Arguments:
    return {**_distance(draw), "points": integer(draw, 1, 9), "seed": seed(draw)}


@target("suggest_schedule", sk.suggest_schedule)
def _suggest(draw: Draw) -> Arguments:
    made = _distance(draw)
    more = {
        "sigma_min": number(draw, 0.001, 0.1),
        "sigma_max": number(draw, 0.5, 50.0),
        "levels": integer(draw, 2, 30),
        "overlap": number(draw, 0.1, 0.9),
        "steps_per_level": integer(draw, 1, 9),
        "network_calls": integer(draw, 1, 900),
    }
    for name in draw(st.sets(st.sampled_from(sorted(more)), max_size=3)):
        made[name] = more[name]
    return made


@target("preset", sk.preset)
def _preset(draw: Draw) -> Arguments:
    return {"name": one_of(draw, *sk.presets())}


@target("presets", sk.presets)
def _presets(draw: Draw) -> Arguments:
    return {}


@target("backends", sk.backends)
def _backends(draw: Draw) -> Arguments:
    return {}


def under(name: Any) -> None:
    with sk.use_backend(name):
        ops.normal((2, 3), sk.NoiseKey(0))


@target("use_backend", under)
def _use(draw: Draw) -> Arguments:
    return {"name": one_of(draw, "native", "reference", "cuda", "triton", "tpu", None)}


@target("sde.VE", sde.VE)
def _ve(draw: Draw) -> Arguments:
    return {"sigma_min": number(draw, 0.01, 0.9), "sigma_max": number(draw, 1.0, 50.0)}


@target("sde.VP", sde.VP)
def _vp(draw: Draw) -> Arguments:
    return {"beta_min": number(draw, 0.01, 0.9), "beta_max": number(draw, 1.0, 50.0)}


@target("sde.SubVP", sde.SubVP)
def _subvp(draw: Draw) -> Arguments:
    return _vp(draw)


@target("sde.DDPMSchedule", sde.DDPMSchedule)
def _discrete(draw: Draw) -> Arguments:
    return {"alphas_bar": Argument([0.9, 0.5, 0.1], "levels")}


def trainer(net: Any, sigmas: Any, **settings: Any) -> sk.Trainer:
    parameters = net.parameters() if isinstance(net, torch.nn.Module) else [torch.zeros(1)]
    return sk.Trainer(net, sigmas, torch.optim.SGD(parameters, 0.1), **settings)


@target("Trainer", trainer)
def _trainer(draw: Draw) -> Arguments:
    made = {"net": Argument(torch.nn.Linear(2, 2), "function"), "sigmas": levels(draw)}
    more = {
        "batch_size": integer(draw, 1, 9),
        "accumulate": Argument(1, "integer"),
        "ema_decay": number(draw, 0.0, 0.99),
        "clip_norm": number(draw, 0.1),
        "warmup_steps": integer(draw, 0, 9),
        "precision": one_of(draw, "float32", "bfloat16"),
        "weighting": number(draw),
        "loss": one_of(draw, "dsm", "ssm"),
        "seed": seed(draw),
    }
    for name in draw(st.sets(st.sampled_from(sorted(more)), max_size=3)):
        made[name] = more[name]
    return made


# Public names that are no functions: what holds results, options or other functions.
NOT_CALLED = {"Schedule", "ops", "Options", "Progress", "SDE"}
# sampling's functions are score_kernels' own.
PUBLIC = {
    *(name for module in (sk, sampling) for name in module.__all__),
    *(f"ops.{name}" for name in ops.__all__),
    *(f"sde.{name}" for name in sde.__all__ if name not in NOT_CALLED),
} - NOT_CALLED


# --- one call ---------------------------------------------------------------------------------


def arguments_of(draw: Draw, made: Target) -> Arguments:
    """Arguments that fit, in odd layouts, some of them replaced."""
    found = made.build(draw)
    shared = len({id(a.value) for a in found.values()}) < len(found)
    for argument in found.values():
        value = argument.value
        # Layouts are copies: what shares memory on purpose is left as it is.
        if argument.kind == "tensor" and isinstance(value, Tensor) and not shared:
            layouts = LAYOUTS if value.dtype.is_floating_point and value.dim() else ["plain"]
            if draw(st.booleans()):
                argument.value = LAYOUTS[draw(st.sampled_from(sorted(layouts)))](value)
    candidates = sorted(n for n, a in found.items() if a.kind != "fixed")
    for name in draw(st.sets(st.sampled_from(candidates), max_size=2)) if candidates else ():
        argument = found[name]
        if argument.kind == "tensor":
            # Distances of 2^31 samples are right, and take hours.
            ways = [w for w in sorted(BROKEN) if name != "data" or "huge" not in w]
            broken = BROKEN[draw(st.sampled_from(ways))]
            # Not every tensor can be made into each of these.
            with contextlib.suppress(RuntimeError, NotImplementedError, IndexError, TypeError):
                argument.value = broken(argument.value)
            argument.replaced = True
        else:
            hostile = HOSTILE[argument.kind]
            if "steps" in name:
                # Billions of them are right, and take hours.
                hostile = [h for h in hostile if not (type(h) is int and h == 2**31)]
            argument.value = hostile[draw(st.integers(0, len(hostile) - 1))]
            argument.replaced = True
    return found


def is_memory(value: Any) -> bool:
    """A tensor whose memory can be looked at."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
        and not value.is_quantized
        and not value._is_zerotensor()
        and value.numel() < 2**24
        and value.untyped_storage().nbytes() > 0
    )


def plain(value: Any) -> Any:
    """The same values in memory of their own, contiguous."""
    if not isinstance(value, Tensor):
        return value
    if value.is_cpu and value.layout is torch.strided and not value.is_nested:
        if value._is_zerotensor():
            return torch.zeros(tuple(value.shape))
        if is_memory(value):
            made = torch.empty(tuple(value.shape), dtype=value.dtype)
            return made.copy_(value.detach().as_subclass(Tensor))
    return value


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach().as_subclass(Tensor)]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in tensors_of(part)]
    return []


def equal_bits(got: Tensor, want: Tensor) -> bool:
    same = (
        (got == want) & (got.signbit() == want.signbit())
        if got.is_floating_point()
        else got == want
    )
    return bool((same | (got.isnan() & want.isnan())).all())


def scale_of(arguments: dict[str, Any]) -> float:
    """A bound of the sum of a sample's terms: of squares of the inputs and of the noise."""
    total, smallest = 0.0, 1.0
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or not value.numel():
            continue
        if name == "step":
            smallest = min(smallest, float(value.detach().double().abs().min()) or 1e-300)
            continue
        if value.is_floating_point():
            rows = (
                value.detach()
                .double()
                .nan_to_num(0, 0, 0)
                .reshape(len(value) if value.dim() else 1, -1)
            )
            # Normals are below 6.8.
            total = max(total, 1.0) * (1 + float(rows.square().sum(1).max()) + 47 * rows.shape[1])
    return total * (1 + total) / smallest


def check_result(
    made: Target, got: Any, want: Any, arguments: dict[str, Any], formula: bool
) -> None:
    """formula: a derivative by sigma is wanted, and torch's own operations round in between."""
    if made.compare == "any":
        return
    for a, b in zip(tensors_of(got), tensors_of(want), strict=True):
        assert a.shape == b.shape, f"got shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"got {a.dtype}, expected {b.dtype}"
        if a.is_meta or b.is_meta:
            assert a.is_meta
            continue
        if made.compare in ("bits", "chain") and not formula or not a.is_floating_point():
            if a.dtype.itemsize == 1:
                a, b = a.float(), b.float()
            assert equal_bits(a, b), f"got {a}, expected the same bits as {b}"
            continue
        a, b = a.double(), b.double()
        finite = a.isfinite() & b.isfinite()
        assert torch.equal(a.isfinite(), b.isfinite()), f"got {a}, expected {b}"
        bound = 1e-4 * b.abs() + 1e-5
        if made.compare == "sums":
            bound = bound + 1e-6 * scale_of(arguments)
        assert ((a - b).abs() <= bound)[finite].all(), f"got {a}, expected {b}"


# What an allocator that cannot serve says; no argument is wrong.
NO_MEMORY = re.compile(r"allocate memory|not enough memory|Storage size|invalid sizes|overflow")
# What torch itself refuses about gradients, and this library leaves to it.
NO_GRADIENT = re.compile(
    r"leaf Variable|leaf|requires grad|does not require grad|inference|ZeroTensors are immutable"
    r"|no forward-mode|has no derivative|finite differences got scores"
)


def rough(arguments: dict[str, Any]) -> bool:
    """Differences over a small step are mostly rounding: there is nothing to compare."""
    step = arguments.get("fd_step")
    return step is not None and step < 0.5 and arguments.get("method") != "double_backward"


def attempt(name: str, found: Arguments) -> str:
    """Make a call; its outcome in a word, or an assertion that it broke the rule."""
    made = TARGETS[name]
    arguments = {n: a.value for n, a in found.items()}
    generator = next((v for v in arguments.values() if inspect.isgenerator(v)), None)
    copies = {n: plain(v) for n, v in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = made.function(**arguments)
    except (ValueError, TypeError) as error:
        names = {*found, *inspect.signature(made.function).parameters, *Options.__annotations__}
        # What shape_or_init and steps_per_level are to whom they are handed on.
        names |= {"shape", "steps"}
        said = re.split(r"\W+", str(error))
        assert names & set(said), f"{name}: {type(error).__name__} names no argument: {error}"
        return type(error).__name__
    except FloatingPointError:
        assert made.compare.endswith("chain")
        return "FloatingPointError"
    except RuntimeError as error:
        for rule, outcome in ((NO_MEMORY, "no memory"), (NO_GRADIENT, "no gradient")):
            if rule.search(str(error)):
                return outcome
        raise
    # Without a seed each call draws another one.
    fresh = arguments.get("seed", 0) is None
    if generator is not None or made.compare == "any" or fresh or rough(arguments):
        return "right"
    with sk.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = made.function(**copies)
    formula = getattr(arguments.get("sigma"), "requires_grad", False)
    check_result(made, got, want, copies, formula)
    return "right"


def described(found: Arguments) -> str:
    """A call's arguments in short: repr of a tensor may itself fail."""
    parts = []
    for name, argument in found.items():
        value = argument.value
        if isinstance(value, Tensor) and not value.is_nested:
            strided = value.layout is torch.strided
            more = f" strides {value.stride()}" if strided else f" {value.layout}"
            said = f"{type(value).__name__} {value.dtype} {tuple(value.shape)}{more} {value.device}"
        else:
            try:
                said = ascii(value)[:80]
            # Python does not write out integers of thousands of digits.
            except ValueError:
                said = type(value).__name__
        parts.append(f"{name}={said}")
    return ", ".join(parts)


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


def calls(
    name: str,
    count: int,
    outcomes: collections.Counter[str],
    *,
    seed: int | None = None,
    log: IO[str] | None = None,
) -> None:
    """Make `count` calls of a target: the same ones each time or, with a seed, others.

    With a log the call is written there before it is made, and a broken rule is an outcome.
    """

    @hypothesis.settings(
        max_examples=count,
        derandomize=seed is None,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(st.data())
    def call(data: st.DataObject) -> None:
        found = arguments_of(data.draw, TARGETS[name])
        if log is None:
            outcomes[attempt(name, found)] += 1
            return
        said = f"{name}({described(found)})"
        log.seek(0)
        log.write(said.ljust(4000)[:4000])
        log.flush()
        try:
            outcomes[attempt(name, found)] += 1
        except Exception as error:
            outcomes["broken rule"] += 1
            print(f"{type(error).__name__}: {str(error)[:300]}\n  {said[:600]}", flush=True)

    call.__name__ = call.hypothesis.inner_test.__name__ = name.replace(".", "_")
    (call if seed is None else hypothesis.seed(seed)(call))()


CALLS = 60


def test_every_public_name_is_a_target() -> None:
    assert set(TARGETS) == PUBLIC


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_right_or_refused(name: str) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    # Memory that is filled with NaN takes as long as the calls.
    torch.use_deterministic_algorithms(False)
    with limited_memory():
        calls(name, CALLS, outcomes)
    print(dict(outcomes))
    # Arguments that are always refused would test nothing but the refusal.
    assert outcomes["right"]


# --- on demand --------------------------------------------------------------------------------


def work(name: str, count: int, seed: int, log: str) -> None:
    """A worker: some calls of one target, and then its outcomes as a line of JSON."""
    outcomes: collections.Counter[str] = collections.Counter()
    torch.set_num_threads(2)
    with limited_memory(), open(log, "w", encoding="utf-8", errors="replace") as file:
        try:
            calls(name, count, outcomes, seed=seed, log=file)
        finally:
            print(json.dumps(outcomes), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="in all (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first worker (default: 0)")
    parser.add_argument("--only", help="targets whose name contains this")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, count, seed, log = options.worker
        work(name, int(count), int(seed), log)
        return 0
    from tqdm.auto import tqdm

    names = [name for name in sorted(TARGETS) if (options.only or "") in name]
    total: collections.Counter[str] = collections.Counter()
    # A worker's calls are few enough for all of them to end in minutes.
    share = -(-options.calls // len(names))
    jobs = [
        (name, min(1000, share - done), options.seed + done)
        for done in range(0, share, 1000)
        for name in names
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "call"
        for name, count, seed in tqdm(jobs, unit="worker"):
            command = [sys.executable, __file__, "--worker", name, str(count), str(seed), str(log)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False, timeout=600
                )
                code, said, why = done.returncode, done.stdout, done.stderr
            except subprocess.TimeoutExpired:
                code, said, why = -1, "", "hung"
            lines = said.splitlines()
            total.update(json.loads(lines.pop()) if lines and lines[-1].startswith("{") else {})
            if lines:
                tqdm.write("\n".join(lines))
            if code:
                total["crash"] += 1
                tqdm.write(f"{why.strip()[-300:]}\nexit {code} in {log.read_text().strip()}")
    made = total.total()
    print(f"{made} calls: " + ", ".join(f"{n} {what}" for what, n in total.most_common()))
    print(f"crashes {total['crash']}, broken rules {total['broken rule']}")
    return int(bool(total["crash"] or total["broken rule"]))


if __name__ == "__main__":
    sys.exit(main())
