"""Attention over a paged cache of latents: the definition.

    out[i, h] = Σ_j w[j] · c[j, :rank],   w = softmax_j(scale · q[i, h]·c[j])    over the latents j before and at i

A latent is the compressed form of a token's keys and values for all heads: `rank` numbers, and the rotated part of the
key. Key h of token j is `(U[h] c[j, :rank], c[j, rank:])` and its value `V[h] c[j, :rank]`, with matrices U[h] and V[h]
that belong to the layer. They need not be applied to every cached token: q·(U c) is (Uᵀ q)·c, so the caller multiplies
the query by Uᵀ and the result by V ("absorption"). DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..paged_attention.samples import Geometry, make_sample


def _samples(draw: Draw) -> Iterator[Sample]:
    def sample(
        name: str,
        num_heads: int,
        sizes: tuple[int, int],
        lengths: list[tuple[int, int]],
        *,
        block_size: int = 16,
        **options: Any,
    ) -> Sample:
        geometry = Geometry(num_heads, 1, sum(sizes), block_size)
        made = make_sample(name, draw, geometry, lengths, **options)
        query, cache, _, *paged, _ = made.args
        return Sample(name, (query, cache, *paged, sizes[0]), made.kwargs)

    yield sample("one token", 1, (8, 2), [(1, 1)], block_size=1)
    yield sample("decodes", 4, (32, 16), [(1, 1), (63, 1), (90, 1), (16, 1), (17, 1)])
    yield sample("decodes first, padding", 5, (24, 8), [(150, 1), (0, 1), (33, 1), (0, 1)], num_decodes=4)
    yield sample("odd sizes", 3, (31, 6), [(40, 1), (35, 20), (5, 5)], num_decodes=1)
    yield sample("many heads", 40, (16, 8), [(70, 1), (20, 3)], block_size=64, num_decodes=1)
    yield sample("prompts and chunks", 6, (32, 16), [(20, 20), (1, 1), (63, 33), (12, 0), (7, 7)])
    yield sample("long chunk", 2, (64, 16), [(170, 140)])
    yield sample("sizes of DeepSeek", 16, (512, 64), [(80, 1), (21, 5)], num_decodes=1)
    yield sample("no sequences", 4, (32, 16), [])


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-4, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 2e-2)},
)
def latent_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    rank: int,
    *,
    num_decodes: int = 0,
) -> Tensor:
    """Attends from the last tokens of each sequence to the cached latents of the whole sequence.

    The latents of the query tokens themselves must be in the cache already (`rope_and_store_latent`). Memory after the
    end of a sequence is not read, as in `paged_attention`, whose arguments these are.

    Args:
        query: `[num_tokens, num_heads, rank + rope_dim]`, absorbed and rotated; may be a strided view. Sequence b owns
            the rows `query_start_loc[b]` to `query_start_loc[b + 1] - 1`, its last tokens. A sequence of length 0 that
            owns rows is padding.
        cache: `[num_blocks, 1, block_size, rank + rope_dim]`, the dtype of the query.
        block_tables: `[num_seqs, max_blocks]` int32: token p of sequence b is in block
            `block_tables[b, p // block_size]`.
        seq_lens: `[num_seqs]` int32, the query tokens included.
        query_start_loc: `[num_seqs + 1]` int32, from 0 to num_tokens.
        scale: The factor of the products of queries and latents.
        rank: Leading numbers of a latent that are its value.
        num_decodes: A hint: the first `num_decodes` sequences own one row each.

    Returns:
        `[num_tokens, num_heads, rank]`, in the dtype of the query, with zeros in rows of padding. Sums are in float32.
    """
    wide, block_size = torch.promote_types(query.dtype, torch.float32), cache.shape[2]
    out = torch.zeros((*query.shape[:2], rank), dtype=query.dtype, device=query.device)
    for seq, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        seq_len = int(seq_lens[seq])
        if start == end or seq_len == 0:
            continue
        block_ids = block_tables[seq, : -(-seq_len // block_size)].long()
        latents = cache[block_ids, 0].flatten(0, 1)[:seq_len].to(wide)
        scores = query[start:end].to(wide) @ latents.T * scale  # [queries, num_heads, keys]
        keys = torch.arange(seq_len, device=query.device)
        is_later = keys > keys[seq_len - (end - start) :, None]
        weights = scores.masked_fill(is_later.unsqueeze(1), -torch.inf).softmax(-1)
        out[start:end] = (weights @ latents[:, :rank]).to(query.dtype)
    return out
