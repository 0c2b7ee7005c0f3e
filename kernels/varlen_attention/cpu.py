"""Attention of encoders on the CPU: compiled (`native.cpp`), or else the plain body."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import varlen_attention

_KERNELS = kernels_by_dtype("varlen_attention", "6P 6l 6i 2f")


@varlen_attention.register("cpu")
def varlen_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    *,
    softcap: float = 0.0,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """Runs `varlen_attention` in the compiled kernel, in float32 for float16; without that kernel, its plain body."""
    kernel = _KERNELS.get(torch.float32 if query.dtype == torch.float16 else query.dtype)
    if kernel is None:
        rest = (query_start_loc, max_seq_len, scale, window)
        return varlen_attention.plain(query, key, value, *rest, softcap=softcap, distance_bias=distance_bias)
    parts = [part.float() if part.dtype == torch.float16 else part for part in (query, key, value)]
    out = empty(tuple(query.shape), parts[0].dtype)
    kernel(
        len(query),
        *(part.data_ptr() for part in parts),
        query_start_loc.data_ptr(),
        0 if distance_bias is None else distance_bias.data_ptr(),
        out.data_ptr(),
        *(stride for part in parts for stride in part.stride()[:2]),
        len(query_start_loc) - 1,
        query.shape[1],
        *key.shape[1:],
        window,
        0 if distance_bias is None else distance_bias.shape[1] // 2,
        scale,
        softcap,
    )
    return out.to(query.dtype)
