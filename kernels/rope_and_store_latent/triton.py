"""Norm of a latent, rotation by position, and the write to the cache of latents on the GPU, in Triton: one launch.

    query       = rotate(query)
    cache[slot] = (l[:rank] / sqrt(mean(l[:rank]²) + eps) · weight,   rotate(l[rank:]))    for each latent l

Grid: (tokens, groups of query heads, then the latent). A program rotates the last parts of about 1,024 numbers of
queries in place, or writes the latent of a token to its slot. The numbers of a rotated pair are read `gap` apart, and
pairs `step` apart, so that one compiled form serves halves and interleaved pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .._heads import head_options, heads_per_program, slot_offset
from .._triton import MAX_PLANS, Launch, Layout, Specialisation, Target, current_target, varying
from .op import rope_and_store_latent


@rope_and_store_latent.register("cuda")
def rope_and_store_latent_triton(
    query: Tensor,
    latent: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor,
    eps: float,
    *,
    interleaved: bool,
) -> None:
    """Runs `rope_and_store_latent` in one kernel.

    Raises:
        ValueError: The shapes or strides of queries, latents and cache do not match.
    """
    layouts = Layout.of(query), Layout.of(latent), Layout.of(cache)
    launch = _plan(layouts, len(weight), eps, interleaved, current_target())
    if len(query):
        launch.run(query, latent, cache, slot_mapping, positions, cos_sin, weight)


@functools.lru_cache(MAX_PLANS)
def _plan(layouts: tuple[Layout, Layout, Layout], rank: int, eps: float, interleaved: bool, target: Target) -> Launch:
    query, latent, cache = layouts
    num_tokens, num_heads, rope_dim = query.shape
    is_stored_whole = cache.shape[1] == 1 and cache.shape[3] == rank + rope_dim == latent.shape[1]
    if not is_stored_whole or {query.strides[2], latent.strides[1], cache.strides[3]} != {1}:
        raise ValueError(
            f"rope_and_store_latent: queries are {list(query.shape)}, latents {list(latent.shape)} and the cache "
            f"{list(cache.shape)}; a latent of {rank} + {rope_dim} numbers needs a cache of one head of that size, and "
            "rows must be contiguous"
        )
    tile = _tile(rank, rope_dim)
    num_groups = triton.cdiv(num_heads, tile["HEADS"])
    strides = (*query.strides[:2], latent.strides[0], cache.strides[0], cache.strides[2])
    pairs = (2, 1) if interleaved else (1, rope_dim // 2)
    sizes = (cache.shape[2], num_heads, num_groups, rank, rope_dim // 2, *pairs)
    options = {**tile, **head_options(target)}
    return Launch(rope_and_store_latent_kernel, (num_tokens, num_groups + 1), (*strides, *sizes, eps), options)


def _tile(rank: int, rope_dim: int) -> dict[str, int]:
    """Returns the tile of a program: heads, half of the rotated part, and the compressed part of a latent."""
    half = triton.next_power_of_2(max(1, rope_dim // 2))
    return {"HEADS": heads_per_program(2 * half), "HALF": half, "RANK": triton.next_power_of_2(rank)}


_STRIDES = ("query_stride", "query_head", "latent_stride", "block_stride", "slot_stride")
_SIZES = ("block_size", "num_heads", "num_groups", "rank", "half", "step", "gap")


def specialisations(target: Target) -> Iterator[Specialisation]:
    """Yields the specialisations of the kernel for a target: latents of up to 512 + 64 numbers."""
    for dtype in ("fp32", "fp16", "bf16"):
        for rank, rope_dim in ((1, 2), (512, 64)):
            types = dict.fromkeys(("query_ptr", "latent_ptr", "cache_ptr", "weight_ptr"), f"*{dtype}")
            types |= {"slot_ptr": "*i64", "positions_ptr": "*i64", "cos_sin_ptr": "*fp32", "eps": "fp32"}
            types |= dict.fromkeys((*_STRIDES, *_SIZES), "i32")
            aligned = (*_STRIDES, "block_size", "rank", "half")
            tile, options = _tile(rank, rope_dim), head_options(target)
            yield Specialisation(rope_and_store_latent_kernel, types, tile, options, aligned)


@triton.jit(**varying(["num_heads", "num_groups", "step", "gap"], ["slot_ptr", "positions_ptr"]))
def rope_and_store_latent_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    latent_ptr,
    cache_ptr,
    slot_ptr,
    positions_ptr,
    cos_sin_ptr,
    weight_ptr,
    query_stride,
    query_head,
    latent_stride,
    block_stride,
    slot_stride,
    block_size,
    num_heads,
    num_groups,
    rank,
    half,
    step,
    gap,
    eps,
    HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    RANK: tl.constexpr,  # noqa: N803
):
    """Rotates HEADS query heads in place, or stores the latent, for token `program_id(0)`."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    table_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * half)
    if group < num_groups:
        head = group * HEADS + tl.arange(0, HEADS)[:, None]
        head_ptr = query_ptr + token * query_stride + head * query_head
        _rotate(head_ptr, head_ptr, head < num_heads, table_ptr, half, step, gap, HALF)
    else:
        slot = tl.load(slot_ptr + token)
        from_ptr = latent_ptr + token * latent_stride
        to_ptr = cache_ptr + slot_offset(slot, block_stride, slot_stride, block_size)
        column = tl.arange(0, RANK)
        inside = column < tl.where(slot >= 0, rank, 0)
        x = tl.load(from_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / rank + eps)
        x *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_ptr + column, x.to(cache_ptr.dtype.element_ty), mask=inside)
        row = tl.arange(0, 1)[:, None]
        is_row = row < tl.where(slot >= 0, 1, 0)
        _rotate(from_ptr + rank + row, to_ptr + rank + row, is_row, table_ptr, half, step, gap, HALF)


@triton.jit
def _rotate(from_ptr, to_ptr, is_row, table_ptr, half, step, gap, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Rotates the rows at `from_ptr`, `[rows, 1]` pointers, and writes them to `to_ptr`, where `is_row` is true."""
    pair = tl.arange(0, HALF)[None, :]
    mask = is_row & (pair < half)
    first = tl.load(from_ptr + pair * step, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(from_ptr + pair * step + gap, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(table_ptr + pair, mask=pair < half, other=0.0)
    sin = tl.load(table_ptr + half + pair, mask=pair < half, other=0.0)
    dtype: tl.constexpr = to_ptr.dtype.element_ty
    tl.store(to_ptr + pair * step, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(to_ptr + pair * step + gap, (second * cos + first * sin).to(dtype), mask=mask)
