"""`Collectives`: sums and concatenations over the ranks of a pp stage, each of which has a part of a tensor.

`GroupCollectives` uses torch.distributed: NCCL between GPUs, gloo between CPU hosts. `SharedCollectives`, in
`shared_memory`, serves CPU ranks of one host: a sum that takes gloo 400 microseconds takes 10 in shared memory.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Collectives", "GroupCollectives"]


class Collectives(Protocol):
    """Operations that all ranks of a group must call in the same order, with tensors of the same shape."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replaces a contiguous tensor by the sum over all ranks and returns it; all ranks get the same bits."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, in order: `[num_ranks, *tensor.shape]`."""
        ...

    def close(self) -> None:
        """Ends operations that wait for a rank which has gone. The collectives are not used afterwards."""
        ...


class GroupCollectives:
    """Collectives of a process group of torch.distributed.

    NCCL gets `asyncOp=False`, which puts an operation on the current CUDA stream like any other kernel. So a CUDA graph
    can record it, and no other stream and events take part.

    Args:
        group: The group. Its methods are called directly, because torch's public functions keep global state.
        size: Number of ranks.
    """

    def __init__(self, group: Any, size: int) -> None:
        from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions

        self._group = group
        self._size = size
        self._sum, self._gather = AllreduceOptions(), AllgatherOptions()
        self._sum.asyncOp = self._gather.asyncOp = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_reduce`; on a GPU the call queues the sum and does not wait for it."""
        _finish(self._group.allreduce([tensor], self._sum))
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_gather`."""
        gathered = torch.empty((self._size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        _finish(self._group._allgather_base(gathered.view(-1), tensor.contiguous().view(-1), self._gather))
        return gathered

    def close(self) -> None:
        """Aborts the operations of the group. NCCL would otherwise wait for minutes and then end this process."""
        self._group.abort()


def _finish(work: Any) -> None:
    """Waits for an operation of gloo; NCCL returns None for one that is queued on the current stream."""
    if work is not None:
        work.wait()
