"""Norm of a latent, rotation by position, and the write to the cache of latents in one pass: the definition.

    query       = rotate(query)
    cache[slot] = (l[:rank] / sqrt(mean(l[:rank]²) + eps) · weight,   rotate(l[rank:]))    for each latent l

    rotate(x)   = (x1 · c - x2 · s,  x2 · c + x1 · s)

c and s are the cosines and the sines at the position of the token. x1 and x2 are the two halves of x, or with
`interleaved` its numbers at even and at odd places, as DeepSeek's checkpoints have them; the result has the same order.
Nothing is rounded between the steps. Su et al., "RoFormer", 2021; DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._op import Draw, Sample, op


def _samples(draw: Draw) -> Iterator[Sample]:
    def sample(
        name: str,
        num_tokens: int,
        num_heads: int,
        sizes: tuple[int, int],
        *,
        interleaved: bool = True,
        num_padding: int = 0,
    ) -> Sample:
        rank, rope_dim = sizes
        # Views of what the projections give: the last part of each query, the last columns of a fused result.
        query = draw.normal(num_tokens, num_heads, rope_dim + 16)[..., 16:]
        latent = draw.normal(num_tokens, rank + rope_dim + 32)[:, 32:]
        num_blocks, block_size = num_tokens // 16 + 1, 16
        cache = draw.normal(num_blocks, 1, block_size, rank + rope_dim)
        slots = draw.permutation(num_blocks * block_size)[:num_tokens]
        slots[draw.permutation(num_tokens)[:num_padding]] = -1
        angles = draw.normal(200, rope_dim // 2, dtype=torch.float32) * 10
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        positions = draw.integers(0, 200, num_tokens)
        args = (query, latent, cache, slots, positions, table, draw.normal(rank), 1e-6)
        return Sample(name, args, {"interleaved": interleaved})

    yield sample("one token", 1, 1, (4, 2))
    yield sample("interleaved", 21, 6, (32, 16), num_padding=3)
    yield sample("halves", 17, 4, (32, 16), interleaved=False, num_padding=2)
    yield sample("odd sizes", 5, 3, (31, 6))
    yield sample("odd sizes, halves", 7, 33, (45, 14), interleaved=False)
    yield sample("sizes of DeepSeek", 3, 19, (512, 64))
    yield sample("padding only", 2, 2, (8, 4), num_padding=2)
    yield sample("no tokens", 0, 2, (8, 4))


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def rope_and_store_latent(
    query: Tensor,
    latent: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    weight: Tensor,
    eps: float,
    *,
    interleaved: bool,
) -> None:
    """Rotates the last parts of queries, and norms, rotates and stores latents.

    Arithmetic is in float32, and each result is rounded once.

    Args:
        query: `[num_tokens, num_heads, rope_dim]`, may be a strided view of contiguous rows. It is changed in place.
        latent: `[num_tokens, rank + rope_dim]`, may be a strided view of contiguous rows. It is only read.
        cache: `[num_blocks, 1, block_size, rank + rope_dim]`, the dtype of the latent. It is changed in place.
        slot_mapping: `[num_tokens]` int64, distinct slots `block_id * block_size + offset`. A token with a negative
            slot is padding, and is not stored.
        positions: `[num_tokens]` int64, rows of `cos_sin`.
        cos_sin: `[max_position, rope_dim]` float32: the cosines of the `rope_dim / 2` angles of a position, then the
            sines.
        weight: `[rank]`, the dtype of the latent: the weight of the norm.
        eps: The number that the norm adds to the mean square.
        interleaved: Whether the two numbers of a rotated pair are neighbours; if not, they are half a row apart.
    """
    rank, block_size = len(weight), cache.shape[2]
    cos, sin = cos_sin[positions].chunk(2, dim=-1)  # [num_tokens, rope_dim / 2] each
    query.copy_(_rotate(query, cos.unsqueeze(1), sin.unsqueeze(1), interleaved))
    compressed = latent[:, :rank].to(torch.promote_types(latent.dtype, torch.float32))
    normed = compressed * torch.rsqrt(compressed.square().mean(-1, keepdim=True) + eps) * weight
    stored = torch.cat((normed, _rotate(latent[:, rank:], cos, sin, interleaved)), dim=-1).to(cache.dtype)
    is_kept = slot_mapping >= 0
    slots = slot_mapping[is_kept]
    cache[slots // block_size, 0, slots % block_size] = stored[is_kept]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
