"""Writing new keys and values into the KV cache on the GPU, in Triton.

    k_cache[slot // block_size, :, slot % block_size] = key / kv_scales[0],   values by kv_scales[1]

Grid: (tokens, groups of KV heads). A program copies heads with about 1,024 numbers of keys, and as many of values. For
padding it reads the slot only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._fp8 import divide_by_scales, e4m3_storage, e4m3_type, narrow
from .._heads import check_cache, head_options, heads_per_program, slot_offset
from .._triton import MAX_PLANS, Launch, Layout, Specialisation, Target, current_target, varying
from .op import store_kv


@store_kv.register("cuda")
def store_kv_triton(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    kv_scales: Tensor | None = None,
) -> None:
    """Runs `store_kv` in one kernel.

    Raises:
        ValueError: The shapes or strides of keys and caches do not match, or scales are given for a 16-bit cache.
    """
    target = current_target()
    layouts = tuple(Layout.of(tensor) for tensor in (key, value, k_cache, v_cache))
    launch = _plan(layouts, kv_scales is not None, target)
    if len(key):
        caches = e4m3_storage(k_cache, target), e4m3_storage(v_cache, target)
        scales = slot_mapping.view(torch.float32) if kv_scales is None else kv_scales  # a pointer of the right type
        launch.run(key, value, *caches, slot_mapping, scales)


@functools.lru_cache(MAX_PLANS)
def _plan(layouts: tuple[Layout, ...], has_scales: bool, target: Target) -> Launch:
    key, value, k_cache, v_cache = layouts
    check_cache("store_kv", key, k_cache, v_cache, has_scales)
    num_tokens, num_kv_heads, head_dim = key.shape
    heads = heads_per_program(head_dim)
    strides = (*key.strides[:2], *value.strides[:2], *k_cache.strides[:3])
    options = {"HEADS": heads, "BLOCK": triton.next_power_of_2(head_dim), **head_options(target)}
    grid = (num_tokens, triton.cdiv(num_kv_heads, heads))
    sizes = (num_kv_heads, k_cache.shape[2], head_dim, int(has_scales))
    return Launch(store_kv_kernel, grid, (*strides, *sizes), options)


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target: heads from one number to 1,024."""
    strides = ("key_stride", "key_head", "value_stride", "value_head", "block_stride", "head_stride", "slot_stride")
    for dtype in ("fp32", "fp16", "bf16"):
        for cache in (dtype, e4m3_type(target)):
            for head_dim in (1, 128, 1024):
                types = {"key_ptr": f"*{dtype}", "value_ptr": f"*{dtype}", "slot_ptr": "*i64"}
                types |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), f"*{cache}")
                types |= {"scales_ptr": "*fp32"}
                types |= dict.fromkeys((*strides, "num_kv_heads", "block_size", "head_dim", "has_scales"), "i32")
                constants = {"HEADS": heads_per_program(head_dim), "BLOCK": head_dim}
                aligned = (*strides, "block_size", "head_dim")
                yield Specialisation(store_kv_kernel, types, constants, head_options(target), aligned)


@triton.jit(**varying(["num_kv_heads", "has_scales"], ["slot_ptr", "scales_ptr"]))
def store_kv_kernel(  # type: ignore[no-untyped-def]
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    scales_ptr,
    key_stride,
    key_head,
    value_stride,
    value_head,
    block_stride,
    head_stride,
    slot_stride,
    num_kv_heads,
    block_size,
    head_dim,
    has_scales,
    HEADS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Stores HEADS heads of token `program_id(0)`. `key_head` and `value_head` are strides between heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_head = head < tl.where(slot >= 0, num_kv_heads, 0)
    is_scaled = head < tl.where(slot >= 0, num_kv_heads * has_scales, 0)
    inside = is_head & (column < head_dim)
    key = tl.load(key_ptr + token * key_stride + head * key_head + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + token * value_stride + head * value_head + column, mask=inside, other=0.0)
    dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
    key = divide_by_scales(key, scales_ptr + head, is_scaled, dtype)
    value = divide_by_scales(value.to(tl.float32), scales_ptr + num_kv_heads + head, is_scaled, dtype)
    to = slot_offset(slot, block_stride, slot_stride, block_size) + head * head_stride + column
    tl.store(k_cache_ptr + to, narrow(key, dtype), mask=inside)
    tl.store(v_cache_ptr + to, narrow(value, dtype), mask=inside)
