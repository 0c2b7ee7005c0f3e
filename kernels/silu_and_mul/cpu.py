"""The gate of a feed-forward layer on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import silu_and_mul

_KERNELS = kernels_by_dtype("silu_and_mul", "PPli")


@silu_and_mul.register("cpu")
def silu_and_mul_cpu(x: Tensor) -> Tensor:
    """Runs `silu_and_mul` in the compiled kernel, or its plain body where that kernel does not support the call."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None or x.dim() != 2 or x.stride(1) != 1:
        return silu_and_mul.plain(x)
    num_rows, size = x.shape[0], x.shape[1] // 2
    out = empty((num_rows, size), x.dtype)
    kernel(num_rows, x.data_ptr(), out.data_ptr(), x.stride(0), size)
    return out
