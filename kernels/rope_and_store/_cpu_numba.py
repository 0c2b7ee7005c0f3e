"""Norm, rotation and the write to the KV cache in numba, for CPUs and dtypes that `native.cpp` does not support.

Every tensor is passed as its flat memory and its strides. A compiled loop over a head is then over contiguous numbers,
and is vectorised.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .._numba import REORDER, Array, Scalar, as_storage, jit
from .._storage import store, widen
from .._threads import team

_MIN_PARALLEL_NUMBERS = 400_000
"""About 200 µs of one core. Smaller calls do not gain from threads."""


def rope_and_store_numba(
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
) -> None:
    """Runs `rope_and_store`, small calls on the calling thread and large ones on several."""
    num_tokens = len(query)
    arguments = (
        *(_flat(tensor) for tensor in (query, key, value, k_cache, v_cache)),
        (query.shape[1], key.shape[1], k_cache.shape[2], query.shape[2]),
        (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        (*k_cache.stride()[:3], *v_cache.stride()[:3]),
        slot_mapping.numpy(),
        positions.numpy(),
        cos_sin.numpy(),
        None if q_weight is None else q_weight.detach().float().numpy(),
        None if k_weight is None else k_weight.detach().float().numpy(),
        np.float32(eps),
        np.ones((2, key.shape[1]), np.float32) if kv_scales is None else kv_scales.numpy(),
    )
    if num_tokens * (query.shape[1] + 2 * key.shape[1]) * query.shape[2] < _MIN_PARALLEL_NUMBERS:
        _rope_and_store(0, num_tokens, *arguments)
    else:
        team.run(_rope_and_store, num_tokens, *arguments)


def _flat(tensor: Tensor) -> Array:
    """Returns the memory from the first to the last number of a tensor as an array for numba."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return as_storage(tensor.as_strided((span,), (1,)))


@jit(REORDER)
def _rope_and_store(
    first: int,
    last: int,
    query: Array,
    key: Array,
    value: Array,
    k_cache: Array,
    v_cache: Array,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    cache_strides: tuple[int, ...],
    slots: Array,
    positions: Array,
    table: Array,
    q_weight: Array | None,
    k_weight: Array | None,
    eps: Scalar,
    scales: Array,
) -> None:
    """Computes tokens `first` to `last - 1`. `shape` is (query heads, KV heads, block size, head size)."""
    num_heads, num_kv_heads, block_size, size = shape
    wide, one = np.empty(size, np.float32), np.float32(1)
    for token in range(first, last):
        row = table[positions[token]]
        for head in range(num_heads):
            start = token * strides[0] + head * strides[1]
            x = query[start : start + size]
            _norm_and_rotate(x, x, q_weight, row, eps, one, wide)
        slot = slots[token]
        if slot < 0:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(num_kv_heads):
            start = token * strides[2] + head * strides[3]
            to = block * cache_strides[0] + head * cache_strides[1] + offset * cache_strides[2]
            _norm_and_rotate(
                key[start : start + size], k_cache[to : to + size], k_weight, row, eps, scales[0, head], wide
            )
            start = token * strides[4] + head * strides[5]
            to = block * cache_strides[3] + head * cache_strides[4] + offset * cache_strides[5]
            new, stored = value[start : start + size], v_cache[to : to + size]
            for d in range(size):
                store(stored, d, widen(new[d]) / scales[1, head])


@jit(REORDER)
def _norm_and_rotate(
    x: Array, to: Array, weight: Array | None, row: Array, eps: Scalar, divisor: Scalar, wide: Array
) -> None:
    """Writes head `x`, normalised, rotated and divided by `divisor`, to `to`. `wide` is a buffer for one head."""
    size, half, scale = len(x), len(row) // 2, np.float32(1)
    if weight is None:
        for d in range(size):
            wide[d] = widen(x[d])
    else:
        squares = np.float32(0)
        for d in range(size):
            number = widen(x[d])
            squares += number * number
            wide[d] = number * weight[d]
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
    cos, sin, second, to_second = row[:half], row[half:], wide[half:], to[half:]
    for d in range(half):
        a, b = scale * wide[d], scale * second[d]
        store(to, d, (a * cos[d] - b * sin[d]) / divisor)
        store(to_second, d, (b * cos[d] + a * sin[d]) / divisor)
    for d in range(2 * half, size):
        store(to, d, scale * wide[d] / divisor)
