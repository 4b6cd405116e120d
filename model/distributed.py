"""What the processes of one training run exchange when torch's launcher (`torchrun`) starts several.

Every process goes through the same batches and embeds its share of the rows. Entity embeddings are gathered, so each
query has the whole batch as negatives. Gradients are summed, which equals one process with the whole batch.

Shapes: B pairs of a batch over all processes, D embedding.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

_TIMEOUT = timedelta(days=7)  # the others wait while the first process computes features or validates

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of a run, seen from one of them. The default is a single process."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> slice:
        """Return the rows of a batch of `count` that a process (default: this one) takes. The slice may be empty."""
        rank = self.rank if rank is None else rank
        return slice(count * rank // self.size, count * (rank + 1) // self.size)

    def gather(self, share_BD: torch.Tensor, count: int) -> torch.Tensor:
        """Return `[count, D]` from the shares of all processes. Gradients flow only to this process's own share."""
        if self.size == 1:
            return share_BD
        gathered_BD = share_BD.new_zeros(count, share_BD.shape[1])
        gathered_BD[self.share(count)] = share_BD.detach()
        dist.all_reduce(gathered_BD)  # shares may differ in length, which all_gather does not support everywhere
        gathered_BD[self.share(count)] = share_BD
        return gathered_BD

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes."""
        if self.size == 1:
            return
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)

    def from_first(self, value: _Value) -> _Value:
        """Return the first process's `value` in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Block until every process has called this."""
        self.from_first(None)


@contextmanager
def open_group(device: torch.device) -> Iterator[tuple[Group, torch.device]]:
    """Join the group that `torchrun` started, if any. Yield it with this process's device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Group(rank=dist.get_rank(), size=size), device
    finally:
        dist.destroy_process_group()
