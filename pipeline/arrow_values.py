"""Python values and Arrow columns: which values a type holds, columns made of values, and values read from columns."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .json_text import json_cell, to_json, value_of_cell
from .mixed_values import JSON, MAX_DEPTH, MAX_FIELDS, MixedTypesError, Survey, holds_json, join_exactly, keeps, survey

UNFIT = (
    *(ValueError, TypeError, OverflowError, RecursionError),
    *(pa.ArrowNotImplementedError, pa.ArrowCapacityError),
)
"""Errors that Arrow raises for a value that does not fit a type. Text with half of a surrogate pair is a ValueError."""

UNWRITABLE = (UnicodeError, OverflowError, RecursionError)
"""Errors of `UNFIT` for a value that no column can hold, of whatever type: bad text, huge numbers, deep lists."""

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
        return ArrowValue, (self._copied(),)

    def __str__(self) -> str:
        kind = self.array.type
        try:
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                raw: bytes = self.array.cast(pa.large_binary())[0].as_py()
                return raw.decode("utf-8", "backslashreplace")
            return str(self.array[0].cast(pa.string()).as_py())
        except UNFIT:
            return b"".join(buffer.to_pybytes() for buffer in self._copied().buffers() if buffer is not None).hex()

    @property
    def parts(self) -> list[Any] | dict[str, Any] | None:
        """The values in a list or struct, as Python values where Python has equals of them; None of a plain value."""
        kind = self.array.type
        if pa.types.is_struct(kind):
            pairs = [(field.name, _python_value(one)) for field, one in zip(kind, self.array.flatten(), strict=True)]
            return dict(pairs) if len(set(kind.names)) == len(pairs) else [list(pair) for pair in pairs]
        if pa.types.is_map(kind):
            start, stop = self.array.offsets[0].as_py(), self.array.offsets[1].as_py()
            inner = [pa.chunked_array([one[start:stop]]) for one in (self.array.keys, self.array.items)]
            return [list(pair) for pair in zip(*map(python_values, inner), strict=True)]
        return python_values(pa.chunked_array([self.array.flatten()])) if kind.num_fields else None

    def _copied(self) -> pa.Array:
        """Returns an array of the value alone, without the buffers of the column that it came from."""
        return pa.array([self.array[0]], self.array.type)


def to_rows(table: pa.Table, schema: pa.Schema | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a table as Python values. A value that Python has no equal of is an `ArrowValue`.

    Args:
        table: The table.
        schema: Columns of the source of the table, for rows as a job reads them: the text of columns that `holds_json`
            is parsed, and a struct lacks the fields that are null, since it has a field for each key of other rows.
    """
    parsed = {field.name for field in schema or () if holds_json(field)}
    values = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        own = python_values(column)
        if name in parsed:
            own = [value_of_cell(value) for value in own]
        elif schema is not None and has_struct(column.type):
            own = [_without_null_fields(value) for value in own]
        values.append(own)
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*values, strict=True)] or [
        {} for _ in range(table.num_rows)
    ]


def _without_null_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_null_fields(one) for name, one in value.items() if one is not None}
    return type(value)(map(_without_null_fields, value)) if type(value) in (list, tuple) else value


def python_values(column: pa.ChunkedArray) -> list[Any]:
    """Returns the values of a column as Python values. A value that Python has no equal of is an `ArrowValue`."""
    is_exact = not _has_nanosecond_times(column.type)
    try:
        if is_exact:
            return list(column.to_pylist())
    except (KeyError, *UNFIT):  # An unknown time zone is a KeyError.
        pass
    return [_python_value(chunk.slice(at, 1)) for chunk in column.chunks for at in range(len(chunk))]


def _python_value(array: pa.Array) -> Any:
    try:
        value = array[0].as_py()
        if not _has_nanosecond_times(array.type) or pa.array([value], array.type).equals(array):
            return value
    except (KeyError, *UNFIT):
        pass
    return ArrowValue(array)


