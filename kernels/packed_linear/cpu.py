"""A linear layer over a packed weight on the CPU: compiled (`native_avx512.cpp`), or else the plain body."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .layout import unit_size
from .op import ACTIVATIONS, packed_linear

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}  # as `Activation` has them in activation.h
_KERNELS = kernels_by_dtype("packed_linear", "PPPPlliiii")


@packed_linear.register("cpu")
def packed_linear_cpu(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype | None = None,
    *,
    activation: str = "",
) -> Tensor:
    """Runs `packed_linear` in the compiled kernel, or its plain body if no kernel can be used here."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None:
        return packed_linear.plain(x, packed, bias, out_features, dtype, activation=activation)
    size = unit_size(x.dtype)
    if x.stride(1) != 1 or x.stride(0) % size:
        x = x.contiguous()
    dtype = dtype or x.dtype
    out = empty((len(x), out_features), dtype)
    kernel(
        len(x),
        x.data_ptr(),
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.stride(0) // size,
        out_features,
        packed.shape[1],
        out_features,
        dtype == torch.float32,
        _NUMBERS[activation],
    )
    return out
