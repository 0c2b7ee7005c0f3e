"""Paged attention on the CPU in numba and torch, for the calls and CPUs that `native.cpp` does not support.

Sequences with few queries (decode, short prompts, short chunks) are computed by one numba kernel that reads the blocks
in place. Sequences with many queries, and a prefix that many decodes share, are computed by torch's matrix
multiplication. README.md has the measurements behind the thresholds.

The order of the sums of the numba kernel depends only on the position of a row and its keys, and not on other rows, its
tile or the thread. The matrix multiplication guarantees no order, so `deterministic` does not use it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._numba import as_storage
from .._threads import team
from ._cpu_matmul import ALL_KEYS, Scoring, attend_by_matmul, gather
from ._cpu_tiles import attend, plan

_MIN_MATMUL_QUERIES = 128
"""Sequences with at least this many queries are computed by torch's matrix multiplication."""

_MIN_SHARING = 8
_MIN_SHARED_PAIRS = 8192
"""A shared prefix is computed by matrix multiplication for at least this many decodes, and (decode, key) pairs."""

_TILE_ROWS = 64
_MIN_PARALLEL_FLOPS = 4_000_000
"""About 200 µs of one core. Smaller calls do not gain from threads."""


def paged_attention_numba(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    window: int = 0,
    *,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    num_decodes: int = 0,
    num_shared: Tensor | None = None,
    deterministic: bool = False,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Runs `paged_attention`: short sequences in numba, long ones and shared prefixes by matrix multiplication."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = k_cache.shape[1]
    tile = max(1, _TILE_ROWS // (num_heads // num_kv_heads))
    starts, lens = query_start_loc.numpy(), seq_lens.numpy()
    num_later = 0 if causal else (window or ALL_KEYS) - 1
    scales = torch.full((num_kv_heads,), scale, dtype=torch.float32) if kv_scales is None else kv_scales[0] * scale
    scoring = Scoring(scales, window, num_later, softcap, sinks, alibi_slopes)
    out = torch.empty(query.shape, dtype=torch.float32)
    # The numba kernel begins each row with the score of one key outside the cache: of none, a sink or a whole prefix.
    carried = torch.full(query.shape[:2], -torch.inf) if sinks is None else sinks.repeat(len(query), 1)
    shared_keys = 0
    if num_shared is not None and not window and not deterministic:
        table, decodes = block_tables[:, : int(num_shared)], seq_lens[:num_decodes]
        shared_keys = _attend_to_shared(out, carried, query, k_cache, v_cache, table, decodes, scoring)
    min_long = sys.maxsize if deterministic else _MIN_MATMUL_QUERIES
    tasks, num_pairs, long_seqs = plan(starts, lens, num_later, tile, min_long, num_decodes, shared_keys)
    slopes = torch.zeros(num_heads) if softcap and alibi_slopes is None else alibi_slopes
    arguments = (
        num_kv_heads,
        tasks,
        as_storage(query),
        as_storage(k_cache),
        as_storage(v_cache),
        block_tables.numpy(),
        scales.numpy(),
        window,
        num_later,
        np.float32(softcap),
        None if slopes is None else slopes.contiguous().numpy(),
        carried.numpy(),
        tile,
        out.numpy(),
    )
    _attend_to_tasks(len(tasks) * num_kv_heads, 4 * num_pairs * num_heads * head_dim, *arguments)
    for seq in long_seqs.tolist():
        rows = slice(int(starts[seq]), int(starts[seq + 1]))
        _attend_to_sequence(out[rows], query[rows], k_cache, v_cache, block_tables[seq], int(lens[seq]), scoring)
    if kv_scales is not None:
        out.unflatten(1, (num_kv_heads, -1)).mul_(kv_scales[1].view(-1, 1, 1))
    return out.to(query.dtype)


def _attend_to_tasks(num_items: int, num_flops: int, *arguments: Any) -> None:
    """Runs the numba kernel for all items, on the calling thread or on several."""
    if num_flops < _MIN_PARALLEL_FLOPS:
        attend(0, num_items, *arguments)
    else:
        team.run(attend, num_items, *arguments)


def _attend_to_shared(
    out: Tensor,
    carried: Tensor,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    seq_lens: Tensor,
    scoring: Scoring,
) -> int:
    """Attends from the decodes to the blocks that they share, unless there are too few decodes or shared keys.

    Args:
        out: `[num_tokens, num_heads, head_dim]` float32. The rows of the decodes are filled.
        carried: `[num_tokens, num_heads]` float32. The rows of the decodes are filled with log(sum of exp(score)).
        query: `[num_tokens, num_heads, head_dim]`.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`.
        v_cache: The shape of `k_cache`.
        tables: `[num_seqs, num_shared]`, the shared blocks.
        seq_lens: `[num_decodes]`, 0 for padding.
        scoring: The options that turn products into scores.

    Returns:
        The number of keys attended to; 0 if there are too few decodes or shared keys, and nothing was filled.
    """
    rows = seq_lens.nonzero().squeeze(1)
    num_keys = tables.shape[1] * k_cache.shape[2]
    if len(rows) < _MIN_SHARING or len(rows) * num_keys < _MIN_SHARED_PAIRS:
        return 0
    keys, values = (gather(cache, tables[rows[0]], query.dtype) for cache in (k_cache, v_cache))
    results, logsumexp = torch.empty(len(rows), *query.shape[1:]), torch.empty(len(rows), query.shape[1])
    attend_by_matmul(results, query[rows], keys, values, seq_lens[rows] - 1, 0, scoring, logsumexp)
    out[rows], carried[rows] = results, logsumexp
    return num_keys


def _attend_to_sequence(
    out: Tensor, query: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, seq_len: int, scoring: Scoring
) -> None:
    """Attends from the queries of one sequence to its cached keys, by matrix multiplication, and fills `out`."""
    block_size, first_position = k_cache.shape[2], seq_len - len(query)
    first_block = max(0, first_position - scoring.window + 1) // block_size if scoring.window else 0
    table = table[first_block : -(-seq_len // block_size)]
    origin = first_block * block_size
    # The slots after the last token may have any content.
    keys, values = (gather(cache, table, query.dtype)[:, : seq_len - origin] for cache in (k_cache, v_cache))
    attend_by_matmul(out, query, keys, values, torch.arange(first_position, seq_len), origin, scoring)
