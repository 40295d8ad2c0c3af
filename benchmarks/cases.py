"""What is timed: every op and sampler, beside what a PyTorch user would write and what peers do."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from score_kernels import ops, sampling
from score_kernels.diffusion.sde import VE, DDPMSchedule
from score_kernels.diffusion.sigmas import geometric_sigmas
from score_kernels.noise import NoiseKey

__all__ = ["Case", "OPS", "cases"]

Step = Callable[[], Any]
KEY = NoiseKey(1)
ALPHA = 1e-4
# Elements: a cache's worth, more than a cache, and one where only the call counts.
SHAPES = ((64, 3, 32, 32), (64, 3, 128, 128), (1, 64))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Steps of a chain.
STEPS = 20


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op: name of the op or sampler.
        shape, dtype: of the state, and of the score.
        bytes: that must move for an element.
        variants: by name, what is timed; "ours" among them.
        checks: of ``score-kernels selfcheck`` that have to be green.
        per: steps of one call.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    variants: dict[str, Step]
    checks: tuple[str, ...]
    per: int = 1

    @property
    def elements(self) -> int:
        """Of the state, times the steps."""
        return math.prod(self.shape) * self.per


@dataclass
class Inputs:
    """Tensors on a device."""

    shape: tuple[int, ...]
    score_dtype: torch.dtype
    device: torch.device
    x: Tensor = field(init=False)
    score: Tensor = field(init=False)
    sigma: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x = torch.randn(self.shape, device=self.device)
        self.score = torch.randn(self.shape, device=self.device).to(self.score_dtype)
        self.sigma = torch.rand(self.shape[0], device=self.device) + 0.1

    @property
    def wide(self) -> Tensor:
        """sigma in x's shape."""
        return self.sigma.view(-1, *[1] * (len(self.shape) - 1))


Made = tuple[dict[str, Step], int]


def _langevin(i: Inputs) -> Made:
    half, root = ALPHA / 2, math.sqrt(ALPHA)
    state, buffer = i.x.clone(), torch.empty_like(i.x)

    def eager() -> Tensor:
        return i.x + half * i.score + root * torch.randn_like(i.x)

    return {
        "ours": lambda: ops.langevin_step_(state, i.score, ALPHA, KEY),
        "new tensor": lambda: ops.langevin_step(i.x, i.score, ALPHA, KEY),
        "eager": eager,
        "by hand": lambda: state.add_(i.score, alpha=half).add_(buffer.normal_(), alpha=root),
        "compiled": _compiled(eager),
    }, 8 + i.score.element_size()


def _affine(i: Inputs) -> Made:
    state = i.x.clone()

    def eager() -> Tensor:
        return 0.9 * i.x + 0.1 * i.score + 0.4 * torch.randn_like(i.x)

    variants = {
        "ours": lambda: ops.affine_step_(state, i.score, 0.9, 0.1, 0.4, KEY),
        "eager": eager,
        "compiled": _compiled(eager),
    }
    return variants, 8 + i.score.element_size()


def _known(i: Inputs) -> Made:
    state, mask = i.x.clone(), torch.rand(i.shape, device=i.device) < 0.5
    line = torch.tensor([[0.9, 0.1, 0.4, 1.0, 0.5]], device=i.device)
    known = torch.randn(i.shape, device=i.device)

    def eager() -> Tensor:
        moved = 0.9 * i.x + 0.1 * i.score + 0.4 * torch.randn_like(i.x)
        return torch.where(mask, known + 0.5 * torch.randn_like(known), moved)

    variants = {
        "ours": lambda: ops.table_step_(state, i.score, line, None, KEY, known=known, mask=mask),
        "eager": eager,
        "compiled": _compiled(eager),
    }
    return variants, 13 + i.score.element_size()


def _perturb(i: Inputs) -> Made:
    def eager() -> Tensor:
        return i.x + i.wide * torch.randn_like(i.x)

    return {
        "ours": lambda: ops.perturb(i.x, i.sigma, KEY),
        "eager": eager,
        "compiled": _compiled(eager),
    }, 8


def _normal(i: Inputs) -> Made:
    return {
        "ours": lambda: ops.normal(i.shape, KEY, device=i.device),
        "eager": lambda: torch.randn(i.shape, device=i.device),
    }, 4


def _dsm(i: Inputs) -> Made:
    score = i.score.requires_grad_()

    def formula() -> tuple[Tensor, Tensor]:
        z = torch.randn_like(i.x)
        each = 0.5 * (i.wide * score + z) ** 2
        return i.x + i.wide * z, each.flatten(1).sum(1).mean()

    def ours() -> tuple[Tensor, Tensor]:
        loss = ops.dsm_loss_from_score(score, i.sigma, KEY).mean()
        return ops.perturb(i.x, i.sigma, KEY), loss

    def with_gradient(forward: Callable[[], tuple[Tensor, Tensor]]) -> Step:
        def step() -> Any:
            noisy, loss = forward()
            return noisy, torch.autograd.grad(loss, score)

        return step

    # Noisy input 8; loss and gradient in one pass 8, apart 4 + 8.
    together = i.device.type == "cpu" and i.score.dtype == torch.float32
    return {
        "ours": with_gradient(ours),
        "eager": with_gradient(formula),
        "compiled": with_gradient(_compiled(formula)),
    }, 8 + (2 if together else 3) * i.score.element_size()


