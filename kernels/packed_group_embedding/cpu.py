"""Lookup in a table of integers in groups on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import kernels_by_dtype
from ..packed_group_linear.cpu import SCALE_TYPES
from ..tape import empty
from .op import packed_group_embedding

_KERNELS = kernels_by_dtype("packed_group_embedding", "PPPPPiiii")


@packed_group_embedding.register("cpu")
def packed_group_embedding_cpu(
    ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Runs `packed_group_embedding` in the compiled kernel, or its plain body if no kernel can be used here."""
    kernel = _KERNELS.get(dtype)
    if kernel is None:
        return packed_group_embedding.plain(ids, codes, scales, zeros, dtype)
    num_blocks, num_pairs, bits = codes.shape[1], codes.shape[2], codes.shape[3] * 4
    out = empty((len(ids), num_blocks * num_pairs * 2), dtype)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (ids, codes, scales, zeros, out)]
    kernel(len(ids), *addresses, num_blocks, 2 * num_pairs, bits, SCALE_TYPES[scales.dtype])
    return out
