"""Paged attention on the CPU in numba: the kernel that reads the blocks in place.

A task is a tile of queries of one sequence, and an item is a task and a KV head. An item computes a running softmax
over the blocks (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Each key and value is
converted to float32 once for all the query heads that share it.

The order of the sums of a row depends only on its position, the window and the block size.
"""

from __future__ import annotations

import numpy as np

from .._numba import REORDER, Array, Scalar, float_from_bits, jit
from .._storage import widen


@jit()
def plan(
    query_start_loc: Array,
    seq_lens: Array,
    num_later: int,
    tile: int,
    min_long: int,
    num_decodes: int,
    shared_keys: int,
) -> tuple[Array, int, Array]:
    """Cuts the sequences of fewer than `min_long` queries into tasks.

    Args:
        query_start_loc: `[num_seqs + 1]` int32, as in `paged_attention`.
        seq_lens: `[num_seqs]` int32, as in `paged_attention`.
        num_later: The number of tokens after itself that a query sees.
        tile: The largest number of queries in a task.
        min_long: The least number of queries for which a sequence is long and is left out.
        num_decodes: The number of sequences at the front that have attended to their first keys already.
        shared_keys: The number of first keys to which they have attended.

    Returns:
        The tasks `[num_tasks, 6]`: sequence, first row, number of queries, position of the first query, first key, and
        the key after the last one. The number of their (query, key) pairs, ignoring windows. And the sequences that are
        left out, as indices `[num_long]`.
    """
    num_tasks, num_long = 0, 0
    for seq in range(len(seq_lens)):
        num_queries = query_start_loc[seq + 1] - query_start_loc[seq]
        if min(num_queries, seq_lens[seq]) < min_long:
            num_tasks += (num_queries + tile - 1) // tile
        else:
            num_long += 1
    tasks, long_seqs = np.empty((num_tasks, 6), np.int64), np.empty(num_long, np.int64)
    num_pairs = 0
    for seq in range(len(seq_lens) - 1, -1, -1):
        start, num_queries = query_start_loc[seq], query_start_loc[seq + 1] - query_start_loc[seq]
        if min(num_queries, seq_lens[seq]) >= min_long:  # padding has rows, but no length
            num_long -= 1
            long_seqs[num_long] = seq
            continue
        first_key = min(shared_keys, seq_lens[seq]) if seq < num_decodes else 0
        num_pairs += num_queries * (seq_lens[seq] - first_key)
        for first in range(0, num_queries, tile):
            num_tasks -= 1
            tasks[num_tasks, 0] = seq
            tasks[num_tasks, 1] = start + first
            tasks[num_tasks, 2] = min(tile, num_queries - first)
            tasks[num_tasks, 3] = seq_lens[seq] - num_queries + first
            tasks[num_tasks, 4] = first_key
            tasks[num_tasks, 5] = min(tasks[num_tasks, 3] + tasks[num_tasks, 2] + num_later, seq_lens[seq])
    return tasks, num_pairs, long_seqs


