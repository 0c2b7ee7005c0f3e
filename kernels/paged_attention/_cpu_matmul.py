"""Paged attention on the CPU by torch's matrix multiplication, which uses the matrix units of a CPU for bfloat16.

The blocks are first copied together. That is faster where many queries see the same keys: in a long chunk of a prompt,
or a prefix that several sequences share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALL_KEYS = 2**31 - 1
"""More keys than any sequence has."""

_TILE = 128


@dataclass(frozen=True, slots=True)
class Scoring:
    """The options of `paged_attention` that turn the product of a query and a key into a score.

    Args:
        scales: `[num_kv_heads]` float32, the factor of the products with the keys of each head.
        window: The number of latest tokens, itself included, that a query sees; 0 for all.
        num_later: The number of tokens after itself that a query sees.
        softcap: The limit that scores approach smoothly; 0 for none.
        sinks: `[num_heads]`, the score of one more key whose value is zero; None for none.
        alibi_slopes: `[num_heads]`, the amount that a score loses for each token of distance; None for none.
    """

    scales: Tensor
    window: int
    num_later: int
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None


def gather(cache: Tensor, block_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies blocks of a cache into one tensor.

    Args:
        cache: `[num_blocks, num_kv_heads, block_size, head_dim]`.
        block_ids: `[n]`.
        dtype: The dtype of the query.

    Returns:
        `[num_kv_heads, n * block_size, head_dim]` in `dtype`, or in float32 for float16, because torch's matrix
        multiplication in float16 is slow on a CPU.
    """
    wide = torch.float32 if dtype == torch.float16 else dtype
    blocks = cache.index_select(0, block_ids).transpose(0, 1).flatten(1, 2)
    if cache.dtype != torch.float8_e4m3fn:
        return blocks.to(wide)
    # Looking up a table of all 256 numbers is six times faster than torch's conversion.
    numbers = torch.arange(256, dtype=torch.uint8).view(cache.dtype).to(wide)
    return numbers.index_select(0, blocks.view(torch.uint8).flatten().int()).view(blocks.shape)


def attend_by_matmul(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    origin: int,
    scoring: Scoring,
    logsumexp: Tensor | None = None,
) -> None:
    """Attends from queries to one run of keys, in tiles of queries.

    Args:
        out: `[num_queries, num_heads, head_dim]` float32, filled.
        query: `[num_queries, num_heads, head_dim]`.
        keys: `[num_kv_heads, num_keys, head_dim]`, the keys from position `origin` on. Every query sees one or more.
        values: `[num_kv_heads, num_keys, head_dim]`, their values.
        positions: `[num_queries]`, the positions of the queries. Without a window they may be in any order.
        origin: The position of the first key.
        scoring: The options that turn products into scores.
        logsumexp: `[num_queries, num_heads]` float32, filled with log(sum of exp(score)), sink included; None if the
            caller does not need it.
    """
    grouped = query.unflatten(1, (len(keys), -1)).to(keys.dtype)
    for first in range(0, len(query), _TILE):
        rows = slice(first, first + _TILE)
        tile, here = grouped[rows].permute(1, 2, 0, 3), positions[rows]  # [num_kv_heads, group, rows, head_dim]
        begin = max(0, int(here[0]) - scoring.window + 1 - origin) if scoring.window else 0
        end = min(keys.shape[1], int(here.max()) + 1 + scoring.num_later - origin)
        scores = torch.bmm(tile.flatten(1, 2), keys[:, begin:end].mT).float().unflatten(1, tile.shape[1:3])
        scores = _scores(scores, here, torch.arange(origin + begin, origin + end), scoring)
        weights = scores.softmax(-1)
        if logsumexp is not None:  # the largest weight is exp(largest score - logsumexp)
            logsumexp[rows] = (scores.amax(-1) - weights.amax(-1).log()).permute(2, 0, 1).flatten(1, 2)
        weights = weights[..., : end - begin].to(keys.dtype).flatten(1, 2)
        result = torch.bmm(weights, values[:, begin:end]).unflatten(1, tile.shape[1:3])
        out[rows] = result.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(products: Tensor, query_positions: Tensor, key_positions: Tensor, scoring: Scoring) -> Tensor:
    """Turns `products` `[num_kv_heads, group, queries, keys]` into scores, in place. A sink adds a column."""
    per_head = (*products.shape[:2], 1, 1)
    query_positions = query_positions.unsqueeze(-1)
    scores = products.mul_(scoring.scales.view(-1, 1, 1, 1))
    if scoring.softcap:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if scoring.alibi_slopes is not None:
        scores -= scoring.alibi_slopes.view(per_head) * (key_positions - query_positions).abs()
    # A mask costs as much as a softmax. Without a window the first keys need none, since every query sees them.
    seen_by_all = 0 if scoring.window else int(query_positions.min() - key_positions[0]) + 1 + scoring.num_later
    key_positions = key_positions[seen_by_all:]
    hidden = key_positions > query_positions + scoring.num_later
    if scoring.window:
        hidden |= key_positions <= query_positions - scoring.window
    scores[..., seen_by_all:].masked_fill_(hidden, -torch.inf)
    if scoring.sinks is not None:
        scores = torch.cat((scores, scoring.sinks.view(per_head).expand(*scores.shape[:-1], 1)), dim=-1)
    return scores
