"""Norm, rotation and the write to the KV cache on the GPU, in Triton: one launch before attention.

    x     = x / sqrt(mean(x²) + eps) · weight         for each query and key head, if weights are given
    query = rotate(query),   k_cache[slot] = rotate(key),   v_cache[slot] = value    each divided by its scale, if given

Grid: (tokens, groups of query heads, then groups of KV heads). A program owns heads of one token with about 1,024
numbers. It reads them once, and writes queries back in place, or keys and values to their slot. A head is held as the
first numbers of its rotated pairs, the second ones and the rest, so that a rotation moves no number between threads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .._fp8 import divide_by_scales, e4m3_storage, e4m3_type, narrow
from .._heads import check_cache, head_options, heads_per_program, slot_offset
from .._triton import MAX_PLANS, Launch, Layout, Specialisation, Target, current_target, varying
from .op import rope_and_store


@rope_and_store.register("cuda")
def rope_and_store_triton(
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
    """Runs `rope_and_store` in one kernel.

    Raises:
        ValueError: One weight is given without the other, scales are given for a 16-bit cache, or the shapes do not
            match.
    """
    target = current_target()
    layouts = tuple(Layout.of(tensor) for tensor in (query, key, value, k_cache, v_cache))
    has = (q_weight is not None, k_weight is not None, kv_scales is not None)
    launch = _plan(layouts, cos_sin.shape[1], has, interleaved, eps, target)
    if len(query):
        caches = e4m3_storage(k_cache, target), e4m3_storage(v_cache, target)
        scales = cos_sin if kv_scales is None else kv_scales  # a pointer of the right type, not read
        launch.run(query, key, value, *caches, slot_mapping, positions, cos_sin, scales, q_weight, k_weight)


@functools.lru_cache(MAX_PLANS)
def _plan(
    layouts: tuple[Layout, ...],
    rot_dim: int,
    has: tuple[bool, bool, bool],
    interleaved: bool,
    eps: float,
    target: Target,
) -> Launch:
    query, key, value, k_cache, v_cache = layouts
    has_q_weight, has_k_weight, has_scales = has
    if has_q_weight != has_k_weight:
        raise ValueError("rope_and_store: one of q_weight and k_weight is None; give both or neither")
    check_cache("rope_and_store", key, k_cache, v_cache, has_scales)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, tile = key.shape[1], _tile(head_dim, rot_dim)
    num_query_groups = triton.cdiv(num_heads, tile["HEADS"])
    strides = (*query.strides[:2], *key.strides[:2], *value.strides[:2], *k_cache.strides[:3])
    sizes = (k_cache.shape[2], num_heads, num_kv_heads, num_query_groups, head_dim, rot_dim // 2, int(has_scales))
    grid = (num_tokens, num_query_groups + triton.cdiv(num_kv_heads, tile["HEADS"]))
    options = {**tile, "INTERLEAVED": interleaved, **head_options(target)}
    return Launch(rope_and_store_kernel, grid, (*strides, *sizes, eps), options)


def _tile(head_dim: int, rot_dim: int) -> dict[str, int]:
    """Returns the tile of a program: heads, half of the rotated part, the rest (at least 1), and the whole head."""
    return {
        "HEADS": heads_per_program(head_dim),
        "HALF": triton.next_power_of_2(max(1, rot_dim // 2)),
        "REST": triton.next_power_of_2(max(1, head_dim - rot_dim)),
        "BLOCK": triton.next_power_of_2(head_dim),
    }


_STRIDES = (
    *("query_stride", "query_head", "key_stride", "key_head", "value_stride", "value_head"),
    *("block_stride", "head_stride", "slot_stride"),
)
_WEIGHTS = ("q_weight_ptr", "k_weight_ptr")
_SIZES = ("block_size", "num_heads", "num_kv_heads", "num_query_groups", "head_dim", "half", "has_scales")


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target: heads of up to 512 numbers, rotated wholly or in part."""
    largest = {**_tile(512, 512), "REST": 512}  # no head is that large in both parts
    tiles = (_tile(1, 0), _tile(128, 128), largest)
    for dtype in ("fp32", "fp16", "bf16"):
        caches = (dtype, e4m3_type(target))
        # Weights of the model, of a norm by `1 + weight` (whose models rotate halves), and none.
        forms = dict.fromkeys(((dtype, False), (dtype, True), ("fp32", False), (None, False), (None, True)))
        for cache, (weight, interleaved), tile in itertools.product(caches, forms, tiles):
            types = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), f"*{dtype}")
            types |= dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), f"*{cache}")
            types |= {"cos_sin_ptr": "*fp32", "scales_ptr": "*fp32"}
            types |= {"slot_ptr": "*i64", "positions_ptr": "*i64", "eps": "fp32"}
            types |= dict.fromkeys((*_STRIDES, *_SIZES), "i32")
            types |= dict.fromkeys(_WEIGHTS, f"*{weight}") if weight else {}
            constants = {**({} if weight else dict.fromkeys(_WEIGHTS)), **tile, "INTERLEAVED": interleaved}
            aligned = (*_STRIDES, "block_size", "head_dim", "half")
            yield Specialisation(rope_and_store_kernel, types, constants, head_options(target), aligned)


_VARYING_SIZES = ("num_heads", "num_kv_heads", "num_query_groups", "has_scales")


