"""Python values and the types of Arrow columns: whether a value fits a type, and columns made of values."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)
"""Errors that Arrow raises for a value that does not fit a type."""


def fits(value: Any, kind: pa.DataType | None) -> bool:
    """Returns whether a column of a type can hold a value; for a type of None, whether any Arrow type can."""
    try:
        pa.array([value], kind)
    except UNFIT:
        return False
    return True


def to_array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """Returns a column of values, with the given type if all values fit it, otherwise with a type from Arrow."""
    if kind is not None:
        try:
            return pa.array(values, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass  # The user's `postprocess` uses the column for values of another type.
    return pa.array(values)
