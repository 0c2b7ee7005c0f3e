"""The Triton kernels of attention over latents. All rows of a tile read the same latents, so a tile mixes heads freely.

A row is one query of one head, as in `paged_attention/_tile.py`, whose running softmax this is. A latent is read once:
the tile that the scores are computed from is also the tile of values.

Decode grid: (splits, tiles of heads, sequences); the results of several splits are merged by `merge_kernel` of
`paged_attention`. Prefill grid: (tiles of queries, tiles of heads).
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import varying
from ..paged_attention._decode import share, store_slots
from ..paged_attention._prefill import find_tile
from ..paged_attention._tile import heads_of_tile, normalised, start_rows, store_rows

SIZES = ("table_stride", "num_heads")
"""Arguments of both kernels of which one compiled form serves every value."""


@triton.jit(**varying([*SIZES, "num_slots"]))
def latent_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr, cache_ptr, tables_ptr, seq_lens_ptr, out_ptr, sums_ptr, stats_ptr,
    q_stride, block_stride, table_stride, num_heads, num_slots, score_scale,
    RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attends from the query of sequence `program_id(2)` to split `program_id(0)` of its latents.

    The result goes to `out_ptr` if there is one split in all, else to `sums_ptr` and `stats_ptr` for `merge_kernel`.
    """
    seq, split = tl.program_id(2), tl.program_id(0)
    _, first_head, tile_heads = heads_of_tile(num_heads, BLOCK_M)
    rows = tl.arange(0, BLOCK_M)
    heads, valid = first_head + rows, rows < tile_heads
    tokens = tl.zeros([BLOCK_M], tl.int32) + seq
    seq_len = tl.load(seq_lens_ptr + seq)
    first, end = share(0, seq_len, split, tl.num_programs(0), BLOCK_N)
    row_max, row_sum, acc = attend_latents(
        q_ptr, tokens, heads, valid, q_stride, tokens * 0 + seq_len - 1, first, end,
        cache_ptr, tables_ptr + seq.to(tl.int64) * table_stride, block_stride, score_scale,
        RANK, ROPE_DIM, BLOCK_SIZE, BLOCK_R, BLOCK_P, BLOCK_N,
    )  # fmt: skip
    out_rows = tokens.to(tl.int64) * num_heads + heads
    if num_slots == 1:
        store_rows(out_ptr, normalised(acc, row_sum), out_rows, valid, RANK)
    else:
        store_slots(sums_ptr, stats_ptr, out_rows * num_slots + split, valid, row_max, row_sum, acc, RANK)


@triton.jit(**varying([*SIZES, "first_seq", "num_seqs"]))
def latent_prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr, cache_ptr, tables_ptr, seq_lens_ptr, starts_ptr, out_ptr,
    q_stride, block_stride, table_stride, num_heads, first_seq, num_seqs, score_scale,
    RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attends from one tile of queries to the latents up to each of them, for the sequences from `first_seq` on.

    The last tiles of all sequences start first, because tiles at the end of a sequence see the most latents.
    """
    _, first_head, tile_heads = heads_of_tile(num_heads, BLOCK_M)
    width = tl.minimum(num_heads, BLOCK_M)
    seq, tile = find_tile(starts_ptr, tl.num_programs(0) - 1 - tl.program_id(0), first_seq, num_seqs, BLOCK_M // width)
    start = tl.load(starts_ptr + seq)
    num_queries = tl.load(starts_ptr + seq + 1) - start
    first_query = tile * (BLOCK_M // width)
    seq_len = tl.load(seq_lens_ptr + seq)
    if first_query >= num_queries:
        return
    rows = tl.arange(0, BLOCK_M)
    queries, heads = first_query + rows // width, first_head + rows % width
    last_query = tl.minimum(first_query + BLOCK_M // width, num_queries) - 1
    valid = (queries <= last_query) & (rows % width < tile_heads)
    context = seq_len - num_queries
    _, row_sum, acc = attend_latents(
        q_ptr, start + queries, heads, valid, q_stride, tl.where(valid, context + queries, -1), 0,
        context + last_query + 1, cache_ptr, tables_ptr + seq.to(tl.int64) * table_stride, block_stride, score_scale,
        RANK, ROPE_DIM, BLOCK_SIZE, BLOCK_R, BLOCK_P, BLOCK_N,
    )  # fmt: skip
    out_rows = (start + queries).to(tl.int64) * num_heads + heads
    store_rows(out_ptr, normalised(acc, row_sum), out_rows, valid, RANK)


@triton.jit
def attend_latents(  # type: ignore[no-untyped-def]
    q_ptr, tokens, heads, valid, q_stride, positions, first, end, cache_ptr, table_ptr, block_stride, score_scale,
    RANK: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attends from rows at `positions` to the latents from `first` to `end - 1`, in tiles of BLOCK_N.

    The compressed part of a latent and its rotated part are tiles of their own, because tiles have powers of two as
    sizes, and only the first of them is a value.
    """
    dim: tl.constexpr = RANK + ROPE_DIM
    columns, rope_columns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    in_rank, in_rope = (columns < RANK)[None, :], (rope_columns < ROPE_DIM)[None, :]
    q_rows = (q_ptr + tokens.to(tl.int64) * q_stride + heads * dim)[:, None]
    q = tl.load(q_rows + columns[None, :], mask=valid[:, None] & in_rank, other=0.0)
    q_rope = tl.load(q_rows + RANK + rope_columns[None, :], mask=valid[:, None] & in_rope, other=0.0)
    row_max, row_sum, acc = start_rows(heads, BLOCK_R)
    keys = first + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < end, other=0)
    for start in range(first, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        readable = (keys < end)[:, None]
        latent_rows = (cache_ptr + blocks.to(tl.int64) * block_stride + keys % BLOCK_SIZE * dim)[:, None]
        following = keys + BLOCK_N  # The block ids of the next tile are read one tile ahead, as in `attend`.
        blocks = tl.load(table_ptr + following // BLOCK_SIZE, mask=following < end, other=0)
        latents = tl.load(latent_rows + columns[None, :], mask=readable & in_rank, other=0.0)
        rotated = tl.load(latent_rows + RANK + rope_columns[None, :], mask=readable & in_rope, other=0.0)
        scores = tl.dot(q, tl.trans(latents), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(rotated), scores, input_precision="ieee") * score_scale
        is_seen = (keys[None, :] <= positions[:, None]) & (keys < end)[None, :]
        scores = tl.where(is_seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        kept = tl.exp2(row_max - new_max)
        row_sum = row_sum * kept + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latents.dtype), latents, acc * kept[:, None], input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc
