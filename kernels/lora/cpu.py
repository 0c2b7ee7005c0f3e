"""The products of adapters on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import lora

_KERNELS = kernels_by_dtype("lora", "PPPPPPPPPlliiiiii")


@functools.cache
def _as_array(part_ends: tuple[int, ...]) -> np.ndarray:
    """Returns the ends of parts as `[num_parts]` int32, which stay in memory for recorded calls."""
    return np.array(part_ends, dtype=np.int32)


@lora.register("cpu")
def lora_cpu(
    out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Tensor,
    tokens: Tensor,
    starts: Tensor,
    part_ends: tuple[int, ...],
) -> None:
    """Runs `lora` in the compiled kernel, or its plain body where that kernel does not support the call."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None or x.stride(-1) != 1 or out.stride(-1) != 1 or out.dtype not in (x.dtype, torch.float32):
        lora.plain(out, x, lora_a, lora_b, ranks, tokens, starts, part_ends)
        return
    num_slots, num_parts, max_rank, in_features = lora_a.shape
    hidden = empty((max(len(tokens), 1), num_parts * max_rank), torch.float32)
    matrices = (lora_a.contiguous(), lora_b.contiguous(), ranks.contiguous(), tokens.contiguous(), starts.contiguous())
    kernel(
        len(x),
        out.data_ptr(),
        x.data_ptr(),
        *(matrix.data_ptr() for matrix in matrices),
        _as_array(part_ends).ctypes.data,
        hidden.data_ptr(),
        out.stride(0),
        x.stride(0),
        num_slots,
        num_parts,
        max_rank,
        in_features,
        lora_b.shape[2],
        out.dtype == torch.float32,
    )
