"""Networks of other forms as scores: values, shapes, precision, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from score_kernels import annealed_langevin, dsm_loss, geometric_sigmas
from score_kernels.diffusion.prediction import by_label, by_sigma, unconditional

SIGMAS = geometric_sigmas(10.0, 0.01, 7)


class Linear(nn.Module):
    """x W, times its level."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor, level: Tensor | None = None, *, shift: float = 0.0) -> Tensor:
        out = x @ self.w + shift
        return out if level is None else out * level[:, None].float()


@pytest.mark.parametrize("divide", [True, False])
def test_values(divide: bool) -> None:
    net, x = Linear(), torch.randn(7, 3)
    labels = torch.randperm(7)
    sigma = SIGMAS[labels]
    plain = x @ net.w
    one = sigma[:, None] if divide else torch.ones(7, 1)
    assert torch.equal(by_sigma(net, divide=divide)(x, sigma), plain * sigma[:, None] / one)
    got = by_label(net, SIGMAS, divide=divide)(x, sigma)
    assert torch.equal(got, plain * labels[:, None].float() / one)
    assert torch.equal(unconditional(net)(x, sigma), plain / sigma[:, None])
    assert torch.equal(unconditional(net)(x, sigma, shift=2.0), (plain + 2) / sigma[:, None])


def test_half_precision_networks_do_not_overflow() -> None:
    """1e3 / 0.01 is past the largest fp16."""
    net = Linear().half()
    with torch.no_grad():
        net.w.copy_(1e3 * torch.eye(3))
    score = unconditional(net)(torch.ones(2, 3).half(), torch.full((2,), 0.01))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.full((2, 3), 1e5))


def test_parameters_are_the_network_s_and_it_trains_and_samples() -> None:
    net = Linear()
    for score in (unconditional(net), by_sigma(net), by_label(net, SIGMAS)):
        assert [id(p) for p in score.parameters()] == [id(net.w)]
        assert list(score.state_dict()) == ["net.w"]
        dsm_loss(score, torch.randn(16, 3), SIGMAS, seed=1).backward()
        assert net.w.grad is not None and net.w.grad.norm() > 0
        net.w.grad = None
        x = annealed_langevin(score, (4, 3), SIGMAS, steps_per_level=2, step_size=1e-6, seed=2)
        assert x.isfinite().all()


def test_what_is_refused() -> None:
    net, x = Linear(), torch.randn(2, 3)
    with pytest.raises(TypeError, match="net: got float 1.0, expected a function"):
        unconditional(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="net: got an output on meta, expected x's cpu"):
        unconditional(lambda x: x.to("meta"))(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"sigmas: got sigmas\[0\] = 1.0 and sigmas\[1\] = 2.0"):
        by_label(net, [1.0, 2.0])
    for sigma in (20.0, 0.001, 0.5 * float(SIGMAS[0] + SIGMAS[1]), float("nan")):
        with pytest.raises(ValueError, match="expected one of the 7 levels"):
            by_label(net, SIGMAS)(x, torch.tensor([float(SIGMAS[3]), sigma]))
    for wrapper in (unconditional(net), by_sigma(net), by_label(net, SIGMAS)):
        with pytest.raises(
            ValueError, match=r"sigma: got shape \(\), expected \[2\], one a sample"
        ):
            wrapper(x, torch.tensor(1.0))


def test_off_the_levels_is_nan_where_nothing_waits_for_the_device() -> None:
    score = torch.compile(by_label(Linear(), SIGMAS), fullgraph=True, backend="eager")
    out = score(torch.randn(2, 3), torch.tensor([float(SIGMAS[2]), 3.0]))
    assert out[0].isfinite().all() and out[1].isnan().all()
