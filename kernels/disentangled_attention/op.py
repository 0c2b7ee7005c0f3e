"""Attention of encoders whose scores have terms of the content and of the distance of two tokens: the definition.

    out[i] = Σ_j w[j] · v[j],   w = softmax_j(s[j])    over the tokens j of the text of i
    s[j]   = scale · (q[i]·k[j] + q[i]·row_key[r] + k[j]·row_query[r]),   r = rows[clamp(i - j)]

The texts lie behind each other in one row of tokens, as those of `varlen_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .._op import Draw, Sample, op

_TILE = 256
"""Queries whose scores are in memory at once, so that a long text takes no square of its length."""


def _sample(
    name: str,
    draw: Draw,
    lengths: Sequence[int],
    *,
    heads: int = 3,
    head_dim: int = 16,
    max_distance: int = 12,
    num_rows: int = 9,
    terms: str = "both",
) -> Sample:
    query, key, value = draw.normal(sum(lengths), 3 * heads, head_dim).split(heads, dim=1)
    row_keys, row_queries, _ = draw.normal(num_rows, 3 * heads, head_dim).split(heads, dim=1)
    rows = draw.integers(0, num_rows, 2 * max_distance + 1)
    starts = draw.tensor([0, *accumulate(lengths)], torch.int32)
    tables = (row_keys if terms != "p2c" else None, row_queries if terms != "c2p" else None)
    inputs = (query, key, value, *tables, rows, starts, max(lengths, default=0))
    return Sample(name, inputs, {"scale": (3 * head_dim) ** -0.5})


def _samples(draw: Draw) -> Iterator[Sample]:
    mixed = [17, 1, 40, 64, 5]
    yield _sample("one token", draw, [1], heads=1, head_dim=8)
    yield _sample("texts", draw, mixed)
    yield _sample("several tiles", draw, [300, 3, 131], heads=2, head_dim=64, max_distance=70, num_rows=140)
    yield _sample("only queries meet distances", draw, mixed, terms="c2p")
    yield _sample("only keys meet distances", draw, mixed, terms="p2c")
    yield _sample("odd heads", draw, [40, 5, 66], head_dim=31)
    yield _sample("more distances than tokens", draw, [20, 41], max_distance=100)
    yield _sample("texts without tokens", draw, [0, 5, 0, 0, 33, 0])
    yield _sample("no texts", draw, [])


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 2e-2)},
)
def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_keys: Tensor | None,
    row_queries: Tensor | None,
    rows: Tensor,
    query_start_loc: Tensor,
    max_seq_len: int,
    *,
    scale: float,
) -> Tensor:
    """Attends from every token of each text to the tokens of the same text, by their contents and their distance.

    All tensors of heads may be strided views, such as parts of one fused projection, whose last dimension is
    contiguous.

    Args:
        query: `[num_tokens, num_heads, head_dim]`. Text b owns the rows `query_start_loc[b]` to
            `query_start_loc[b + 1] - 1`.
        key: The shape and dtype of `query`.
        value: The shape and dtype of `query`.
        row_keys: `[num_rows, num_heads, head_dim]` in the dtype of the query: what queries are multiplied with, for
            each row of distances. None if the model has no such term.
        row_queries: The shape and dtype of `row_keys`: what keys are multiplied with. None if the model has no such
            term.
        rows: `[2 * max_distance + 1]` int64: the row of query i and key j is element
            `clamp(i - j, -max_distance, max_distance) + max_distance`.
        query_start_loc: `[num_seqs + 1]` int32, from 0 to num_tokens. A text may have no tokens.
        max_seq_len: The number of tokens of the longest text, or more. The host knows it without reading the device.
        scale: The factor of the scores.

    Returns:
        `[num_tokens, num_heads, head_dim]`, in the dtype of the query. Sums are in float32.
    """
    wide, limit = torch.promote_types(query.dtype, torch.float32), len(rows) // 2
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    to_keys, to_queries = (None if x is None else x.permute(1, 2, 0).to(wide) for x in (row_keys, row_queries))
    for start, end in pairwise(query_start_loc.tolist()):
        keys, values = (x[start:end].transpose(0, 1).to(wide) for x in (key, value))  # [heads, tokens, head_dim]
        of_keys = None if to_queries is None else (keys @ to_queries).mT  # [heads, rows, tokens]
        for first in range(start, end, _TILE):
            last = min(first + _TILE, end)
            queries = query[first:last].transpose(0, 1).to(wide)
            tokens = torch.arange(start, end, device=query.device)
            distances = tokens[first - start : last - start, None] - tokens
            picked = rows[distances.clamp(-limit, limit) + limit].expand(len(queries), -1, -1)  # [heads, queries, keys]
            scores = queries @ keys.mT
            if to_keys is not None:
                scores = scores + (queries @ to_keys).gather(2, picked)
            if of_keys is not None:
                scores = scores + of_keys.gather(1, picked)
            out[first:last] = ((scores * scale).softmax(-1) @ values).transpose(0, 1).to(query.dtype)
    return out
