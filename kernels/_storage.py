"""Reading and writing numbers in numba kernels: float32, 8-bit integers, and the bits of smaller floats (`as_storage`).

A kernel calls `widen` and `store`, and numba chooses the conversion by the element type at compile time. Kernels of
several files may use them, unlike other arithmetic (`_numba.py` says why), because number formats do not change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import types
from numba.extending import overload

from ._numba import Array, Scalar, bits_from_float, float_from_bits

__all__ = ["store", "widen"]


def widen(stored: Scalar) -> Scalar:
    """Returns a stored number, which is a float32, an 8-bit integer or the bits of a smaller float, as float32."""
    raise NotImplementedError("only compiled code calls this")


@overload(widen)
def _choose_widen(stored: Scalar) -> Callable[[Scalar], Scalar]:
    narrow = {types.uint16: _widen_bfloat16, types.int16: _widen_float16, types.uint8: _widen_float8}
    narrow[types.int8] = _widen_int8
    return narrow.get(stored, _widen_float32)


def _widen_float32(stored: Scalar) -> Scalar:
    return stored


def _widen_int8(stored: Scalar) -> Scalar:
    return np.float32(stored)


def _widen_bfloat16(stored: Scalar) -> Scalar:
    return float_from_bits(np.uint32(stored) << np.uint32(16))


def _widen_float16(stored: Scalar) -> Scalar:
    bits = np.uint32(np.uint16(stored))
    magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
    # The bias of the exponent is 15 here and 127 in float32. A multiplication corrects it, for subnormals too.
    finite = bits_from_float(float_from_bits(magnitude) * np.float32(2.0**112))
    is_finite = magnitude < np.uint32(0x7C00 << 13)
    sign = (bits & np.uint32(0x8000)) << np.uint32(16)
    return float_from_bits(sign | (finite if is_finite else magnitude | np.uint32(0x7F800000)))


def _widen_float8(stored: Scalar) -> Scalar:
    bits = np.uint32(stored)
    magnitude = bits & np.uint32(0x7F)
    if magnitude == np.uint32(0x7F):  # NaN; there is no infinity
        return float_from_bits(np.uint32(0x7FC00000))
    # The bias of the exponent is 7 here.
    value = float_from_bits(magnitude << np.uint32(20)) * np.float32(2.0**120)
    return -value if bits & np.uint32(0x80) else value


def store(to: Array, index: int, x: Scalar) -> None:
    """Rounds a float32 to the number format of `to`, ties to even, and stores it."""
    raise NotImplementedError("only compiled code calls this")


@overload(store)
def _choose_store(to: Array, index: int, x: Scalar) -> Callable[[Array, int, Scalar], None]:
    stores = {types.uint16: _store_bfloat16, types.int16: _store_float16, types.uint8: _store_float8}
    stores[types.int8] = _store_int8
    return stores.get(to.dtype, _store_float32)


def _store_float32(to: Array, index: int, x: Scalar) -> None:
    to[index] = x


def _store_int8(to: Array, index: int, x: Scalar) -> None:
    to[index] = np.int8(np.rint(min(max(x, np.float32(-127)), np.float32(127))) if x == x else np.float32(0))


def _store_bfloat16(to: Array, index: int, x: Scalar) -> None:
    bits = bits_from_float(x)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    to[index] = np.uint16((rounded if x == x else np.uint32(0x7FC00000)) >> np.uint32(16))


def _store_float16(to: Array, index: int, x: Scalar) -> None:
    bits = bits_from_float(x)
    size = bits & np.uint32(0x7FFFFFFF)
    # Adding just under half of the last kept bit rounds, and the bias goes from 127 to 15. Numbers below 2^-14 are
    # multiples of 2^-24, which is the spacing of float32 at 1/2, so that adding 1/2 rounds to them.
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
    # The same as for float16, with 3 bits of mantissa, a bias of 7, and multiples of 2^-9 below 2^-6.
    normal = (size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1)) - np.uint32(120 << 23)) >> np.uint32(
        20
    )
    tiny = bits_from_float(float_from_bits(size) + np.float32(16384.0)) - np.uint32(0x46800000)
    code = tiny if size < np.uint32(0x3C800000) else normal
    code = code if x == x else np.uint32(0x7F)
    to[index] = np.uint8(code | ((bits >> np.uint32(24)) & np.uint32(0x80)))
