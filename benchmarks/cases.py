"""What is timed: every op and sampler, beside what a PyTorch user would write and what peers do."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Step
from score_kernels import dsm_loss, ops, sampling
from score_kernels.diffusion.sde import VE, DDPMSchedule
from score_kernels.diffusion.sigmas import geometric_sigmas
from score_kernels.noise import NoiseKey

__all__ = ["OPS", "SMALL", "Careful", "Case", "cases"]

KEY = NoiseKey(1)
ALPHA = 1e-4
# With so few elements only the call counts.
SMALL = (1, 64)
# What fits a cache, what does not, and a call.
SHAPES = ((64, 3, 32, 32), (64, 3, 128, 128), SMALL)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: name of the op or sampler.
        shape, dtype: of the state, and of the score.
        bytes: that must move for an element and step.
        variants: by name, what is timed; "ours" among them.
        steps: of one call.
        grad: whether autograd records.
        capturable: whether a CUDA graph can hold it: nothing waits for the device.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    variants: dict[str, Step]
    steps: int
    grad: bool
    capturable: bool


class Inputs:
    """Random tensors on a device."""

    def __init__(self, shape: tuple[int, ...], score_dtype: torch.dtype, device: torch.device):
        self.shape = shape
        self.device = device
        self.x = torch.randn(shape, device=device)
        self.score = torch.randn(shape, device=device).to(score_dtype)
        self.sigma = torch.rand(shape[0], device=device) + 0.1
        self.column = (-1, *[1] * (len(shape) - 1))
        # Steps of a chain: so many that its beginning does not count.
        self.steps = 200 if shape == SMALL else 20

    def expand(self, values: Tensor) -> Tensor:
        """`[B]` as `[B, 1, ...]`."""
        return values.view(self.column)

    def signs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rademacher variables as one writes them in PyTorch."""
        return torch.randint(2, self.shape, device=self.device, dtype=dtype) * 2 - 1


# The variants, and the bytes that must move for an element.
Made = tuple[dict[str, Step], int]


def _against_eager(ours: Step, eager: Step, **others: Step) -> dict[str, Step]:
    """Ours, others, eager and torch.compile of it, which compiles at the first call."""
    torch._dynamo.reset()
    return {"ours": ours, **others, "eager": eager, "compiled": torch.compile(eager)}


def _langevin(i: Inputs) -> Made:
    half, root = ALPHA / 2, math.sqrt(ALPHA)
    state, buffer, draw = i.x.clone(), torch.empty_like(i.x), itertools.count()

    def eager() -> Tensor:
        return i.x + half * i.score + root * torch.randn_like(i.x)

    variants = _against_eager(lambda: ops.langevin_step_(state, i.score, ALPHA, KEY), eager)
    variants |= {
        "new key": lambda: ops.langevin_step_(state, i.score, ALPHA, KEY.at(next(draw))),
        "new tensor": lambda: ops.langevin_step(i.x, i.score, ALPHA, KEY),
        "by hand": lambda: state.add_(i.score, alpha=half).add_(buffer.normal_(), alpha=root),
    }
    return variants, 8 + i.score.element_size()


def _affine(i: Inputs) -> Made:
    state = i.x.clone()

    def eager() -> Tensor:
        return 0.9 * i.x + 0.1 * i.score + 0.4 * torch.randn_like(i.x)

    ours = partial(ops.affine_step_, state, i.score, 0.9, 0.1, 0.4, KEY)
    return _against_eager(ours, eager), 8 + i.score.element_size()


def _known(i: Inputs) -> Made:
    state, mask = i.x.clone(), torch.rand(i.shape, device=i.device) < 0.5
    line = torch.tensor([[0.9, 0.1, 0.4, 1.0, 0.5]], device=i.device)
    known = torch.randn(i.shape, device=i.device)

    def eager() -> Tensor:
        moved = 0.9 * i.x + 0.1 * i.score + 0.4 * torch.randn_like(i.x)
        return torch.where(mask, known + 0.5 * torch.randn_like(known), moved)

    ours = partial(ops.table_step_, state, i.score, line, None, KEY, known=known, mask=mask)
    return _against_eager(ours, eager), 13 + i.score.element_size()


def _perturb(i: Inputs) -> Made:
    def eager() -> Tensor:
        return i.x + i.expand(i.sigma) * torch.randn_like(i.x)

    return _against_eager(lambda: ops.perturb(i.x, i.sigma, KEY), eager), 8


