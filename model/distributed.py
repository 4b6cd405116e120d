"""One training run in several processes, started by torch's own launcher (`torchrun`): what they have to exchange.

Every process walks through the same batches and takes its share of the rows of each. Only entity embeddings travel,
so that the negatives of a query come from the whole batch, and gradients, which add up to those of one process that
holds the whole batch.

Shapes: B pairs of a batch over all processes, D embedding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# The others wait while the first process computes features or validates.
_PATIENCE = timedelta(days=7)

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of a run, seen from one of them; by default it is alone."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and speaks to the user."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """The rows of a batch of `count` that a process takes, this one by default; empty where there are too few."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def gather(self, share_BD: torch.Tensor, count: int) -> torch.Tensor:
        """`[count, D]` from the shares of all processes. A gradient flows to this process's own share only."""
        if self.size == 1:
            return share_BD
        shares = [self.share(count, rank) for rank in range(self.size)]
        lengths = [share.stop - share.start for share in shares]
        padded_BD = F.pad(share_BD.detach(), (0, 0, 0, max(lengths) - len(share_BD))).contiguous()
        gathered = [torch.empty_like(padded_BD) for _ in shares]
        dist.all_gather(gathered, padded_BD)
        parts = [part[:length] for part, length in zip(gathered, lengths, strict=True)]
        parts[self.rank] = share_BD
        return torch.cat(parts)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, in one exchange."""
        if self.size == 1:
            return
        kept = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in kept])
        dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in kept]
        for parameter, gradient in zip(kept, torch.split(flat, sizes), strict=True):
            parameter.grad = gradient.view_as(parameter).clone()

    def from_first(self, value: _Value) -> _Value:
        """What the first process gives, in all of them; the others' `value` is ignored."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Return once every process has come here."""
        self.from_first(None)


@contextmanager
def open_group(device: torch.device) -> Iterator[tuple[Group, torch.device]]:
    """The group that `torchrun` started this process in, and the process's own device; without it, one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Group(rank=dist.get_rank(), size=size), device
    finally:
        dist.destroy_process_group()
