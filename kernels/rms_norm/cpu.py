"""RMSNorm on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import rms_norm

_KERNELS = kernels_by_dtype("rms_norm", "PPPPPllif")


@rms_norm.register("cpu")
def rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, add_unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Runs `rms_norm` in the compiled kernel, or its plain body where that kernel does not support the call."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None or add_unit_offset or x.dim() != 2 or x.stride(1) != 1:
        return rms_norm.plain(x, weight, eps, residual, add_unit_offset=add_unit_offset)
    num_rows, size = x.shape
    out = empty((num_rows, size), x.dtype)
    new_residual = x if residual is None else empty((num_rows, size), x.dtype)
    kernel(
        num_rows,
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        new_residual.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        size,
        eps,
    )
    return out, new_residual
