"""Paged attention on the CPU: compiled (`native.cpp`), or else in numba and torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._native import kernels_by_dtype
from ..tape import empty
from .op import paged_attention

_KERNELS = kernels_by_dtype("paged_attention", "10P 4l 7i 2f i")


@paged_attention.register("cpu")
def paged_attention_cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    window: int = 0,
    *,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    num_decodes: int = 0,
    num_shared: Tensor | None = None,
    deterministic: bool = False,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Runs `paged_attention` in the compiled kernel, or in numba what that kernel does not support.

    The compiled kernel supports causal attention over a cache in the dtype of the query, with every other option.
    """
    is_supported = causal and k_cache.dtype == query.dtype and kv_scales is None
    kernel = _KERNELS.get(query.dtype) if is_supported else None
    if kernel is None:
        paged = (k_cache, v_cache, block_tables, seq_lens, query_start_loc)
        options: dict[str, Any] = {"causal": causal, "softcap": softcap, "sinks": sinks, "alibi_slopes": alibi_slopes}
        options |= {"num_decodes": num_decodes, "num_shared": num_shared, "deterministic": deterministic}
        options["kv_scales"] = kv_scales
        return paged_attention.fallback("paged_attention_numba")(query, *paged, scale, window, **options)
    num_tokens, num_heads, head_dim = query.shape
    num_seqs = len(seq_lens)
    shared = None if window or deterministic else num_shared
    is_decode = num_decodes == num_seqs == num_tokens
    out = empty((num_tokens, num_heads, head_dim), query.dtype)
    kernel(
        num_tokens,
        query.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_tables.data_ptr(),
        seq_lens.data_ptr(),
        query_start_loc.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        0 if shared is None else shared.data_ptr(),
        out.data_ptr(),
        *query.stride()[:2],
        k_cache.stride(0),
        block_tables.stride(0),
        *((-1, -1) if is_decode else (num_seqs, num_decodes)),
        num_heads,
        *k_cache.shape[1:3],
        head_dim,
        window,
        scale,
        softcap,
        not deterministic,
    )
    return out
