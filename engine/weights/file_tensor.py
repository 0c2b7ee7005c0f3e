"""`FileTensor`: a tensor of a file, here or behind a URL, whose numbers are read when they are needed.

If a tensor is divided among ranks along its first dimension, each rank reads only the bytes of its part. If it is
divided along another dimension, each rank reads whole rows and keeps its part of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..storage import Location

__all__ = ["FileTensor", "PlainRows", "RowFormat"]

PIECE_BYTES = 16 << 20
"""Bytes of numbers that are decoded at once; this rank's part is cut from them before more bytes are read."""


class RowFormat(Protocol):
    """The way in which the rows of a tensor, along its first dimension, are stored in a file."""

    @property
    def num_together(self) -> int:
        """Number of consecutive rows that can only be decoded together."""
        ...

    def num_bytes(self, num_rows: int, row_shape: Sequence[int]) -> int:
        """Returns the bytes that a number of rows take in the file."""
        ...

    def decode(self, data: bytearray, shape: Sequence[int]) -> Tensor:
        """Returns the tensor of some rows, from their bytes in the file."""
        ...


@dataclass(frozen=True, slots=True)
class PlainRows:
    """Numbers one after another, as PyTorch has them in memory.

    Attributes:
        dtype: Number type.
    """

    dtype: torch.dtype

    @property
    def num_together(self) -> int:
        """Number of rows that can only be decoded together: each row can be decoded by itself."""
        return 1

    def num_bytes(self, num_rows: int, row_shape: Sequence[int]) -> int:
        """Returns the bytes that a number of rows take in the file."""
        return num_rows * self.dtype.itemsize * math.prod(row_shape)

    def decode(self, data: bytearray, shape: Sequence[int]) -> Tensor:
        """Returns the tensor of some rows, which shares the memory of their bytes."""
        return torch.frombuffer(data, dtype=self.dtype).reshape(shape) if data else torch.empty(shape, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor, or a part of one, whose numbers are not read yet.

    Attributes:
        file: The file with the numbers.
        start: Offset in the file at which the numbers of the whole tensor start, in bytes.
        dtype: Number type of the tensor that `read` returns.
        whole_shape: Shape of the whole tensor.
        parts: Start and length of this part in each dimension.
        rows: The way in which the rows of the whole tensor are stored.
    """

    file: Location
    start: int
    dtype: torch.dtype
    whole_shape: torch.Size
    parts: tuple[tuple[int, int], ...]
    rows: RowFormat

    @classmethod
    def whole(cls, file: Location, start: int, shape: Sequence[int], dtype: torch.dtype, rows: RowFormat) -> FileTensor:
        """Returns a whole tensor; `narrow` takes parts of it."""
        return cls(file, start, dtype, torch.Size(shape), tuple((0, length) for length in shape), rows)

    @property
    def shape(self) -> torch.Size:
        """Shape of this part of the tensor."""
        return torch.Size(length for _, length in self.parts)

    def is_floating_point(self) -> bool:
        """Returns whether the number type is a floating-point type, like `torch.Tensor.is_floating_point`."""
        return self.dtype.is_floating_point

    def narrow(self, dim: int, start: int, length: int) -> FileTensor:
        """Returns the given range of dimension `dim`, like `torch.Tensor.narrow`; nothing is read from the file."""
        parts = list(self.parts)
        parts[dim] = (parts[dim][0] + start, length)
        return replace(self, parts=tuple(parts))

    def read(self) -> Tensor:
        """Reads the numbers of this part and returns them as a tensor.

        Raises:
            StorageError: The store failed in all attempts.
        """
        if not self.parts:
            return self._read_rows(0, 1).reshape(())
        result = torch.empty(self.shape, dtype=self.dtype)
        first, num_rows = self.parts[0]
        together = self.rows.num_together
        decoded_bytes = together * self.dtype.itemsize * math.prod(self.whole_shape[1:])
        step = max(1, PIECE_BYTES // max(1, decoded_bytes)) * together
        last = first + num_rows
        for start in range(first - first % together, last, step):
            begin, end = max(start, first), min(start + step, last)
            rows = self._read_rows(start, min(-(-end // together) * together, self.whole_shape[0]))
            result[begin - first : end - first] = self._cut(rows[begin - start : end - start])
        return result

    def _read_rows(self, start: int, stop: int) -> Tensor:
        """Reads whole rows; `start` must be a multiple of the number of rows that are decoded together."""
        row_shape = self.whole_shape[1:]
        begin = self.start + self.rows.num_bytes(start, row_shape)
        data = self.file.read_bytes(begin, begin + self.rows.num_bytes(stop - start, row_shape))
        return self.rows.decode(bytearray(data), (stop - start, *row_shape))

    def _cut(self, rows: Tensor) -> Tensor:
        for dim, (start, length) in enumerate(self.parts[1:], 1):
            rows = rows.narrow(dim, start, length)
        return rows
