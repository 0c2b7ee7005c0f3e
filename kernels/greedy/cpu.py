"""The most likely token on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import native_kernel
from .op import greedy

_KERNEL = native_kernel("greedy", "PPli")


@greedy.register("cpu")
def greedy_cpu(logits: Tensor) -> Tensor:
    """Runs `greedy` in the compiled kernel, or its plain body where that kernel does not support the call."""
    if _KERNEL is None or logits.stride(1) != 1:
        return greedy.plain(logits)
    num_rows, vocab_size = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int64)
    _KERNEL(num_rows, logits.data_ptr(), ids.data_ptr(), logits.stride(0), vocab_size)
    return ids
