"""Device code of all attention kernels: a tile of query rows attends to one tile of keys after another.

A row is one query of one head. All rows of a tile belong to one KV head, so a key is read once for all of them. The
softmax is a running one (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018): a row keeps the
maximum of its scores, and the sum of its weights and the weighted sum of values relative to that maximum. Scores are
multiplied by log2(e), because GPUs have an instruction for powers of two.
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from .._fp8 import widen

SIZES = ("table_stride", "num_heads", "group", "window", "has_slopes", "has_scales")
"""Arguments of all attention kernels of which one compiled form serves every value."""
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)
"""The maximum of no scores. It is finite, so that its difference from itself is not NaN."""


@triton.jit
def heads_of_tile(group, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns (KV head, first query head, number of query heads) of `program_id(1)`. A wide group has several tiles."""
    width = tl.minimum(group, BLOCK_M)
    tiles_per_group = tl.cdiv(group, width)
    kv_head = tl.program_id(1) // tiles_per_group
    first = tl.program_id(1) % tiles_per_group * width
    return kv_head, kv_head * group + first, tl.minimum(width, group - first)


@triton.jit
def load_queries(q_ptr, k_ptr, tokens, heads, valid, q_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads the queries of (tokens[i], heads[i]) as `[rows, BLOCK_D]`, with zeros in rows that are not valid.

    With an 8-bit cache, bfloat16 becomes float16: it represents every e4m3 number, and the conversion from e4m3 is one
    instruction.
    """
    columns = tl.arange(0, BLOCK_D)
    offsets = tokens.to(tl.int64) * q_stride + heads * HEAD_DIM
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)
    if k_ptr.dtype.element_ty.primitive_bitwidth == 8 and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q


@triton.jit
def start_rows(heads, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the softmax state (maximum, sum, weighted sum) of rows that have seen no key yet."""
    row_max = tl.full(heads.shape, LOWEST, tl.float32)
    return row_max, tl.zeros(heads.shape, tl.float32), tl.zeros([heads.shape[0], BLOCK_D], tl.float32)


@triton.jit
def see_sinks(row_max, row_sum, sinks_ptr, heads, has_sink):  # type: ignore[no-untyped-def]
    """Returns (maximum, sum) of the rows of a tile after the sink of their head, which has a score but no value."""
    sinks = tl.load(sinks_ptr + heads, mask=has_sink, other=0.0) * LOG2_E
    return tl.where(has_sink, sinks, row_max), tl.where(has_sink, 1.0, row_sum)


@triton.jit
def load_slopes(slopes_ptr, heads, has_slope, EDITED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the ALiBi slope of the head of each row of a tile, times log2(e) as scores are powers of 2.

    The slope is 0 where `has_slope` is false, and everywhere without EDITED, when no slopes are read.
    """
    if EDITED:
        slopes = tl.load(slopes_ptr + heads, mask=has_slope, other=0.0) * LOG2_E
    else:
        slopes = tl.zeros(heads.shape, tl.float32)
    return slopes


@triton.jit
def load_scale(scales_ptr, k_ptr, index, has_scales):  # type: ignore[no-untyped-def]
    """Returns scale number `index` of an 8-bit cache; 1 if there are no scales, and for other caches."""
    scale = 1.0
    if k_ptr.dtype.element_ty.primitive_bitwidth == 8:
        scale = tl.load(scales_ptr + index, mask=has_scales != 0, other=1.0)
    return scale


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q, row_max, row_sum, acc, positions, slopes, first, end, first_read, window, k_ptr, v_ptr, table_ptr, block_stride,
    score_scale, cap,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, EDITED: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attends from rows at `positions` to the keys from `first` to `end - 1`, in tiles of BLOCK_N.

    With EDITED, scores are bounded by `cap`, if it is not 0, and lose `slopes` for each token of distance.

    With MASKED, a row sees only the keys of its window, and with CAUSAL only keys up to its position. Keys before
    `first_read` are not read. A tile in which a row sees no key does not change any bit of that row. Without MASKED,
    every row sees all keys, and these are whole tiles.
    """
    columns = tl.arange(0, q.shape[1])
    keys = first + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=(keys >= first_read) & (keys < end), other=0)
    for start in range(first, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        readable = (keys >= first_read) & (keys < end) if MASKED else tl.full([BLOCK_N], True, tl.int1)
        offsets = (blocks.to(tl.int64) * block_stride + keys % BLOCK_SIZE * HEAD_DIM)[:, None] + columns[None, :]
        # The block ids of the next tile are read one tile ahead. Otherwise the copies of keys and values would wait for
        # them, and the compiler could not start these copies before the product of the tile before.
        following = keys + BLOCK_N
        blocks = tl.load(table_ptr + following // BLOCK_SIZE, mask=following < end, other=0)
        mask = readable[:, None] & (columns < HEAD_DIM)[None, :]
        k = widen(tl.load(k_ptr + offsets, mask=mask, other=0.0), q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if EDITED:
            capped = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)  # cap * tanh, with 2 log2(e) in score_scale
            scores = tl.where(cap > 0.0, capped, scores)
            if CAUSAL:
                scores += slopes[:, None] * (keys[None, :] - positions[:, None])
            else:
                scores -= slopes[:, None] * tl.abs(keys[None, :] - positions[:, None])
        if MASKED and CAUSAL:
            ages = positions[:, None] - tl.where(readable, keys, 2**30)[None, :]  # negative ages become huge
            scores = tl.where(ages.to(tl.uint32) < window.to(tl.uint32), scores, float("-inf"))
        elif MASKED:
            distances = tl.abs(positions[:, None] - tl.where(readable, keys, -(2**30))[None, :])  # huge if unreadable
            scores = tl.where(distances < tl.minimum(window, 2**30), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        kept = tl.exp2(row_max - new_max)
        row_sum = row_sum * kept + tl.sum(weights, 1)
        v = widen(tl.load(v_ptr + offsets, mask=mask, other=0.0), q.dtype)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def normalised(acc, row_sum):  # type: ignore[no-untyped-def]
    """Divides the weighted sums by the sums of weights. Rows that saw no key become 0."""
    return acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]


@triton.jit
def store_rows(out_ptr, x, rows, valid, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores x `[rows, BLOCK_D]` to the given rows of a contiguous tensor."""
    columns = tl.arange(0, x.shape[1])
    mask = valid[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = out_ptr + (rows.to(tl.int64) * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(pointers, x.to(out_ptr.dtype.element_ty), mask=mask)
