"""The form of the messages between ranks: JSON, and after it the bytes of the arrays in it.

A message can stand only for plain values, arrays and errors of this package. So reading one runs no code that the other
end has chosen, as unpickling would.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np

from ..errors import MillraceError, RequestError

__all__ = ["Buffer", "decode", "encode"]

Buffer = bytes | bytearray | memoryview

_SIZE = struct.Struct("<I")
_ARRAY, _ERROR = "__array__", "__error__"
_FORMATS = frozenset("?bBhHiIlLqQefd")
"""Types of the elements of arrays, as `struct` names them."""


def encode(value: Any) -> bytes:
    """Returns a message.

    Args:
        value: None, booleans, numbers, text, errors of this package, arrays (any object with a buffer of numbers), and
            lists and dicts of such values. The keys of a dict are text. Tuples arrive as lists.
    """
    arrays: list[bytes] = []

    def name(item: Any) -> dict[str, Any]:
        if isinstance(item, MillraceError):
            told = RequestError.from_exception(item)
            return {_ERROR: [told.kind, told.message]}
        view = memoryview(item)
        assert view.format in _FORMATS, f"a rank was about to send an array of {view.format!r}"
        arrays.append(view.tobytes())
        return {_ARRAY: [view.format, view.shape]}

    text = json.dumps(value, default=name, separators=(",", ":")).encode()
    return b"".join((_SIZE.pack(len(text)), text, *arrays))


def decode(message: Buffer) -> Any:
    """Returns the value of a message of `encode`.

    Raises:
        ValueError: The message was not made by `encode`.
    """
    view = memoryview(message)
    if len(view) < _SIZE.size:
        raise ValueError(f"a message has {len(view)} bytes, fewer than the length of its text takes")
    place = _SIZE.size + _SIZE.unpack_from(view)[0]

    def restore(item: dict[str, Any]) -> Any:
        nonlocal place
        if _ERROR in item:
            kind, text = item[_ERROR]
            return RequestError(kind, text, False).to_exception()
        if _ARRAY not in item:
            return item
        array = _read_array(view, place, *item[_ARRAY])
        place += array.nbytes
        return array[()]  # An array without dimensions becomes a number.

    value = json.loads(bytes(view[_SIZE.size : place]), object_hook=restore)
    if place != len(view):
        raise ValueError(f"a message has {len(view)} bytes, but its text accounts for {place}")
    return value


def _read_array(view: memoryview, place: int, kind: str, shape: list[int]) -> np.ndarray:
    """Returns a copy of the array that begins at `place`."""
    if kind not in _FORMATS or any(size < 0 for size in shape):
        raise ValueError(f"a message holds an array of {kind!r} with shape {shape}")
    dtype = np.dtype(kind)
    if math.prod(shape) * dtype.itemsize > len(view) - place:
        raise ValueError(f"a message of {len(view)} bytes holds an array of {kind!r} with shape {shape}")
    return np.ndarray(shape, dtype, buffer=view, offset=place).copy()
