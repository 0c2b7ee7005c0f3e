"""Process groups of torch.distributed, made without its global state: NCCL between GPUs, gloo between CPUs.

`collectives` computes sums over such a group; `GroupLink` here passes tensors between pp stages on GPUs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

__all__ = ["GroupLink", "make_group"]

TIMEOUT = timedelta(minutes=10)
"""Most time that an operation waits for a rank. A dead process is noticed at once; this is for a lost host."""


def make_group(store: Store, rank: int, size: int, kind: str, ip: str) -> Any:
    """Returns a process group of torch.distributed: NCCL for `"cuda"`, gloo for `"cpu"`. All its processes call this.

    Args:
        store: A store that only this group uses.
        rank: Rank of this process in the group.
        size: Number of processes in the group.
        kind: Device of the tensors, `"cpu"` or `"cuda"`.
        ip: Address of this host for the other processes.
    """
    if kind == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [ProcessGroupGloo.create_device(hostname=ip)]
    gloo._timeout = TIMEOUT
    gloo._threads = 1
    return ProcessGroupGloo(store, rank, size, gloo)


class GroupLink:
    """A `StageLink` over NCCL, for a chain of GPUs with one GPU of each pp stage.

    Args:
        group: Process group of the ranks of the chain, in the order of pp stages.
        pp_rank: Index of this rank's pp stage.
    """

    def __init__(self, group: Any, pp_rank: int) -> None:
        self._group = group
        self._next, self._previous = pp_rank + 1, pp_rank - 1
        self._sending: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Queues the sending of a tensor to the next pp stage; keeps the tensor until the second `send` after this."""
        if len(self._sending) > 1:
            work, _ = self._sending.popleft()
            work.wait()
        tensor = tensor.contiguous()
        self._sending.append((self._group.send([tensor], self._next, 0), tensor))

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the next tensor from the previous pp stage; the CUDA stream waits for its data, the host does not."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        self._group.recv([tensor], self._previous, 0).wait()
        return tensor

    def close(self) -> None:
        """Aborts the operations of the group. NCCL would otherwise wait for minutes and then end this process."""
        self._group.abort()
