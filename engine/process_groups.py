"""Process groups of torch.distributed, made without its global state, and what of them the engine uses.

gloo between CPUs, NCCL between GPUs. `collectives` has the sums; here are the groups themselves, the way from stage to
stage, and agreeing on a number.
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

__all__ = ["GroupLink", "GroupWorld", "make_group"]

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
    """A chain of ranks, one of each stage, as `parallel.StageLink`.

    Args:
        group: Of these ranks.
        pp_rank: This one's stage.
    """

    def __init__(self, group: Any, pp_rank: int) -> None:
        self._group = group
        self._next, self._previous = pp_rank + 1, pp_rank - 1
        self._sending: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Starts to send a tensor to the next stage. It is kept until the send after the next one."""
        if len(self._sending) > 1:
            work, _ = self._sending.popleft()
            work.wait()
        tensor = tensor.contiguous()
        self._sending.append((self._group.send([tensor], self._next, 0), tensor))

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Waits for the next tensor from the stage before; on a GPU the stream waits, not the host."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        self._group.recv([tensor], self._previous, 0).wait()
        return tensor


class GroupWorld:
    """All ranks of an engine, as `parallel.World`.

    Args:
        group: Of CPUs.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def smallest(self, value: int) -> int:
        """Returns the smallest of all ranks' values."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        values = torch.tensor([value], dtype=torch.int64)
        self._group.allreduce([values], options).wait()
        return int(values)
