"""`iter_gguf_tensors`: the tensors of GGUF files, as a checkpoint of Hugging Face has them.

Blocks are dequantised when a part of a tensor is read, some rows at a time. Changes that llama.cpp made are undone.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedModelError
from ..storage import Location
from ..weights.file_tensor import FileTensor
from .architectures import find_architecture
from .header import GgufHeader, GgufTensorInfo, block_type, read_headers

__all__ = ["GgufRows", "iter_gguf_tensors", "log_dequantisation"]


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GgufRows:
    """Rows of blocks.

    Attributes:
        type_name: Name of the type of the blocks, or of single numbers.
        head_rows: Rows of a head whose rotated pairs lie side by side; 0 for a matrix without such heads.
        offset: The number that is added to each number.
    """

    type_name: str
    head_rows: int = 0
    offset: float = 0.0

    @property
    def num_together(self) -> int:
        """Number of rows that can only be decoded together: the rows of a head."""
        return self.head_rows or 1

    def num_bytes(self, num_rows: int, row_shape: Sequence[int]) -> int:
        """Returns the bytes that a number of rows take in the file."""
        _, block_size, block_bytes = block_type(self.type_name)
        return num_rows * math.prod(row_shape) // block_size * block_bytes

    def decode(self, data: bytearray, shape: Sequence[int]) -> Tensor:
        """Returns the numbers of some rows in float32."""
        from gguf.quants import dequantize

        kind, block_size, block_bytes = block_type(self.type_name)
        rows = np.frombuffer(data, np.uint8).reshape(-1, shape[-1] // block_size * block_bytes)
        decoded = torch.from_numpy(np.ascontiguousarray(dequantize(rows, kind), np.float32)).reshape(tuple(shape))
        if self.head_rows:
            decoded = decoded.unflatten(0, (-1, self.head_rows // 2, 2)).transpose(1, 2).flatten(0, 2)
        return decoded + self.offset if self.offset else decoded


def log_dequantisation(header: GgufHeader, dtype: torch.dtype) -> None:
    """Says in one line of log that blocks do not stay blocks, and the memory that their numbers take."""
    types = ", ".join(sorted({tensor.type_name for tensor in header.tensors}))
    stored = sum(tensor.num_bytes for tensor in header.tensors)
    needed = sum(math.prod(tensor.shape) for tensor in header.tensors) * dtype.itemsize
    logger.info(
        "%s: %d tensors (%s) are dequantised to %s as they are read: %.0f MiB in the file, %.0f MiB in memory",
        header.file, len(header.tensors), types, str(dtype).removeprefix("torch."), stored / 2**20, needed / 2**20,
    )  # fmt: skip


def iter_gguf_tensors(files: Sequence[Location]) -> Iterator[tuple[str, FileTensor]]:
    """Yields every (name, tensor) of GGUF files; no numbers are read.

    Args:
        files: The file, or all files of a model that is split; the first one has the metadata.

    Raises:
        CheckpointError: A file is missing or damaged.
        UnsupportedModelError: The architecture, or the type of a tensor, is not implemented.
    """
    header = read_headers(files)
    for info in header.tensors:
        yield info.name, FileTensor.whole(info.file, info.start, info.shape, torch.float32, _rows(header, info))


def _rows(header: GgufHeader, info: GgufTensorInfo) -> GgufRows:
    """Returns how the rows of a tensor are decoded."""
    is_blocks = block_type(info.type_name)[1] > 1
    if not _is_decoded(info.type_name) or (is_blocks and len(info.shape) == 1):
        raise UnsupportedModelError(
            f"{info.file}: {info.name!r:.80} holds {info.type_name}, which the installed gguf does not dequantise"
        )
    architecture = find_architecture(header)
    module, _, leaf = info.name.rpartition(".")
    key = architecture.paired_heads.get(module.rpartition(".")[2])
    if key is None:
        is_offset = architecture.norm_unit_offset and module.endswith("norm") and leaf == "weight"
        return GgufRows(info.type_name, offset=-1.0 if is_offset else 0.0)
    num_heads = header.own(key, header.own("attention.head_count"))
    if info.shape[0] % (2 * num_heads):
        raise CheckpointError(
            f"{info.file}: {info.name} has shape {list(info.shape)}, which {num_heads} heads do not divide"
        )
    return GgufRows(info.type_name, head_rows=info.shape[0] // num_heads)


@functools.cache
def _is_decoded(type_name: str) -> bool:
    """Returns whether the package `gguf` can dequantise a type."""
    from gguf.quants import dequantize

    kind, _, block_bytes = block_type(type_name)
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
