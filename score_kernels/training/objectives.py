"""The losses a :class:`score_kernels.Trainer` knows by name, and those a user brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from score_kernels import ops
from score_kernels.losses.dsm import denoising_losses, draw_labels
from score_kernels.losses.sliced import sliced_score_loss
from score_kernels.noise import NoiseKey, Purpose

__all__ = ["Objective", "objective"]

# The mean loss of a batch and, where known, its losses [B] and their levels [B].
Result = tuple[Tensor, "tuple[Tensor, Tensor] | None"]
Objective = Callable[[nn.Module, Tensor, NoiseKey, dict[str, Any]], Result]


def objective(loss: str | Callable[..., Tensor], sigmas: Tensor, weighting: float) -> Objective:
    """The function a trainer calls.

    Raises:
        TypeError, ValueError: loss is neither a known name nor a function.
    """
    if callable(loss):
        return _Custom(loss, sigmas)
    if not isinstance(loss, str):
        raise TypeError(f"loss: got {type(loss).__name__}, expected 'dsm', 'ssm' or a function")
    if loss not in ("dsm", "ssm"):
        raise ValueError(f"loss: got {loss!r}, expected 'dsm', 'ssm' or a function")
    return _OverLevels(loss, sigmas, weighting)


class _OverLevels:
    """A loss at a noise level drawn for each sample, weighted by sigma^weighting."""

    def __init__(self, name: str, sigmas: Tensor, weighting: float) -> None:
        self.name = name
        self.sigmas = sigmas
        self.weighting = weighting

    def __call__(
        self, net: nn.Module, x: Tensor, key: NoiseKey, conditions: dict[str, Any]
    ) -> Result:
        self.sigmas = self.sigmas.to(x.device)
        labels = draw_labels(len(x), len(self.sigmas), key, x.device)
        sigma = self.sigmas[labels]
        if self.name == "dsm":
            weight = None if self.weighting == 2.0 else sigma ** (self.weighting - 2.0)
            each = denoising_losses(net, x, sigma, key, weight, conditions)
        else:
            # Unlike denoising, slicing needs no noise in the data; the levels put it there.
            noisy = ops.perturb(x, sigma, key.for_purpose(Purpose.DSM_NOISE))
            score = _with(net, conditions)
            each = sliced_score_loss(score, noisy, sigma, noise=key, reduction="none")
            each = sigma**self.weighting * each
        return each.mean(), (each.detach(), labels)


class _Custom:
    """A user's `loss(net, x, sigmas, noise)`."""

    def __init__(self, loss: Callable[..., Tensor], sigmas: Tensor) -> None:
        self.loss = loss
        self.sigmas = sigmas

    def __call__(
        self, net: nn.Module, x: Tensor, key: NoiseKey, conditions: dict[str, Any]
    ) -> Result:
        self.sigmas = self.sigmas.to(x.device)
        value = self.loss(net, x, self.sigmas, key, **conditions)
        if not isinstance(value, Tensor) or value.shape not in ((), x.shape[:1]):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: got {got} from the function, expected one number or [B]")
        return value.mean(), None


def _with(net: nn.Module, conditions: dict[str, Any]) -> Callable[..., Tensor]:
    # The network itself where it can be: what is found out about it is remembered by identity.
    return (lambda x, sigma: net(x, sigma, **conditions)) if conditions else net
