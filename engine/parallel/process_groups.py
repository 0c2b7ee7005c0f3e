"""Process groups of torch.distributed, made without its global state: NCCL between GPUs, gloo between CPUs.

`collectives` has the sums; here are the groups themselves, and the way from stage to stage between GPUs.
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
"""How long a rank waits for another in one operation. A dead process is noticed at once; this is for a lost host."""


def make_group(store: Store, rank: int, size: int, kind: str, ip: str) -> Any:
    """Makes a process group.

    Args:
        store: For this group alone.
        rank: This process in it.
        size: Processes in it.
        kind: `"cpu"` or `"cuda"`: where its tensors are.
        ip: Of this host, as the others reach it.
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
    """A chain of GPUs, one of each stage, as `parallel.StageLink`.

    Args:
        group: Of these ranks.
        pp_rank: This one's stage.
    """

    def __init__(self, group: Any, pp_rank: int) -> None:
        self._group = group
        self._next, self._previous = pp_rank + 1, pp_rank - 1
        self._sending: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Queues sending a tensor to the next stage. Its memory is kept until the send after the next one."""
        if len(self._sending) > 1:
            work, _ = self._sending.popleft()
            work.wait()
        tensor = tensor.contiguous()
        self._sending.append((self._group.send([tensor], self._next, 0), tensor))

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Queues receiving the next tensor from the stage before: the stream waits for it, not the host."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        self._group.recv([tensor], self._previous, 0).wait()
        return tensor

    def close(self) -> None:
        """Has nothing to close: the group ends with its last owner."""
