"""Networks and schedulers of Hugging Face's diffusers (``pip install score-kernels[diffusers]``).

:func:`score_of` takes a network trained with a DDPM-like scheduler to the samplers and losses here.
The fused schedulers are diffusers' own with another `step`: one pass over memory, and noise named
by a :class:`score_kernels.NoiseKey` instead of a generator::

    pipeline.scheduler = FusedDDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.noise = NoiseKey(seed, first_sample=rank * batch)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from score_kernels import ops
from score_kernels.backends import choose
from score_kernels.diffusion.prediction import as_score
from score_kernels.diffusion.sde import DDPMSchedule
from score_kernels.noise import NoiseKey, Purpose, resolve
from score_kernels.sampling.sde import norms

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
_PREDICTS = ", ".join(map(repr, _KINDS))


def from_scheduler(scheduler: Any) -> DDPMSchedule:
    """The chain that networks of a scheduler are trained on, from its ``alphas_cumprod``.

    Args:
        scheduler: DDPMScheduler, DDIMScheduler or another with ``alphas_cumprod``.

    Raises:
        TypeError: it has none (flow matching, say).
        ValueError: its last step leaves nothing of the data (``rescale_betas_zero_snr``), so that
            no finite sigma is its level.
    """
    alphas_bar = getattr(scheduler, "alphas_cumprod", None)
    if alphas_bar is None:
        raise TypeError(
            f"scheduler: got {type(scheduler).__name__}, expected one with alphas_cumprod, such as "
            "DDPMScheduler or DDIMScheduler"
        )
    if scheduler.config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "scheduler: got rescale_betas_zero_snr, expected a scheduler whose last step keeps "
            "something of the data: one that keeps nothing is at sigma = infinity"
        )
    return DDPMSchedule(alphas_bar)


def score_of(net: nn.Module, scheduler: Any) -> nn.Module:
    """A diffusers network as a score: ``score(y, sigma, **conditions)``.

    Args:
        net: ``net(x_t, timesteps, **conditions)``, such as a UNet2DModel.
        scheduler: the one it was trained with; its ``prediction_type`` is "epsilon", "sample" or
            "v_prediction".

    Returns, Raises:
        As :func:`score_kernels.as_score` and :func:`from_scheduler`; a ValueError, too, for other
        prediction types.
    """
    chain = from_scheduler(scheduler)
    predicts = scheduler.config.get("prediction_type")
    if predicts not in _KINDS:
        raise ValueError(
            f"scheduler: got prediction_type {predicts!r}, expected one of {_PREDICTS}"
        )
    return as_score(net, kind=_KINDS[predicts], schedule=chain)


class _Named:
    """Noise by name.

    Attributes:
        noise: names the noise of the next step; every step moves its draw on by one. Set it where a
            run begins, or, with the draw the number of steps done, where one is resumed. None
            begins with a fresh seed of torch's default generator. Its purpose is replaced.
    """

    noise: NoiseKey | None = None

    def _next(self, generator: Any) -> NoiseKey:
        if generator is not None:
            raise ValueError(
                "generator: got one, expected none: noise is named by the scheduler's `noise`"
            )
        key = resolve(self.noise, None)
        self.noise = key.at(key.draw + 1)
        return key.for_purpose(Purpose.LANGEVIN)


class FusedDDPMScheduler(_Named, DDPMScheduler):
    """DDPMScheduler (Ho et al. 2020, arXiv 2006.11239) with `step` as an affine step.

    Samples are float32. Variances "learned", "learned_range" and "fixed_large_log" (whose logarithm
    the parent takes the root of) are refused.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """The parent's, with the noise of this step's key. A generator is refused."""
        if self.variance_type not in ("fixed_small", "fixed_small_log", "fixed_large"):
            raise ValueError(
                f"variance_type: got {self.variance_type!r}, expected 'fixed_small', "
                "'fixed_small_log' or 'fixed_large'"
            )
        if self.config.prediction_type not in _KINDS:
            raise ValueError(
                f"prediction_type: got {self.config.prediction_type!r}, expected one of {_PREDICTS}"
            )
        key = self._next(generator)
        t = int(timestep)
        before = int(self.previous_timestep(t))
        # In the parent's float32: 1 - abar has few digits there, and networks are trained with it.
        abar = self.alphas_cumprod[t]
        abar_before = self.alphas_cumprod[before] if before >= 0 else self.one
        alpha = abar / abar_before
        root, noise_root = float(abar**0.5), float((1 - abar) ** 0.5)
        if self.config.prediction_type == "sample":
            x0 = model_output
        elif self.config.prediction_type == "v_prediction":
            x0 = ops.affine_step_(sample.clone(), model_output, root, -noise_root, 0.0, key)
        else:
            a, b = 1 / root, -noise_root / root
            x0 = ops.affine_step_(sample.clone(), model_output, a, b, 0.0, key)
        if self.config.thresholding:
            x0 = self._threshold_sample(x0)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        a = float(alpha**0.5 * (1 - abar_before) / (1 - abar))
        b = float(abar_before**0.5 * (1 - alpha) / (1 - abar))
        spread = self._get_variance(t)
        c = float(spread if self.variance_type == "fixed_small_log" else spread**0.5)
        x = ops.affine_step_(sample.clone(), x0, a, b, c if t > 0 else 0.0, key)
        return DDPMSchedulerOutput(x, x0) if return_dict else (x, x0)


class FusedScoreSdeVeScheduler(_Named, ScoreSdeVeScheduler):
    """ScoreSdeVeScheduler (Song et al. 2021, arXiv 2011.13456) with affine steps.

    Samples are float32. Predictor and corrector each take the next draw. The corrector's step is
    the parent's: by norms averaged over the batch, so that its samples depend on each other.
    """

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float,
        sample: Tensor,
        generator: None = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, Tensor]:
        """The parent's, with the noise of this step's key. A generator is refused."""
        self._check_timesteps()
        key = self._next(generator)
        # The parent's arithmetic, which truncates a float32.
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
        """The parent's, with the noise of this step's key. A generator is refused."""
        self._check_timesteps()
        key = self._next(generator)
        x = sample.clone(memory_format=torch.contiguous_format)
        backend, score = choose(x.device, x.dtype), model_output.contiguous()
        noise_size, size = norms(backend, score, key, batch_mean=True)
        step = 2 * self.config.snr**2 * noise_size / size
        # The step size stays on the device: reading it back would wait for the network.
        table = torch.stack([torch.ones_like(step), step, (2 * step).sqrt()])[None]
        ops.table_step_(x, score, table, None, key)
        return SchedulerOutput(x) if return_dict else (x,)

    def _check_timesteps(self) -> None:
        if self.timesteps is None:
            raise ValueError("timesteps: got none, expected a call of set_timesteps before a step")
