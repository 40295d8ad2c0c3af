"""Networks and schedulers of Hugging Face's diffusers (``pip install score-kernels[diffusers]``).

:func:`score_of` makes a score of a network trained with a DDPM-like scheduler. The fused schedulers
are diffusers' own with a `step` in one pass over memory and noise of a
:class:`score_kernels.NoiseKey` instead of a generator::

    pipeline.scheduler = FusedDDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.noise = NoiseKey(seed, first_sample=rank * batch)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from score_kernels import checks, ops
from score_kernels.backends import choose
from score_kernels.diffusion.prediction import as_score
from score_kernels.diffusion.sde import DDPMSchedule
from score_kernels.noise import NoiseKey, Purpose, resolve
from score_kernels.sampling.sde import norm_ratio

try:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
    from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler, SdeVeOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
except ImportError as error:
    raise ImportError(
        "score_kernels.integrations.diffusers needs diffusers: pip install score-kernels[diffusers]"
    ) from error

__all__ = ["FusedDDPMScheduler", "FusedScoreSdeVeScheduler", "from_scheduler", "score_of"]

_KINDS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}


def from_scheduler(scheduler: Any) -> DDPMSchedule:
    """The DDPM schedule of a diffusers scheduler, from its ``alphas_cumprod``.

    Raises a TypeError for a scheduler that has none (flow matching, say), a ValueError for one
    whose last timestep is noise alone, at sigma = infinity (``rescale_betas_zero_snr``).
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(
            f"scheduler: got {type(scheduler).__name__}, expected one with alphas_cumprod, such as "
            "DDPMScheduler or DDIMScheduler"
        )
    if scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "scheduler: got rescale_betas_zero_snr, expected one whose last timestep has a finite "
            "sigma"
        )
    return DDPMSchedule(scheduler.alphas_cumprod)


def score_of(net: nn.Module, scheduler: Any) -> nn.Module:
    """A diffusers network ``net(x_t, timesteps, **conditions)``, such as UNet2DModel, as a score.

    The scheduler is the one that it was trained with, its ``prediction_type`` "epsilon", "sample"
    or "v_prediction". Result and errors as of :func:`score_kernels.as_score` and `from_scheduler`.
    """
    return as_score(net, schedule=from_scheduler(scheduler), kind=_kind(scheduler))


def _kind(scheduler: Any) -> str:
    return _KINDS[checks.choice("prediction_type", scheduler.config.prediction_type, _KINDS)]


class _Keyed:
    """A scheduler with noise by key.

    Attributes:
        noise: the key of the next step, whose purpose is replaced; every step adds 1 to its draw.
            Set it before a run; to resume one, with the number of steps done as its draw. None
            starts with a fresh seed of torch's default generator.
    """

    noise: NoiseKey | None = None

    def _next(self, generator: Any) -> NoiseKey:
        if generator is not None:
            raise ValueError("generator: got one, expected none: the scheduler has a `noise` key")
        key = resolve(self.noise, None)
        self.noise = key.at(key.draw + 1)
        return key.for_purpose(Purpose.LANGEVIN)


class FusedDDPMScheduler(_Keyed, DDPMScheduler):
    """DDPMScheduler (Ho et al. 2020, arXiv 2006.11239) with a fused `step`.

    Samples are float32. Variances "learned", "learned_range" and "fixed_large_log" (of whose
    logarithm the parent takes the root) raise a ValueError, as does a generator.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        variances = ("fixed_small", "fixed_small_log", "fixed_large")
        checks.choice("variance_type", self.variance_type, variances)
        kind = _kind(self)
        key = self._next(generator)
        t = int(timestep)
        before = int(self.previous_timestep(t))
        # In float32, as networks are trained: 1 - abar has few digits there.
        abar = self.alphas_cumprod[t]
        abar_before = self.alphas_cumprod[before] if before >= 0 else self.one
        alpha = abar / abar_before
        root, noise_root = float(abar**0.5), float((1 - abar) ** 0.5)
        if kind == "x0":
            x0 = model_output
        else:
            a, b = (root, -noise_root) if kind == "v" else (1 / root, -noise_root / root)
            x0 = ops.affine_step_(sample.clone(), model_output, a, b, 0.0, key)
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        a = float(alpha**0.5 * (1 - abar_before) / (1 - abar))
        b = float(abar_before**0.5 * (1 - alpha) / (1 - abar))
        variance = self._get_variance(t)
        # "fixed_small_log" returns the standard deviation.
        c = float(variance if self.variance_type == "fixed_small_log" else variance**0.5)
        x = ops.affine_step_(sample.clone(), x0, a, b, c if t > 0 else 0.0, key)
        return DDPMSchedulerOutput(x, x0) if return_dict else (x, x0)


class FusedScoreSdeVeScheduler(_Keyed, ScoreSdeVeScheduler):
    """ScoreSdeVeScheduler (Song et al. 2021, arXiv 2011.13456) with affine steps.

    Samples are float32. Predictor and corrector each take the next draw. The corrector's step size
    is the parent's: of norms averaged over the batch, so that its samples depend on each other.
    """

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float,
        sample: Tensor,
        generator: None = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, Tensor]:
        key = self._next(generator)
        # The parent's arithmetic, which truncates a float32 product.
        time = torch.as_tensor(timestep, dtype=torch.float32).cpu()
        index = (time * (len(self.timesteps) - 1)).long()
        sigma, below = self.discrete_sigmas[index], self.get_adjacent_sigma(index, time)
        c = float((sigma**2 - below**2) ** 0.5)
        mean = torch.add(sample, model_output, alpha=c * c)
        x = ops.affine_step_(sample.clone(), model_output, 1.0, c * c, c, key)
        return SdeVeOutput(x, mean) if return_dict else (x, mean)

    def step_correct(
        self,
        model_output: Tensor,
        sample: Tensor,
        generator: None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        key = self._next(generator)
        x = sample.clone(memory_format=torch.contiguous_format)
        backend, score = choose(x.device, x.dtype), model_output.contiguous()
        # The step size stays on the device: reading it back would wait for the network.
        step = 2 * self.config.snr**2 * norm_ratio(backend, score, key, batch_mean=True)
        table = torch.stack([torch.ones_like(step), step, (2 * step).sqrt()], 1)
        ops.table_step_(x, score, table, None, key)
        return SchedulerOutput(x) if return_dict else (x,)
