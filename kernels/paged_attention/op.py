"""Causal attention over a KV cache that is cut into blocks: the definition.

    out[i] = Σ_j softmax_j(scale · q[i]·k[j]) · v[j]     over the keys j with  pos(i) - window < j <= pos(i)

Prefill, a chunk of a prompt and decode are one definition. README.md describes the layout.
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
) -> Tensor:
    """Attends from the last tokens of each sequence to the cached keys and values of the whole sequence.

    The keys and values of the query tokens themselves must be in the cache already (`store_kv`). Slots at or after the
    length of a sequence, blocks that only tokens before every window use, and entries of a block table past its last
    block are never read: they may hold anything.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, may be a strided view. Sequence b owns the rows
            `query_start_loc[b]` to `query_start_loc[b + 1] - 1`; of n such rows, row i is at position
            `seq_lens[b] - n + i`.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, the dtype of the query. Consecutive query heads
            share a KV head when `num_heads > num_kv_heads`.
        v_cache: The same.
        block_tables: `[num_seqs, max_blocks]` int32: token p of sequence b is in block
            `block_tables[b, p // block_size]`.
        seq_lens: `[num_seqs]` int32, the query tokens included.
        query_start_loc: `[num_seqs + 1]` int32, from 0 to num_tokens.
        scale: Multiplies the scores, `head_dim ** -0.5` as a rule.
        window: How many of the latest tokens, itself included, a token sees; 0 for all.

    Returns:
        `[num_tokens, num_heads, head_dim]`, in the dtype of the query. Sums are in float32.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    num_kv_heads, block_size = k_cache.shape[1:3]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for seq, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        if start == end:
            continue
        seq_len = int(seq_lens[seq])
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
        key_positions = torch.arange(first_key, seq_len, device=query.device)
        hidden = key_positions > query_positions
        if window:
            hidden |= key_positions <= query_positions - window
        weights = (grouped @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:end] = (weights @ values).permute(2, 0, 1, 3).flatten(1, 2).to(query.dtype)
    return out
