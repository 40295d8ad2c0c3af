"""diffusers' networks as scores, and its schedulers' steps with our noise against its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tolerances
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.schedulers import scheduling_ddpm, scheduling_sde_ve
from torch import Tensor, nn

from score_kernels import NoiseKey, annealed_langevin, dsm_loss, ops
from score_kernels.integrations.diffusers import (
    FusedDDPMScheduler,
    FusedScoreSdeVeScheduler,
    from_scheduler,
    score_of,
)
from score_kernels.noise import Purpose

PREDICTIONS = ["epsilon", "sample", "v_prediction"]
KEY = NoiseKey(11, purpose=Purpose.LANGEVIN, first_sample=5)


def unet(channels: int = 1, predicted: int = 1) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels * predicted,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


@pytest.fixture
def our_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[NoiseKey]]:
    """diffusers' own steps draw our normals, one draw after the other."""
    keys = [KEY]

    def normals(shape: Any, **_: Any) -> Tensor:
        keys.append(keys[-1].at(keys[-1].draw + 1))
        return ops.normal(tuple(shape), keys[-2])

    for module in (scheduling_ddpm, scheduling_sde_ve):
        monkeypatch.setattr(module, "randn_tensor", normals)
    yield keys


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_scores_of_gaussian_data(scheduler: type, predicts: str) -> None:
    """A perfect network by diffusers' own add_noise and get_velocity.

    Data N(mu, variance I): of the pairs (x_0, z) behind a given x_t, the mean is the regression.
    """
    mu, variance = -0.4, 0.6
    own = scheduler(num_train_timesteps=100, prediction_type=predicts, beta_end=0.2)

    class Perfect(nn.Module):
        def forward(self, x: Tensor, steps: Tensor) -> Tensor:
            one = torch.ones_like(x)
            m = own.add_noise(one, 0 * one, steps)
            std = own.add_noise(0 * one, one, steps)
            gain = 1 / (m**2 * variance + std**2)
            x0 = mu + m * variance * gain * (x - m * mu)
            z = std * gain * (x - m * mu)
            return {"epsilon": z, "sample": x0, "v_prediction": own.get_velocity(x0, z, steps)}[
                predicts
            ]

    chain = from_scheduler(own)
    assert torch.equal(chain.alphas_bar, own.alphas_cumprod.double())
    sigma = chain.sigmas.float()
    y = mu + (variance + sigma.double()[:, None] ** 2).sqrt() * torch.randn(100, 3).double()
    got = score_of(Perfect(), own)(y, sigma)
    want = (mu - y) / (variance + sigma.double()[:, None] ** 2)
    # sqrt(abar) and sqrt(1 - abar) at a float64 state are float64 roots of one float32 number; the
    # level in float32 is 2^-24 off, as far as that goes.
    size = (y.abs() + abs(mu)) / (variance + sigma.double()[:, None] ** 2)
    assert bool(((got - want).abs() <= 1e-6 * size).all())


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_unet_trains_and_samples(predicts: str) -> None:
    net = unet()
    score = score_of(net, DDPMScheduler(100, prediction_type=predicts, beta_end=0.2))
    sigmas = from_scheduler(DDPMScheduler(100, beta_end=0.2)).sigmas.flip(0)
    dsm_loss(score, torch.randn(3, 1, 8, 8), sigmas, seed=1).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    step_size = 0.1 * float(sigmas[-1]) ** 2
    run = {"steps_per_level": 1, "step_size": step_size, "seed": 2}
    x = annealed_langevin(score, (4, 1, 8, 8), sigmas[::7], **run)
    assert x.isfinite().all()
    half = annealed_langevin(score, (2, 1, 8, 8), sigmas[::7], first_sample=2, **run)
    # The same noise to the bit; a network's rows are so to rounding only.
    torch.testing.assert_close(half, x[2:], rtol=1e-3, atol=1e-3 * float(x.abs().max()))


