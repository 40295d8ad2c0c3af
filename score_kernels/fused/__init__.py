"""Scores that are formulas: whole chains in one kernel.

``score_kernels.fused.score`` compiles the PyTorch function of a score, or C++ text, into a function
that takes a chain's steps one after the other without leaving the processor's first-level cache.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from score_kernels import checks
from score_kernels.backends import reference
from score_kernels.backends.compiled import native
from score_kernels.backends.reference import NO_END, End
from score_kernels.diffusion.prediction import as_score
from score_kernels.fused import build

if TYPE_CHECKING:
    from score_kernels.sampling.engine import Chain

__all__ = ["FusedScore", "score"]


def score(
    source: Callable[..., Tensor] | str,
    dim: int,
    *,
    kind: str = "score",
    params: Tensor | None = None,
) -> FusedScore:
    """A score whose chains run in one kernel, ``[B, dim]``.

    Args:
        source: a function ``score(x, sigma)`` or ``score(x)`` of PyTorch that treats rows
            independently, x ``[B, dim]`` float32 and sigma ``[B]``; or C++ text::

                template <class F>
                void score(const F* x, F sigma, F* s, const float* params)

            from a row's numbers x to its score s; see docs/fused.md.
        dim: numbers of a row, 1 to 256.
        kind: "score", or "energy": the function gives ``[B]``, and its negative gradient is the
            score.
        params: float32 and contiguous, what C++ text gets as params, which reads as far as it
            likes. It may be changed in place between chains, or replaced: ``score.params = ...``.

    Returns:
        A score for samplers, losses and tests: a function of x and sigma. ``.function`` is the
        function that was given, of an energy its negative gradient, or None for C++ text; what is
        compiled has the weights and constants of this moment.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; the function fails on a batch, or
            gives another shape, or a row's score that depends on other rows.
        NotImplementedError: the function has an operation that is not fused; it is named.
        RuntimeError: the compiler reports an error.
    """
    return FusedScore(source, dim, kind, params)


class FusedScore:
    """What :func:`score` returns: a score, fused with the chains of samplers."""

    def __init__(
        self, source: Callable[..., Tensor] | str, dim: int, kind: str, params: Tensor | None
    ) -> None:
        self.dim = checks.count("dim", dim, least=1)
        if dim > 256:
            raise ValueError(f"dim: got {dim}, expected at most 256")
        checks.choice("kind", kind, ("score", "energy"))
        self.function: Callable[..., Tensor] | None = None
        self.takes_sigma = False
        self.params = params
        if isinstance(source, str):
            if kind == "energy":
                raise ValueError("kind: got 'energy' with C++ text, expected 'score'")
            if params is None and _reads_params(source):
                raise ValueError("params: got none, expected those that the C++ text reads")
            text = source
        else:
            checks.function("source", source)
            if params is not None:
                raise ValueError("params: got them with a function, expected them with C++ text")
            self.takes_sigma = _arguments(source) > 1
            # Slow to import.
            from score_kernels.fused import trace

            self._probe(source, kind)
            self.function = source if kind == "score" else as_score(source, kind="energy")
            row = torch.zeros(1, self.dim, dtype=torch.float32), torch.ones(1, dtype=torch.float32)
            text = trace.source_of(self.function, row[: 1 + self.takes_sigma])
        self.text = _FRAME.format(text=text, dim=self.dim)
        self._functions: dict[str, int | None] = {}
        if self._address() is not None and self.function is not None:
            self._check_rows()

    @property
    def params(self) -> Tensor | None:
        """What C++ text gets as params."""
        return self._params

    @params.setter
    def params(self, params: Tensor | None) -> None:
        if params is not None:
            checks.instance("params", params, Tensor, "a tensor")
            if params.dtype != torch.float32 or not params.is_contiguous():
                which = "" if params.is_contiguous() else "non-contiguous "
                raise TypeError(f"params: got {which}{params.dtype}, expected contiguous float32")
        self._params = params

    def __call__(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        self._check_shape(x)
        if self.function is not None:
            rows = x if x.dim() == 2 else x.reshape(len(x), self.dim)
            given = (rows, sigma) if self.takes_sigma else (rows,)
            return self.function(*given).reshape(x.shape)
        run = self._runner(x)
        if run is None:
            raise RuntimeError(
                f"score: C++ text, got x on {x.device}, expected a CUDA GPU, or a CPU with a "
                "compiler and the native backend"
            )
        level = math.nan if sigma is None or not len(sigma) else float(sigma.flatten()[0])
        if sigma is not None and bool((sigma != level).any()):
            raise ValueError("sigma: got several noise levels with C++ text, expected one")
        out = x.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        run(out, _evaluation(level), (0, 0, 0, 0, None))
        return out

    def chain(self, chain: Chain) -> Callable[[int, int], None] | None:
        """``chain.advance`` in one call, or None where its steps are more than the score's."""
        x, model, plan = chain.x, chain.model, chain.plan
        self._check_shape(x)
        if self.takes_sigma and any(math.isnan(phase.sigma) for phase in plan):
            raise TypeError("score: takes sigma, expected a function of x for a chain without one")
        more = model.guidance, model.conditions, model.limits, *(p.pre_step for p in plan)
        fits = chain.backend is native if x.is_cpu else chain.backend is not reference.backend
        fits = fits and chain.affine and not model.pairs
        run = self._runner(x) if fits and len(x) and not any(more) else None
        if run is None:
            return None
        lines = [(p.a, p.b, p.c, p.sigma, 1 / p.mean) for p in plan]
        repeats = torch.tensor([phase.steps for phase in plan])
        table = torch.tensor(lines, dtype=torch.float32).repeat_interleave(repeats, 0)

        def advance(t: int, stop: int) -> None:
            run(x, table[t:stop], (*chain.key[:2], t, *chain.key[3:]), chain.end)

        return advance

    def _check_shape(self, x: Tensor) -> None:
        if len(x) and x[:1].numel() != self.dim:
            raise ValueError(f"x: got rows of {x[:1].numel()}, expected the score's {self.dim}")

    def _runner(self, x: Tensor) -> Callable[..., None] | None:
        """A function of (x, table, key) that takes all steps of a table, if x's device has one."""
        if x.is_cuda:
            with torch.cuda.device(x.device):
                return functools.partial(self._launch, build.cuda_kernel(self.text))
        address = self._address() if x.is_cpu else None
        return None if address is None else functools.partial(self._run, address)

    def _launch(
        self,
        kernel: Callable[..., None],
        x: Tensor,
        table: Tensor,
        key: tuple[Any, ...],
        end: End = NO_END,
    ) -> None:
        seed, purpose, draw, first, addresses = key
        table = table.to(x.device)
        # Pointers that the kernel does not read are the table's.
        params = table if self.params is None else self.params.detach().to(x.device)
        tensors = [x, table, params, table if addresses is None else addresses]
        numbers = [len(x), len(table), seed, seed >> 32, first, first >> 32, draw, purpose]
        low, high = torch.tensor(end[1:], dtype=torch.float32).view(torch.int32).tolist()
        numbers = [*(n & 0xFFFFFFFF for n in numbers), int(addresses is not None), end[0]]
        numbers += [low & 0xFFFFFFFF, high & 0xFFFFFFFF]
        with torch.cuda.device_of(x):
            kernel((-(-len(x) // _THREADS), 1, 1), (_THREADS, 1, 1), [*tensors, *numbers])
        torch.autograd.graph.increment_version(x)

    def _run(
        self, address: int, x: Tensor, table: Tensor, key: tuple[Any, ...], end: End = NO_END
    ) -> None:
        # Of a GPU a copy, which is held here until the chain ends.
        held = None if self.params is None else self.params.detach().to(x.device)
        params = 0 if held is None else held.data_ptr()
        addresses = 0 if key[4] is None else key[4].data_ptr()
        where = x.data_ptr(), address, params, table.data_ptr(), len(x), self.dim, len(table)
        native.kernels.chain(*where, *end, *key[:4], addresses)
        torch.autograd.graph.increment_version(x)

    def _address(self) -> int | None:
        """The compiled function for the instruction set in use, or None where none can be."""
        if native.unavailable():
            return None
        isa = native.kernels.isa()
        if isa not in self._functions:
            if build.compiler() is None:
                warnings.warn(
                    "score: no C++ compiler found; chains run step by step in PyTorch, some 100 "
                    "times slower. Install g++ or clang++, or name one in CXX",
                    stacklevel=4,
                )
                self._functions[isa] = None
            else:
                library = build.compiled(self.text, isa)
                self._functions[isa] = ctypes.cast(library.sk_score, ctypes.c_void_p).value
        return self._functions[isa]

    def _probe(self, source: Callable[..., Tensor], kind: str) -> None:
        """That the function takes a batch and gives the right shape."""
        batch = 257, self.dim
        given = torch.zeros(batch, dtype=torch.float32), torch.ones(257, dtype=torch.float32)
        arguments = given[: 1 + self.takes_sigma]
        takes = f"x [257, {self.dim}]" + " and sigma [257]" * self.takes_sigma
        try:
            with torch.no_grad():
                shape = tuple(source(*arguments).shape)
        except RuntimeError as error:
            raise ValueError(f"source: fails for {takes}: {error}") from error
        want = batch if kind == "score" else batch[:1]
        if shape != want:
            hint = "; sigma[:, None] is a column" if self.takes_sigma and kind == "score" else ""
            raise ValueError(f"source: gave the shape {shape} for {takes}, expected {want}{hint}")

    def _check_rows(self) -> None:
        """That rows do not depend on each other, and that the compiled score is the function."""
        address, generator = self._address(), torch.Generator().manual_seed(0)
        assert address is not None
        for sigma, spread in ((1.0, 1.0), (7.3, 3.0)):
            x = spread * torch.randn(37, self.dim, generator=generator, dtype=torch.float32)
            levels = torch.full((37,), sigma, dtype=torch.float32)
            want = self(x, levels).detach().to(torch.float32)
            alone = torch.cat([self(x[i : i + 1], levels[:1]).detach() for i in range(5)])
            if _far(alone, want[:5]):
                raise ValueError(
                    "source: gave rows other scores in a batch than alone, expected a function of "
                    "each row without random numbers (networks: .eval())"
                )
            got = x.clone()
            self._run(address, got, _evaluation(sigma), (0, 0, 0, 0, None))
            if _far(got, want):
                raise RuntimeError(
                    "source: the compiled score is not the function, which is a defect of "
                    "score_kernels; please report it. C++ text may do"
                )


def _far(got: Tensor, want: Tensor) -> bool:
    """Whether scores of rows differ by more than rounding, where they are finite."""
    finite = want.isfinite().all(1)
    got, want = got[finite], want[finite]
    if not len(want):
        return False
    return not (got - want).abs().max() <= 1e-3 * want.abs().max().clamp_min(1e-30)


# Of a block on a GPU.
_THREADS = 128
_FRAME = """#include <score_kernels/fused.h>
#line 1 "score"
{text}
SK_FUSED_SCORE({dim})
"""


def _evaluation(sigma: float) -> Tensor:
    """The table of one step, from x to its score."""
    return torch.tensor([[0.0, 1.0, 0.0, sigma, 1.0]], dtype=torch.float32)


def _arguments(function: Callable[..., Tensor]) -> int:
    """How many tensors a function takes: x, and sigma where a second argument can be that."""
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = list(inspect.signature(called).parameters.values())
    except ValueError:
        # torch's own functions, which have no signature: of x.
        return 1
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    # A default is a constant of a function made in a loop, unless it is sigma's.
    return sum(
        p.name == "sigma" or (p.default is p.empty and p.kind is not p.VAR_KEYWORD)
        for p in parameters
    )


def _reads_params(text: str) -> bool:
    """Whether C++ text uses the last argument of its score."""
    name = re.search(r"\bscore\s*\([^)]*\*\s*(\w+)\s*\)", text)
    return name is not None and len(re.findall(rf"\b{name[1]}\b", text)) > 1
