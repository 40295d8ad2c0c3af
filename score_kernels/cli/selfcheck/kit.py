"""What the checks of ``score-kernels selfcheck`` share: bounds, ways to compare, inputs.

Inputs are made on the CPU and moved, and results are compared on the CPU, so that every device runs
the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from score_kernels import ops
from score_kernels.backends import Backend, choose, reference, use_backend
from score_kernels.backends.compiled import native
from score_kernels.noise import NoiseKey

# ok, figure, what was expected.
Finding = tuple[bool, str, str]
Make = Callable[[torch.device], list[Tensor]]

CPU = torch.device("cpu")
SCORES = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

# Every field counts, and samples carry into the counter's high word.
KEY = NoiseKey(2**63 + 11, purpose=2, draw=17, first_sample=2**32 - 2)

# Normals against the exact function of their words: the contract's bound.
NORMAL = 2e-6
# fp32 sums and products against fp64: relative norm of the error.
FP32 = 1e-6
# The same with plain torch operations in between, each of which rounds.
FP32_CHAIN = 1e-5
# A gradient in the score's dtype: the exact one, rounded once to 8 or 11 bits.
GRADIENT = {torch.float32: FP32, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Keys are fixed, so that a result stays. A right generator would fail the statistics of one run in
# a million if the keys were drawn anew: each of the tests has its share, normal approximations.
ALPHA = 1e-6
STATISTICS = 11
DEVIATIONS = -NormalDist().inv_cdf(ALPHA / STATISTICS / 2)
# Kolmogorov's asymptotic law, whose first term bounds it: p <= 2 exp(-2 d^2 n).
KOLMOGOROV = math.sqrt(math.log(2 * STATISTICS / ALPHA) / 2)


class NotHere(Exception):
    """Why a check cannot be run on this machine."""


@dataclass(frozen=True)
class Kit:
    """What a check is given: the device, how much to do, and ways to compare."""

    device: torch.device
    quick: bool = False

    @property
    def backend(self) -> Backend:
        """What serves the device."""
        return choose(self.device, torch.float32)

    def many(self, count: int) -> int:
        """The count of a full run, a tenth of it for a quick one."""
        return count // 10 if self.quick else count

    def run(self, make: Make) -> list[Tensor]:
        """What `make` gives on the device, on the CPU."""
        with _poisoned_memory():
            return [t.detach().cpu() for t in make(self.device)]

    def runs(self, make: Make) -> dict[str, list[Tensor]]:
        """`run`, on a CPU in every instruction set."""
        if self.backend is not native:
            return {self.backend.name: self.run(make)}
        found = {}
        before = native.kernels.isa()
        try:
            for isa in native.kernels.isas():
                native.kernels.set_isa(isa)
                found[f"native {isa}"] = self.run(make)
        finally:
            native.kernels.set_isa(before)
        return found

    def reference(self, make: Make) -> list[Tensor]:
        """What `make` gives with the reference backend on the CPU."""
        if self.device.type == "cpu" and self.backend is reference.backend:
            raise NotHere("the reference itself serves the CPU")
        with use_backend("reference"):
            return Kit(CPU).run(make)

    def same(self, got: Make, want: Make | None = None) -> Finding:
        """To the bit: `got` and `want` on the device; without want, `got` and the reference."""
        if want is None:
            expected = self.reference(got)
            return differences({k: (v, expected) for k, v in self.runs(got).items()})
        wanted = self.runs(want)
        return differences({k: (v, wanted[k]) for k, v in self.runs(got).items()})

    def error(self, got: Make, want: Make | None = None) -> float:
        """The largest relative norm of what `got` is off the reference's `want` (or `got`)."""
        expected = self.reference(want or got)
        return largest(
            relative(g, w)
            for values in self.runs(got).values()
            for g, w in zip(values, expected, strict=True)
        )


def differences(pairs: dict[str, tuple[list[Tensor], list[Tensor]]]) -> Finding:
    """Counts the values whose bits are not the expected ones, by name of who computed them."""
    wrong, total = {}, 0
    for name, (got, want) in pairs.items():
        count = 0
        for g, w in zip(got, want, strict=True):
            if (g.shape, g.dtype) != (w.shape, w.dtype):
                has, wants = (f"{tuple(t.shape)} of {t.dtype}" for t in (g, w))
                raise ValueError(f"{name} gave {has}, expected {wants}")
            kind = _BITS.get(g.dtype, g.dtype)
            count += int((g.contiguous().view(kind) != w.contiguous().view(kind)).sum())
            total += g.numel()
        if count:
            wrong[name] = count
    who = f" ({', '.join(f'{name}: {count:,}' for name, count in wrong.items())})" if wrong else ""
    return not wrong, f"{sum(wrong.values()):,} of {total:,} values differ{who}", "none differ"


def within(error: float, bound: float) -> Finding:
    return error <= bound, f"{error:.1e}", f"at most {bound:.0e}"


def deviations(*values: float) -> Finding:
    worst = largest(abs(value) for value in values)
    expected = f"at most {DEVIATIONS:.2f} ({ALPHA:.0e} for the whole run)"
    return worst <= DEVIATIONS, f"{worst:.2f} deviations", expected


def largest(values: Iterator[float]) -> float:
    """The largest, or nan where there is one."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def relative(got: Tensor, want: Tensor) -> float:
    norm = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / (norm or 1.0)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: freed memory could hold the right values of an earlier run."""
    settings: Any = torch.utils.deterministic
    fill, enabled = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Another stream of a GPU, in turn with the current one; nothing on other devices."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        # Busy for milliseconds: what is not put on this stream comes too early, and is seen.
        busy = torch.zeros(2**24, device=device)
        for _ in range(200):
            busy.add_(1)
        yield
    current.wait_stream(side)


def require_gpu(kit: Kit) -> None:
    if kit.device.type != "cuda":
        raise NotHere("for GPUs only")


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Inputs: torch's own normals, on the CPU."""
    generator = torch.Generator(CPU).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=CPU)


def levels(rows: int) -> Tensor:
    """One noise level or weight a row."""
    return torch.linspace(0.1, 2.0, rows, device=CPU)


def elementwise(
    device: torch.device, shape: tuple[int, ...], key: NoiseKey, rows: slice = slice(None)
) -> list[Tensor]:
    """Fill, updates and noisy data of some rows of a batch, and the same off any alignment."""
    x, score = (randn(shape, seed)[rows] for seed in (1, 2))
    key = key.for_samples(key.first_sample + (rows.start or 0))
    sigma = levels(shape[0])[rows].to(device)
    out = [ops.normal(tuple(x.shape), key, device=device), ops.perturb(x.to(device), sigma, key)]
    for offset in (0, 1):
        here, drift = (_at_offset(t.to(device), offset) for t in (x, score))
        out.append(ops.langevin_step(here, drift, 0.37, key))
        out.append(ops.affine_step_(here, drift.bfloat16(), 0.9, -0.3, 0.7, key))
    return out


def _at_offset(x: Tensor, offset: int) -> Tensor:
    """A copy, so many elements from the start of its memory."""
    return x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)


def sums(device: torch.device, shape: tuple[int, ...]) -> list[Tensor]:
    """Every reduction."""
    s, g = (randn(shape, seed).to(device) for seed in (3, 4))
    sigma = levels(shape[0]).to(device)
    return [
        ops.dsm_loss_from_score(s, sigma, KEY),
        ops.probe_dot(s, KEY, probe="sphere"),
        ops.ssm_reduce(g, s, KEY),
        ops.fd_reduce(g, s, sigma, KEY, probe="gaussian"),
    ]
