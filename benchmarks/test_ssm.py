"""A training step (forward, backward) by sliced against denoising score matching, same network.

dsm        score_kernels.dsm_loss
hand 2b    sliced score matching with double backward as one writes it in PyTorch
hand jvp   the same with torch.func.jvp
double, jvp, fd   score_kernels.sliced_score_loss by its three methods

Also prints the peak memory of each step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import compare, peak_bytes
from score_kernels import NoiseKey, dsm_loss, sliced_score_loss


def mlp() -> nn.Module:
    hidden = [nn.Linear(2, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus()]
    return nn.Sequential(*hidden, nn.Linear(128, 2))


def conv() -> nn.Module:
    first, second, last = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 32), (32, 32), (32, 1)))
    return nn.Sequential(first, nn.Softplus(), second, nn.Softplus(), last)


NETS = [((4096, 2), mlp), ((64, 1, 28, 28), conv)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape, make", NETS, ids=["mlp", "conv"])
def test_ssm(benchmark: Any, shape: tuple[int, ...], make: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net, x, noise = make(), torch.randn(shape), NoiseKey(1)
    parameters = list(net.parameters())

    def by_hand() -> Tensor:
        leaf = x.detach().requires_grad_()
        v = torch.randint_like(x, 2) * 2 - 1
        s = net(leaf)
        slope = torch.autograd.grad((v * s).sum(), leaf, create_graph=True)[0]
        return ((v * slope).flatten(1).sum(1) + 0.5 * s.square().flatten(1).sum(1)).mean()

    def by_hand_jvp() -> Tensor:
        v = torch.randint_like(x, 2) * 2 - 1
        s, slope = torch.func.jvp(net, (x,), (v,))
        return ((v * slope).flatten(1).sum(1) + 0.5 * s.square().flatten(1).sum(1)).mean()

    def step(loss: Tensor) -> Any:
        return torch.autograd.grad(loss, parameters)

    def sliced(method: str) -> Any:
        return lambda: step(sliced_score_loss(net, x, noise=noise, method=method))

    variants = {
        "dsm": lambda: step(dsm_loss(lambda y, sigma: net(y), x, [0.5], noise=noise)),
        "hand 2b": lambda: step(by_hand()),
        "double": sliced("double_backward"),
        "hand jvp": lambda: step(by_hand_jvp()),
        "jvp": sliced("jvp"),
        "fd": sliced("finite_difference"),
    }
    peaks = ", ".join(f"{name} {peak_bytes(f) / 2**20:.1f}" for name, f in variants.items())
    print(f"\npeak memory in MiB: {peaks}")
    compare(
        benchmark,
        variants,
        "fd",
        {f"{name}/dsm": (name, "dsm") for name in variants if name != "dsm"},
        shape=shape,
        threads=threads,
    )
