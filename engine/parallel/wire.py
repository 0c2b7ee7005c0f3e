"""The form of the messages between ranks: JSON, and after it the bytes of the arrays in it.

A message stands only for plain values, arrays and errors of this package. So reading one runs no code that the other
end has chosen, as unpickling would.

In the JSON, a dict with one key, the mark, stands for an array or an error. The mark is a number of underscores; the
message begins with that number. It is a name that no dict of the value has, so every dict arrives as it was sent.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from typing import Any

import numpy as np

from ..errors import MillraceError, RequestError

__all__ = ["Buffer", "decode", "encode"]

Buffer = bytes | bytearray | memoryview

_SIZES = struct.Struct("<II")
"""Length of the JSON in bytes, and number of underscores of the mark."""

_ARRAY, _ERROR = "array", "error"
_FORMATS = frozenset("?bBhHiIlLqQefd")
"""Types of the elements of arrays, as `struct` names them."""


def encode(value: Any) -> bytes:
    """Returns a message.

    Args:
        value: None, booleans, numbers, text, errors of this package, arrays (any object with a buffer of numbers), and
            lists and dicts of such values. The keys of a dict are text. Tuples arrive as lists.
    """
    for length in itertools.count(1):
        text, arrays, is_clear = _marked(value, "_" * length)
        if is_clear:
            return b"".join((_SIZES.pack(len(text), length), text, *arrays))
    raise AssertionError


def _marked(value: Any, mark: str) -> tuple[bytes, list[bytes], bool]:
    """Returns the JSON of a value with a mark, the bytes of its arrays, and whether no dict in it has the mark."""
    arrays: list[bytes] = []
    num_marked = 0

    def name(item: Any) -> dict[str, Any]:
        nonlocal num_marked
        num_marked += 1
        if isinstance(item, MillraceError):
            told = RequestError.from_exception(item)
            return {mark: [_ERROR, told.kind, told.message]}
        view = memoryview(item)
        assert view.format in _FORMATS, f"a rank was about to send an array of {view.format!r}"
        arrays.append(view.tobytes())
        return {mark: [_ARRAY, view.format, view.shape]}

    text = json.dumps(value, default=name, separators=(",", ":"))
    return text.encode(), arrays, text.count(f'"{mark}":') == num_marked


def decode(message: Buffer) -> Any:
    """Returns the value of a message of `encode`.

    Raises:
        ValueError: The message was not made by `encode`.
    """
    view = memoryview(message)
    if len(view) < _SIZES.size:
        raise ValueError(f"a message has {len(view)} bytes, fewer than the length of its text takes")
    size, length = _SIZES.unpack_from(view)
    if size + _SIZES.size > len(view) or length > size:
        raise ValueError(f"a message of {len(view)} bytes has a text of {size} and a mark of {length}")
    place, mark = _SIZES.size + size, "_" * length

    def restore(item: dict[str, Any]) -> Any:
        nonlocal place
        if mark not in item:
            return item
        kind, *told = item[mark]
        if kind == _ERROR:
            name, text = told
            return RequestError(name, text, False).to_exception()
        array = _read_array(view, place, *told)
        place += array.nbytes
        return array[()]  # An array without dimensions becomes a number.

    try:
        value = json.loads(bytes(view[_SIZES.size : place]), object_hook=restore)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"a message has a text that is not one of ours: {error}") from error
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
