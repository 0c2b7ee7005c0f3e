"""`release_pages`: takes the pages of a mapped file, once their numbers are copied, out of this process's memory.

The pages of a checkpoint that were read count as memory of the process until they are unmapped. The system keeps them
in its cache, so releasing them costs little if they are read again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

__all__ = ["release_pages"]

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED of Linux


def release_pages(tensor: Tensor) -> None:
    """Releases the whole pages of a tensor that is mapped from a file and was not changed; any other tensor is kept."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end and _is_of_a_file(start, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _is_of_a_file(start: int, end: int) -> bool:
    """Returns whether the addresses are mapped from one file. Releasing other memory would make it zeros."""
    for line in _MAPS.read_text().splitlines():
        span, _, _, _, inode, *path = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in span.split("-"))
        if first <= start < last:
            return end <= last and inode != "0" and bool(path)
    return False
