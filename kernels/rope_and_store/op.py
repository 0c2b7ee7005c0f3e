"""Norm of the heads, rotation by position, and the write to the KV cache in one pass: the definition.

    x     = x / sqrt(mean(x²) + eps) · weight         for each query and key head, if weights are given
    query = rotate(query),   k_cache[slot] = rotate(key),   v_cache[slot] = value    each divided by its scale, if given

    rotate(x) = cat(x1 · c - x2 · s,  x2 · c + x1 · s,  x3)

x1 and x2 are the two halves of the first `rot_dim` numbers of a head, x3 is the rest; c and s are the cosines and the
sines at the position of the token. Nothing is rounded between the three steps, which are `rms_norm`, this rotation and
`store_kv`. This is the half-split pairing of Su et al., "RoFormer", 2021, that GPT-NeoX and Llama checkpoints use. If
`interleaved` is true, x1 and x2 are the even and the odd numbers instead, and each result stays in its number's place:
neighbours are a pair, as in the paper and in checkpoints of GPT-J, Cohere and DeepSeek.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._op import Draw, Sample, op
from ..store_kv.op import store_kv


def _samples(draw: Draw) -> Iterator[Sample]:
    def sample(
        name: str,
        num_tokens: int,
        heads: tuple[int, int],
        head_dim: int,
        *,
        rot_dim: int | None = None,
        has_norm: bool = True,
        interleaved: bool = False,
        weight_dtype: torch.dtype | None = None,
        num_padding: int = 0,
        cache_dtype: torch.dtype = draw.dtype,
        is_scaled: bool = False,
    ) -> Sample:
        rot_dim = head_dim if rot_dim is None else rot_dim
        # Views of one fused projection, as the attention layer passes them.
        fused = draw.normal(num_tokens, heads[0] + 2 * heads[1], head_dim)
        query, key, value = fused.split((heads[0], heads[1], heads[1]), dim=1)
        num_blocks, block_size = num_tokens // 16 + 1, 16
        cache = draw.normal(2, num_blocks, heads[1], block_size, head_dim).to(cache_dtype)
        slots = draw.permutation(num_blocks * block_size)[:num_tokens]
        slots[draw.permutation(num_tokens)[:num_padding]] = -1
        angles = draw.normal(200, rot_dim // 2, dtype=torch.float32) * 10
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        options: dict[str, Any] = {"interleaved": interleaved}
        if has_norm:
            weights = {name: draw.normal(head_dim, dtype=weight_dtype) for name in ("q_weight", "k_weight")}
            options |= {**weights, "eps": 1e-6}
        if is_scaled:
            options["kv_scales"] = draw.scales(heads[1])
        positions = draw.integers(0, 200, num_tokens)
        return Sample(name, (query, key, value, cache[0], cache[1], slots, positions, table), options)

    small = torch.float8_e4m3fn
    yield sample("one token", 1, (1, 1), 2)
    yield sample("no norm", 21, (6, 2), 32, has_norm=False)
    yield sample("grouped heads", 33, (6, 2), 32, num_padding=5)
    yield sample("float32 weights", 3, (4, 2), 32, weight_dtype=torch.float32)
    yield sample("large heads", 2, (2, 1), 256)
    yield sample("many heads", 3, (19, 9), 128)
    yield sample("part of the head", 9, (4, 4), 80, rot_dim=32)
    yield sample("norm alone", 3, (4, 2), 24, rot_dim=0)
    yield sample("odd half, no norm", 5, (2, 1), 14, has_norm=False, num_padding=1)
    yield sample("8-bit cache", 17, (4, 2), 64, num_padding=2, cache_dtype=small)
    yield sample("8-bit cache, no norm, part", 7, (3, 1), 48, rot_dim=16, has_norm=False, cache_dtype=small)
    yield sample("8-bit cache, scales", 19, (4, 2), 64, num_padding=2, cache_dtype=small, is_scaled=True)
    part: dict[str, Any] = {"rot_dim": 16, "has_norm": False, "cache_dtype": small}
    yield sample("8-bit cache, scales, no norm, part", 5, (36, 34), 32, **part, is_scaled=True)
    yield sample("neighbours", 9, (6, 2), 32, interleaved=True, num_padding=2)
    yield sample("neighbours, part", 5, (3, 1), 80, rot_dim=22, interleaved=True)
    yield sample("neighbours, no norm", 3, (19, 9), 128, has_norm=False, interleaved=True)
    yield sample("neighbours, 8-bit cache, scales, part", 7, (4, 2), 48, **part, interleaved=True, is_scaled=True)
    yield sample("padding only", 2, (2, 1), 16, num_padding=2)
    yield sample("no tokens", 0, (2, 1), 16)


@op(
    samples=_samples,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1.6e-2, 1.6e-2)},
)
def rope_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    kv_scales: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Normalises and rotates queries and keys, and stores keys and values in the KV cache.

    Arithmetic is in float32, and each result is rounded once.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, may be a strided view of contiguous heads. It is changed in place.
        key: `[num_tokens, num_kv_heads, head_dim]`, may be a strided view of contiguous heads. It is only read.
        value: The shape and dtype of the key, and the same conditions.
        k_cache: `[num_blocks, num_kv_heads, block_size, head_dim]`, the dtype of the key, or float8_e4m3fn, for which
            numbers are clamped to +-448, or on a CPU int8, for which they are clamped to +-127. It is changed in place.
        v_cache: The shape, dtype and strides of `k_cache`. It is changed in place.
        slot_mapping: `[num_tokens]` int64, distinct slots `block_id * block_size + offset`. A token with a negative
            slot is padding, and is not stored.
        positions: `[num_tokens]` int64, rows of `cos_sin`.
        cos_sin: `[max_position, rot_dim]` float32: the cosines of the `rot_dim / 2` angles of a position, then the
            sines. `rot_dim <= head_dim`; the dimensions after it are not rotated.
        q_weight: `[head_dim]`, the dtype of the query or float32: the weight of the norm of query heads. None for no
            norm.
        k_weight: The same for key heads, in the same dtype. Both are given, or neither.
        eps: The number that the norm adds to the mean square.
        kv_scales: `[2, num_kv_heads]` float32, contiguous, for an 8-bit cache: the number by which the keys of each
            head are divided before they are rounded, then the same for values. None to divide by nothing.
        interleaved: Whether the numbers 2 i and 2 i + 1 of a head are a pair that is rotated; otherwise the numbers i
            and `rot_dim / 2 + i` are.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, rot_dim / 2] each
    query.copy_(_rotate(_norm(query, q_weight, eps), cos, sin, interleaved))
    rotated = _rotate(_norm(key, k_weight, eps), cos, sin, interleaved)
    store_kv.plain(rotated, value, k_cache, v_cache, slot_mapping, kv_scales=kv_scales)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if weight is None else wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned, rest = x.tensor_split((2 * cos.shape[-1],), dim=-1)
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    first, second = pairs.unbind(-1)  # [num_tokens, num_heads, rot_dim / 2] each
    out = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1 if interleaved else -2)
    return torch.cat((out.flatten(-2), rest), dim=-1)