@jit(REORDER)
def _exp(x: Scalar) -> Scalar:
    """Returns exp(x) for x <= 0 with a relative error of 2e-7: 2^n from its bits, times a Taylor series of the rest.

    A loop that called a library's exp would not be vectorised.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x  # NaN stays
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693145751953125) - n * np.float32(1.4286068203094172e-06)  # ln 2 in two parts
    series = np.float32(1 / 5040) * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(1 / 2)
    series = (series * r + np.float32(1)) * r + np.float32(1)
    return series * float_from_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@jit(REORDER)
def attend(
    first: int,
    last: int,
    num_kv_heads: int,
    tasks: Array,
    query: Array,
    k_cache: Array,
    v_cache: Array,
    tables: Array,
    scales: Array,
    window: int,
    num_later: int,
    softcap: Scalar,
    slopes: Array | None,
    carried: Array,
    max_queries: int,
    out: Array,
) -> None:
    """Computes items `first` to `last - 1`: item i is KV head `i % num_kv_heads` of task `i // num_kv_heads`.

    Args:
        first: The first item.
        last: The item after the last one.
        num_kv_heads: KV heads.
        tasks: `[num_tasks, 6]`, from `plan`.
        query: `[num_tokens, num_heads, head_dim]`, from `as_storage`.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, from `as_storage`.
        v_cache: The shape of `k_cache`, from `as_storage`.
        tables: `[num_seqs, max_blocks]` int32.
        scales: `[num_kv_heads]` float32, the factor of the products with the keys of each head.
        window: The number of latest tokens, itself included, that a query sees; 0 for all.
        num_later: The number of tokens after itself that a query sees.
        softcap: float32, 0 for none.
        slopes: `[num_heads]` float32, the slopes of ALiBi, 0 for none. None if there is no softcap either.
        carried: `[num_tokens, num_heads]` float32, the score with which each row begins. In a task that begins at key 0
            it is the score of a sink, or minus infinity for none, and its value is 0. In other tasks it is log(sum of
            exp(score)) over all keys before, and its value is in `out`.
        max_queries: The largest number of queries in a task.
        out: `[num_tokens, num_heads, head_dim]` float32. The rows of the tasks are filled.
    """
    head_dim, block_size = query.shape[2], k_cache.shape[2]
    group = query.shape[1] // num_kv_heads
    max_rows = max_queries * group
    q = np.empty((max_rows, head_dim), np.float32)  # row r: query r // group of the tile, head r % group of the group
    sums = np.empty((max_rows, head_dim), np.float32)
    peaks = np.empty(max_rows, np.float32)
    totals = np.empty(max_rows, np.float32)
    # Three rows more than a block has, so that a group of four keys may end after it. The weights there are 0.
    keys = np.zeros((block_size + 3, head_dim), np.float32)
    values = np.zeros((block_size + 3, head_dim), np.float32)
    weights = np.zeros(block_size + 3, np.float32)
    for item in range(first, last):
        group_start = item % num_kv_heads * group
        seq, row, num_queries, position, begin, end = tasks[item // num_kv_heads]
        num_rows = num_queries * group
        for r in range(num_rows):
            token, head = row + r // group, group_start + r % group
            for d in range(head_dim):
                q[r, d] = widen(query[token, head, d]) * scales[item % num_kv_heads]
                sums[r, d] = 0
            if begin > 0:
                for d in range(head_dim):
                    sums[r, d] = out[token, head, d]
            peaks[r], totals[r] = carried[token, head], 1
        begin = max(begin, position - window + 1) if window > 0 else begin
        for block in range(begin // block_size, (end + block_size - 1) // block_size):
            block_id, base = tables[seq, block], block * block_size
            low, high = max(0, begin - base), min(block_size, end - base)
            _load(keys, k_cache, block_id, item % num_kv_heads, low, high)
            _load(values, v_cache, block_id, item % num_kv_heads, low, high)
            for r in range(num_rows):
                here = position + r // group - base  # the position of the query, relative to this block
                t0, t1 = max(low, here + 1 - window) if window > 0 else low, min(high, here + 1 + num_later)
                if t0 < t1:
                    _products(weights, q, r, keys, t0, t1)
                    if slopes is not None:  # decided at compile time
                        _bend(weights, t0, t1, softcap, slopes[group_start + r % group], here)
                    _accumulate(sums, peaks, totals, r, weights, values, t0, t1)
        for r in range(num_rows):
            for d in range(head_dim):
                out[row + r // group, group_start + r % group, d] = sums[r, d] / totals[r]


@jit(REORDER)
def _load(wide: Array, cache: Array, block_id: int, head: int, low: int, high: int) -> None:
    """Copies slots low to high - 1 of a cache block to rows of `wide` as float32; sets the next three rows to zero."""
    for t in range(low, high):
        for d in range(wide.shape[1]):
            wide[t, d] = widen(cache[block_id, head, t, d])
    for t in range(high, high + 3):
        for d in range(wide.shape[1]):
            wide[t, d] = 0


@jit(REORDER)
def _products(scores: Array, q: Array, r: int, keys: Array, t0: int, t1: int) -> None:
    """Sets `scores[t0:t1]` to the dot products of row r of q with rows t0 to t1 - 1 of keys, four rows at a time."""
    for t in range(t0, t1, 4):
        s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for d in range(q.shape[1]):
            x = q[r, d]
            s0 += x * keys[t, d]
            s1 += x * keys[t + 1, d]
            s2 += x * keys[t + 2, d]
            s3 += x * keys[t + 3, d]
        scores[t] = s0
        scores[t + 1] = s1
        scores[t + 2] = s2
        scores[t + 3] = s3


@jit(REORDER)
def _bend(scores: Array, t0: int, t1: int, softcap: Scalar, slope: Scalar, here: int) -> None:
    """Applies softcap and ALiBi in place to `scores[t0:t1]`, the scores of keys in slots t0 to t1 - 1 of a block.

    `here` is the slot of the query, counted from the start of the block; it may lie outside of the block.
    """
    if softcap > 0:
        for t in range(t0, t1):
            # tanh by its formula, because a loop with a library's tanh is not vectorised
            fold = _exp(np.float32(-2) * np.abs(scores[t]) / softcap)
            bounded = softcap * (np.float32(1) - fold) / (np.float32(1) + fold)
            scores[t] = bounded if scores[t] > 0 else -bounded
    if slope != 0:
        for t in range(t0, t1):
            scores[t] -= slope * np.float32(abs(t - here))


@jit(REORDER)
def _accumulate(
    sums: Array, peaks: Array, totals: Array, r: int, weights: Array, values: Array, t0: int, t1: int
) -> None:
    """Adds the keys in slots t0 to t1 - 1 of a block to the running softmax of row r.

    Args:
        sums: `[rows, head_dim]`, the sums of weighted values so far.
        peaks: `[rows]`, the largest scores so far.
        totals: `[rows]`, the sums of weights so far.
        r: The row.
        weights: The scores of the keys, which become weights in place: exp(score - peak).
        values: `[slots, head_dim]`, the values of the block.
        t0: The first slot.
        t1: The slot after the last one.
    """
    peak = peaks[r]
    for t in range(t0, t1):
        peak = weights[t] if weights[t] > peak else peak
    shrink = _exp(peaks[r] - peak)
    total = np.float32(0)
    for t in range(t0, t1):
        weight = _exp(weights[t] - peak)
        weights[t] = weight
        total += weight
    for t in range(t1, t1 + 3):
        weights[t] = 0
    peaks[r] = peak
    totals[r] = totals[r] * shrink + total
    for d in range(values.shape[1]):
        sums[r, d] *= shrink
    for t in range(t0, t1, 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for d in range(values.shape[1]):
            sums[r, d] += w0 * values[t, d] + w1 * values[t + 1, d] + w2 * values[t + 2, d] + w3 * values[t + 3, d]