def _fill(ours: Callable[..., Tensor], eager: Callable[[Inputs], Tensor]) -> Any:
    """New noise; torch.compile of a generator alone has nothing to fuse."""

    def made(i: Inputs) -> Made:
        return {"ours": lambda: ours(i.shape, KEY, device=i.device), "eager": lambda: eager(i)}, 4

    return made


def _dsm_loss(i: Inputs) -> Made:
    z = torch.randn_like(i.x)

    def eager() -> Tensor:
        return 0.5 * (i.expand(i.sigma) * i.score + z).square().flatten(1).sum(1)

    ours = partial(ops.dsm_loss_from_score, i.score, i.sigma, KEY)
    return _against_eager(ours, eager), i.score.element_size()


class Careful(torch.autograd.Function):
    """The loss by hand: keeps one residual and scales it in place."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
        residual = torch.addcmul(z, score, sigma)
        ctx.save_for_backward(residual, sigma)
        return 0.5 * residual.square().flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        residual, sigma = ctx.saved_tensors
        each = grad.view(-1, *[1] * (residual.dim() - 1))
        return residual.mul_(sigma * each), None, None


def _dsm(i: Inputs) -> Made:
    """Noisy input, loss, gradient by a given score."""
    score = i.score.requires_grad_()

    def formula() -> tuple[Tensor, Tensor]:
        wide, z = i.expand(i.sigma), torch.randn_like(i.x)
        each = 0.5 * (wide * score + z) ** 2
        return i.x + wide * z, each.flatten(1).sum(1).mean()

    def careful() -> tuple[Tensor, Tensor]:
        wide, z = i.expand(i.sigma), torch.randn_like(i.x)
        return torch.addcmul(i.x, z, wide), Careful.apply(score, wide, z).mean()

    def ours() -> tuple[Tensor, Tensor]:
        loss = ops.dsm_loss_from_score(score, i.sigma, KEY).mean()
        return ops.perturb(i.x, i.sigma, KEY), loss

    forward = _against_eager(ours, formula)
    forward["compiled, fallback random"] = torch.compile(formula, options={"fallback_random": True})
    if score.dtype == torch.float32:
        forward["careful"] = careful

    def with_gradient(step: Step) -> Step:
        def run() -> Any:
            noisy, loss = step()
            return noisy, torch.autograd.grad(loss, score)

        return run

    # Noisy input 8; loss and gradient in one pass 8, apart 4 + 8.
    together = i.device.type == "cpu" and score.dtype == torch.float32
    bytes_moved = 8 + (2 if together else 3) * score.element_size()
    return {name: with_gradient(step) for name, step in forward.items()}, bytes_moved


def _dsm_training(i: Inputs) -> Made:
    """A whole step of training a score that is one multiplication."""
    weight, sigmas = (
        torch.ones((), device=i.device, requires_grad=True),
        geometric_sigmas(1, 0.1, 9),
    )
    table = sigmas.to(i.device)

    def ours() -> Any:
        loss = dsm_loss(lambda y, sigma: weight * y, i.x, sigmas, noise=KEY)
        return torch.autograd.grad(loss, weight)

    def eager() -> Any:
        sigma = i.expand(table[torch.randint(9, i.shape[:1], device=i.device)])
        z = torch.randn_like(i.x)
        score = weight * (i.x + sigma * z)
        loss = (0.5 * (sigma * score + z) ** 2).flatten(1).sum(1).mean()
        return torch.autograd.grad(loss, weight)

    return {"ours": ours, "eager": eager}, 24


def _probe_dot(i: Inputs) -> Made:
    def eager() -> Tensor:
        return (i.signs(i.score.dtype) * i.score).flatten(1).sum(1)

    return _against_eager(lambda: ops.probe_dot(i.score, KEY), eager), i.score.element_size()


def _probe_scale(i: Inputs) -> Made:
    return _against_eager(
        lambda: ops.probe_scale(i.sigma, i.shape, KEY), lambda: i.expand(i.sigma) * i.signs()
    ), 4


def _ssm_reduce(i: Inputs) -> Made:
    g = torch.randn_like(i.score)

    def eager() -> Tensor:
        v = i.signs(g.dtype)
        return (v * g).flatten(1).sum(1) + 0.5 * i.score.square().flatten(1).sum(1)

    return _against_eager(lambda: ops.ssm_reduce(g, i.score, KEY), eager), 2 * g.element_size()


def _fd_pair(i: Inputs) -> Made:
    def eager() -> Tensor:
        shift = i.expand(i.sigma) * i.signs()
        return torch.cat([i.x + shift, i.x - shift])

    return _against_eager(lambda: ops.fd_pair(i.x, i.sigma, KEY), eager), 12


def _fd_reduce(i: Inputs) -> Made:
    above, below = i.score, torch.randn_like(i.score)

    def eager() -> Tensor:
        v, s = i.signs(above.dtype), 0.5 * (above + below)
        derivative = (v * (above - below)).flatten(1).sum(1) / (2 * i.sigma)
        return derivative + 0.5 * s.square().flatten(1).sum(1)

    ours = partial(ops.fd_reduce, above, below, i.sigma, KEY)
    return _against_eager(ours, eager), 2 * above.element_size()


def _identity(x: Tensor, sigma: Tensor | None = None) -> Tensor:
    """A score that costs nothing."""
    return x


def _annealed(i: Inputs) -> Made:
    sigmas, per_level, start = geometric_sigmas(1.0, 0.5, 4), i.steps // 4, 1e-6 * i.x
    levels = sigmas.tolist()

    def eager() -> Tensor:
        x = start.clone()
        for sigma in levels:
            level = x.new_full(x.shape[:1], sigma)
            alpha = 1e-3 * (sigma / levels[-1]) ** 2
            for _ in range(per_level):
                x = x + alpha / 2 * _identity(x, level) + math.sqrt(alpha) * torch.randn_like(x)
        return x

    ours = partial(
        sampling.annealed_langevin, _identity, start, sigmas, steps_per_level=per_level,
        step_size=1e-3, seed=1, denoise=False,
    )  # fmt: skip
    variants: dict[str, Step] = {"ours": ours, "eager": eager}
    flat = start.flatten(1)
    if importlib.util.find_spec("torchebm") is not None and flat.shape[1] <= 64:
        from torchebm.core import GaussianModel
        from torchebm.samplers import LangevinDynamics

        model = GaussianModel(torch.zeros_like(flat[0]), torch.eye(flat.shape[1]).to(i.device))
        sampler = LangevinDynamics(model.to(i.device), step_size=1e-3, device=i.device)
        variants["torchebm"] = lambda: sampler.sample(flat, n_steps=i.steps)
    return variants, 12


def _scheduler(i: Inputs) -> Made:
    """A loop of one's own over the coefficients of DDPM; diffusers' schedulers."""
    state, a, b, c = i.x.clone(), 0.99, -0.01, 0.1

    def ours() -> None:
        for t in range(i.steps):
            ops.affine_step_(state, i.score, a, b, c, KEY.at(t))

    def eager() -> Tensor:
        x = i.x
        for _ in range(i.steps):
            x = a * x + b * i.score + c * torch.randn_like(x)
        return x

    variants: dict[str, Step] = {"ours": ours, "eager": eager}
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        from score_kernels.integrations.diffusers import FusedDDPMScheduler

        def chain(scheduler: Any) -> Tensor:
            x = i.x
            for t in scheduler.timesteps:
                x = scheduler.step(i.score, t, x).prev_sample
            return x

        theirs, fused = DDPMScheduler(clip_sample=False), FusedDDPMScheduler(clip_sample=False)
        for scheduler in (theirs, fused):
            scheduler.set_timesteps(i.steps)
        fused.noise = KEY
        variants |= {
            "diffusers": partial(chain, theirs),
            "ours in diffusers": partial(chain, fused),
        }
    return variants, 12


def _corrector(i: Inputs) -> Made:
    start = 1e-3 * i.x

    def eager() -> Tensor:
        x = start
        for _ in range(i.steps):
            score, z = _identity(x), torch.randn_like(x)
            norms = [v.flatten(1).norm(dim=1) for v in (z, score)]
            size = i.expand(2 * (0.01 * norms[0] / norms[1]) ** 2)
            x = x + size * score + (2 * size).sqrt() * z
        return x

    ours = partial(
        sampling.predictor_corrector, _identity, start, VE(0.5, 1.0), steps=i.steps, predictor=None,
        corrector="langevin", snr=0.01, seed=1, denoise=False,
    )  # fmt: skip
    # The norms are a pass of their own over the score.
    return {"ours": ours, "eager": eager}, 16


def _sampler(make: Callable[[int], Callable[..., Tensor]], noise: bool = True) -> Any:
    """A sampler of so many steps beside as many eager ones ``x + b score + c z``, c = 0 without
    noise."""

    def made(i: Inputs) -> Made:
        start, sampler = 1e-3 * i.x, make(i.steps)

        def eager() -> Tensor:
            x = start
            for _ in range(i.steps):
                x = x + 0.01 * _identity(x, x.new_full(x.shape[:1], 0.5))
                if noise:
                    x = x + 0.1 * torch.randn_like(x)
            return x

        return {"ours": lambda: sampler(_identity, start, seed=1), "eager": eager}, 12

    return made


def _flow(i: Inputs) -> Made:
    """Heun's method: two scores a step, one in the last."""
    start, sigmas = 1e-3 * i.x, _levels(i.steps)
    levels = [*sigmas.tolist(), 0.0]

    def eager() -> Tensor:
        x = start
        for sigma, following in itertools.pairwise(levels):
            d = -sigma * _identity(x, x.new_full(x.shape[:1], sigma))
            ahead = x + (following - sigma) * d
            if following:
                level = x.new_full(x.shape[:1], following)
                d = 0.5 * (d - following * _identity(ahead, level))
                ahead = x + (following - sigma) * d
            x = ahead
        return x

    ours = partial(sampling.probability_flow, _identity, start, sigmas, seed=1)
    return {"ours": ours, "eager": eager}, 12


