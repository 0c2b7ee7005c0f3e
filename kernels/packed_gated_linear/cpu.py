"""The first half of a SwiGLU network on the CPU: compiled (`native_avx512.cpp`), or else the plain body."""

from __future__ import annotations

from torch import Tensor

from .._native import kernels_by_dtype
from ..packed_linear.layout import PANEL, unit_size
from ..tape import empty
from .op import packed_gated_linear

_KERNELS = kernels_by_dtype("packed_gated_linear", "PPPliii")


@packed_gated_linear.register("cpu")
def packed_gated_linear_cpu(x: Tensor, packed: Tensor, *, activates: bool = True) -> Tensor:
    """Runs `packed_gated_linear` in the compiled kernel, or its plain body if no kernel can be used here."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None:
        return packed_gated_linear.plain(x, packed, activates=activates)
    unit = unit_size(x.dtype)
    if x.stride(1) != 1 or x.stride(0) % unit:
        x = x.contiguous()
    num_columns = len(packed) * PANEL
    out = empty((len(x), num_columns // 2 if activates else num_columns), x.dtype)
    addresses = (x.data_ptr(), packed.data_ptr(), out.data_ptr())
    kernel(len(x), *addresses, x.stride(0) // unit, packed.shape[1], num_columns, activates)
    return out
