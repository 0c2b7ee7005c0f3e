"""The gate of a GeGLU feed-forward layer on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import gelu_and_mul

_KERNELS = kernels_by_dtype("gelu_and_mul", "2P l 2i")


@gelu_and_mul.register("cpu")
def gelu_and_mul_cpu(x: Tensor, approximate: str) -> Tensor:
    """Runs `gelu_and_mul` in the compiled kernel, or its plain body where that kernel does not support the call."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None or x.dim() != 2 or x.stride(1) != 1:
        return gelu_and_mul.plain(x, approximate)
    num_rows, size = x.shape[0], x.shape[1] // 2
    out = empty((num_rows, size), x.dtype)
    kernel(num_rows, x.data_ptr(), out.data_ptr(), x.stride(0), size, approximate == "tanh")
    return out
