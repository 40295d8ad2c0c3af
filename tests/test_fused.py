"""Fused scores: chains in one kernel against the same chains step by step in PyTorch."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from conftest import NATIVE, on_backend
from fibers.build import COMPILER
from torch import Tensor, nn

import score_kernels as sk
from score_kernels import fused
from score_kernels.fused import build

pytestmark = pytest.mark.skipif(not COMPILER or not NATIVE, reason="needs a C++ compiler")

SIGMAS = sk.geometric_sigmas(5.0, 0.5, 4)
# In C++, and as torch does it: no function of a library, so that the bits are the same.
CPP = """
template <class F> void score(const F* x, F sigma, F* s, const float* p) {
  for (int i = 0; i < 3; ++i) s[i] = (F(p[i]) - x[i]) / (sigma * sigma + 2);
}
"""
PARAMS = torch.tensor([1.0, -2.0, 0.5])


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCORE_KERNELS_CACHE", str(tmp_path_factory.mktemp("fused")))
        yield


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    v = (sigma * sigma + 2)[:, None]
    return (PARAMS - x) / v


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """Of three components in the plane."""
    centres = torch.tensor([[4.0, 0.0], [-2.0, 3.0], [-2.0, -3.0]])
    v = (sigma**2 + 1)[:, None]
    to = centres - x[:, None]
    weights = torch.softmax(-(to**2).sum(2) / (2 * v), 1)
    return (weights[:, :, None] * to).sum(1) / v


def double_well(x: Tensor) -> Tensor:
    return ((x**2 - 1) ** 2).sum(1) + 0.3 * x[:, 0]


def lattice(x: Tensor) -> Tensor:
    phi = x.view(-1, 4, 4)
    kinetic = (phi - phi.roll(1, 1)) ** 2 + (phi - phi.roll(1, 2)) ** 2
    return (0.5 * kinetic - phi**2 + 0.25 * phi**4).sum((1, 2))


def both(x: Tensor, score: Callable[..., Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """A chain fused and step by step: the wrapped score is no FusedScore."""
    chains = []
    for one in (score, lambda *a: score(*a)):
        chains.append(
            sk.annealed_langevin(
                one, x, SIGMAS, steps_per_level=3, step_size=0.2, seed=5, **options
            )
        )
    return chains[0], chains[1]


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("rows", [1, 3, 16, 37, 1000])
def test_noise_and_updates_are_the_steps_to_the_bit(isa: str, rows: int) -> None:
    with on_backend(isa):
        score = fused.score(gaussian, 3)
        got, want = both(7 * torch.randn(rows, 3), score)
        assert torch.equal(got, want)


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("end", [{"clamp": (-0.5, 1.5)}, {"wrap": 0.7}])
def test_steps_that_end_in_a_box(
    isa: str, end: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the one call for all steps."""
    with on_backend(isa):
        score, x, steps = fused.score(gaussian, 3), 7 * torch.randn(37, 3), []
        run = fused.FusedScore._run
        monkeypatch.setattr(fused.FusedScore, "_run", lambda *a: [steps.append(len(a[3])), run(*a)])
        got, want = both(x, score, **end)
        assert torch.equal(got, want) and steps[0] == 12


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 130, 256])
def test_rows_of_any_length(isa: str, dim: int) -> None:
    with on_backend(isa):
        score = fused.score(lambda x, sigma: -x / sigma[:, None], dim)
        got, want = both(torch.randn(21, dim), score, first_sample=2**32 - 11)
        assert torch.equal(got, want)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chains_do_not_depend_on_threads_batches_or_pauses(threads: int) -> None:
    score = fused.score(mixture, 2)
    x, before = 5 * torch.randn(700, 2), torch.get_num_threads()

    def chain(x: Tensor, **options: object) -> Tensor:
        return sk.langevin(score, x, sigma=1.0, step_size=0.1, steps=60, seed=3, **options)

    want = chain(x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(chain(x), want)
    finally:
        torch.set_num_threads(before)
    parts = [chain(x[a:b], first_sample=a) for a, b in ((0, 13), (13, 400), (400, 700))]
    assert torch.equal(torch.cat(parts), want)
    order = torch.randperm(700)
    assert torch.equal(chain(x[order], samples=order), want[order])
    frames = chain(x, record_every=7)
    assert torch.equal(frames[-1], want)
    assert torch.equal(chain(frames[2], first_step=21), want)
    draws = torch.full((700,), 4)
    moved = sk.langevin(
        lambda x, sigma: score(x, sigma), x, sigma=1.0, step_size=0.1, steps=60, seed=3,
        samples=order, draws=draws,
    )  # fmt: skip
    close(chain(x, samples=order, draws=draws), moved)


def close(got: Tensor, want: Tensor) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= tolerances.FUSED, error


def with_default(x: Tensor, sigma: Tensor | float = 1.0) -> Tensor:
    return -x / (1 + torch.as_tensor(sigma).reshape(-1, 1) ** 2)


def with_masks(x: Tensor, sigma: Tensor) -> Tensor:
    """Masks that are added are joined, numbers of masks are added."""
    above, far = sigma > 1, sigma > 2
    return -x * (1 + (above + far).float() + 0.1 * (above.float() + far.float()))[:, None]


def with_ones(x: Tensor, sigma: Tensor) -> Tensor:
    """Constants of integers, and terms that vanish where sigma is 1."""
    ones = torch.cat([x[:, :1], torch.ones_like(x[:, 1:])], 1)
    return -x / (1 + sigma**2)[:, None] + 0.1 * sigma.log()[:, None] * ones


@pytest.mark.parametrize(
    "function, dim",
    [
        (mixture, 2),
        (gaussian, 3),
        (with_default, 2),
        (with_masks, 2),
        (with_ones, 3),
        (lambda *given: -given[0] / (1 + given[1][:, None]), 2),
    ],
)
def test_scores_with_functions_agree_to_their_rounding(
    function: Callable[..., Tensor], dim: int
) -> None:
    x = 3 * torch.randn(50, dim)
    got, want = (both(x, one)[0] for one in (fused.score(function, dim), function))
    close(got, want)


def angles(x: Tensor) -> Tensor:
    """Indices that repeat, whose gradients add up."""
    pairs = x[:, torch.tensor([0, 1, 2, 0])] * x[:, torch.tensor([1, 2, 0, 1])]
    return pairs.sin().sum(1) + x[:, 1:].square().sum(1) + x[:, 0]


def columns(x: Tensor) -> Tensor:
    """Rosenbrock's, whose gradient goes through masks that are constants."""
    return (1 - x[:, 0]) ** 2 + 2 * (x[:, 1] - x[:, 0] ** 2) ** 2 + x[:, 2].square()


def logistic(x: Tensor) -> Tensor:
    """A posterior's, with the loss that changes its own tensor in place."""
    features = torch.arange(21.0).view(7, 3).sin()
    labels = (features[:, 0] > 0).float().expand(len(x), 7)
    loss = nn.functional.binary_cross_entropy_with_logits(x @ features.T, labels, reduction="none")
    return loss.sum(1) + x.square().sum(1) / 2


@pytest.mark.parametrize(
    "energy, dim",
    [
        (double_well, 3),
        (lattice, 16),
        (angles, 3),
        (columns, 3),
        (logistic, 3),
        (lambda x: x[:, 0] ** 2 + x[:, 1:].square().sum(1), 1),
        (lambda x: (x @ torch.ones(2, 1)).tanh().squeeze(-1) + x.square().sum(1), 2),
    ],
)
def test_energies_are_differentiated(energy: Callable[..., Tensor], dim: int) -> None:
    score, x = fused.score(energy, dim, kind="energy"), torch.randn(9, dim)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
    torch.testing.assert_close(score(x), -gradient)

    def chain(one: Callable[..., Tensor]) -> Tensor:
        return sk.langevin(one, x, step_size=0.01, steps=20, seed=1)

    close(chain(score), chain(lambda x: score(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 33), nn.SiLU(), nn.Linear(33, 2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.layers(torch.cat([x, sigma.log()[:, None]], 1)) / sigma[:, None]


def test_a_small_network() -> None:
    torch.manual_seed(0)
    close(*both(torch.randn(40, 2), fused.score(Net(), 2)))


# Of numbers from -0.5 to 0.5; the others' are from 0.2 to 1.2.
SIGNED = (
    "abs", "acos", "asin", "atanh", "ceil", "floor", "neg", "relu", "round", "sigmoid", "sign",
    "tanh", "trunc",
)  # fmt: skip
UNARY = (
    *SIGNED, "asinh", "atan", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "log", "log10",
    "log1p", "log2", "reciprocal", "rsqrt", "sin", "sinh", "sqrt", "square", "tan",
)  # fmt: skip


def changed_in_place(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y[:, 2:] += 2 * x[:, 2:]
    y[:, 1] = 0.5
    return y


MATRIX = torch.arange(25.0).view(5, 5) / 25
NORMED = nn.Sequential(nn.LayerNorm(5, elementwise_affine=False), nn.BatchNorm1d(5)).eval()
MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "acosh": lambda x: (x + 1).acosh(),
    "add, alpha": lambda x: torch.add(x, x.flip(1), alpha=2.5),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "amin": lambda x: x - x.amin(1, keepdim=True),
    "bmm": lambda x: torch.cat(
        [(x[:, :4].reshape(-1, 2, 2) @ x[:, 1:].reshape(-1, 2, 2)).reshape(-1, 4), x[:, :1]], 1
    ),
    "cat": lambda x: torch.cat([x[:, 2:], 2 * x[:, :2]], 1),
    "chunk": lambda x: (x @ torch.cat([MATRIX, MATRIX + 1], 1)).chunk(2, 1)[0],
    "clamp": lambda x: x.clamp(0.5, 1.0) + x.clamp(min=0.8) - x.clamp(max=0.9),
    "comparisons": lambda x: (x > 1) * x + (x <= 0.7) * 3.0 - (x != x.flip(1)) * 1.0,
    "cumulated": lambda x: torch.stack([x[:, : i + 1].sum(1) for i in range(5)], 1),
    "expand": lambda x: x.sum(1, keepdim=True).expand(-1, 5) * x,
    "gelu": torch.nn.functional.gelu,
    "einsum": lambda x: torch.einsum("bi,bj,ij->bi", x, x, torch.arange(25.0).view(5, 5)),
    "in place": changed_in_place,
    "functions of two": lambda x: (
        torch.atan2(x, x.flip(1)) + torch.hypot(x, x.flip(1)) + torch.fmod(5 * x, 2.0)
    ),
    "index": lambda x: x[:, [4, 0, 0, 1, 3]] * x,
    "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x - 1, 0.1),
    "integers": lambda x: (
        torch.cat([x[:, :3], torch.full((len(x), 2), 2)], 1)
        * torch.arange(5)
        * torch.full_like(x, 2) ** -1
    ),
    "largest": lambda x: x - x.max(1, keepdim=True)[0] + x.min(1).values[:, None],
    "logical": lambda x: torch.where((x > 0.5) & ~(x > 1.2) | (x < 0.3), x, -x),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "long sums": lambda x: (x[:, :, None] * x.new_ones(5, 40).cumsum(1)).transpose(1, 2).sum(1),
    "long rows": lambda x: torch.cat([x * i for i in range(30)], 1).view(-1, 30, 5).amax(1),
    "masks in a stack": lambda x: torch.where(
        torch.stack([x[:, 0] > 0.5, *(x[:, 1:] < 1).unbind(1)], 1), -x, 2 * x
    ),
    "masks as numbers": lambda x: x * torch.stack([(x[:, i] > 0.7).float() for i in range(5)], 1),
    "matrix": lambda x: x @ MATRIX,
    "matrix, on the left": lambda x: torch.cat([MATRIX[:2] @ x.T, MATRIX[2:] @ x.T]).T,
    "matrix, transposed": lambda x: x @ MATRIX.T,
    "maximum": lambda x: torch.maximum(x, x.flip(1)) - torch.minimum(x, 1 / x),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "normalisation": NORMED,
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "outer": lambda x: (x[:, :, None] * x[:, None]).sum(2),
    "power of a number": lambda x: 2.0**x,
    "power": lambda x: x**3 + x**-2 + x**0.5 + x**2.2,
    "product": lambda x: x * x.prod(1, keepdim=True),
    "remainder": lambda x: torch.remainder(x - 0.7, 0.3) + torch.remainder(x - 0.7, -0.3),
    "select": lambda x: torch.stack([x[:, 4], *x[:, :4].unbind(1)], 1),
    "softmax": lambda x: torch.softmax(2 * x, 1),
    "softplus": torch.nn.functional.softplus,
    "sub, rsub": lambda x: (2 - x) - torch.sub(x, x.roll(1, 1), alpha=0.5),
    "transpose": lambda x: (x[:, :4].view(-1, 2, 2).mT.reshape(-1, 4).sum(1, keepdim=True)) * x,
    "variance": lambda x: x * x.var(1, keepdim=True),
}


def step_to_the_score(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A step of 2 fused, and with the function itself."""
    score = fused.score(function, x.shape[1])
    options = {"step_size": 2.0, "steps": 1, "seed": 1, "on_nan": "ignore"}
    return sk.langevin(score, x, **options), sk.langevin(function, x, **options)


def test_functions_of_one_number_are_torch_s() -> None:
    """All in one score, of five numbers each, as each of its own would have to be compiled."""
    shift = torch.tensor([0.7 if name in SIGNED else 0.0 for name in UNARY]).repeat_interleave(5)

    def all_of_them(x: Tensor) -> Tensor:
        pairs = zip(UNARY, (x - shift).split(5, 1), strict=True)
        return torch.cat([getattr(torch, name)(part) for name, part in pairs], 1)

    got, want = step_to_the_score(all_of_them, torch.rand(19, len(shift)) + 0.2)
    for name, one, other in zip(UNARY, got.split(5, 1), want.split(5, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", MORE)
def test_operations_are_torch_s(name: str) -> None:
    got, want = step_to_the_score(MORE[name], torch.rand(19, 5) + 0.2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_scores_of_one_process_keep_their_constants() -> None:
    """Constants of the same name and size, of two libraries."""
    torch.manual_seed(3)
    x, networks = torch.randn(20, 40), [nn.Linear(40, 40) for _ in range(2)]
    scores = [fused.score(lambda x, net=net: net(x) - 2 * x, 40) for net in networks]
    for score in scores:
        got = sk.langevin(score, x, step_size=0.1, steps=5, seed=1)
        want = sk.langevin(score.function, x, step_size=0.1, steps=5, seed=1)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_cpp_text_with_parameters() -> None:
    score = fused.score(CPP, 3, params=PARAMS)
    x = torch.randn(20, 3)
    got = sk.annealed_langevin(score, x, SIGMAS, steps_per_level=3, step_size=0.2, seed=5)
    assert torch.equal(got, both(x, fused.score(gaussian, 3))[0])
    assert torch.equal(score(x, torch.full((20,), 2.0)), gaussian(x, torch.full((20,), 2.0)))
    # In place, and another tensor.
    for change in (lambda: PARAMS.add_(1.0), lambda: setattr(score, "params", PARAMS / 2)):
        held = PARAMS.clone()
        try:
            change()
            v = torch.tensor(2.0) ** 2 + 2
            assert torch.equal(score(x, torch.full((20,), 2.0)), (score.params - x) / v)
        finally:
            PARAMS.copy_(held)
    with pytest.raises(TypeError, match="params: got torch.float64, expected contiguous float32"):
        score.params = PARAMS.double()
    with pytest.raises(TypeError, match="params: got non-contiguous torch.float32"):
        score.params = torch.ones(6)[::2]


def test_options_that_are_no_affine_steps_go_step_by_step() -> None:
    score, x = fused.score(gaussian, 3), torch.randn(20, 3)
    known, mask = torch.ones(3), torch.tensor([True, False, False])
    seen: list[int] = []
    for options in (
        {"known": known, "mask": mask},
        {"guidance": lambda x, sigma: 0.1 * x},
        {"callback": lambda progress: seen.append(progress.step)},
        {"denoise": False},
        {"clamp": (-0.5, 2.0), "callback": lambda progress: None},
    ):
        got, want = both(x, score, **options)
        assert torch.equal(got, want)
    assert seen == [*range(12), *range(12)]
    sde = sk.VE(0.5, 5.0)
    got, want = (
        sk.predictor_corrector(one, x, sde, steps=5, corrector="langevin", seed=1)
        for one in (score, lambda x, sigma: score(x, sigma))
    )
    assert torch.equal(got, want)


def test_states_of_any_shape() -> None:
    """Whose rows the function sees as [B, dim], fused or not."""
    score, x = fused.score(lambda x: 0.5 * x.roll(1, 1) - x, 16), torch.randn(3, 4, 4)
    options = {"step_size": 0.1, "steps": 3, "seed": 1}
    got = sk.langevin(score, x, **options)
    assert torch.equal(got, sk.langevin(score, x, guidance=lambda x, _: 0 * x, **options))
    flat = sk.langevin(score.function, x.view(3, 16), **options)
    assert torch.equal(got, flat.view_as(x))


def test_scores_that_are_called_at_a_scaled_state() -> None:
    """VP, whose mean is not 1."""
    x, score = torch.randn(20, 3), fused.score(gaussian, 3)
    got, want = (
        sk.euler_maruyama(one, x, sk.VP(), steps=9, seed=1) for one in (score, score.function)
    )
    assert torch.equal(got, want)


def test_levels_left_out_and_steps_of_their_own() -> None:
    x, score = torch.randn(20, 3), fused.score(gaussian, 3)
    sizes = [0.3, 0.2, 0.1, 0.05]
    for sampler in (
        partial(sk.annealed_langevin, sigmas=SIGMAS, steps_per_level=[2, 0, 3, 1], step_size=0.1),
        partial(sk.langevin, step_size=sizes, steps=4, sigma=1.5, noise_scale=[0, 1, 0.5, 0]),
    ):
        got, want = (
            sampler(one, x, temperature=0.4, seed=1) for one in (score, lambda *a: score(*a))
        )
        assert torch.equal(got, want)


def test_a_divergence_names_its_sample() -> None:
    score = fused.score(lambda x: x**3, 2)
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    with pytest.raises(FloatingPointError, match="sample 1"):
        sk.langevin(score, x, step_size=1.0, steps=20, seed=1)


@pytest.mark.parametrize(
    "source, dim, options, error, text",
    [
        (
            lambda x: x.cumsum(1),
            2,
            {},
            NotImplementedError,
            r"source: cumsum is not fused, at .*test_fused.py:\d+; see",
        ),
        (lambda x: x - x.mean(0), 2, {}, ValueError, "source: gave rows other scores in a batch"),
        (lambda x: x[:, :1], 2, {}, ValueError, r"source: gave the shape \(257, 1\) for x \[257"),
        (
            lambda x, sigma: -x / sigma**2,
            2,
            {},
            ValueError,
            r"source: fails for x \[257, 2\] and sigma \[257\]: The size of tensor",
        ),
        (
            lambda x, sigma: -x / sigma**2,
            1,
            {},
            ValueError,
            r"expected \(257, 1\); sigma\[:, None\] is a column",
        ),
        (lambda x: x**2, 2, {"kind": "energy"}, ValueError, r"\[257, 2\], expected \(257,\)"),
        (lambda x: x if x.sum() > 0 else -x, 2, {}, NotImplementedError, "source: takes a number"),
        (
            lambda x: torch.index_put(x, (x > 1,), torch.zeros(())),
            2,
            {},
            NotImplementedError,
            "index_put at places that depend on the row is not fused",
        ),
        (
            lambda x: (x[:, :, None] - x[:, None]).tanh().flip(1).cos().sum(1),
            256,
            {},
            NotImplementedError,
            "source: holds [0-9]+ numbers of a row at a time, as of all pairs",
        ),
        (lambda x: x, 0, {}, ValueError, "dim: got 0, expected"),
        (lambda x: x, 257, {}, ValueError, "dim: got 257, expected at most 256"),
        (lambda x: x, 2, {"kind": "log"}, ValueError, "kind: got 'log', expected one of"),
        (lambda x: x, 2, {"params": PARAMS}, ValueError, "params: got them with a function"),
        (CPP, 3, {"kind": "energy"}, ValueError, "kind: got 'energy' with C\\+\\+ text"),
        (CPP, 3, {}, ValueError, "params: got none, expected those that the C.. text reads"),
        (
            "void score() { nothing; }",
            3,
            {},
            RuntimeError,
            "score:1:16: error: .nothing. was not declared",
        ),
        (5, 3, {}, TypeError, "source: got"),
    ],
)
def test_what_cannot_be_fused_is_named(
    source: object, dim: int, options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        fused.score(source, dim, **options)


def test_chains_that_do_not_fit_the_score() -> None:
    text = fused.score(CPP, 3, params=PARAMS)
    with pytest.raises(ValueError, match="x: got rows of 2, expected the score's 3"):
        text(torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="sigma: got several noise levels with C"):
        text(torch.zeros(2, 3), torch.tensor([1.0, 2.0]))
    with pytest.raises(
        RuntimeError, match="C.. text, got x on meta, expected a CUDA GPU, or a CPU"
    ):
        text(torch.zeros(2, 3, device="meta"), torch.ones(2))
    with pytest.raises(ValueError, match="x: got rows of 4, expected the score's 3"):
        both(torch.zeros(2, 4), fused.score(gaussian, 3))
    with pytest.raises(TypeError, match="score: takes sigma"):
        sk.langevin(fused.score(gaussian, 3), torch.zeros(2, 3), step_size=0.1, steps=2, seed=1)


def test_without_a_compiler_chains_run_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3)
    want = both(x, fused.score(gaussian, 3))[1]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found; chains run step by step"):
        score = fused.score(gaussian, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(both(x, score)[0], want)


def test_a_score_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fused.score(gaussian, 3)
    made = sorted(Path(build._cache()).iterdir())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    fused.score(gaussian, 3)
    assert sorted(Path(build._cache()).iterdir()) == made


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    code = (
        "import torch, score_kernels as sk\n"
        "score = sk.fused.score(lambda x: -x, 2)\n"
        "print(sk.langevin(score, torch.ones(1, 2), step_size=0.1, steps=3, seed=1).tolist())"
    )
    environment = {**__import__("os").environ, "SCORE_KERNELS_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        for _ in range(3)
    ]
    # One that is killed while it compiles leaves nothing that another would take for a library.
    processes[0].kill()
    said = {process.communicate()[0] for process in processes[1:]}
    assert len(said) == 1 and said != {b""}
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_ten_levels_of_the_toy_have_the_mass_of_its_modes() -> None:
    """The mixture of the tutorial, 4:1, at (5, 5) and (-5, -5): see test_sampling's toy."""

    def toy(x: Tensor, sigma: Tensor) -> Tensor:
        v = (sigma**2)[:, None]
        return (5 * torch.tanh(math.log(2) + 5 * x.sum(1, keepdim=True) / v) - x) / v

    x = sk.ops.uniform((20_000, 2), sk.NoiseKey(3)) * 16 - 8
    sigmas = sk.geometric_sigmas(20.0, 1.0, 10)
    score = fused.score(toy, 2)
    got = sk.annealed_langevin(score, x, sigmas, steps_per_level=100, step_size=0.1, seed=11)
    mass = float((got.sum(1) > 0).double().mean())
    # Of the same chain step by step; four standard deviations of 20,000 samples.
    assert abs(mass - 0.783) < 4 * math.sqrt(0.783 * 0.217 / 20_000)
