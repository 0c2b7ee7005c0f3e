"""Attention over latents on the CPU by torch's matrix multiplication. All heads share the latents."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..paged_attention._cpu_matmul import Scoring, attend_by_matmul, gather
from .op import latent_attention

_MAX_ROWS = 2048
"""Most rows (queries times heads) whose scores are in memory at once."""


@latent_attention.register("cpu")
def latent_attention_cpu(
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
    """Runs `latent_attention` sequence by sequence, in tiles of queries."""
    block_size, num_heads = cache.shape[2], query.shape[1]
    out = torch.zeros((*query.shape[:2], rank), dtype=torch.float32)
    scoring = Scoring(torch.tensor([scale]), window=0, num_later=0, softcap=0.0, sinks=None, alibi_slopes=None)
    step = max(1, _MAX_ROWS // num_heads)
    for seq, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        seq_len = int(seq_lens[seq])
        if start == end or seq_len == 0:
            continue
        block_ids = block_tables[seq, : -(-seq_len // block_size)]
        latents = gather(cache, block_ids, query.dtype)[:, :seq_len]
        for first in range(start, end, step):
            rows = slice(first, min(first + step, end))
            positions = torch.arange(rows.start, rows.stop) + (seq_len - end)
            attend_by_matmul(out[rows], query[rows], latents, latents[..., :rank], positions, 0, scoring)
    return out.to(query.dtype)
