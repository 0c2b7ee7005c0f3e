"""Attention over a KV cache that is cut into blocks: the definition.

    out[i] = Σ_j w[j] · v[j],   w = softmax_j(s[j])    over the keys j that query i sees
    s[j]   = softcap · tanh(scale · q[i]·k[j] / softcap) - slope · |pos(i) - j|

With `kv_scales`, k[j] and v[j] are the numbers in the cache times the scales of their head.

A query sees the keys with `|pos(i) - j| < window`, and of these, with `causal`, the keys up to its own position.
Prefill, a chunk of a prompt and decode are one definition. README.md describes the layout and names the source of each
option.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .._op import op
from .samples import samples


@op(
    samples=samples,
    tolerance={torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 2e-2)},
)
def paged_attention(
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
    """Attends from the last tokens of each sequence to the cached keys and values of the whole sequence.

    The keys and values of the query tokens themselves must be in the cache already (`store_kv`). Three kinds of memory
    are never read and may have any content: slots from the length of a sequence on, blocks whose tokens are outside of
    every window, and entries of a block table after the last block of the sequence.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, may be a strided view. Sequence b owns the rows
            `query_start_loc[b]` to `query_start_loc[b + 1] - 1`. If these are n rows, row i of them is at position
            `seq_lens[b] - n + i`. A sequence of length 0 that owns rows is padding.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, the dtype of the query, float8_e4m3fn, or on
            a CPU int8. Consecutive query heads share a KV head when `num_heads > num_kv_heads`.
        v_cache: The shape and dtype of `k_cache`.
        block_tables: `[num_seqs, max_blocks]` int32: token p of sequence b is in block
            `block_tables[b, p // block_size]`. No sequence is longer than `max_blocks * block_size`.
        seq_lens: `[num_seqs]` int32, the query tokens included.
        query_start_loc: `[num_seqs + 1]` int32, from 0 to num_tokens.
        scale: The factor of the products of queries and keys, `head_dim ** -0.5` as a rule.
        window: The number of tokens, itself included, that a token sees on either side of itself; 0 for all.
        causal: Whether a token sees only itself and the tokens before it. If not, it sees the tokens after it too, up
            to the length of the sequence.
        softcap: The limit of the size of a score, `softcap * tanh(score / softcap)`, before masking; 0 for none.
        sinks: `[num_heads]` float32, the score of one more key per head, whose value is zero; None for none.
        alibi_slopes: `[num_heads]` float32, the amount that a score loses for each token of distance; None for none.
        num_decodes: A hint: the first `num_decodes` sequences own one row each.
        num_shared: A hint, `[1]` int32: in all of the first `num_decodes` sequences that are not padding, the first
            `num_shared` entries of the block tables are the same, and the query is after these blocks. An
            implementation may then read them once in place of once per sequence.
        deterministic: Whether no bit of a row may depend on other sequences in the call, on the chunks of a prompt, or
            on padding. It may be slower.
        kv_scales: `[2, num_kv_heads]` float32, contiguous, for an 8-bit cache: the factor of the cached keys of each
            head, then the factor of its values. None for 1.

    Returns:
        `[num_tokens, num_heads, head_dim]`, in the dtype of the query, with zeros in rows of padding. Sums are in
        float32.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    per_head = (num_kv_heads, -1, 1, 1)  # [num_heads] -> [num_kv_heads, group, queries, keys]
    key_scales = value_scales = 1.0
    if kv_scales is not None:
        key_scales, value_scales = kv_scales.to(wide).view(2, *per_head)
    for seq, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        seq_len = int(seq_lens[seq])
        if start == end or seq_len == 0:
            continue
        first_position = seq_len - (end - start)
        first_key = max(0, first_position - window + 1) if window else 0
        first_block = first_key // block_size
        block_ids = block_tables[seq, first_block : -(-seq_len // block_size)].long()
        seen = slice(first_key - first_block * block_size, seq_len - first_block * block_size)
        keys, values = (  # [num_kv_heads, 1, num_keys, head_dim]
            cache[block_ids].transpose(0, 1).flatten(1, 2)[:, None, seen].to(wide) for cache in (k_cache, v_cache)
        )
        grouped = query[start:end].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).to(wide)
        query_positions = torch.arange(first_position, seq_len, device=query.device).unsqueeze(-1)
        distances = query_positions - torch.arange(first_key, seq_len, device=query.device)  # [queries, keys]
        scores = grouped @ keys.mT * (scale * key_scales)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.view(per_head).to(wide) * distances.abs()
        hidden = (distances < 0) & causal
        if window:
            hidden |= distances.abs() >= window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks.view(per_head).to(wide).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(-1)[..., : seq_len - first_key]
        out[start:end] = (weights @ values * value_scales).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out
