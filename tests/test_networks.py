"""The small score networks: protocol, scaling, independence of the samples, gradients."""

import pytest
import torch

from score_kernels.networks import ConvScore, MLPScore


def _stirred(net: torch.nn.Module) -> torch.nn.Module:
    # The last layers start at zero; a test of what the network adds needs them elsewhere.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


NETWORKS = [
    pytest.param(lambda: MLPScore(64, 32), (1, 8, 8), id="mlp"),
    pytest.param(lambda: MLPScore(64, 32, depth=1), (64,), id="mlp-depth1"),
    pytest.param(lambda: MLPScore(6, 32, conditional=False), (2, 3), id="mlp-unconditional"),
    pytest.param(lambda: ConvScore(1, 8), (1, 8, 8), id="conv"),
    pytest.param(lambda: ConvScore(3, 8, levels=1), (3, 5, 4), id="conv-flat"),
    pytest.param(lambda: ConvScore(3, 16, levels=3), (3, 7, 5), id="conv-odd"),
    pytest.param(lambda: ConvScore(1, 8, levels=3), (1, 1, 1), id="conv-1x1"),
]


@pytest.mark.parametrize("make, shape", NETWORKS)
def test_returns_the_shape_of_x(make, shape):
    net = make()
    for batch in (0, 1, 3):
        x, sigma = torch.randn(batch, *shape), torch.rand(batch) + 0.1
        assert net(x, sigma).shape == x.shape


@pytest.mark.parametrize("make, shape", NETWORKS)
def test_a_sample_does_not_depend_on_its_batch_mates(make, shape):
    net = _stirred(make()).double()
    x, sigma = torch.randn(5, *shape, dtype=torch.float64), torch.linspace(0.1, 9, 5).double()
    whole = net(x, sigma)
    for i in range(5):
        torch.testing.assert_close(net(x[i : i + 1], sigma[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("make, shape", NETWORKS)
def test_every_parameter_gets_a_gradient(make, shape):
    net = _stirred(make())
    net(torch.randn(4, *shape), torch.rand(4) + 0.1).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "net, shape",
    [
        (MLPScore(12, 16, data_std=0.7), (3, 4)),
        (ConvScore(3, 8, data_std=0.7), (3, 5, 6)),
    ],
)
def test_untrained_network_is_the_score_of_a_gaussian(net, shape):
    x, sigma = torch.randn(4, *shape), torch.tensor([0.01, 0.3, 2.0, 50.0])
    variance = (sigma**2 + 0.7**2).reshape(-1, *[1] * len(shape))
    torch.testing.assert_close(net(x, sigma), -x / variance)


@pytest.mark.parametrize("net, shape", [(MLPScore(6, 16, data_std=0.7), (6,)),
                                        (ConvScore(2, 8, data_std=0.7), (2, 4, 4))])  # fmt: skip
def test_scalings_of_input_and_output(net, shape):
    """Table 1 of arXiv 2206.00364 as a score: f sees x / sqrt(sigma^2 + d^2)."""
    _stirred(net)
    first, seen = net.layers[0] if isinstance(net, MLPScore) else net.first, []
    first.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net.last.register_forward_hook(lambda module, args, out: seen.append(out))
    x, sigma = torch.randn(3, *shape), torch.tensor([0.1, 2.0, 9.0])
    score, s = net(x, sigma), sigma.reshape(-1, *[1] * len(shape))
    variance = s**2 + 0.7**2
    torch.testing.assert_close(seen[0], x / variance.sqrt())
    torch.testing.assert_close(score, -x / variance + 0.7 / (s * variance.sqrt()) * seen[1])


def test_sigma_times_score_is_of_order_one_at_every_level():
    for net, shape in ((MLPScore(64, 32), (64,)), (ConvScore(1, 8), (1, 8, 8))):
        _stirred(net)
        for level in (0.01, 0.1, 1.0, 10.0, 100.0):
            sigma = torch.full((64,), level)
            x = torch.randn(64, *shape) * (1 + level**2) ** 0.5
            size = (level * net(x, sigma)).square().mean().sqrt()
            assert size < 10, (level, size)


def test_unconditional_is_one_function_over_sigma():
    net = MLPScore(2, 128, depth=2, activation="softplus", conditional=False)
    widths = [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
    assert widths == [(128, 2), (128, 128), (2, 128)]
    x = torch.randn(6, 2)
    at_one = net(x, torch.ones(6))
    torch.testing.assert_close(net(x, torch.full((6,), 0.25)), 4 * at_one)


def test_conditional_network_is_told_sigma():
    for net, shape in ((MLPScore(64, 32), (64,)), (ConvScore(1, 8), (1, 8, 8))):
        _stirred(net)
        x = torch.randn(1, *shape)
        # The same input to the body at two levels, so only the embedding can tell them apart.
        scaled = [net(x * (1 + s**2) ** 0.5, torch.tensor([s])) for s in (0.5, 0.6)]
        added = [
            (score + x / (1 + s**2) ** 0.5) * s * (1 + s**2) ** 0.5
            for score, s in zip(scaled, (0.5, 0.6), strict=True)
        ]
        assert (added[0] - added[1]).abs().max() > 1e-4


def test_differentiates_twice_for_sliced_score_matching():
    for net, shape in ((MLPScore(4, 8, activation="softplus"), (4,)), (ConvScore(1, 8), (1, 2, 2))):
        net = _stirred(net).double()
        x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
        sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
        assert torch.autograd.gradgradcheck(lambda x, net=net, sigma=sigma: net(x, sigma), (x,))


def test_sizes_and_activations():
    net = MLPScore(6, 24, depth=3, activation="softplus", conditional=False)
    widths = [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
    assert widths == [(24, 6), (24, 24), (24, 24), (6, 24)]
    assert isinstance(net.act, torch.nn.Softplus) and isinstance(MLPScore(6).act, torch.nn.SiLU)
    net = ConvScore(2, 16, levels=3)
    assert net.first.weight.shape == (16, 2, 3, 3) and len(net.down) == 3
    # Half as many pixels a side and twice as many channels a level.
    assert [block.conv1.weight.shape[0] for block in net.down] == [16, 32, 64]


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda: MLPScore(0), "dim"),
        (lambda: MLPScore(2, hidden=0), "hidden"),
        (lambda: MLPScore(2, data_std=float("nan")), "data_std"),
        (lambda: MLPScore(2, activation="relu"), "activation"),
        (lambda: ConvScore(1, 12), "width"),
        (lambda: ConvScore(1, 8, levels=0), "levels"),
        (lambda: MLPScore(2)(torch.zeros(3, 2), torch.ones(2)), "sigma"),
        (lambda: MLPScore(2)(torch.zeros(3, 3), torch.ones(3)), "dim=2"),
        (lambda: ConvScore(1, 8)(torch.zeros(3, 8, 8), torch.ones(3)), "x: got shape"),
        (lambda: ConvScore(1, 8)(torch.zeros(3, 2, 8, 8), torch.ones(3)), "x: got shape"),
        (lambda: ConvScore(1, 8)(torch.zeros(3, 1, 8, 8), torch.tensor(1.0)), "sigma"),
    ],
)
def test_errors_name_the_argument(call, names):
    with pytest.raises(ValueError, match=names):
        call()
