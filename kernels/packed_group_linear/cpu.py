"""A linear layer of integers in groups on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import packed_group_linear

_KERNELS = kernels_by_dtype("packed_group_linear", "PPPPPPPliiiiii")
SCALE_TYPES = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})
"""The numbers that stand for the dtypes of scales in the compiled kernels."""
_BLOCK_BYTES = 8
"""The kernel writes the scale and the sum of each block after a row's 16-bit inputs."""


@packed_group_linear.register("cpu")
def packed_group_linear_cpu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs `packed_group_linear` in the compiled kernel, or its plain body if no kernel can be used here."""
    kernel = _KERNELS.get(x.dtype)
    if x.dtype == torch.float16 and _KERNELS:
        start = None if bias is None else bias.float()
        return packed_group_linear_cpu(x.float(), codes, scales, zeros, start, out_features).to(dtype or x.dtype)
    if kernel is None:
        return packed_group_linear.plain(x, codes, scales, zeros, bias, out_features, dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    (num_rows, in_features), num_blocks = x.shape, codes.shape[1]
    dtype = dtype or x.dtype
    num_parts = x.dtype.itemsize // 2  # The kernel rounds a row of float32 to two rows of 16 bits.
    rounded = empty((num_rows, num_parts * (2 * in_features + _BLOCK_BYTES * num_blocks)), torch.int8)
    out = empty((num_rows, out_features), dtype)
    tensors = (x, codes, scales, zeros, bias, rounded, out)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (out_features, num_blocks, in_features // num_blocks, codes.shape[3] * 4)
    kernel(num_rows, *addresses, x.stride(0), *sizes, SCALE_TYPES[scales.dtype], dtype == torch.float32)
    return out
