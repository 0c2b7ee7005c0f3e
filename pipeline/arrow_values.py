"""Python values and the types of Arrow columns: whether a value fits a type, and columns made of values."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)
"""Errors that Arrow raises for a value that does not fit a type."""


def fits(value: Any, kind: pa.DataType | None) -> bool:
    """Whether a column of a type can hold a value. None stands for any type that Arrow has."""
    try:
        pa.array([value], kind)
    except UNFIT:
        return False
    return True


def to_array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """Makes a column of values, of the given type if all values fit it; otherwise their own type decides."""
    if kind is not None:
        try:
            return pa.array(values, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass  # The user's postprocess has given the column another meaning.
    return pa.array(values)
