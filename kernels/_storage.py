"""The numbers that numba kernels read and write: float32, and the bits that `as_storage` makes of smaller floats.

A kernel calls `widen` and `store`, and numba picks the conversion by the element type when it compiles. They may be
shared between files, unlike other arithmetic (see `_numba.py`): what a format's bits mean does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import types
from numba.extending import overload

from ._numba import Array, Scalar, bits_from_float, float_from_bits

__all__ = ["store", "widen"]


def widen(stored: Scalar) -> Scalar:
    """Reads one stored number as float32: float32, or the bits that `as_storage` made of a smaller type."""
    raise NotImplementedError("only compiled code calls this")


@overload(widen)
def _choose_widen(stored: Scalar) -> Callable[[Scalar], Scalar]:
    narrow = {types.uint16: _widen_bfloat16, types.int16: _widen_float16, types.uint8: _widen_float8}
    return narrow.get(stored, _widen_float32)


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


def _widen_float8(stored: Scalar) -> Scalar:
    bits = np.uint32(stored)
    magnitude = bits & np.uint32(0x7F)
    if magnitude == np.uint32(0x7F):  # NaN; there is no infinity
        return float_from_bits(np.uint32(0x7FC00000))
    # As for float16: the bias is 7 here.
    value = float_from_bits(magnitude << np.uint32(20)) * np.float32(2.0**120)
    return -value if bits & np.uint32(0x80) else value


def store(to: Array, index: int, x: Scalar) -> None:
    """Rounds a float32 to the kind of numbers in `to`, ties to even, and stores it."""
    raise NotImplementedError("only compiled code calls this")


@overload(store)
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