def _has_nanosecond_times(kind: pa.DataType) -> bool:
    """Returns whether a type has times of day in nanoseconds, which Python cuts to microseconds without an error."""
    return kind == pa.time64("ns") or any(_has_nanosecond_times(kind.field(at).type) for at in range(kind.num_fields))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns a type that holds the same values, and is no view and not run-end encoded: few functions take those."""
    return _rebuilt(kind, lambda leaf: {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(leaf, leaf))


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Returns a plain type that holds the same values, and that Parquet has: no seconds, no negative scale."""

    def stored_leaf(leaf: pa.DataType) -> pa.DataType:
        if pa.types.is_timestamp(leaf) and leaf.unit == "s":
            return pa.timestamp("ms", leaf.tz)
        if pa.types.is_decimal(leaf) and leaf.scale < 0:
            return pa.decimal256(min(76, leaf.precision - leaf.scale), 0)
        return pa.time32("ms") if leaf == pa.time32("s") else leaf

    return _rebuilt(plain_type(kind), stored_leaf)


def _rebuilt(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Returns a type with other types in place of its innermost ones, and with plain lists and values around them."""
    types = pa.types

    def field(one: pa.Field) -> pa.Field:
        return one.with_type(_rebuilt(one.type, leaf))

    if types.is_run_end_encoded(kind):
        return _rebuilt(kind.value_type, leaf)
    if types.is_list_view(kind) or types.is_list(kind):
        return pa.list_(field(kind.value_field))
    if types.is_large_list_view(kind) or types.is_large_list(kind):
        return pa.large_list(field(kind.value_field))
    if types.is_fixed_size_list(kind):
        return pa.list_(field(kind.value_field), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([field(one) for one in kind])
    if types.is_map(kind):
        return pa.map_(_rebuilt(kind.key_type, leaf), field(kind.item_field))
    return leaf(kind)


def cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Returns a column in another type; lists and structs become JSON in a column of text.

    Raises:
        ValueError: A value does not fit, as do the other errors of `UNFIT`.
    """
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if _has_list_views(column.type):  # Arrow casts a list view with a null into a list of too few offsets.
        column = pa.chunked_array([make_array(python_values(column), plain_type(column.type))])
    if column.type == kind:
        return column
    if pa.types.is_string(kind) and not _has_text(column.type):
        texts = [None if value is None else _text_of(value, column.type) for value in python_values(column)]
        return pa.chunked_array([pa.array(texts, kind)])
    return column.cast(kind)


def _has_text(kind: pa.DataType) -> bool:
    """Returns whether Arrow casts the values of a type to the text that Python shows of them.

    Arrow writes a float of 1.0 as 1 and true in small letters, so a prompt would depend on the types of other files.
    """
    types = pa.types
    are_written = (types.is_integer, types.is_decimal, types.is_date, types.is_string, types.is_large_string)
    are_bytes = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_null)
    if types.is_dictionary(kind):
        return _has_text(kind.value_type)
    return any(holds(kind) for holds in (*are_written, *are_bytes))


def _text_of(value: Any, kind: pa.DataType) -> str:
    """Returns a value as text: JSON of a list or a struct, and otherwise the text that Python shows, as of a UUID."""
    is_nested = pa.types.is_nested(kind) or isinstance(value, list | tuple | dict)
    return to_json(value) if is_nested else str(value)


def _has_list_views(kind: pa.DataType) -> bool:
    is_view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return is_view or any(_has_list_views(kind.field(at).type) for at in range(kind.num_fields))


def plain(table: pa.Table) -> pa.Table:
    """Returns a table with the types of `plain_type`."""
    return pa.table([cast(column, plain_type(column.type)) for column in table.columns], names=table.column_names)


def json_field(name: str) -> pa.Field:
    """Returns a column of text in which lists and objects are JSON."""
    return pa.field(name, pa.string(), metadata=JSON)


