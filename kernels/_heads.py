"""Helpers of the Triton kernels over heads: the number of heads of a program, and the address of a cache slot."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._triton import Layout, Target

_TILE = 1024
_MAX_HEADS = 32
_NUM_THREADS = 64


def heads_per_program(head_dim: int) -> int:
    """Returns the number of heads, a power of two up to 32, that hold about 1,024 numbers: 8 heads of 128, say."""
    return max(1, min(_MAX_HEADS, _TILE // triton.next_power_of_2(head_dim)))


def head_options(target: Target) -> dict[str, Any]:
    """Returns the options to compile and launch a program of about 1,024 numbers, 16 per thread."""
    return {"num_warps": _NUM_THREADS // target.warp_size, "enable_fp_fusion": True}


def check_cache(op: str, key: Layout, k_cache: Layout, v_cache: Layout, has_scales: bool) -> None:
    """Checks that the shapes and strides of keys and caches fit each other. `op` is the name in the message.

    Raises:
        ValueError: Heads are not contiguous, the caches differ in layout, their heads are not those of the keys, or
            there are scales for a cache that is not in 8 bits.
    """
    if has_scales and k_cache.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{op}: kv_scales are given for a cache in {k_cache.dtype}; only float8_e4m3fn has scales")
    same = k_cache == v_cache
    fits = (k_cache.shape[1], k_cache.shape[3]) == tuple(key.shape[1:])
    if not same or not fits or k_cache.strides[3] != 1 or key.strides[2] != 1:
        raise ValueError(
            f"{op}: keys are {list(key.shape)} with strides {key.strides}, the caches {list(k_cache.shape)} with "
            f"strides {k_cache.strides} and {list(v_cache.shape)} with strides {v_cache.strides}; both caches must "
            f"be [num_blocks, {key.shape[1]}, block_size, {key.shape[2]}] with the same strides, and heads contiguous"
        )


@triton.jit
def slot_offset(slot, block_stride, slot_stride, block_size):  # type: ignore[no-untyped-def]
    """Returns the offset of a slot of KV head 0 from the start of the cache, in elements."""
    slot = slot.to(tl.int64)
    return slot // block_size * block_stride + slot % block_size * slot_stride
