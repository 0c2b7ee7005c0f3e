"""A linear layer of 8-bit integers on the CPU: compiled (`native_avx512.cpp`), or else the plain body."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .._native import NativeKernel, kernels_by_dtype
from ..tape import empty
from .layout import UNIT
from .op import int8_linear

_SCALE_BYTES = 4
"""The kernel writes the scale of a row after its 8-bit inputs."""


def _kernels() -> Mapping[torch.dtype, NativeKernel]:
    """Returns the compiled kernel of each dtype; none if the CPU lacks AVX512_VNNI, which the kernels use."""
    if not torch.cpu._is_vnni_supported():
        return MappingProxyType({})
    return kernels_by_dtype("int8_linear", "PPPPPPliii")


_KERNELS = _kernels()


@int8_linear.register("cpu")
def int8_linear_cpu(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs `int8_linear` in the compiled kernel, or its plain body if no kernel can be used here."""
    kernel = _KERNELS.get(x.dtype)
    if kernel is None:
        return int8_linear.plain(x, packed, weight_scale, bias, out_features, dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    num_rows, in_features = x.shape
    dtype = dtype or x.dtype
    quantised = empty((num_rows, in_features + _SCALE_BYTES), torch.int8)
    out = empty((num_rows, out_features), dtype)
    kernel(
        num_rows,
        x.data_ptr(),
        packed.data_ptr(),
        weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        quantised.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        in_features // UNIT,
        out_features,
        dtype == torch.float32,
    )
    return out
