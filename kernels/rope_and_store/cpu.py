"""Norm, rotation and the write to the KV cache on the CPU: one pass in numba.

Every tensor is passed as the flat memory from its first number on, with its strides: a compiled loop over a head then
knows that its numbers lie side by side, and is vectorised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import types
from numba.extending import overload
from torch import Tensor

from .._numba import REORDER, Array, Scalar, as_storage, bits_from_float, float_from_bits, jit
from .._threads import team
from .op import rope_and_store

_MIN_PARALLEL_NUMBERS = 400_000
"""About 200 µs of one core: below it, threads cost more than they bring."""


@rope_and_store.register("cpu")
def rope_and_store_cpu(
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
) -> None:
    """Runs `rope_and_store` in numba, on the calling thread unless there is much to do.

    Raises:
        ValueError: One weight without the other, or heads that are not contiguous.
    """
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rope_and_store: one of q_weight and k_weight is None; give both or neither")
    if any(tensor.stride(-1) != 1 for tensor in (query, key, value, k_cache, v_cache, cos_sin)):
        raise ValueError("rope_and_store: the last stride of a tensor is not 1; heads and the table must be contiguous")
    num_tokens = len(query)
    if not num_tokens:
        return
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
    )
    if num_tokens * (query.shape[1] + 2 * key.shape[1]) * query.shape[2] < _MIN_PARALLEL_NUMBERS:
        _rope_and_store(0, num_tokens, *arguments)
    else:
        team.run(_rope_and_store, num_tokens, *arguments)


def _flat(tensor: Tensor) -> Array:
    """Returns the memory from the first number of a tensor to its last, as storage."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return as_storage(tensor.as_strided((span,), (1,)))


def _widen(stored: Scalar) -> Scalar:
    """Reads one stored number as float32: float32, or the bits that `as_storage` made of a smaller type."""
    raise NotImplementedError("only compiled code calls this")


@overload(_widen)
def _choose_widen(stored: Scalar) -> Callable[[Scalar], Scalar]:
    return {types.uint16: _widen_bfloat16, types.int16: _widen_float16}.get(stored, _widen_float32)


def _widen_float32(stored: Scalar) -> Scalar:
    return stored


def _widen_bfloat16(stored: Scalar) -> Scalar:
    return float_from_bits(np.uint32(stored) << np.uint32(16))


def _widen_float16(stored: Scalar) -> Scalar:
    bits = np.uint32(np.uint16(stored))
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    # The exponent is biased by 15 here and by 127 in float32. A product sets it right, for subnormals too.
    finite = bits_from_float(float_from_bits(magnitude) * np.float32(2.0**112))
    is_finite = magnitude < np.uint32(0x7C00 << 13)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    return float_from_bits(sign | (finite if is_finite else magnitude | np.uint32(0x7F800000)))


def _store(to: Array, index: int, x: Scalar) -> None:
    """Rounds a float32 to the kind of numbers in `to`, ties to even, and stores it."""
    raise NotImplementedError("only compiled code calls this")


@overload(_store)
def _choose_store(to: Array, index: int, x: Scalar) -> Callable[[Array, int, Scalar], None]:
    stores = {types.uint16: _store_bfloat16, types.int16: _store_float16, types.uint8: _store_float8}
    return stores.get(to.dtype, _store_float32)


def _store_float32(to: Array, index: int, x: Scalar) -> None:
    to[index] = x


def _store_bfloat16(to: Array, index: int, x: Scalar) -> None:
    bits = bits_from_float(x)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    to[index] = np.uint16((rounded if x == x else np.uint32(0x7FC00000)) >> np.uint32(16))


def _store_float16(to: Array, index: int, x: Scalar) -> None:
    bits = bits_from_float(x)
    size = bits & np.uint32(0x7FFFFFFF)
    # Just under half of what is cut off is added, and the bias goes from 127 to 15. What is below 2^-14 is a multiple
    # of 2^-24, the spacing of float32 at 1/2: adding 1/2 rounds to it.
    normal = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1)) - np.uint32(112 << 23)) >> np.uint32(
        13
    )
    tiny = bits_from_float(float_from_bits(size) + np.float32(0.5)) - np.uint32(0x3F000000)
    code = tiny if size < np.uint32(0x38800000) else normal
    code = np.uint32(0x7C00) if size >= np.uint32(0x477FF000) else code  # 65,520 and more round to infinity
    code = code if x == x else np.uint32(0x7E00)
    to[index] = np.int16(np.uint16(code | ((bits >> np.uint32(16)) & np.uint32(0x8000))))


def _store_float8(to: Array, index: int, x: Scalar) -> None:
    bits = bits_from_float(x)
    size = min(bits & np.uint32(0x7FFFFFFF), np.uint32(0x43E00000))  # 448, the largest
    # As for float16: 3 bits of mantissa, a bias of 7, and multiples of 2^-9 below 2^-6.
    normal = (size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1)) - np.uint32(120 << 23)) >> np.uint32(
        20
    )
    tiny = bits_from_float(float_from_bits(size) + np.float32(16384.0)) - np.uint32(0x46800000)
    code = tiny if size < np.uint32(0x3C800000) else normal
    code = code if x == x else np.uint32(0x7F)
    to[index] = np.uint8(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))


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
) -> None:
    """Does tokens `first` to `last - 1`. `shape`: query heads, KV heads, block size, head size."""
    num_heads, num_kv_heads, block_size, size = shape
    wide = np.empty(size, np.float32)
    for token in range(first, last):
        row = table[positions[token]]
        for head in range(num_heads):
            start = token * strides[0] + head * strides[1]
            x = query[start : start + size]
            _norm_and_rotate(x, x, q_weight, row, eps, wide)
        slot = slots[token]
        if slot < 0:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(num_kv_heads):
            start = token * strides[2] + head * strides[3]
            to = block * cache_strides[0] + head * cache_strides[1] + offset * cache_strides[2]
            _norm_and_rotate(key[start : start + size], k_cache[to : to + size], k_weight, row, eps, wide)
            start = token * strides[4] + head * strides[5]
            to = block * cache_strides[3] + head * cache_strides[4] + offset * cache_strides[5]
            new, stored = value[start : start + size], v_cache[to : to + size]
            for d in range(size):
                _store(stored, d, _widen(new[d]))


@jit(REORDER)
def _norm_and_rotate(x: Array, to: Array, weight: Array | None, row: Array, eps: Scalar, wide: Array) -> None:
    """Writes head `x`, normed and rotated, at `to`. `wide` has room for a head."""
    size, half, scale = len(x), len(row) // 2, np.float32(1)
    if weight is None:
        for d in range(size):
            wide[d] = _widen(x[d])
    else:
        squares = np.float32(0)
        for d in range(size):
            number = _widen(x[d])
            squares += number * number
            wide[d] = number * weight[d]
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
    cos, sin, second, to_second = row[:half], row[half:], wide[half:], to[half:]
    for d in range(half):
        a, b = scale * wide[d], scale * second[d]
        _store(to, d, a * cos[d] - b * sin[d])
        _store(to_second, d, b * cos[d] + a * sin[d])
    for d in range(2 * half, size):
        _store(to, d, scale * wide[d])
