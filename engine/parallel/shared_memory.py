"""`SharedCollectives`: collectives of CPU ranks on one host, which exchange their parts through shared memory.

Every rank writes its part and reads the parts of all others. A counter of each rank says how many rounds it has
written. Parts are written to two places in turn, so a rank waits once a round: a rank that has written round k + 1 has
read round k, and only after that is the memory of round k written again.

Counters are plain memory without fences. x86 keeps stores in order, and this module is used only there. A sum, of which
a step has two for each layer, is one compiled call where the compiled kernels are installed.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.exchange import SharedSum, shared_sums

__all__ = ["SharedCollectives", "SharedRegion", "can_share_memory"]

CHUNK_BYTES = 1 << 20
"""Most bytes that a rank writes in one round; a larger tensor takes several rounds."""

COUNTER_BYTES = 128
"""Bytes between two counters, so that they are neither in one cache line nor in two lines that are fetched together."""

SPINS_BEFORE_YIELD = 2_000
"""Reads of a counter, about 0.1 ms, before a waiting rank yields its core."""

YIELDS_BETWEEN_CHECKS = 256
"""Yields before a waiting rank checks whether the other ranks are alive."""

_FOLDER = Path("/dev/shm")


def can_share_memory() -> bool:
    """Returns whether this machine has /dev/shm and a CPU (x86-64) whose stores become visible in program order."""
    return platform.machine() in ("x86_64", "AMD64") and _FOLDER.is_dir()


class SharedRegion:
    """Memory that several processes of one host map. One process creates it, and the others open it by its name.

    Args:
        name: Name that `create` returned.
        num_bytes: Size of the region, the same in all processes.
    """

    def __init__(self, name: str, num_bytes: int) -> None:
        self._path = _FOLDER / name
        file = os.open(self._path, os.O_RDWR)
        try:
            self.memory = mmap.mmap(file, num_bytes)
        finally:
            os.close(file)

    @staticmethod
    def create(num_bytes: int) -> str:
        """Creates a zeroed region and returns its name; its memory is reserved, so later writes cannot fail."""
        name = f"millrace-{secrets.token_hex(8)}"
        file = os.open(_FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, num_bytes)
        except OSError:
            os.unlink(_FOLDER / name)
            raise
        finally:
            os.close(file)
        return name

    def unlink(self) -> None:
        """Removes the name after all processes have opened the region; the last process to end frees its memory."""
        self._path.unlink(missing_ok=True)


class SharedCollectives:
    """Collectives over a shared region of `num_bytes(size)` bytes.

    Args:
        region: Region that all ranks map.
        rank: This rank.
        size: Number of ranks.
        check: Raises if another rank has died; it is called periodically while this rank waits.
    """

    def __init__(self, region: SharedRegion, rank: int, size: int, check: Callable[[], None]) -> None:
        self._rank, self._size, self._check = rank, size, check
        head = size * COUNTER_BYTES
        self._counters = memoryview(region.memory)[:head].cast("q")
        self._mine = rank * COUNTER_BYTES // 8
        self._others = [i * COUNTER_BYTES // 8 for i in range(size) if i != rank]
        data = torch.frombuffer(region.memory, dtype=torch.uint8, offset=head, count=2 * size * CHUNK_BYTES)
        self._data = data.view(2, size, CHUNK_BYTES)
        self._views: dict[torch.dtype, Tensor] = {}
        self._round = 0
        self._sums = shared_sums()
        self._places = [place.data_ptr() for place in self._data]
        self._counters_at = self._data.data_ptr() - head

    @staticmethod
    def num_bytes(size: int) -> int:
        """Returns the number of bytes that the shared region of `size` ranks must have."""
        return size * (COUNTER_BYTES + 2 * CHUNK_BYTES)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_reduce`; every rank adds the parts in the same order."""
        compiled = self._sums.get(tensor.dtype)
        for chunk in self._chunks(tensor):
            if compiled is None:
                torch.sum(self._exchange(chunk), dim=0, out=chunk)
            else:
                self._sum(compiled, chunk)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """As `Collectives.all_gather`."""
        gathered = torch.empty((self._size, *tensor.shape), dtype=tensor.dtype)
        rows = gathered.view(self._size, -1)
        begin = 0
        for chunk in self._chunks(tensor.contiguous()):
            rows[:, begin : begin + len(chunk)] = self._exchange(chunk)
            begin += len(chunk)
        return gathered

    def close(self) -> None:
        """Does nothing: a wait notices the death of a rank by itself, and the memory ends with its last owner."""

    def _chunks(self, tensor: Tensor) -> tuple[Tensor, ...]:
        flat = tensor.view(-1)
        most = CHUNK_BYTES // tensor.element_size()
        return (flat,) if len(flat) <= most else flat.split(most)

    def _sum(self, compiled: SharedSum, chunk: Tensor) -> None:
        part = (chunk.data_ptr(), len(chunk), self._places[self._round & 1], self._data.stride(1))
        self._round += 1
        if not compiled.exchange(*part, self._counters_at, self._rank, self._size, self._round, SPINS_BEFORE_YIELD):
            for other in self._others:
                self._wait(other)
            compiled.add(*part, self._size)

    def _exchange(self, chunk: Tensor) -> Tensor:
        """Shares this rank's chunk `[n]` and returns all ranks' `[size, n]`; the second next call overwrites them."""
        places = self._view(chunk.dtype)[self._round & 1][:, : len(chunk)]
        places[self._rank].copy_(chunk)
        self._round += 1
        self._counters[self._mine] = self._round
        for other in self._others:
            if self._counters[other] < self._round:
                self._wait(other)
        return places

    def _view(self, dtype: torch.dtype) -> Tensor:
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self._data.view(dtype)
        return view

    def _wait(self, other: int) -> None:
        counters, target = self._counters, self._round
        for _ in range(SPINS_BEFORE_YIELD):
            if counters[other] >= target:
                return
        num_yields = 0
        while counters[other] < target:
            os.sched_yield()
            num_yields += 1
            if num_yields % YIELDS_BETWEEN_CHECKS == 0:
                self._check()
