"""The processes of a run: those of torchrun, or one alone."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "current", "joined"]


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`, and number `local` on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process: "cuda" is the GPU of its local number."""
        several = name == "cuda" and self.size > 1
        return torch.device(f"cuda:{self.local}" if several else name)

    def all_gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


def current() -> Ranks:
    """The ranks of the initialized process group, or a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join torchrun's process group for a command, if torchrun started this process."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield current()
        return
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # After a restart torchrun's store still holds the addresses of those that died (torch 2.13).
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        # gloo for CPU tensors and objects, NCCL for GPU tensors.
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        # One rank may work for long before the others hear from it.
        timeout=timedelta(days=7),
    )
    try:
        yield current()
        # No rank leaves while another one still communicates with it.
        dist.barrier()
    finally:
        dist.destroy_process_group()
        # What keeps the group, as cycles of DistributedDataParallel do, keeps its threads. One that
        # frees a tensor while the interpreter exits aborts the process (torch 2.13).
        gc.collect()
