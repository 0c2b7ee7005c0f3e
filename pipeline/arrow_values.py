"""Python values and Arrow columns: which values a type holds, columns made of values, and values read from columns."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

UNFIT = (
    *(ValueError, TypeError, OverflowError, RecursionError),
    *(pa.ArrowNotImplementedError, pa.ArrowCapacityError),
)
"""Errors that Arrow raises for a value that does not fit a type. Text with half of a surrogate pair is a ValueError."""

UNWRITABLE = (UnicodeError, OverflowError, RecursionError)
"""Errors of `UNFIT` for a value that no column can hold, of whatever type: bad text, huge numbers, deep lists."""

MAX_DEPTH = 48
"""Most levels of lists and structs. Arrow reads no deeper tables: its own format ends at 63, Parquet at 49 lists."""

MAX_INT64 = 2**63 - 1
MAX_UINT64 = 2**64 - 1


class ArrowValue:
    """A value of an Arrow column that Python has no equal of, such as text that is not UTF-8 or a day of year 12000.

    It can be pickled, and written to a column of its type. Whatever wants to read it gets an error.

    Attributes:
        array: Arrow array of length 1 with the value.
    """

    __slots__ = ("array",)

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrowValue) and self.array.equals(other.array)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"<{self.array.type} {self}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowValue, (pa.array([self.array[0]], self.array.type),)  # A copy, without the rest of the column.

    def __str__(self) -> str:
        kind = self.array.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            raw = self.array.cast(pa.large_binary())[0].as_py()
            return str(raw.decode("utf-8", "backslashreplace"))
        try:
            return str(self.array[0].cast(pa.string()).as_py())
        except UNFIT:
            return "..."


def quoted(value: Any) -> str:
    """Returns a value as an error message quotes it: its `repr`, shortened to 200 characters however deep it is."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    return shortener.repr(value)[:200]


def fits(value: Any, kind: pa.DataType | None) -> bool:
    """Returns whether a column of a type can hold a value; for a type of None, whether any Arrow type can."""
    return misfit(value, kind) is None


def misfit(value: Any, kind: pa.DataType | None) -> BaseException | None:
    """Returns the error that says why a column cannot hold a value, or None. Arguments as in `fits`."""
    try:
        make_array([value], kind)
    except UNFIT as error:
        return error
    return None


def to_array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """Returns a column of values, with the given type if all values fit it, otherwise with a type from Arrow."""
    if kind is not None:
        try:
            return make_array(values, kind)
        except UNFIT:
            pass  # The user's `postprocess` uses the column for values of another type.
    return make_array(values, None)


def make_array(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    """Returns a column of values.

    Args:
        values: The values.
        kind: Type of the column; None for a type that holds the values exactly, so that 2**63 is unsigned.

    Raises:
        ValueError: A value does not fit, as do the other errors of `UNFIT`.
    """
    if any(isinstance(value, ArrowValue) for value in values):
        return _join(values, kind)
    if kind is not None:
        return pa.array(values, kind)
    try:
        array = pa.array(values)
    except OverflowError:
        array = pa.array(values, _exact(pa.array([_signed(value) for value in values]).type, values))
    if _has_microseconds(array.type):
        array = pa.array(values, _exact(array.type, values))
    if depth(array.type) > MAX_DEPTH:
        raise RecursionError(f"the value has more than {MAX_DEPTH} levels of lists and objects")
    return array


def depth(kind: pa.DataType) -> int:
    """Returns the number of levels of lists and structs of a type; 0 if the type is plain."""
    return max((1 + depth(kind.field(at).type) for at in range(kind.num_fields)), default=0)


def _join(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    kind = kind or next(value.array.type for value in values if isinstance(value, ArrowValue))
    parts = [value.array if isinstance(value, ArrowValue) else pa.array([value], kind) for value in values]
    return pa.concat_arrays([part if part.type == kind else part.cast(kind) for part in parts])


def _signed(value: Any) -> Any:
    """Returns a value with 0 in place of every integer that only an unsigned column holds."""
    if isinstance(value, list | tuple):
        return [_signed(one) for one in value]
    if isinstance(value, dict):
        return {name: _signed(one) for name, one in value.items()}
    return 0 if isinstance(value, int) and MAX_INT64 < value <= MAX_UINT64 else value


def _has_microseconds(kind: pa.DataType) -> bool:
    if kind.num_fields:
        return any(_has_microseconds(kind.field(at).type) for at in range(kind.num_fields))
    return kind == pa.duration("us") or (pa.types.is_timestamp(kind) and kind.unit == "us")


def _exact(kind: pa.DataType, values: Iterable[Any]) -> pa.DataType:
    """Returns the type that Arrow found for values, unsigned or with nanoseconds where a value needs that."""
    given = [value for value in values if value is not None]
    if pa.types.is_list(kind):
        return pa.list_(_exact(kind.value_type, (one for value in given for one in value)))
    if pa.types.is_struct(kind):
        fields = [(field.name, _exact(field.type, (value.get(field.name) for value in given))) for field in kind]
        return pa.struct(fields)
    if pa.types.is_int64(kind) and any(value > MAX_INT64 for value in given):
        return pa.uint64()
    if pa.types.is_timestamp(kind) and any(getattr(value, "nanosecond", 0) for value in given):
        return pa.timestamp("ns", kind.tz)
    if pa.types.is_duration(kind) and any(getattr(value, "nanoseconds", 0) for value in given):
        return pa.duration("ns")
    return kind
