"""`MappedPages`: takes the pages of mapped files, once their numbers are copied, out of this process's memory.

The pages of a checkpoint that were read count as memory of the process until they are unmapped. The system keeps them
in its cache, so releasing them costs little if they are read again.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
from pathlib import Path

from torch import Tensor

__all__ = ["MappedPages"]

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED of Linux


class MappedPages:
    """The memory of this process that is mapped from files when the object is made.

    The list of it has a line for each file and library, so it is read once, and not for each tensor.
    """

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if _MAPS.exists() else []
        fields = [line.split(maxsplit=5) for line in lines]
        spans = (span.split("-") for span, _, _, _, inode, *path in fields if inode != "0" and path)
        self._spans = sorted((int(first, 16), int(end, 16)) for first, end in spans)

    def release(self, tensor: Tensor) -> None:
        """Releases the whole pages of a tensor that was not changed; any memory that is not of a file is kept.

        Args:
            tensor: A tensor, or a part of one, whose memory was there when the object was made. Memory that is newer
                may lie where a file was mapped, and would become zeros.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        index = bisect.bisect_right(self._spans, start, key=lambda span: span[0]) - 1
        if start < end and index >= 0 and end <= self._spans[index][1]:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
