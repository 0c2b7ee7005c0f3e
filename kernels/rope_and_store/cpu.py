"""Norm, rotation and the write to the KV cache on the CPU: compiled (`native.cpp`), or else in numba."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._native import kernels_by_dtype
from .op import rope_and_store

_KERNELS = kernels_by_dtype("rope_and_store", "10P 12l 5i f")
_MAX_HEAD_DIM = 1024
"""The largest head that fits the buffer of the compiled kernel."""


@rope_and_store.register("cpu")
def rope_and_store_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    kv_scales: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Runs `rope_and_store` in the compiled kernel, or in numba where that kernel does not support the call.

    Raises:
        ValueError: One weight is given without the other, or heads or rows of `cos_sin` are not contiguous.
    """
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rope_and_store: one of q_weight and k_weight is None; give both or neither")
    tensors = (query, key, value, k_cache, v_cache)
    if any(tensor.stride(-1) != 1 for tensor in tensors) or cos_sin.stride(-1) != 1:
        raise ValueError("rope_and_store: the last stride of a tensor is not 1; heads and the table must be contiguous")
    num_tokens, num_heads, head_dim = query.shape
    if not num_tokens:
        return
    is_supported = k_cache.dtype == query.dtype and head_dim <= _MAX_HEAD_DIM and kv_scales is None
    is_supported &= not interleaved and (q_weight is None or q_weight.dtype == query.dtype)
    kernel = _KERNELS.get(query.dtype) if is_supported else None
    if kernel is None:
        run = rope_and_store.fallback("rope_and_store_numba")
        options: dict[str, Any] = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps, "kv_scales": kv_scales}
        run(*tensors, slot_mapping, positions, cos_sin, **options, interleaved=interleaved)
        return
    kernel(
        num_tokens,
        *(tensor.data_ptr() for tensor in (*tensors, slot_mapping, positions, cos_sin)),
        0 if q_weight is None else q_weight.data_ptr(),
        0 if k_weight is None else k_weight.data_ptr(),
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        num_heads,
        key.shape[1],
        k_cache.shape[2],
        head_dim,
        cos_sin.shape[1],
        eps,
    )
