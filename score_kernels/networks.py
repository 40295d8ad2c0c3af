"""Small score networks for demonstrations and tests.

Both are called as ``net(x, sigma)``, x ``[B, ...]`` and sigma ``[B]`` float32, and return the score
``grad_x log p_sigma(x)`` in x's shape. Samples of a batch do not depend on each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from score_kernels import checks

__all__ = ["ConvScore", "MLPScore"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "softplus": nn.Softplus}


class _Scaled(nn.Module):
    """A network scaled with `data_std`, which its state therefore holds."""

    data_std: float

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.data_std, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        # A state may have been cast to half precision.
        if not math.isclose(float(state), self.data_std, rel_tol=0.01):
            raise ValueError(f"data_std: got weights of {float(state)}, expected {self.data_std}")


class MLPScore(_Scaled):
    """Fully connected score network, for points and small images.

    With `conditional`, f being a network of ``x / sqrt(sigma^2 + d^2)`` and an embedding of
    ``log sigma``, and d the standard deviation `data_std` of the data around 0:

        score(x, sigma) = -x / (sigma^2 + d^2) + f d / (sigma sqrt(sigma^2 + d^2))

    so that ``sigma score`` is of order one at every noise level (technique 3 of NCSNv2, Song and
    Ermon 2020, arXiv 2006.09011; scaling of Karras et al. 2022, arXiv 2206.00364). f is 0 before
    training: the score of ``N(0, (sigma^2 + d^2) I)``. Otherwise ``f(x) / sigma``, as in NCSNv2.

    Args:
        dim: numbers in a sample, the product of ``x.shape[1:]``.
        hidden, depth: width and number of the hidden layers.
        activation: "silu" or "softplus": smooth, as sliced score matching differentiates twice.
        conditional: whether sigma is an input of the network.
        data_std: d, above 0.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        *,
        depth: int = 2,
        activation: str = "silu",
        conditional: bool = True,
        data_std: float = 1.0,
    ) -> None:
        super().__init__()
        _check(data_std, dim=dim, hidden=hidden, depth=depth)
        checks.choice("activation", activation, _ACTIVATIONS)
        self.dim = dim
        self.conditional = conditional
        self.data_std = data_std
        self.act = _ACTIVATIONS[activation]()
        self.layers = nn.ModuleList(
            nn.Linear(dim if i == 0 else hidden, hidden) for i in range(depth)
        )
        self.last = nn.Linear(hidden, dim)
        if conditional:
            self.embed = _SigmaEmbedding(hidden)
            self.shifts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
            _zero(self.last)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        checks.sigma(sigma, x)
        flat = x.flatten(1)
        if flat.shape[1] != self.dim:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected samples of dim={self.dim} numbers"
            )
        if not self.conditional:
            return (self._body(flat, None) / sigma[:, None]).reshape(x.shape)
        scale, of_x, of_f = _scalings(flat, sigma, self.data_std)
        out = self._body(flat * scale, self.embed(sigma))
        return (of_x * flat + of_f * out).reshape(x.shape)

    def _body(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        for i, layer in enumerate(self.layers):
            u = layer(h)
            if embedding is not None:
                u = u + self.shifts[i](embedding)
            h = self.act(u) if i == 0 or embedding is None else h + self.act(u)
        return self.last(h)


class ConvScore(_Scaled):
    """Small U-Net for images of any height and width.

    Each of `levels` resolutions, half the one before (rounded up), has one residual block of two
    3x3 convolutions on the way down and one on the way up, normalised over groups of 8 channels. An
    embedding of ``log sigma`` scales and shifts the channels of every block. Input and output are
    scaled with `data_std` as in :class:`MLPScore`.

    Args:
        channels: channels of the image.
        width: channels of the first resolution, a multiple of 8; each lower one has twice as many.
        levels: number of resolutions.
        data_std: as in :class:`MLPScore`.
    """

    def __init__(
        self, channels: int = 1, width: int = 32, *, levels: int = 2, data_std: float = 1.0
    ) -> None:
        super().__init__()
        _check(data_std, channels=channels, width=width, levels=levels)
        if width % 8:
            raise ValueError(f"width: got {width}, expected a multiple of 8, the size of a group")
        self.channels = channels
        self.data_std = data_std
        widths = [width * 2**i for i in range(levels)]
        self.embed = _SigmaEmbedding(2 * width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(_ResidualBlock(w, w, 2 * width) for w in widths)
        self.shrink = nn.ModuleList(
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1) for w in widths[:-1]
        )
        self.up = nn.ModuleList(_ResidualBlock(3 * w, w, 2 * width) for w in widths[-2::-1])
        self.norm = nn.GroupNorm(width // 8, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        _zero(self.last)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        checks.sigma(sigma, x)
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected [B, {self.channels}, height, width]"
            )
        scale, of_x, of_f = _scalings(x, sigma, self.data_std)
        embedding = self.embed(sigma)
        h = self.first(x * scale)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            h = block(h, embedding)
            if i < len(self.shrink):
                skips.append(h)
                h = self.shrink[i](h)
        for block in self.up:
            skip = skips.pop()
            h = F.interpolate(h, size=skip.shape[-2:], mode="nearest")
            h = block(torch.cat([h, skip], dim=1), embedding)
        return of_x * x + of_f * self.last(F.silu(self.norm(h)))


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a skip; the embedding scales and shifts channels in between."""

    def __init__(self, c_in: int, c_out: int, features: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(c_in // 8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(features, 2 * c_out)
        self.norm2 = nn.GroupNorm(c_out // 8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        # Blocks begin as the identity: the first steps of training stay small.
        _zero(self.conv2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class _SigmaEmbedding(nn.Module):
    """Sines and cosines of log sigma `[B]`, then two layers: `[B, features]`."""

    frequencies: Tensor

    def __init__(self, features: int, *, waves: int = 16) -> None:
        super().__init__()
        # Periods from about 60 to 0.6 in log sigma: the longest distinguishes all levels of a
        # schedule, the shortest neighbouring ones.
        frequencies = 0.1 * torch.logspace(0, 2, waves, dtype=torch.float32)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.net = nn.Sequential(
            nn.Linear(2 * waves, features), nn.SiLU(), nn.Linear(features, features), nn.SiLU()
        )

    def forward(self, sigma: Tensor) -> Tensor:
        angles = sigma.log()[:, None] * self.frequencies
        return self.net(torch.cat([angles.sin(), angles.cos()], dim=1))


def _scalings(x: Tensor, sigma: Tensor, data_std: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the network's input, and of x and the network's output in the score."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    variance = sigma.square() + data_std**2
    scale = variance.rsqrt()
    return scale, -1 / variance, data_std * scale / sigma


def _check(data_std: float, **sizes: int) -> None:
    checks.positive("data_std", data_std)
    for name, size in sizes.items():
        checks.count(name, size, least=1)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
