"""Rotary position embedding: the definition.

With x1 and x2 the two halves of the first `rot_dim` dimensions of a head, and c, s the cosines and sines at a position:

    x1, x2 = x1 · c - x2 · s,  x2 · c + x1 · s

Su et al., "RoFormer", 2021, in the half-split pairing that GPT-NeoX and Llama checkpoints use.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    def inputs(num_tokens: int, heads: tuple[int, int], head_dim: int, rot_dim: int) -> tuple[Tensor, ...]:
        # Views of one fused projection, as the attention layer passes them: [num_tokens, Hq + 2 Hkv, head_dim].
        fused = draw.normal(num_tokens, heads[0] + 2 * heads[1], head_dim)
        angles = draw.normal(200, rot_dim // 2, dtype=torch.float32) * 10
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        query, key = fused[:, : heads[0]], fused[:, heads[0] : heads[0] + heads[1]]
        return draw.integers(0, 200, num_tokens), query, key, table

    yield Sample("one token", inputs(1, (1, 1), 2, 2))
    yield Sample("grouped heads", inputs(63, (6, 2), 32, 32))
    yield Sample("part of the head", inputs(123, (4, 4), 80, 32))
    yield Sample("odd half", inputs(5, (2, 1), 14, 14))
    yield Sample("wide head", inputs(9, (3, 1), 128, 128))
    yield Sample("no tokens", inputs(0, (2, 1), 16, 16))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def rotary(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    """Rotates the queries and the keys by their positions, in place, in float32.

    Args:
        positions: `[num_tokens]` int64, rows of `cos_sin`.
        query: `[num_tokens, num_heads, head_dim]`, may be a strided view. Changed in place.
        key: `[num_tokens, num_kv_heads, head_dim]`, may be a strided view. Changed in place.
        cos_sin: `[max_position, rot_dim]` float32: the cosines of the `rot_dim / 2` angles of a position, then the
            sines. `rot_dim <= head_dim`; the dimensions after it stay as they are.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, rot_dim / 2] each
    for heads in (query, key):
        first, second = heads[..., : cos_sin.shape[-1]].chunk(2, dim=-1)
        rotated = first * cos - second * sin, second * cos + first * sin
        first.copy_(rotated[0])
        second.copy_(rotated[1])
