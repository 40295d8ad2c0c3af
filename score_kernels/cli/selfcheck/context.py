"""What the checks of ``score-kernels selfcheck`` share: tolerances, comparisons, inputs.

Inputs are made on the CPU and moved, and results are compared on the CPU, so that every device runs
the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
# Every field counts, and samples carry into the counter's high word.
TEST_KEY = NoiseKey(2**63 + 11, purpose=2, draw=17, first_sample=2**32 - 2)

# Relative norms of errors: fp32 sums and products against fp64, and the same with plain torch
# operations in between, each of which rounds.
FP32, FP32_CHAIN = 1e-6, 1e-5
# A gradient in the score's dtype: the exact one, rounded once to 8 or 11 bits.
GRADIENT = {torch.float32: FP32, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Keys are fixed, so that a result stays. A correct generator would fail the statistics of one run
# in a million if the keys were drawn anew; the tests of a run share that level.
ALPHA, STATISTICS = 1e-6, 12
DEVIATIONS = -NormalDist().inv_cdf(ALPHA / STATISTICS / 2)


class Skipped(Exception):
    """Why a check cannot be run on this machine."""


@dataclass(frozen=True)
class CheckContext:
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

    def require_gpu(self) -> None:
        if self.device.type != "cuda":
            raise Skipped("for GPUs only")

    def run(self, make: Make) -> list[Tensor]:
        """What `make` gives on the device, on the CPU."""
        with _poisoned_memory():
            return [t.detach().cpu() for t in make(self.device)]

    def runs(self, make: Make) -> dict[str, list[Tensor]]:
        """`run`, on a CPU in every instruction set."""
        if self.backend is not native:
            return {self.backend.name: self.run(make)}
        found, before = {}, native.kernels.isa()
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
            raise Skipped("the reference itself serves the CPU")
        with use_backend("reference"):
            return CheckContext(CPU).run(make)

    def same(self, got: Make, want: Make | None = None) -> Finding:
        """To the bit: `got` and `want` on the device; without want, `got` and the reference."""
        if want is None:
            expected = self.reference(got)
            return differences({k: (v, expected) for k, v in self.runs(got).items()})
        wanted = self.runs(want)
        return differences({k: (v, wanted[k]) for k, v in self.runs(got).items()})

    def error(self, got: Make, want: Make | None = None) -> float:
        """The largest relative norm of the difference of `got` and the reference's `want`."""
        return self.error_to(self.reference(want or got), got)

    def error_to(self, want: list[Tensor], got: Make) -> float:
        """The largest relative norm of the difference of `got` and constants."""
        return largest(
            float((g.double() - w.double()).norm() / (w.double().norm() or 1.0))
            for values in self.runs(got).values()
            for g, w in zip(values, want, strict=True)
        )


def differences(pairs: dict[str, tuple[list[Tensor], list[Tensor]]]) -> Finding:
    """Counts the values whose bits are not the expected ones, by name of who computed them."""
    wrong: dict[str, int] = {}
    total = 0
    for name, (got, want) in pairs.items():
        for g, w in zip(got, want, strict=True):
            if (g.shape, g.dtype) != (w.shape, w.dtype):
                has, wants = (f"{tuple(t.shape)} of {t.dtype}" for t in (g, w))
                raise ValueError(f"{name} gave {has}, expected {wants}")
            g, w = (t.contiguous().view(-1, 1).view(torch.uint8) for t in (g, w))
            wrong[name] = wrong.get(name, 0) + int((g != w).any(1).sum())
            total += len(g)
    who = ", ".join(f"{name}: {count:,}" for name, count in wrong.items() if count)
    figure = f"{sum(wrong.values()):,} of {total:,} values differ"
    return not who, figure + f" ({who})" * bool(who), "none differ"


def within(*errors: tuple[float, float]) -> Finding:
    """Each error is at most its bound."""
    found, bounds = (
        ", ".join(f"{value:.1e}" for value in values) for values in zip(*errors, strict=True)
    )
    return all(error <= bound for error, bound in errors), found, f"at most {bounds}"


def deviations(*values: float) -> Finding:
    """Numbers that are standard normal if all is well."""
    worst = largest(abs(value) for value in values)
    expected = f"at most {DEVIATIONS:.2f} ({ALPHA:.0e} for the whole run)"
    return worst <= DEVIATIONS, f"{worst:.2f} deviations", expected


def largest(values: Iterable[float]) -> float:
    """The largest, or nan where there is one."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


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


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Inputs: torch's own normals, on the CPU."""
    generator = torch.Generator(CPU).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=CPU)


def levels(rows: int) -> Tensor:
    """One noise level or weight for each sample."""
    return torch.linspace(0.1, 2.0, rows, device=CPU)


def elementwise(
    device: torch.device, shape: tuple[int, ...], key: NoiseKey, rows: slice = slice(None)
) -> list[Tensor]:
    """Fill, noisy data and updates of some rows of a batch, aligned and off any alignment."""
    x, score = (randn(shape, seed)[rows] for seed in (1, 2))
    key = key.for_samples(key.first_sample + (rows.start or 0))
    sigma = levels(shape[0])[rows].to(device)
    out = [ops.normal(tuple(x.shape), key, device=device), ops.perturb(x.to(device), sigma, key)]
    for offset in (0, 1):
        x, score = (
            t.new_empty(t.numel() + offset, device=device)[offset:].view(t.shape).copy_(t)
            for t in (x, score)
        )
        out.append(ops.langevin_step(x, score, 0.37, key))
        out.append(ops.affine_step_(x.clone(), score.bfloat16(), 0.9, -0.3, 0.7, key))
    return out


def sums(device: torch.device, shape: tuple[int, ...]) -> list[Tensor]:
    """Every reduction."""
    s, g = (randn(shape, seed).to(device) for seed in (3, 4))
    sigma = levels(shape[0]).to(device)
    return [
        ops.dsm_loss_from_score(s, sigma, TEST_KEY),
        ops.probe_dot(s, TEST_KEY, probe="sphere"),
        ops.ssm_reduce(g, s, TEST_KEY),
        ops.fd_reduce(g, s, sigma, TEST_KEY, probe="gaussian"),
    ]