def _probe_dot(i: Inputs) -> Made:
    def eager() -> Tensor:
        v = torch.randint(2, i.shape, device=i.device, dtype=i.score.dtype) * 2 - 1
        return (v * i.score).flatten(1).sum(1)

    return {
        "ours": lambda: ops.probe_dot(i.score, KEY),
        "eager": eager,
        "compiled": _compiled(eager),
    }, i.score.element_size()


def _probe_scale(i: Inputs) -> Made:
    def eager() -> Tensor:
        return i.wide * (torch.randint(2, i.shape, device=i.device, dtype=torch.float32) * 2 - 1)

    return {
        "ours": lambda: ops.probe_scale(i.sigma, i.shape, KEY),
        "eager": eager,
        "compiled": _compiled(eager),
    }, 4


def _ssm_reduce(i: Inputs) -> Made:
    g = torch.randn_like(i.score)

    def eager() -> Tensor:
        v = torch.randint(2, i.shape, device=i.device, dtype=g.dtype) * 2 - 1
        return (v * g).flatten(1).sum(1) + 0.5 * i.score.square().flatten(1).sum(1)

    return {
        "ours": lambda: ops.ssm_reduce(g, i.score, KEY),
        "eager": eager,
        "compiled": _compiled(eager),
    }, 2 * i.score.element_size()


def _trivial(x: Tensor, sigma: Tensor | None = None) -> Tensor:
    return x


