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
    interleaved: bool = False,
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
        interleaved,
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
    interleaved: bool,
) -> None:
    """Computes tokens `first` to `last - 1`. `shape` is (query heads, KV heads, block size, head size)."""
    num_heads, num_kv_heads, block_size, size = shape
    wide, one = np.empty(size, np.float32), np.float32(1)
    for token in range(first, last):
        row = table[positions[token]]
        for head in range(num_heads):
            start = token * strides[0] + head * strides[1]
            x = query[start : start + size]
            _norm(x, q_weight, eps, wide)
            _rotate(wide, x, row, one, interleaved)
        slot = slots[token]
        if slot < 0:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(num_kv_heads):
            start = token * strides[2] + head * strides[3]
            to = block * cache_strides[0] + head * cache_strides[1] + offset * cache_strides[2]
            _norm(key[start : start + size], k_weight, eps, wide)
            _rotate(wide, k_cache[to : to + size], row, scales[0, head], interleaved)
            start = token * strides[4] + head * strides[5]
            to = block * cache_strides[3] + head * cache_strides[4] + offset * cache_strides[5]
            new, stored = value[start : start + size], v_cache[to : to + size]
            for d in range(size):
                store(stored, d, widen(new[d]) / scales[1, head])


@jit(REORDER)
def _norm(x: Array, weight: Array | None, eps: Scalar, wide: Array) -> None:
    """Writes head `x` to the buffer `wide` in float32, and normalises it there if there is a weight."""
    size = len(x)
    if weight is None:
        for d in range(size):
            wide[d] = widen(x[d])
        return
    squares = np.float32(0)
    for d in range(size):
        number = widen(x[d])
        squares += number * number
        wide[d] = number * weight[d]
    scale = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
    for d in range(size):
        wide[d] *= scale


@jit(REORDER)
def _rotate(wide: Array, to: Array, row: Array, divisor: Scalar, interleaved: bool) -> None:
    """Writes the float32 head `wide`, rotated and divided by `divisor`, to `to`."""
    half = len(row) // 2
    cos, sin, second, to_second = row[:half], row[half:], wide[half:], to[half:]
    if interleaved:
        for d in range(half):
            a, b = wide[2 * d], wide[2 * d + 1]
            store(to, 2 * d, (a * cos[d] - b * sin[d]) / divisor)
            store(to, 2 * d + 1, (b * cos[d] + a * sin[d]) / divisor)
    else:
        for d in range(half):
            a, b = wide[d], second[d]
            store(to, d, (a * cos[d] - b * sin[d]) / divisor)
            store(to_second, d, (b * cos[d] + a * sin[d]) / divisor)
    for d in range(2 * half, len(wide)):
        store(to, d, wide[d] / divisor)
