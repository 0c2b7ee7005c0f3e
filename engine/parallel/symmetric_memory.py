"""`SymmetricCollectives`: sums of GPUs on one host, whose kernels read the memory of the other GPUs directly.

Symmetric memory is a buffer of the same size on every rank that the GPUs of all ranks map. torch has kernels that add
up such buffers and are queued on the current stream, like those of NCCL. A decode step has two small sums for each
layer, and for small sums NCCL's protocol costs more than their bytes. NCCL remains for large sums, and for what is
gathered.

All ranks add in the order of ranks, or one rank adds each element for all, so all ranks get the same bits.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..device import gpu_with_shared_sums, repeat_until_idle
from ..env import allow_equal_indices
from .collectives import GroupCollectives

__all__ = ["Registration", "SymmetricCollectives", "can_map", "describe_rank"]

ONE_SHOT_BYTES = 256 << 10
"""Most bytes of a sum in which every rank reads all parts. In a larger one each rank adds up and hands out a share."""

BUFFER_BYTES = 16 << 20
"""Most bytes of a sum in symmetric memory: a decode step of 1,024 sequences and a hidden size of 8,192."""

ALIGNMENT_BYTES = 16
"""What address and size of a summed tensor are a multiple of, so that the kernels move the most bytes at once."""

SIZES = (2, 4, 8)
"""Numbers of ranks for which torch compiles the kernels."""

DTYPES = (torch.bfloat16, torch.float32)
"""Dtypes for which torch compiles the kernels."""

RELEASE_S = 10.0
"""Most seconds for which `close` signals in place of ranks that have gone."""


class SymmetricCollectives:
    """Collectives of GPUs on one host: small and middle sums in symmetric memory, everything else by NCCL.

    Args:
        nccl: Collectives of the same ranks.
        registration: The ranks as torch knows them.
        buffer: `[BUFFER_BYTES]` uint8, the symmetric memory of this rank.
        memory: torch's `_SymmetricMemory` of the buffer, which maps the memory of all ranks.
    """

    def __init__(self, nccl: GroupCollectives, registration: Registration, buffer: Tensor, memory: Any) -> None:
        ops = torch.ops.symm_mem
        self._nccl, self._registration, self._buffer, self._memory = nccl, registration, buffer, memory
        self._sum_once = ops.one_shot_all_reduce_copy_out
        # With multicast the switch between the GPUs adds.
        self._sum_shares = ops.multimem_all_reduce_ if memory.multicast_ptr else ops.two_shot_all_reduce_

    @classmethod
    def open(cls, nccl: GroupCollectives, registration: Registration, device: torch.device) -> Self:
        """Makes the buffer and maps those of the other ranks, which call this at the same time.

        Args:
            nccl: Collectives of the same ranks.
            registration: The ranks as torch knows them.
            device: GPU of this rank.

        Raises:
            RuntimeError: The GPUs cannot map each other's memory.
        """
        from torch._C._distributed_c10d import _SymmetricMemory

        name, group = registration.name, registration.group
        allow_equal_indices()  # `can_map` has compared the GPUs themselves.
        # Releases from 2.13 on find the ranks in the registered group. The version compares as a version, not as text.
        if torch.__version__ < "2.13":
            _SymmetricMemory.set_group_info(name, group.rank(), group.size(), registration.store)
        buffer = _SymmetricMemory.empty_strided_p2p((BUFFER_BYTES,), (1,), torch.uint8, device, name)
        return cls(nccl, registration, buffer, _SymmetricMemory.rendezvous(buffer, name))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_reduce`; the call queues the sum and does not wait for it."""
        if not _fits(tensor):
            return self._nccl.all_reduce(tensor)
        own = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if tensor.nbytes <= ONE_SHOT_BYTES:
            self._sum_once(own, tensor, "sum", self._registration.name, tensor)
            return tensor
        own.copy_(tensor)
        self._sum_shares(own, "sum", self._registration.name)
        return tensor.copy_(own)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_gather`."""
        return self._nccl.all_gather(tensor)

    def close(self) -> None:
        """Ends sums that wait for a rank which has gone, NCCL's too; a kernel would otherwise wait for ever.

        The two must end together, because the stream holds sums of both kinds in turn.
        """
        release = threading.Thread(target=self._release, daemon=True)
        release.start()
        self._nccl.close()
        release.join()

    def _release(self) -> None:
        """Signals in place of the other ranks until the sums that are queued on this rank have ended."""
        with contextlib.suppress(RuntimeError):  # An error of the device, which has ended its kernels.
            repeat_until_idle(self._signal_for_others, self._buffer.device, RELEASE_S)

    def _signal_for_others(self) -> None:
        """Sets the signals that this rank waits for, and takes those that it has set and others have not taken.

        Each rank has a pad of signals `[num_blocks, num_ranks]`. In a sum, block b of rank r waits until `[b, r]` of
        the pad of each rank is 0 and sets it to 1; then it waits until each element of row b of its own pad is 1, and
        sets it to 0.
        """
        memory = self._memory
        for rank in range(memory.world_size):
            if rank != memory.rank:
                pad = memory.get_signal_pad(rank, dtype=torch.int32).view(-1, memory.world_size)
                pad[:, memory.rank].zero_()
                own = memory.get_signal_pad(memory.rank, dtype=torch.int32).view(-1, memory.world_size)
                own[:, rank].fill_(1)


@dataclass(frozen=True, slots=True)
class Registration:
    """The ranks of a pp stage as torch knows them, so that its kernels for symmetric memory find them by a name.

    Attributes:
        group: The process group. torch's registry does not keep it, so that whoever uses the name must.
        store: Store in which the ranks exchange the addresses of their memory.
        number: Number of the name in this process. The numbers of all ranks must be equal: torch counts the exchanges
            of addresses in a process, and ranks with different counts would miss each other.
    """

    group: Any
    store: Any
    number: int

    @classmethod
    def make(cls, nccl: Any, store: Any, rank: int, size: int) -> Self:
        """Registers the ranks of a pp stage under a name that is new in this process.

        Args:
            nccl: Process group of the ranks.
            store: A store that only these ranks use, and only for this purpose.
            rank: This rank among them.
            size: Number of ranks.
        """
        from torch._C._distributed_c10d import ProcessGroup, _register_process_group

        group = ProcessGroup(store, rank, size)
        group._register_backend(torch.device("cuda"), ProcessGroup.BackendType.NCCL, nccl)
        for number in itertools.count():
            registration = cls(group, store, number)
            try:
                _register_process_group(registration.name, group)
            except RuntimeError as error:
                if "already registered" not in str(error):
                    raise
            else:
                group._set_group_name(registration.name)
                return registration
        raise AssertionError

    @property
    def name(self) -> Any:
        """The name under which the ranks are registered, a text."""
        return f"millrace-{self.number}"


def describe_rank(registration: Registration, device: torch.device) -> list[Any] | None:
    """Returns the host, the number of the registration and the GPU of this rank; None if torch lacks the kernels."""
    gpu = gpu_with_shared_sums(device) if registration.group.size() in SIZES else None
    return None if gpu is None else [socket.gethostname(), registration.number, gpu]


def can_map(ranks: Sequence[list[Any] | None]) -> bool:
    """Returns whether some ranks (see `describe_rank`) have different GPUs of one host, and the kernels."""
    known = [rank for rank in ranks if rank is not None]
    hosts, gpus = {(host, number) for host, number, _ in known}, {gpu for _, _, gpu in known}
    return len(known) == len(ranks) == len(gpus) and len(hosts) == 1


def _fits(tensor: Tensor) -> bool:
    """Returns whether the kernels can add up tensors like this one, and the buffer can hold it."""
    is_aligned = tensor.nbytes % ALIGNMENT_BYTES == tensor.data_ptr() % ALIGNMENT_BYTES == 0
    return is_aligned and 0 < tensor.nbytes <= BUFFER_BYTES and tensor.dtype in DTYPES
