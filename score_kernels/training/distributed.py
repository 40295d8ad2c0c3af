"""The processes of a run: those of torchrun, or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Ranks", "current", "joined"]


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank, size: number of this process, from 0, and how many there are.
        local: its number on this machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process: "cuda" is the GPU of its local number."""
        device = torch.device(name)
        several = self.size > 1 and device.type == "cuda" and device.index is None
        return torch.device("cuda", self.local) if several else device

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def gathered(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, on every rank. Picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def current() -> Ranks:
    """The ranks of the process group that is there, or one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join torchrun's process group for the time of a command, if torchrun started this process.

    Raises:
        ValueError: torchrun started more processes than there are GPUs to use.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield current()
        return
    kind = torch.device(device).type
    local = int(os.environ["LOCAL_RANK"])
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"device: got cuda in process {local} of this machine, expected at most {count} "
                "processes, one for each GPU: torchrun --nproc-per-node"
            )
        torch.cuda.set_device(local)
    # After a restart torchrun's store still holds the addresses of those that died (torch 2.13).
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        # CPU tensors and objects go by gloo, those of GPUs by NCCL.
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        # A rank may have much more to do than another before they meet.
        timeout=timedelta(days=7),
    )
    try:
        ranks = current()
        yield ranks
        # None leaves while another one still talks to it.
        ranks.wait()
    finally:
        dist.destroy_process_group()