@triton.jit(**varying(_VARYING_SIZES, ["slot_ptr", "positions_ptr", "scales_ptr"]))
def rope_and_store_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    positions_ptr,
    cos_sin_ptr,
    scales_ptr,
    q_weight_ptr,
    k_weight_ptr,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    block_stride,
    head_stride,
    slot_stride,
    block_size,
    num_heads,
    num_kv_heads,
    num_query_groups,
    head_dim,
    half,
    has_scales,
    eps,
    HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    INTERLEAVED: tl.constexpr,  # noqa: N803
):
    """Rotates HEADS query heads in place, or stores HEADS key and value heads in the cache, for token `program_id(0)`.

    `query_head`, `key_head` and `value_head` are the strides between the heads of a token.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    table_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * half)
    if group < num_query_groups:
        head = group * HEADS + tl.arange(0, HEADS)[:, None]
        head_ptr = query_ptr + token * query_stride + head * query_head
        is_head = head < num_heads
        _norm_and_rotate(
            head_ptr, head_ptr, is_head, q_weight_ptr, table_ptr, scales_ptr, is_head, head_dim, half, eps,
            HALF, REST, INTERLEAVED,
        )  # fmt: skip
    else:
        head = (group - num_query_groups) * HEADS + tl.arange(0, HEADS)[:, None]
        head_ptr = key_ptr + token * key_stride + head * key_head
        slot = tl.load(slot_ptr + token)
        to = slot_offset(slot, block_stride, slot_stride, block_size) + head * head_stride
        is_head = head < tl.where(slot >= 0, num_kv_heads, 0)
        is_scaled = head < tl.where(slot >= 0, num_kv_heads * has_scales, 0)
        _norm_and_rotate(
            head_ptr, k_cache_ptr + to, is_head, k_weight_ptr, table_ptr, scales_ptr + head, is_scaled, head_dim, half,
            eps, HALF, REST, INTERLEAVED,
        )  # fmt: skip
        head_ptr = value_ptr + token * value_stride + head * value_head
        _copy(head_ptr, v_cache_ptr + to, is_head, scales_ptr + num_kv_heads + head, is_scaled, head_dim, BLOCK)


@triton.jit
def _copy(from_ptr, to_ptr, is_head, scales_ptr, is_scaled, head_dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Copies HEADS heads of `head_dim` elements, and rounds them to the element type of `to_ptr`.

    `from_ptr` and `to_ptr` are `[HEADS, 1]` pointers to the first elements of the heads. Heads for which `is_head` is
    false are neither read nor written. If the element type of `to_ptr` is e4m3, heads for which `is_scaled` is true are
    first divided by their scales, which are at `scales_ptr`, `[HEADS, 1]` too.
    """
    column = tl.arange(0, BLOCK)[None, :]
    inside = is_head & (column < head_dim)
    x = tl.load(from_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = to_ptr.dtype.element_ty
    tl.store(to_ptr + column, narrow(divide_by_scales(x, scales_ptr, is_scaled, dtype), dtype), mask=inside)


@triton.jit
def _load_pairs(from_ptr, mask, half, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Returns the first and the second numbers of the rotated pairs at `from_ptr` in float32, HALF columns each."""
    if INTERLEAVED:
        neighbour = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(from_ptr + neighbour, mask=mask & (neighbour < 2 * half), other=0.0).to(tl.float32)
        return both.reshape(both.shape[0], HALF, 2).split()
    column = tl.arange(0, HALF)[None, :]
    first = tl.load(from_ptr + column, mask=mask & (column < half), other=0.0).to(tl.float32)
    second = tl.load(from_ptr + half + column, mask=mask & (column < half), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _norm_and_rotate(  # type: ignore[no-untyped-def]
    from_ptr,
    to_ptr,
    is_head,
    weight_ptr,
    table_ptr,
    scales_ptr,
    is_scaled,
    head_dim,
    half,
    eps,
    HALF: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    INTERLEAVED: tl.constexpr,  # noqa: N803
):
    """Normalises and rotates HEADS heads at `from_ptr` and writes them to `to_ptr`; see `_copy` for these pointers."""
    column = tl.arange(0, HALF)[None, :]
    rest_column = 2 * half + tl.arange(0, REST)[None, :]
    kept = is_head & (rest_column < head_dim)
    first, second = _load_pairs(from_ptr, is_head, half, HALF, INTERLEAVED)
    rest = tl.load(from_ptr + rest_column, mask=kept, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        squares += tl.sum(rest * rest, axis=1, keep_dims=True)
        scale = tl.rsqrt(squares / head_dim + eps)
        first_weight, second_weight = _load_pairs(weight_ptr, True, half, HALF, INTERLEAVED)
        first *= scale * first_weight
        second *= scale * second_weight
        rest *= scale * tl.load(weight_ptr + rest_column, mask=rest_column < head_dim, other=0.0).to(tl.float32)
    cos = tl.load(table_ptr + column, mask=column < half, other=0.0)
    sin = tl.load(table_ptr + half + column, mask=column < half, other=0.0)
    dtype: tl.constexpr = to_ptr.dtype.element_ty
    turned_first = divide_by_scales(first * cos - second * sin, scales_ptr, is_scaled, dtype)
    turned_second = divide_by_scales(second * cos + first * sin, scales_ptr, is_scaled, dtype)
    if INTERLEAVED:
        both = tl.join(turned_first, turned_second).reshape(turned_first.shape[0], 2 * HALF)
        neighbour = tl.arange(0, 2 * HALF)[None, :]
        tl.store(to_ptr + neighbour, narrow(both, dtype), mask=is_head & (neighbour < 2 * half))
    else:
        turned = is_head & (column < half)
        tl.store(to_ptr + column, narrow(turned_first, dtype), mask=turned)
        tl.store(to_ptr + half + column, narrow(turned_second, dtype), mask=turned)
    tl.store(to_ptr + rest_column, narrow(divide_by_scales(rest, scales_ptr, is_scaled, dtype), dtype), mask=kept)
