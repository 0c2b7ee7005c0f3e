"""Row ids: twelve bytes from the place of a row in the input, or from its key.

An array of ids has strings of twelve bytes (`ID_TYPE`), which numpy sorts by their bytes. `as_bytes` returns Python
values, because numpy itself drops zero bytes at the end of a string.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..arrow_values import python_values

ROW_ID_BYTES = 12
ID_TYPE = np.dtype(f"S{ROW_ID_BYTES}")


def key_ids(table: pa.Table, key: Sequence[str]) -> np.ndarray:
    """Returns row ids that are hashes of the rows' values in the key columns.

    Args:
        table: Table of the rows, with the columns of the key.
        key: Names of the columns of the key.

    Returns:
        Ids of shape [num_rows]: 96 bits of blake2b. Among a billion keys, the chance that two share an id is 1e-11.
    """
    values = zip(*(python_values(table[name]) for name in key), strict=True)
    empty = hashlib.blake2b(digest_size=ROW_ID_BYTES)  # A copy takes half the time of a new one.
    digests = []
    for one in values:
        digest = empty.copy()
        digest.update(repr(one).encode())
        digests.append(digest.digest())
    return from_bytes(digests)


def from_arrow(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Returns an Arrow column of ids as an array of `ID_TYPE`. A column of `binary(12)` in one piece is not copied."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.type != pa.binary(ROW_ID_BYTES):
        array = array.cast(pa.binary(ROW_ID_BYTES))
    if not len(array):
        return np.empty(0, ID_TYPE)
    return np.frombuffer(array.buffers()[1], dtype=ID_TYPE)[array.offset : array.offset + len(array)]


def to_arrow(ids: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Returns ids as an Arrow column of `binary(12)`."""
    data = pa.py_buffer(np.ascontiguousarray(ids))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ROW_ID_BYTES), len(ids), [None, data])


def as_bytes(ids: np.ndarray) -> list[bytes]:
    """Returns an array of ids as a list of Python bytes of length twelve."""
    return [bytes(one) for one in ids.view(f"V{ROW_ID_BYTES}")]


def from_bytes(values: Sequence[bytes]) -> np.ndarray:
    """Returns an array of `ID_TYPE` from Python bytes of length twelve."""
    return np.frombuffer(b"".join(values), dtype=ID_TYPE)
