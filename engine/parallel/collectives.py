"""What the ranks of a stage compute together: sums and concatenations of tensors of which each has a part.

`GroupCollectives` is torch.distributed: NCCL between GPUs, gloo between hosts without. `SharedCollectives`, in
`shared_memory`, is for CPU ranks of one host, where gloo takes 400 microseconds for what memory does in 10.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Collectives", "GroupCollectives"]


class Collectives(Protocol):
    """Operations that all ranks of a group start in the same order with tensors of one shape."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replaces a contiguous tensor by the sum of all ranks' and returns it; all get the same bits."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, in order: `[num_ranks, *tensor.shape]`."""
        ...


class GroupCollectives:
    """Collectives of a process group of torch.distributed.

    Args:
        group: The group. Its methods are called directly: the functions around them keep global state.
        size: Ranks in it.
    """

    def __init__(self, group: Any, size: int) -> None:
        self._group = group
        self._size = size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_reduce`; on a GPU it is queued, not waited for."""
        self._group.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_gather`."""
        gathered = torch.empty((self._size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self._group.allgather([list(gathered.unbind())], [tensor.contiguous()]).wait()
        return gathered
