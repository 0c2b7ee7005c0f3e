"""Attention of encoders, over texts of any lengths without padding: the definition.

    out[i] = Σ_j w[j] · v[j],   w = softmax_j(s[j])    over the tokens j of the text of i with |i - j| < window
    s[j]   = softcap · tanh(scale · q[i]·k[j] / softcap) + bias[clamp(j - i)]

The texts lie behind each other in one row of tokens, so that none is padded to the length of another. README.md names
the source of each option.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .._op import op
from .samples import samples

_TILE = 256
"""Queries whose scores are in memory at once, so that a long text takes no square of its length."""


@op(
    samples=samples,
    tolerance={torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 2e-2)},
)
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    *,
    softcap: float = 0.0,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """Attends from every token of each text to the tokens of the same text, before and after it.

    Query, key and value may be strided views, such as parts of one fused projection, whose last dimension is
    contiguous.

    Args:
        query: `[num_tokens, num_heads, head_dim]`. Text b owns the rows `query_start_loc[b]` to
            `query_start_loc[b + 1] - 1`.
        key: `[num_tokens, num_kv_heads, head_dim]` in the dtype of the query. Consecutive query heads share a KV head
            when `num_heads > num_kv_heads`.
        value: The shape and dtype of `key`.
        query_start_loc: `[num_seqs + 1]` int32, from 0 to num_tokens. A text may have no tokens.
        max_seq_len: The number of tokens of the longest text, or more. The host knows it without reading the device.
        scale: The factor of the products of queries and keys, `head_dim ** -0.5` as a rule.
        window: The number of tokens, itself included, that a token sees on either side of itself; 0 for all.
        softcap: The limit of the size of a score, `softcap * tanh(score / softcap)`; 0 for none.
        distance_bias: `[num_heads, 2 * max_distance + 1]` float32, contiguous: what is added to the score of query i
            and key j, after scale and softcap, is column `clamp(j - i, -max_distance, max_distance) + max_distance`.
            None for none.

    Returns:
        `[num_tokens, num_heads, head_dim]`, in the dtype of the query. Sums are in float32.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    num_kv_heads = key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for start, end in pairwise(query_start_loc.tolist()):
        for first in range(start, end, _TILE):
            last = min(first + _TILE, end)
            seen = slice(max(start, first - window + 1), min(end, last + window - 1)) if window else slice(start, end)
            # Rows are laid out by KV head, group, query and number; keys and values have one group.
            rows = query[first:last].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).to(wide)
            keys, values = (x[seen].transpose(0, 1).unsqueeze(1).to(wide) for x in (key, value))
            scores = rows @ keys.mT * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            queries = torch.arange(first, last, device=query.device).unsqueeze(1)
            distances = torch.arange(seen.start, seen.stop, device=query.device) - queries  # [queries, keys]
            if distance_bias is not None:
                limit = distance_bias.shape[1] // 2
                bias = distance_bias[:, distances.clamp(-limit, limit) + limit]
                scores = scores + bias.unflatten(0, (num_kv_heads, -1)).to(wide)
            if window:
                scores = scores.masked_fill(distances.abs() >= window, -torch.inf)
            out[first:last] = (scores.softmax(-1) @ values).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out
