"""Rows with addresses: random ones, and every op as a function of a batch and its key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from score_kernels import NoiseKey, ops

KEY = NoiseKey(2**63 + 11, purpose=2, draw=17)
# Rows of one block, of a few and of many; in tiles of several rows and in several tiles.
ELEMENTS = [1, 2, 3, 4, 5, 8, 63, 64, 132, 1023, 1028, 2050]


class Batch:
    """Rows with their addresses and all that ops take; indexing takes rows of everything."""

    def __init__(self, rows: int, elements: int) -> None:
        blocks = -(-elements // 4)
        # Samples that differ in the high word alone, and some that are equal.
        samples = torch.randint(0, 2**24, (rows,)) << 32 | torch.randint(5, (rows,))
        samples[-1], samples[0] = samples[rows // 2], 2**56 - 1
        draws = torch.randint(0, 2**32 - 17, (rows,))
        pieces = torch.randint(0, 2**32 // blocks, (rows,)).where(torch.rand(rows) < 0.7, 0)
        draws[0], pieces[0] = 2**32 - 18, 2**32 // blocks - 1
        scores, known = torch.randn(2, rows, elements)
        self.parts = [
            samples, draws, pieces,
            torch.randn(rows, elements), scores, known, torch.rand(rows, elements) < 0.4,
            torch.rand(rows) + 0.1, torch.rand(rows, 5) * torch.tensor([1, 1, 1, 1, 0.5]),
        ]  # fmt: skip

    def __getitem__(self, rows: Tensor) -> Batch:
        found = object.__new__(Batch)
        found.parts = [part[rows] for part in self.parts]
        return found

    @property
    def key(self) -> NoiseKey:
        samples, draws, pieces = self.parts[:3]
        return KEY.rows(samples, draws=draws, pieces=pieces)

    @property
    def addresses(self) -> list[tuple[int, int, int]]:
        """(sample, draw, piece) of each row."""
        samples, draws, pieces = (part.tolist() for part in self.parts[:3])
        return [(s, KEY.draw + d, p) for s, d, p in zip(samples, draws, pieces, strict=True)]

    def apply(self, op: Callable[..., Tensor]) -> Tensor:
        return op(self.key, *self.parts[3:])


def _table(columns: int) -> Callable[..., Tensor]:
    def step(
        key: NoiseKey, x: Tensor, s: Tensor, known: Tensor, mask: Tensor, _: Tensor, lines: Tensor
    ) -> Tensor:
        given = {} if columns == 3 else {"known": known, "mask": mask}
        table = lines[:, :columns].contiguous()
        return ops.table_step_(x.clone(), s.bfloat16(), table, None, key, **given)

    return step


def _counted(
    key: NoiseKey, x: Tensor, s: Tensor, known: Tensor, mask: Tensor, *_: Tensor
) -> Tensor:
    table = torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.2, 0.3]])
    # The step is a part of the draw, which is the key's and the address's besides.
    return ops.table_step_(x.clone(), s, table, torch.tensor(1), key.at(key.draw - 1))


def _gradient(key: NoiseKey, x: Tensor, s: Tensor, *rest: Tensor) -> Tensor:
    leaf = s.clone().requires_grad_()
    ops.dsm_loss_from_score(leaf, rest[2], key, weight=rest[2]).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


# Elementwise: (key, x, score, known, mask, sigma, lines) -> [B, ...] in the same bits everywhere.
EXACT: dict[str, Callable[..., Tensor]] = {
    "words": lambda key, x, *_: ops.words(x.shape, key),
    "normal": lambda key, x, *_: ops.normal(x.shape, key),
    "uniform": lambda key, x, *_: ops.uniform(x.shape, key),
    "rademacher": lambda key, x, *_: ops.rademacher(x.shape, key),
    "langevin": lambda key, x, s, *_: ops.langevin_step(x, s, 0.3, key),
    "affine in place": lambda key, x, s, *_: ops.affine_step_(x.clone(), s, 0.9, 0.2, 0.3, key),
    "table": _table(3),
    "known": _table(5),
    "counted": _counted,
    "perturb": lambda key, x, s, k, m, sigma, _: ops.perturb(x, sigma, key),
    "probe": lambda key, x, s, k, m, sigma, _: ops.probe_scale(sigma, x.shape, key),
    "gaussian probe": lambda key, x, s, k, m, sigma, _: ops.probe_scale(
        sigma, x.shape, key, probe="gaussian"
    ),
    "pair": lambda key, x, s, k, m, sigma, _: ops.fd_pair(x, sigma, key).unflatten(0, (2, -1))
    .transpose(0, 1).contiguous(),
}  # fmt: skip
# With sums, whose last bits depend on the backend.
SUMS: dict[str, Callable[..., Tensor]] = {
    "dsm": lambda key, x, s, k, m, sigma, _: ops.dsm_loss_from_score(s, sigma, key),
    "dsm gradient": _gradient,
    "dot": lambda key, x, s, *_: ops.probe_dot(s, key),
    "sphere": lambda key, x, s, *_: ops.probe_dot(s, key, probe="sphere"),
    "ssm": lambda key, x, s, *_: ops.ssm_reduce(x, s, key),
    "differences": lambda key, x, s, k, m, sigma, _: ops.fd_reduce(x, s, sigma, key),
}
