"""Paged attention on the CPU.

Sequences with few queries (decode, short prompts, short chunks) go through one numba kernel that reads the blocks in
place: a task is a tile of queries of one sequence, an item is a task and a KV head, and an item keeps a running softmax
over the blocks (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Each key and value is
widened to float32 once for all the query heads that share it.

Sequences with many queries gather their blocks once and go through torch's matrix multiplication, which has the wide
units of the machine for bfloat16. README.md has the measurements behind the border between the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from .._numba import REORDER, Array, Scalar, as_storage, float_from_bits, jit
from .._threads import team
from .op import paged_attention

_MIN_MATMUL_QUERIES = 128
"""From this many queries on, a sequence goes through torch's matrix multiplication."""

_MATMUL_TILE = 128
_TILE_ROWS = 64
_MIN_PARALLEL_FLOPS = 4_000_000
"""About 200 µs of one core: below it, threads cost more than they bring."""


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
) -> Tensor:
    """Runs `paged_attention`: short sequences in the numba kernel, long ones by matrix multiplication."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    starts, lens = query_start_loc.numpy(), seq_lens.numpy()
    out = torch.empty(query.shape, dtype=torch.float32)
    tile = max(1, _TILE_ROWS // group)
    tasks, num_pairs, long_seqs = _plan(starts, lens, tile, _MIN_MATMUL_QUERIES)
    arguments = (
        num_kv_heads,
        tasks,
        as_storage(query),
        as_storage(k_cache),
        as_storage(v_cache),
        block_tables.numpy(),
        np.float32(scale),
        window,
        tile * group,
        out.numpy(),
    )
    num_items = len(tasks) * num_kv_heads
    if 4 * num_pairs * num_heads * head_dim < _MIN_PARALLEL_FLOPS:
        _attend(0, num_items, *arguments)
    else:
        team.run(_attend, num_items, *arguments)
    for seq in long_seqs.tolist():
        rows = slice(int(starts[seq]), int(starts[seq + 1]))
        _attend_by_matmul(
            out[rows],
            query[rows],
            k_cache,
            v_cache,
            block_tables[seq],
            seq_len=int(lens[seq]),
            scale=scale,
            window=window,
        )
    return out.to(query.dtype)


@jit()
def _plan(query_start_loc: Array, seq_lens: Array, tile: int, long: int) -> tuple[Array, int, Array]:
    """Cuts the sequences of fewer than `long` queries into tiles.

    Returns:
        The tasks `[num_tasks, 4]`: sequence, first row, number of queries, position of the first query. The number of
        their (query, key) pairs, ignoring windows. And the sequences that are left: `[num_long]`.
    """
    num_tasks, num_long = 0, 0
    for seq in range(len(seq_lens)):
        num_queries = query_start_loc[seq + 1] - query_start_loc[seq]
        if num_queries < long:
            num_tasks += (num_queries + tile - 1) // tile
        else:
            num_long += 1
    tasks, long_seqs = np.empty((num_tasks, 4), np.int64), np.empty(num_long, np.int64)
    num_pairs = 0
    for seq in range(len(seq_lens) - 1, -1, -1):
        start, num_queries = query_start_loc[seq], query_start_loc[seq + 1] - query_start_loc[seq]
        if num_queries >= long:
            num_long -= 1
            long_seqs[num_long] = seq
            continue
        num_pairs += num_queries * seq_lens[seq]
        for first in range(0, num_queries, tile):
            num_tasks -= 1
            tasks[num_tasks, 0] = seq
            tasks[num_tasks, 1] = start + first
            tasks[num_tasks, 2] = min(tile, num_queries - first)
            tasks[num_tasks, 3] = seq_lens[seq] - num_queries + first
    return tasks, num_pairs, long_seqs


def _widen(stored: Scalar) -> Scalar:
    """Reads one stored number (float32, bfloat16 bits in uint16, float16 bits in int16) as float32."""
    raise NotImplementedError("only compiled code calls this")


@overload(_widen)
def _choose_widen(stored: Scalar) -> Callable[[Scalar], Scalar]:
    return {types.uint16: _widen_bfloat16, types.int16: _widen_float16}.get(stored, _widen_float32)


def _widen_float32(stored: Scalar) -> Scalar:
    return stored


def _widen_bfloat16(stored: Scalar) -> Scalar:
    return float_from_bits(np.uint32(stored) << np.uint32(16))


def _widen_float16(stored: Scalar) -> Scalar:
    bits = np.uint32(np.uint16(stored))
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    if bits & np.uint32(0x7C00) == np.uint32(0x7C00):  # infinity and NaN
        return float_from_bits(sign | np.uint32(0x7F800000) | ((bits & np.uint32(0x3FF)) << np.uint32(13)))
    # The exponent is biased by 15 here and by 127 in float32. A product sets it right, for subnormals too.
    magnitude = float_from_bits((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
    return -magnitude if sign else magnitude


@jit(REORDER)
def _exp(x: Scalar) -> Scalar:
    """Returns exp(x) for x <= 0, to 2e-7 of its value: 2^n by its bits times the Taylor series of what remains.

    It is here, and not the library's, so that the loops which call it are vectorised.
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
def _attend(
    first: int,
    last: int,
    num_kv_heads: int,
    tasks: Array,
    query: Array,
    k_cache: Array,
    v_cache: Array,
    tables: Array,
    scale: Scalar,
    window: int,
    max_rows: int,
    out: Array,
) -> None:
    """Computes items `first` to `last - 1`: item i is KV head `i % num_kv_heads` of task `i // num_kv_heads`."""
    head_dim, block_size = query.shape[2], k_cache.shape[2]
    group = query.shape[1] // num_kv_heads
    q = np.empty((max_rows, head_dim), np.float32)  # row r: query r // group of the tile, head r % group of the group
    sums = np.empty((max_rows, head_dim), np.float32)
    peaks = np.empty(max_rows, np.float32)
    totals = np.empty(max_rows, np.float32)
    # Three rows more than a block has, so that groups of four keys may end past it: their weights there are 0.
    keys = np.zeros((block_size + 3, head_dim), np.float32)
    values = np.zeros((block_size + 3, head_dim), np.float32)
    weights = np.zeros(block_size + 3, np.float32)
    for item in range(first, last):
        head = item % num_kv_heads
        seq, row, num_queries, position = tasks[item // num_kv_heads]
        num_rows = num_queries * group
        for r in range(num_rows):
            for d in range(head_dim):
                q[r, d] = _widen(query[row + r // group, head * group + r % group, d]) * scale
                sums[r, d] = 0
            peaks[r] = -np.inf
            totals[r] = 0
        begin = max(0, position - window + 1) if window > 0 else 0
        end = position + num_queries
        for block in range(begin // block_size, (end + block_size - 1) // block_size):
            block_id, base = tables[seq, block], block * block_size
            low, high = max(0, begin - base), min(block_size, end - base)
            _load(keys, k_cache, block_id, head, low, high)
            _load(values, v_cache, block_id, head, low, high)
            for r in range(num_rows):
                seen = position + r // group + 1 - base
                t0, t1 = max(low, seen - window) if window > 0 else low, min(high, seen)
                if t0 < t1:
                    _scores(weights, q, r, keys, t0, t1)
                    _accumulate(sums, peaks, totals, r, weights, values, t0, t1)
        for r in range(num_rows):
            for d in range(head_dim):
                out[row + r // group, head * group + r % group, d] = sums[r, d] / totals[r]


@jit(REORDER)
def _load(wide: Array, cache: Array, block_id: int, head: int, low: int, high: int) -> None:
    """Reads slots low to high - 1 of a block as float32, and puts zeros into the three rows after them."""
    for t in range(low, high):
        for d in range(wide.shape[1]):
            wide[t, d] = _widen(cache[block_id, head, t, d])
    for t in range(high, high + 3):
        for d in range(wide.shape[1]):
            wide[t, d] = 0


@jit(REORDER)
def _scores(scores: Array, q: Array, r: int, keys: Array, t0: int, t1: int) -> None:
    """Sets `scores[t0:t1]` to the products of row r of q with the keys, four at a time."""
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
def _accumulate(
    sums: Array, peaks: Array, totals: Array, r: int, weights: Array, values: Array, t0: int, t1: int
) -> None:
    """Turns scores into weights, in place, and adds the weighted values to row r of the running softmax."""
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


def _attend_by_matmul(
    out: Tensor,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    *,
    seq_len: int,
    scale: float,
    window: int,
) -> None:
    """Computes one sequence, `out` `[num_queries, num_heads, head_dim]` float32, in tiles of queries."""
    num_queries = len(query)
    num_kv_heads, block_size = k_cache.shape[1:3]
    first_block = max(0, seq_len - num_queries - window + 1) // block_size if window else 0
    origin = first_block * block_size  # the position of the first gathered key
    table = table[first_block : -(-seq_len // block_size)]
    keys, values = (
        # torch has no fast float16 matrix multiplication on the CPU.
        cache.index_select(0, table).transpose(0, 1).flatten(1, 2).to(_matmul_dtype(query.dtype))
        for cache in (k_cache, v_cache)
    )  # [num_kv_heads, num_keys, head_dim]
    grouped = query.unflatten(1, (num_kv_heads, -1)).to(keys.dtype)
    for first in range(0, num_queries, _MATMUL_TILE):
        tile = grouped[first : first + _MATMUL_TILE].permute(1, 2, 0, 3)  # [num_kv_heads, group, rows, head_dim]
        begin = seq_len - num_queries + first
        end = begin + tile.shape[2]
        seen_from = max(0, begin - window + 1) if window else 0
        seen = slice(seen_from - origin, end - origin)
        scores = torch.bmm(tile.flatten(1, 2), keys[:, seen].mT).float().mul_(scale).unflatten(1, tile.shape[1:3])
        scores.masked_fill_(_hidden(begin, end, seen_from, window), -torch.inf)
        weights = scores.softmax(-1).to(keys.dtype).flatten(1, 2)
        result = torch.bmm(weights, values[:, seen]).unflatten(1, tile.shape[1:3])
        out[first : first + _MATMUL_TILE] = result.permute(2, 0, 1, 3).flatten(1, 2)


def _matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _hidden(begin: int, end: int, seen_from: int, window: int) -> Tensor:
    """Returns which keys each query at positions begin to end - 1 must not see, `[queries, keys]` bool."""
    queries, keys = torch.arange(begin, end).unsqueeze(-1), torch.arange(seen_from, end)
    return (keys > queries) | (keys <= queries - window) if window else keys > queries