def cell_values(column: pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """Returns the values of a column as Python values; in a field of `json_field`, what the JSON stands for."""
    values = python_values(column)
    return [value_of_cell(value) for value in values] if holds_json(field) else values


def field_array(values: Sequence[Any], field: pa.Field) -> pa.Array:
    """Returns a column of values as by `make_array`; in a field of `json_field`, all values but text become JSON."""
    if holds_json(field) and pa.types.is_string(field.type):
        values = [value if value is None or isinstance(value, str) else to_json(value) for value in values]
    return make_array(values, field.type)


def stored(table: pa.Table) -> pa.Table:
    """Returns a table in types that Parquet has. A column that no such type holds is text, or JSON in text."""
    columns = [_stored(column) for column in table.columns]
    fields = [
        json_field(field.name) if pa.types.is_nested(field.type) and pa.types.is_string(column.type) else field
        for field, column in zip(table.schema, columns, strict=True)
    ]
    schema = pa.schema([field.with_type(column.type) for field, column in zip(fields, columns, strict=True)])
    return pa.table(columns, schema=schema)


def _stored(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not has_empty_struct(column.type) and not _has_intervals(column.type):
        try:
            return cast(column, stored_type(column.type))
        except UNFIT:
            pass
    if pa.types.is_nested(column.type):
        return cast(column, pa.string())
    texts = [None if value is None else str(value) for value in python_values(column)]
    return pa.chunked_array([pa.array(texts, pa.string())])


def join(tables: Sequence[pa.Table]) -> pa.Table:
    """Returns the rows of all tables. A column whose values fit no common type is text, with JSON where it is not."""
    try:
        return join_exactly(tables)
    except UNFIT:
        names = dict.fromkeys(name for table in tables for name in table.column_names)
        joined = [_join_columns([_only(table, name) for table in tables]) for name in names]
        fields = [one.schema.field(0) for one in joined]
        return pa.table([one.column(0) for one in joined], schema=pa.schema(fields))


def _only(table: pa.Table, name: str) -> pa.Table:
    """Returns a table with one of the columns of another; with nulls, if that one has no such column."""
    return table.select([name]) if name in table.column_names else pa.table({name: pa.nulls(len(table))})


def _join_columns(tables: Sequence[pa.Table]) -> pa.Table:
    try:
        return join_exactly(tables)
    except UNFIT:
        name = tables[0].column_names[0]
        texts = [text for table in tables for text in _cells(table.column(0), table.schema.field(0))]
        return pa.table([pa.array(texts, pa.string())], schema=pa.schema([json_field(name)]))


def _cells(column: pa.ChunkedArray, field: pa.Field) -> Iterable[str | None]:
    """Returns the values of a column as text that `value_of_cell` reads: JSON, or text that is no JSON."""
    values = python_values(column)
    return values if holds_json(field) else [None if value is None else _cell_text(value) for value in values]


def _cell_text(value: Any) -> str | None:
    cell: str | None = json_cell(value_of_cell(to_json(value)))
    return cell


def has_struct(kind: pa.DataType) -> bool:
    """Returns whether a type is, or holds, a struct."""
    return pa.types.is_struct(kind) or any(has_struct(kind.field(at).type) for at in range(kind.num_fields))


def has_empty_struct(kind: pa.DataType) -> bool:
    """Returns whether a type is, or holds, a struct without fields."""
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(has_empty_struct(kind.field(at).type) for at in range(kind.num_fields))


def _has_intervals(kind: pa.DataType) -> bool:
    """Returns whether a type is, or holds, calendar intervals, which Parquet lacks."""
    return pa.types.is_interval(kind) or any(_has_intervals(kind.field(at).type) for at in range(kind.num_fields))


def quoted(value: Any) -> str:
    """Returns a value as an error message quotes it: its `repr`, shortened to 200 characters however deep it is."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 80
    return shortener.repr(value)[:200]


def fits(value: Any, kind: pa.DataType | pa.Field | None) -> bool:
    """Returns whether a column of a type can hold a value; for a type of None, whether any Arrow type can."""
    return misfit(value, kind) is None


def misfit(value: Any, kind: pa.DataType | pa.Field | None) -> BaseException | None:
    """Returns the error that says why a column cannot hold a value, or None. Arguments as in `fits`."""
    try:
        if isinstance(kind, pa.Field):
            field_array([value], kind)
        else:
            make_array([value], kind)
    except UNFIT as error:
        return error
    return None


def to_array(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    """Returns a column of values, with the given type if it gives all values back, otherwise with a type from Arrow."""
    if kind is not None:
        if (vectors := _vector_type(values, kind)) is not None:
            return pa.array(values, vectors)
        try:
            if keeps(values, kind):
                return make_array(values, kind)
        except UNFIT:
            pass  # The user's `postprocess` uses the column for values of another type.
    return make_array(values, None)


def _vector_type(values: Sequence[Any], kind: pa.DataType) -> pa.DataType | None:
    """Returns a list of fixed size for vectors of one length, or lists of such vectors, in a column of lists.

    Vectors are arrays only where the settings of a processor give all of them one length and type.
    """
    given = [value for value in values if value is not None]
    if kind != pa.list_(pa.float32()) or not given:
        return None
    if are_lists := isinstance(given[0], list):
        if not given[0] or not isinstance(given[0][0], np.ndarray) or not all(isinstance(one, list) for one in given):
            return None
        given = [vector for value in given for vector in value]
    shapes = {(value.dtype, value.shape) if isinstance(value, np.ndarray) else None for value in given}
    only = shapes.pop() if len(shapes) == 1 else None
    if only is None or len(only[1]) != 1:
        return None
    vectors = pa.list_(pa.from_numpy_dtype(only[0]), only[1][0])
    return pa.list_(vectors) if are_lists else vectors


def own_column(
    name: str, values: Sequence[Any], kind: pa.DataType | None, max_fields: int = MAX_FIELDS
) -> tuple[pa.Field, pa.Array]:
    """Returns a column as by `to_array`, with its field. Objects with many keys together are JSON in a column of text.

    Args:
        name: Name of the column.
        values: The values.
        kind: As in `to_array`.
        max_fields: Most keys that objects may have together in a struct; with 0, all objects are JSON.

    Raises:
        ValueError: Arrow has no type for the values, as the other errors of `UNFIT` say too.
    """
    if not any(isinstance(value, ArrowValue) for value in values) and not _fit(values, kind):
        found = survey(values)
        if found.has_objects and found.num_keys >= max_fields:
            return json_field(name), _json_array(values, found)
    array = to_array(values, kind)
    return pa.field(name, array.type), array


def _fit(values: Sequence[Any], kind: pa.DataType | None) -> bool:
    try:
        return kind is not None and keeps(values, kind)
    except UNFIT:
        return False


def _json_array(values: Sequence[Any], found: Survey) -> pa.Array:
    """Returns lists and objects as JSON. A value in them of a type that Arrow lacks is refused as in other columns."""
    for example in found.examples.values():
        if not isinstance(example, int):  # JSON has integers of any length.
            pa.array([example])
    return pa.array([None if value is None else to_json(value) for value in values], pa.string())


def make_array(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    """Returns a column of values.

    Args:
        values: The values.
        kind: Type of the column; None for a type that gives the values back, so that 2**63 is unsigned.

    Raises:
        ValueError: A value does not fit, as do the other errors of `UNFIT`.
        MixedTypesError: Values of several types are given without a type, and Arrow would change some.
    """
    if any(isinstance(value, ArrowValue) for value in values):
        return _join(values, kind)
    if kind is not None:
        return pa.array(values, kind)
    survey(values)
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
    if kind is None:
        kind = next(value.array.type for value in values if isinstance(value, ArrowValue))
        if not keeps([value for value in values if not isinstance(value, ArrowValue)], kind):
            raise MixedTypesError(f"values of several types are in one column of {kind!s:.100}")
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
