"""A step that ends with a clamp or a wrap, or has a preconditioner, beside the plain one."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import interleaved
from score_kernels import NoiseKey
from score_kernels.backends import choose
from score_kernels.backends.reference import CLAMP, NO_END, WRAP

__all__ = ["steps"]

SHAPE = (64, 3, 32, 32)
A, B, C = 1.0, 1e-3, 1e-3


def steps(device: torch.device, *, threads: list[int], rounds: int) -> None:
    """Print ns an element of a step in place, as chains do it, and of eager code for the same."""
    print(f"{'step':14} threads {'ns an element':>20} {'eager':>20}")
    for count in threads:
        torch.set_num_threads(count)
        ns = _measured(device, rounds)
        plain = ns["plain"]
        for name in [name for name in ns if not name.startswith("eager")]:
            eager = ns[f"eager {name}"]
            ours = f"{ns[name]:.3f} x{ns[name] / plain:.3f}"
            print(f"{name:14} {count:7} {ours:>20} {f'{eager:.2f} x{eager / ns[name]:.1f}':>20}")


def _measured(device: torch.device, rounds: int) -> dict[str, float]:
    x, score = 0.5 * torch.randn(2, *SHAPE, device=device)
    gain, row = torch.rand(SHAPE, device=device), torch.tensor([[A, B, C]], device=device)
    backend, key = choose(x.device, x.dtype), NoiseKey(1)
    table = partial(backend.table_step, x, x, score, row, None, key, None, None)

    def by_hand(c: float = C) -> Tensor:
        return x.add_(score, alpha=B).add_(torch.randn_like(x), alpha=c)

    def by_hand_with_gain() -> Tensor:
        x.addcmul_(gain, score, value=B)
        return x.addcmul_(gain.sqrt(), torch.randn_like(x), value=C)

    variants = {
        "plain": lambda: backend.affine_step(x, x, score, A, B, C, key),
        "temperature": lambda: backend.affine_step(x, x, score, A, B, 0.7 * C, key),
        "clamp": lambda: table(None, (CLAMP, -1.0, 1.0)),
        "wrap": lambda: table(None, (WRAP, 1.0, 1.0)),
        "precondition": lambda: table(gain, NO_END),
        "eager plain": by_hand,
        "eager temperature": lambda: by_hand(0.7 * C),
        "eager clamp": lambda: by_hand().clamp_(-1.0, 1.0),
        "eager wrap": lambda: by_hand().remainder_(1.0),
        "eager precondition": by_hand_with_gain,
    }
    seconds = interleaved(variants, rounds, device)
    return {name: statistics.median(v) / x.numel() * 1e9 for name, v in seconds.items()}
