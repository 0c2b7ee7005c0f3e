"""Tensors of safetensors files behind a URL: the header says where each stands, its numbers are read when used.

No file is copied to a disk. Of a tensor that ranks share along its first dimension, each rank reads its own bytes;
along another one a rank reads whole rows, and keeps its part of them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..storage import Location

__all__ = ["RemoteTensor", "iter_remote_tensors", "read_metadata"]

NUM_THREADS = 16  # they wait for answers of a store
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100 << 20
PIECE_BYTES = 16 << 20
"""So much of a tensor is asked for at once, and cut before more is."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class RemoteTensor:
    """A tensor whose numbers are still where they are stored.

    Attributes:
        file: The file.
        start: Where in it the numbers of the whole tensor start, in bytes.
        dtype: Of the numbers.
        whole_shape: Of the tensor in the file.
        parts: Start and length of what is wanted of each dimension.
    """

    file: Location
    start: int
    dtype: torch.dtype
    whole_shape: torch.Size
    parts: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> torch.Size:
        """The shape of what is wanted."""
        return torch.Size(length for _, length in self.parts)

    def is_floating_point(self) -> bool:
        """Whether the numbers are floats."""
        return self.dtype.is_floating_point

    def narrow(self, dim: int, start: int, length: int) -> RemoteTensor:
        """Returns a part, as `torch.Tensor.narrow` does; nothing is read."""
        parts = list(self.parts)
        parts[dim] = (parts[dim][0] + start, length)
        return replace(self, parts=tuple(parts))

    def read(self) -> Tensor:
        """Reads what is wanted.

        Raises:
            StorageError: The store kept failing.
        """
        result = torch.empty(self.shape, dtype=self.dtype)
        if not self.parts:
            return self._read_rows(0, 1).reshape(())
        first, num_rows = self.parts[0]
        row_bytes = self.dtype.itemsize * math.prod(self.whole_shape[1:])
        step = max(1, PIECE_BYTES // max(1, row_bytes))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            result[start:stop] = self._cut(self._read_rows(first + start, first + stop))
        return result

    def _read_rows(self, start: int, stop: int) -> Tensor:
        row_bytes = self.dtype.itemsize * math.prod(self.whole_shape[1:])
        data = self.file.read_bytes(self.start + start * row_bytes, self.start + stop * row_bytes)
        if not data:
            return torch.empty((stop - start, *self.whole_shape[1:]), dtype=self.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.dtype).reshape(stop - start, *self.whole_shape[1:])

    def _cut(self, rows: Tensor) -> Tensor:
        for dim, (start, length) in enumerate(self.parts[1:], 1):
            rows = rows.narrow(dim, start, length)
        return rows


def iter_remote_tensors(files: Sequence[Location]) -> Iterator[tuple[str, RemoteTensor]]:
    """Yields every (name, tensor) of files; only their headers are read, several at once.

    Args:
        files: Safetensors files.

    Raises:
        CheckpointError: A file is damaged.
    """
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="millrace-headers") as pool:
        for tensors in pool.map(_locate_tensors, files):
            yield from tensors.items()


def read_metadata(file: Location) -> dict[str, str]:
    """Returns what a safetensors file says about itself.

    Raises:
        CheckpointError: The file is damaged.
    """
    metadata: dict[str, str] = _read_header(file, file.size()).get("__metadata__", {})
    return metadata


def _locate_tensors(file: Location) -> dict[str, RemoteTensor]:
    size = file.size()
    header = _read_header(file, size)
    header.pop("__metadata__", None)
    try:
        num_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        begin = size - num_bytes
        tensors = {name: _locate(file, begin, **entry) for name, entry in header.items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); store it again") from error
    for name, tensor in tensors.items():
        start, stop = header[name]["data_offsets"]
        if stop - start != tensor.dtype.itemsize * math.prod(tensor.whole_shape):
            raise CheckpointError(f"{file} is damaged: {name} of {list(tensor.shape)} has {stop - start} bytes")
    return tensors


def _locate(file: Location, begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> RemoteTensor:
    """Makes a tensor of an entry of a header; its names are those of the format."""
    parts = tuple((0, length) for length in shape)
    return RemoteTensor(file, begin + data_offsets[0], DTYPES[dtype], torch.Size(shape), parts)


def _read_header(file: Location, size: int) -> dict[str, Any]:
    """Reads the entries of a file, which must be as long as they say."""
    (length,) = struct.unpack("<Q", file.read_bytes(0, min(LENGTH_BYTES, size)).ljust(LENGTH_BYTES, b"\xff"))
    begin = LENGTH_BYTES + length
    if begin > min(size, MAX_HEADER_BYTES):
        raise CheckpointError(f"{file} is truncated, or is no safetensors file; store it again")
    try:
        header: dict[str, Any] = json.loads(file.read_bytes(LENGTH_BYTES, begin))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); store it again") from error
    if size != begin + max(ends, default=0):
        raise CheckpointError(f"{file} is truncated: {size} bytes instead of {begin + max(ends, default=0)}")
    return header
