"""LayerNorm on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import layer_norm

_KERNELS = kernels_by_dtype("layer_norm", "6P 2l if")


@layer_norm.register("cpu")
def layer_norm_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs `layer_norm` in the compiled kernel, or its plain body where that kernel does not support the call."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None or x.dim() != 2 or x.stride(1) != 1:
        return layer_norm.plain(x, weight, bias, eps, residual)
    num_rows, size = x.shape
    out = empty((num_rows, size), x.dtype)
    new_residual = x if residual is None else empty((num_rows, size), x.dtype)
    kernel(
        num_rows,
        x.data_ptr(),
        *(0 if part is None else part.data_ptr() for part in (residual, weight, bias)),
        out.data_ptr(),
        new_residual.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        size,
        eps,
    )
    return out, new_residual