def _levels(steps: int) -> Tensor:
    return geometric_sigmas(1.0, 0.5, steps)


def _schedule(steps: int) -> DDPMSchedule:
    return DDPMSchedule(1 / (1 + _levels(steps).flip(0) ** 2))


_SAMPLERS: dict[str, Callable[[Inputs], Made]] = {
    "annealed": _annealed,
    "scheduler": _scheduler,
    "corrector": _corrector,
    "langevin": _sampler(lambda steps: partial(sampling.langevin, step_size=1e-3, steps=steps)),
    "consistent_annealed": _sampler(
        lambda steps: partial(
            sampling.consistent_annealed, sigmas=_levels(steps), step_size=0.1, denoise=False
        )
    ),
    "euler_maruyama": _sampler(
        lambda steps: partial(sampling.euler_maruyama, sde=VE(0.5, 1.0), steps=steps, denoise=False)
    ),
    "predictor": _sampler(
        lambda steps: partial(
            sampling.predictor_corrector,
            sde=VE(0.5, 1.0),
            steps=steps,
            corrector=None,
            denoise=False,
        )  # fmt: skip
    ),
    "ddpm": _sampler(lambda steps: partial(sampling.ddpm, schedule=_schedule(steps))),
    "ddim": _sampler(
        lambda steps: partial(sampling.ddim, schedule=_schedule(steps), steps=steps), noise=False
    ),
    "probability_flow": _flow,
}
OPS: dict[str, Callable[[Inputs], Made]] = {
    "langevin_step": _langevin,
    "affine_step": _affine,
    "known elements": _known,
    "perturb": _perturb,
    "normal": _fill(ops.normal, lambda i: torch.randn(i.shape, device=i.device)),
    "uniform": _fill(ops.uniform, lambda i: torch.rand(i.shape, device=i.device)),
    "rademacher": _fill(ops.rademacher, lambda i: i.signs()),
    "dsm loss": _dsm_loss,
    "dsm with gradient": _dsm,
    "dsm training step": _dsm_training,
    "probe_dot": _probe_dot,
    "probe_scale": _probe_scale,
    "ssm_reduce": _ssm_reduce,
    "fd_pair": _fd_pair,
    "fd_reduce": _fd_reduce,
    **{f"{name} chain": make for name, make in _SAMPLERS.items()},
}
_BFLOAT16 = (
    "langevin_step", "affine_step", "known elements", "dsm loss", "dsm with gradient", "probe_dot",
    "ssm_reduce", "fd_reduce",
)  # fmt: skip


def cases(names: list[str], device: torch.device, *, quick: bool) -> Iterator[Callable[[], Case]]:
    """What to measure, each made when it is its turn."""
    for name in names:
        chain = name.endswith(" chain")
        shapes = [s for s in SHAPES if not (chain and s == SHAPES[1] or quick and s == SHAPES[0])]
        if name == "langevin_step" and not quick:
            shapes.append((4096, 2))
        for shape in shapes:
            yield partial(case, name, shape, "float32", device)
            if name in _BFLOAT16 and not quick:
                yield partial(case, name, shape, "bfloat16", device)


def case(name: str, shape: tuple[int, ...], dtype: str, device: torch.device) -> Case:
    """One case, with its tensors."""
    inputs = Inputs(shape, DTYPES[dtype], device)
    variants, bytes_moved = OPS[name](inputs)
    chain, training = name.endswith(" chain"), name == "dsm training step"
    return Case(
        name,
        shape,
        dtype,
        bytes_moved,
        variants,
        steps=inputs.steps if chain else 1,
        grad=training or name == "dsm with gradient",
        capturable=not (chain or training),
    )
