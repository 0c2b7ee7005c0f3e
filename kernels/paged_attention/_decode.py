"""Attention for sequences with one query: several programs compute parts of the keys, and a merge joins them.

Decode grid: (splits, KV heads, sequences). The host, which does not know the lengths, fixes the number of splits, and
every program computes an equal share of its sequence. All programs of a sequence start before those of the next one, so
the grid is balanced if the longest sequences come first.

Prefix grid: (tiles of sequences, KV heads, splits). The blocks with which all sequences begin are read once for a whole
tile of sequences.

A program stores the maximum of its scores, the sum of its weights and its weighted sum of values in its slot of a
float32 workspace. The merge (grid: sequences, heads) adds up the slots of a row (Dao et al., "Flash-Decoding", 2023).
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


@triton.jit(**varying([*SIZES, "first_slot", "num_slots", "has_sinks", "has_shared"]))
def decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, tables_ptr, seq_lens_ptr, num_shared_ptr, sinks_ptr, slopes_ptr, scales_ptr, out_ptr,
    sums_ptr, stats_ptr,
    q_stride, block_stride, table_stride, num_heads, group, first_slot, num_slots, window, score_scale, cap,
    has_sinks, has_slopes, has_scales, has_shared,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDITED: tl.constexpr,
):  # fmt: skip
    """Attends from the query of sequence `program_id(2)` to split `program_id(0)` of its keys after the shared blocks.

    The result goes to `out_ptr` if there is one split in all, else to `sums_ptr` and `stats_ptr` for `merge_kernel`.
    """
    seq, split = tl.program_id(2), tl.program_id(0)
    kv_head, first_head, tile_heads = heads_of_tile(group, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    heads, valid = first_head + rows, rows < tile_heads
    tokens = tl.zeros([BLOCK_M], tl.int32) + seq
    seq_len = tl.load(seq_lens_ptr + seq)
    num_shared = tl.load(num_shared_ptr, mask=has_shared != 0, other=0)
    first_key = tl.maximum(seq_len - window, num_shared * BLOCK_SIZE)
    first, end = share(first_key, seq_len, split, tl.num_programs(0), BLOCK_N)

    q = load_queries(q_ptr, k_ptr, tokens, heads, valid, q_stride, HEAD_DIM, BLOCK_D)
    has_sink = rows < tl.where(split == 0, tile_heads * has_sinks, 0)  # a sink counts once
    row_max, row_sum, acc = start_rows(heads, BLOCK_D)
    row_max, row_sum = see_sinks(row_max, row_sum, sinks_ptr, heads, has_sink)
    slopes = load_slopes(slopes_ptr, heads, rows < tile_heads * has_slopes, EDITED)
    score_scale *= load_scale(scales_ptr, k_ptr, kv_head, has_scales)
    k_ptr += kv_head * BLOCK_SIZE * HEAD_DIM
    v_ptr += kv_head * BLOCK_SIZE * HEAD_DIM
    tables_ptr += seq.to(tl.int64) * table_stride
    row_max, row_sum, acc = attend(
        q, row_max, row_sum, acc, tokens * 0 + seq_len - 1, slopes, first, end, first, window, k_ptr, v_ptr, tables_ptr,
        block_stride, score_scale, cap, BLOCK_SIZE, HEAD_DIM, BLOCK_N, EDITED, CAUSAL=True, MASKED=True,
    )  # fmt: skip
    acc *= load_scale(scales_ptr, k_ptr, num_heads // group + kv_head, has_scales)
    out_rows = tokens.to(tl.int64) * num_heads + heads
    if num_slots == 1:
        store_rows(out_ptr, normalised(acc, row_sum), out_rows, valid, HEAD_DIM)
    else:
        slots = out_rows * num_slots + first_slot + split
        store_slots(sums_ptr, stats_ptr, slots, valid, row_max, row_sum, acc, HEAD_DIM)


@triton.jit(**varying([*SIZES, "num_seqs", "num_slots"]))
def prefix_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, tables_ptr, seq_lens_ptr, num_shared_ptr, slopes_ptr, scales_ptr, sums_ptr, stats_ptr,
    q_stride, block_stride, table_stride, num_heads, group, num_seqs, num_slots, window, score_scale, cap,
    has_slopes, has_scales,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EDITED: tl.constexpr,
):  # fmt: skip
    """Attends from the queries of a tile of sequences, `program_id(0)`, to split `program_id(2)` of the shared keys."""
    split = tl.program_id(2)
    kv_head, first_head, tile_heads = heads_of_tile(group, BLOCK_M)
    width = tl.minimum(group, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    seqs = tl.program_id(0) * (BLOCK_M // width) + rows // width
    heads = first_head + rows % width
    valid = (rows // width < BLOCK_M // width) & (rows % width < tile_heads) & (seqs < num_seqs)
    seq_lens = tl.load(seq_lens_ptr + seqs, mask=valid, other=0)
    leader = tl.min(tl.where(seq_lens > 0, seqs, num_seqs))  # padding has no blocks
    num_keys = tl.where(leader < num_seqs, tl.load(num_shared_ptr) * BLOCK_SIZE, 0)
    first, end = share(0, num_keys, split, tl.num_programs(2), BLOCK_N)

    q = load_queries(q_ptr, k_ptr, seqs, heads, valid, q_stride, HEAD_DIM, BLOCK_D)
    row_max, row_sum, acc = start_rows(heads, BLOCK_D)
    slopes = load_slopes(slopes_ptr, heads, rows % width < tile_heads * has_slopes, EDITED)
    score_scale *= load_scale(scales_ptr, k_ptr, kv_head, has_scales)
    k_ptr += kv_head * BLOCK_SIZE * HEAD_DIM
    v_ptr += kv_head * BLOCK_SIZE * HEAD_DIM
    tables_ptr += leader.to(tl.int64) * table_stride
    row_max, row_sum, acc = attend(
        q, row_max, row_sum, acc, seq_lens - 1, slopes, first, end, first, window, k_ptr, v_ptr, tables_ptr,
        block_stride, score_scale, cap, BLOCK_SIZE, HEAD_DIM, BLOCK_N, EDITED, CAUSAL=True, MASKED=True,
    )  # fmt: skip
    acc *= load_scale(scales_ptr, k_ptr, num_heads // group + kv_head, has_scales)
    slots = (seqs.to(tl.int64) * num_heads + heads) * num_slots + split
    store_slots(sums_ptr, stats_ptr, slots, valid, row_max, row_sum, acc, HEAD_DIM)


@triton.jit(**varying(["num_slots"]))
def merge_kernel(  # type: ignore[no-untyped-def]
    sums_ptr,
    stats_ptr,
    out_ptr,
    num_slots,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SLOTS: tl.constexpr,
):
    """Merges the results of all splits (`num_slots`) for row `program_id(0)`, a head of a sequence, into `out_ptr`."""
    row = tl.program_id(0).to(tl.int64)
    slots, columns = tl.arange(0, MAX_SLOTS), tl.arange(0, BLOCK_D)
    used = slots < num_slots
    pointers = stats_ptr + (row * num_slots + slots) * 2
    slot_max = tl.load(pointers, mask=used, other=float("-inf"))
    weights = tl.exp2(slot_max - tl.max(slot_max, 0))
    row_sum = tl.sum(tl.load(pointers + 1, mask=used, other=0.0) * weights, 0)
    mask = used[:, None] & (columns < HEAD_DIM)[None, :]
    sums = tl.load(sums_ptr + (row * num_slots + slots)[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
    out = tl.sum(sums * weights[:, None], 0) / tl.where(row_sum > 0.0, row_sum, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


@triton.jit
def share(first, end, split, num_splits, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the first key of a split and the key after its last one. Splits are whole tiles, except at the end."""
    tiles = tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)
    keys = tl.cdiv(tiles, num_splits) * BLOCK_N
    return first + split * keys, tl.minimum(first + (split + 1) * keys, end)


@triton.jit
def store_slots(sums_ptr, stats_ptr, slots, valid, row_max, row_sum, acc, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores the maximum, the sum and the weighted sum of each row of a split, as partial result number `slots`."""
    store_rows(sums_ptr, acc, slots, valid, HEAD_DIM)
    tl.store(stats_ptr + slots * 2, row_max, mask=valid)
    tl.store(stats_ptr + slots * 2 + 1, row_sum, mask=valid)
