"""Embedding lookup on the CPU: compiled (`native.cpp`), so that a tape can record it, or else the plain body."""

from __future__ import annotations

from torch import Tensor

from .._native import native_kernel
from ..tape import empty
from .op import embedding

_KERNEL = native_kernel("embedding", "PPPl")


@embedding.register("cpu")
def embedding_cpu(ids: Tensor, table: Tensor) -> Tensor:
    """Runs `embedding` in the compiled kernel, or its plain body if the kernel cannot be used here."""
    if _KERNEL is None:
        return embedding.plain(ids, table)
    out = empty((len(ids), table.shape[1]), table.dtype)
    row_bytes = table.shape[1] * table.itemsize
    _KERNEL(len(ids), ids.data_ptr(), table.data_ptr(), out.data_ptr(), row_bytes)
    return out