CONFIGS = [
    {"prediction_type": predicts, "variance_type": variance}
    for predicts in PREDICTIONS
    for variance in ("fixed_small", "fixed_small_log", "fixed_large")
] + [
    {"clip_sample": False},
    {"clip_sample_range": 2.5},
    {"thresholding": True, "sample_max_value": 1.5},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"timestep_spacing": "trailing"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("inference", [None, 7])
def test_ddpm_steps_are_the_parent_s(
    config: dict[str, Any], inference: int | None, our_noise: list[NoiseKey]
) -> None:
    torch.manual_seed(6)
    theirs, ours = DDPMScheduler(50, **config), FusedDDPMScheduler(50, **config)
    if inference is not None:
        theirs.set_timesteps(inference)
        ours.set_timesteps(inference)
    for t in theirs.timesteps:
        x, out = torch.randn(2, 2, 3, 4, 4)
        before = x.clone()
        # The parent draws nothing at its last step. The purpose is replaced.
        ours.noise = key = our_noise[-1].for_purpose(Purpose.USER)
        want, got = theirs.step(out, t, x), ours.step(out, t, x)
        assert torch.equal(x, before) and ours.noise == key.at(key.draw + 1)
        assert relative(got.prev_sample, want.prev_sample) <= tolerances.FP32_RELATIVE
        # x_0 from epsilon is a difference divided by sqrt(abar), which can be 1e-4.
        divides = theirs.config.prediction_type == "epsilon"
        root = theirs.alphas_cumprod[t] ** 0.5 if divides else 1.0
        size = (x.abs() + out.abs()).norm() / root
        error = (got.pred_original_sample - want.pred_original_sample).norm()
        assert error <= tolerances.FP32_RELATIVE * size
        ours.noise = key
        pair = ours.step(out, t, x, return_dict=False)
        assert torch.equal(pair[0], got.prev_sample)
        assert torch.equal(pair[1], got.pred_original_sample)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("inference", [10, 37])
def test_ve_steps_are_the_parent_s(inference: int, our_noise: list[NoiseKey]) -> None:
    settings = {"sigma_max": 50.0, "snr": 0.2}
    theirs, ours = ScoreSdeVeScheduler(**settings), FusedScoreSdeVeScheduler(**settings)
    ours.noise = KEY
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(inference)
        scheduler.set_sigmas(inference)
    for i, t in enumerate(theirs.timesteps):
        sigma = float(theirs.sigmas[i])
        x, out = sigma * torch.randn(3, 2, 5, 5), torch.randn(3, 2, 5, 5) / sigma
        want, got = theirs.step_correct(out, x), ours.step_correct(out, x)
        assert relative(got.prev_sample, want.prev_sample) <= tolerances.FP32_RELATIVE
        want, got = theirs.step_pred(out, t, x), ours.step_pred(out, t, x)
        assert relative(got.prev_sample, want.prev_sample) <= tolerances.FP32_RELATIVE
        assert relative(got.prev_sample_mean, want.prev_sample_mean) <= tolerances.FP32_RELATIVE
        assert ours.noise == our_noise[-1] == KEY.at(2 * i + 2)
    tuples = ours.step_pred(out, 0.5, x, return_dict=False), ours.step_correct(out, x, None, False)
    assert [len(each) for each in tuples] == [2, 1]


def test_pipelines_run_and_split() -> None:
    """diffusers' own pipelines: noise by name, so that a resumed run is the run."""
    net = unet().eval()
    steps = FusedDDPMScheduler(20, beta_end=0.2)
    pipeline = DDPMPipeline(unet=net, scheduler=steps)
    pipeline.set_progress_bar_config(disable=True)
    steps = pipeline.scheduler
    images = []
    for _ in range(2):
        torch.manual_seed(3)
        steps.noise = NoiseKey(9)
        images.append(pipeline(batch_size=2, num_inference_steps=5, output_type="np").images)
    assert (images[0] == images[1]).all() and steps.noise.draw == 5
    # Without a key: a fresh seed that torch.manual_seed rules.
    first = []
    for _ in range(2):
        torch.manual_seed(3)
        steps.noise = None
        first.append(pipeline(batch_size=2, num_inference_steps=5, output_type="np").images)
    assert (first[0] == first[1]).all() and (first[0] != images[0]).any()
    with pytest.raises(ValueError, match="generator: got one, expected none"):
        pipeline(num_inference_steps=5, generator=torch.Generator())

    x, out = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    steps.noise = NoiseKey(9)
    whole = steps.step(out, 4, x).prev_sample
    steps.noise = NoiseKey(9, first_sample=4)
    assert torch.equal(steps.step(out[4:], 4, x[4:]).prev_sample, whole[4:])

    chain = FusedScoreSdeVeScheduler(sigma_max=10.0)
    ve = ScoreSdeVePipeline(unet=unet(3).eval(), scheduler=chain)
    ve.set_progress_bar_config(disable=True)
    assert ve(batch_size=1, num_inference_steps=4, output_type="np").images.shape == (1, 8, 8, 3)
    assert ve.scheduler.noise.draw == 8


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = unet()
    with pytest.raises(TypeError, match="scheduler: got FlowMatchEulerDiscreteScheduler, expected"):
        score_of(net, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="scheduler: got rescale_betas_zero_snr"):
        from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="prediction_type: got 'other', expected one of"):
        score_of(net, DDPMScheduler(prediction_type="other"))
    learned = score_of(unet(predicted=2), DDPMScheduler(variance_type="learned_range"))
    with pytest.raises(ValueError, match=r"net: got .*\(2, 2, 8, 8\).*variances too"):
        learned(torch.randn(2, 1, 8, 8), torch.ones(2))
    x = torch.randn(2, 1, 4, 4)
    for variance in ("learned", "learned_range", "fixed_large_log"):
        with pytest.raises(
            ValueError, match=f"variance_type: got '{variance}', expected one of 'fixed_sm"
        ):
            FusedDDPMScheduler(variance_type=variance).step(x, 3, x)
    with pytest.raises(ValueError, match="prediction_type: got 'other', expected"):
        FusedDDPMScheduler(prediction_type="other").step(x, 3, x)
    with pytest.raises(TypeError, match="got dtype torch.float16, expected torch.float32"):
        FusedDDPMScheduler().step(x.half(), 3, x.half())

    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_ddpm", None)
    monkeypatch.delitem(sys.modules, "score_kernels.integrations.diffusers")
    with pytest.raises(ImportError, match=r"pip install score-kernels\[diffusers\]"):
        importlib.import_module("score_kernels.integrations.diffusers")