def _annealed(i: Inputs) -> Made:
    sigmas = geometric_sigmas(1.0, 0.5, 4)
    levels = sigmas.tolist()
    start = 1e-6 * i.x

    def ours() -> Tensor:
        return sampling.annealed_langevin(
            _trivial, start, sigmas, steps_per_level=STEPS // 4, step_size=1e-3, seed=1,
            denoise=False,
        )  # fmt: skip

    def eager() -> Tensor:
        x = start.clone()
        for sigma in levels:
            level = x.new_full(x.shape[:1], sigma)
            alpha = 1e-3 * (sigma / levels[-1]) ** 2
            for _ in range(STEPS // 4):
                x = x + alpha / 2 * _trivial(x, level) + math.sqrt(alpha) * torch.randn_like(x)
        return x

    variants: dict[str, Step] = {"ours": ours, "eager": eager}
    if importlib.util.find_spec("torchebm") is not None:
        from torchebm.core import GaussianModel
        from torchebm.samplers import LangevinDynamics

        flat = start.reshape(len(start), -1)
        one = torch.ones(1, device=i.device)
        model = GaussianModel(0 * flat[0], torch.diag(one.expand(flat.shape[1])))
        if flat.shape[1] <= 64:
            sampler = LangevinDynamics(model.to(i.device), step_size=1e-3, device=i.device)
            variants["torchebm"] = lambda: sampler.sample(flat, n_steps=STEPS)
    return variants, 12


def _ddpm(i: Inputs) -> Made:
    variants: dict[str, Step] = {}
    state, table = i.x.clone(), [(0.99, -0.01, 0.1)] * STEPS

    def ours() -> None:
        for t, (a, b, c) in enumerate(table):
            ops.affine_step_(state, i.score, a, b, c, KEY.at(t))

    def eager() -> Tensor:
        x = i.x
        for a, b, c in table:
            x = a * x + b * i.score + c * torch.randn_like(x)
        return x

    variants.update({"ours": ours, "eager": eager})
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        from score_kernels.integrations.diffusers import FusedDDPMScheduler

        theirs, fused = DDPMScheduler(clip_sample=False), FusedDDPMScheduler(clip_sample=False)
        for scheduler in (theirs, fused):
            scheduler.set_timesteps(STEPS)
        fused.noise = KEY

        def chain(scheduler: Any) -> Step:
            def run() -> Any:
                x = i.x
                for t in scheduler.timesteps:
                    x = scheduler.step(i.score, t, x).prev_sample
                return x

            return run

        variants["diffusers"], variants["ours in diffusers"] = chain(theirs), chain(fused)
    return variants, 12


def _corrector(i: Inputs) -> Made:
    start = 1e-3 * i.x

    def ours() -> Tensor:
        return sampling.predictor_corrector(
            lambda x, sigma: x, start, VE(0.5, 1.0), steps=STEPS, predictor=None, snr=0.01, seed=1,
            denoise=False,
        )  # fmt: skip

    def eager() -> Tensor:
        x = start
        for _ in range(STEPS):
            z = torch.randn_like(x)
            norms = [v.flatten(1).norm(dim=1) for v in (z, x)]
            size = 2 * (0.01 * norms[0] / norms[1]) ** 2
            wide = size.view(-1, *[1] * (x.dim() - 1))
            x = x + wide * x + (2 * wide).sqrt() * z
        return x

    # The norms are a pass of their own over the score.
    return {"ours": ours, "eager": eager}, 16


def _sampler(make: Callable[..., Tensor], noise: bool = True, calls: int = 1) -> Any:
    """A sampler with a network that costs nothing, beside a loop of as many steps in eager."""

    def made(i: Inputs) -> Made:
        start = 1e-3 * i.x

        def eager() -> Tensor:
            x = start
            for _ in range(STEPS):
                level = x.new_full(x.shape[:1], 0.5)
                for _ in range(calls):
                    moved = 0.99 * x + 0.01 * _trivial(x, level)
                x = moved + 0.1 * torch.randn_like(x) if noise else moved
            return x

        return {"ours": lambda: make(_trivial, start, seed=1), "eager": eager}, 12

    return made


# Whose first sigma is the last one's twentieth power of a ratio that consistent annealing allows.
_LEVELS = geometric_sigmas(1.0, 0.5, STEPS)
_SAMPLERS: dict[str, Callable[[Inputs], Made]] = {
    "langevin": _sampler(partial(sampling.langevin, step_size=1e-3, steps=STEPS)),
    "consistent_annealed": _sampler(
        partial(sampling.consistent_annealed, sigmas=_LEVELS, step_size=0.1, denoise=False)
    ),
    "euler_maruyama": _sampler(
        partial(sampling.euler_maruyama, sde=VE(0.5, 1.0), steps=STEPS, denoise=False)
    ),
    "predictor": _sampler(
        partial(
            sampling.predictor_corrector,
            sde=VE(0.5, 1.0),
            steps=STEPS,
            corrector=None,
            denoise=False,
        )
    ),
    "ddpm": _sampler(partial(sampling.ddpm, schedule=DDPMSchedule(1 / (1 + _LEVELS.flip(0) ** 2)))),
    "ddim": _sampler(
        partial(sampling.ddim, schedule=DDPMSchedule(1 / (1 + _LEVELS.flip(0) ** 2)), steps=STEPS),
        noise=False,
    ),
    "probability_flow": _sampler(
        partial(sampling.probability_flow, sigmas=_LEVELS), noise=False, calls=2
    ),
}

_STEP = ("updates, scores of 3 dtypes", "thread counts", "sizes and alignments")
OPS: dict[str, tuple[Callable[[Inputs], Made], tuple[str, ...], int]] = {
    "langevin_step": (_langevin, _STEP, 1),
    "affine_step": (_affine, _STEP, 1),
    "known elements": (_known, ("steps by lines, known elements",), 1),
    "perturb": (_perturb, ("sizes and alignments",), 1),
    "normal": (_normal, ("golden normals", "noise against the reference"), 1),
    "dsm with gradient": (_dsm, ("denoising loss", "its gradient, fp32, bf16, fp16"), 1),
    "probe_dot": (_probe_dot, ("probes, sliced and differences",), 1),
    "probe_scale": (_probe_scale, ("probes, sliced and differences",), 1),
    "ssm_reduce": (_ssm_reduce, ("probes, sliced and differences",), 1),
    "annealed chain": (_annealed, ("annealed chain",), STEPS),
    "scheduler chain": (_ddpm, ("annealed chain", *_STEP), STEPS),
    "corrector chain": (_corrector, ("steps by lines, known elements",), STEPS),
    **{f"{name} chain": (make, ("annealed chain",), STEPS) for name, make in _SAMPLERS.items()},
}
# Their scores are those of a network on the state: fp32.
_CHAINS = tuple(name for name in OPS if name.endswith(" chain"))
_NO_SCORE = ("perturb", "normal", "probe_scale")


def cases(
    names: list[str], device: torch.device, *, quick: bool, compiled: bool
) -> Iterator[partial[Case]]:
    """The rows to measure, each made when it is its turn; the first arguments are its name, shape
    and dtype."""
    for name in names:
        for shape in SHAPES[1:] if quick else SHAPES:
            if name in _CHAINS and shape == SHAPES[1]:
                continue
            for dtype in DTYPES:
                if dtype == "float32" or not (name in _CHAINS or name in _NO_SCORE or quick):
                    yield partial(_made, name, shape, dtype, device, compiled)


def _made(
    name: str, shape: tuple[int, ...], dtype: str, device: torch.device, compiled: bool
) -> Case:
    make, checks, per = OPS[name]
    variants, size = make(Inputs(shape, DTYPES[dtype], device))
    if not compiled:
        variants.pop("compiled", None)
    return Case(name, shape, dtype, size, variants, checks, per)


def _compiled(function: Callable[[], Any]) -> Step:
    """torch.compile of it; compiles at the first call."""
    torch._dynamo.reset()
    return torch.compile(function)
