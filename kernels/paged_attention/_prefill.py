"""Attention for any number of queries per sequence: prompts, chunks of them, and decodes among them.

A tile is BLOCK_M // group queries of one sequence times the heads of one KV head. Grid: (tiles, KV heads). The host
does not know the lengths, so it launches the largest possible number of tiles, and each program searches its sequence.
Sequence b owns the tiles from `query_start_loc[b] // queries_per_tile + b` on: as many as it needs, or one more.
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import varying
from ._tile import (
    SIZES,
    attend,
    heads_of_tile,
    load_queries,
    load_scale,
    load_slopes,
    normalised,
    see_sinks,
    start_rows,
    store_rows,
)


@triton.jit(**varying([*SIZES, "first_seq", "num_seqs", "has_sinks", "deterministic"]))
def prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, tables_ptr, seq_lens_ptr, starts_ptr, sinks_ptr, slopes_ptr, scales_ptr, out_ptr,
    q_stride, block_stride, table_stride, num_heads, group, first_seq, num_seqs, window, score_scale, cap,
    has_sinks, has_slopes, has_scales, deterministic,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDITED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Attends from one tile of queries to their keys, for the sequences from `first_seq` on.

    Axis 0 of the grid is the tile of queries and axis 1 the tile of query heads. The last tiles of all sequences start
    first, because tiles at the end of a sequence see the most keys.

    Args (those that are not arguments of `paged_attention`):
        deterministic: 1 to mask every tile of keys, so that a row has the same bits in any batch.
        EDITED: Whether scores are edited before the softmax, by a softcap or by the slopes of ALiBi.
        CAUSAL: Whether a query sees only keys up to its own position; otherwise also later keys of its window.
    """
    kv_head, first_head, tile_heads = heads_of_tile(group, BLOCK_M)
    width = tl.minimum(group, BLOCK_M)
    seq, tile = find_tile(starts_ptr, tl.num_programs(0) - 1 - tl.program_id(0), first_seq, num_seqs, BLOCK_M // width)
    start = tl.load(starts_ptr + seq)
    num_queries = tl.load(starts_ptr + seq + 1) - start
    first_query = tile * (BLOCK_M // width)
    if first_query >= num_queries:
        return
    rows = tl.arange(0, BLOCK_M)
    queries, heads = first_query + rows // width, first_head + rows % width
    last_query = tl.minimum(first_query + BLOCK_M // width, num_queries) - 1
    valid = (queries <= last_query) & (rows % width < tile_heads)
    context = tl.load(seq_lens_ptr + seq) - num_queries
    positions = tl.where(valid, context + queries, -1)

    first_read = tl.maximum(context + first_query - window + 1, 0)
    first = first_read // BLOCK_N * BLOCK_N
    if CAUSAL:
        seen_by_all, end = context + first_query + 1, context + last_query + 1
    else:  # min(position + window, seq_len) for the first and the last query, in a form that cannot overflow
        seen_by_all = context + num_queries - tl.maximum(num_queries - first_query - window, 0)
        end = context + num_queries - tl.maximum(num_queries - last_query - window, 0)
    sees_all = (context + last_query - window < first) & (deterministic == 0)
    whole = tl.where(sees_all, tl.maximum(seen_by_all // BLOCK_N * BLOCK_N, first), first)

    q = load_queries(q_ptr, k_ptr, start + queries, heads, valid, q_stride, HEAD_DIM, BLOCK_D)
    row_max, row_sum, acc = start_rows(heads, BLOCK_D)
    row_max, row_sum = see_sinks(row_max, row_sum, sinks_ptr, heads, valid & (rows % width < tile_heads * has_sinks))
    slopes = load_slopes(slopes_ptr, heads, rows % width < tile_heads * has_slopes, EDITED)
    score_scale *= load_scale(scales_ptr, k_ptr, kv_head, has_scales)
    k_ptr += kv_head * BLOCK_SIZE * HEAD_DIM
    v_ptr += kv_head * BLOCK_SIZE * HEAD_DIM
    tables_ptr += seq.to(tl.int64) * table_stride
    row_max, row_sum, acc = attend(
        q, row_max, row_sum, acc, positions, slopes, first, whole, first_read, window, k_ptr, v_ptr, tables_ptr,
        block_stride, score_scale, cap, BLOCK_SIZE, HEAD_DIM, BLOCK_N, EDITED, CAUSAL, MASKED=False,
    )  # fmt: skip
    row_max, row_sum, acc = attend(
        q, row_max, row_sum, acc, positions, slopes, whole, end, first_read, window, k_ptr, v_ptr, tables_ptr,
        block_stride, score_scale, cap, BLOCK_SIZE, HEAD_DIM, BLOCK_N, EDITED, CAUSAL, MASKED=True,
    )  # fmt: skip
    acc *= load_scale(scales_ptr, k_ptr, num_heads // group + kv_head, has_scales)
    out_rows = (start + queries).to(tl.int64) * num_heads + heads
    store_rows(out_ptr, normalised(acc, row_sum), out_rows, valid, HEAD_DIM)


@triton.jit
def find_tile(starts_ptr, tile, first_seq, num_seqs, queries_per_tile):  # type: ignore[no-untyped-def]
    """Finds the sequence that owns a tile by binary search. Returns it, and the index of the tile within it."""
    origin = tl.load(starts_ptr + first_seq)
    low, high, low_tile = first_seq, num_seqs, first_seq * 0
    while high - low > 1:
        middle = (low + high) // 2
        middle_tile = (tl.load(starts_ptr + middle) - origin) // queries_per_tile + middle - first_seq
        if middle_tile <= tile:
            low, low_tile = middle, middle_tile
        else:
            high = middle
    return low, tile - low_tile
