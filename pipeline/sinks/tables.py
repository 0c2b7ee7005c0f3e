"""Makes Arrow tables of finished rows: `result_tables` of results, and `failed_tables` of dead letters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .. import columns
from ..arrow_values import UNFIT, UNWRITABLE, field_array, fits, misfit, own_column, quoted, stored
from ..json_text import json_cell
from ..mixed_values import MAX_FIELDS, holds_json, joint_schema, num_fields
from ..stages.base import Row, RowError

WRITE = "write"
"""Name, in errors of rows, of the step that makes tables."""


@dataclass(slots=True)
class Finished:
    """A row that has passed all stages.

    Attributes:
        row_id: Id of the row in the ledger.
        row: The row.
        generated: The row as generation left it, before `postprocess`. This form is counted.
    """

    row_id: bytes
    row: Row
    generated: Row


NOT_WRITTEN = frozenset({columns.ROW_ID, *columns.MARKS})
"""Columns of a row that are not written as they are: the id is the first column of every table."""

MAX_ATTEMPTS = 2**31
"""Number of attempts from which on a value is none."""

Group = tuple[list[Finished], pa.Table]
"""Rows, and their table."""


def result_tables(
    rows: Sequence[Finished], schema: pa.Schema | None, max_fields: int = MAX_FIELDS
) -> tuple[list[Group], list[Finished]]:
    """Makes tables of rows without an error, one for each set of column types, and finds the rows that fit no table.

    Args:
        rows: Rows without an error.
        schema: Columns and types; None to take them from the rows.
        max_fields: As in `own_column`.

    Returns:
        The rows of each table with the table, which has the column `columns.ROW_ID`; and the rows that cannot be
        written, whose `error` this function sets to the reason.
    """
    as_json = [field.name for field in schema or () if holds_json(field) and pa.types.is_string(field.type)]
    groups, unfit = _tables(rows, [_with_clear_text(one.row.data, as_json) for one in rows], schema, max_fields)
    for one in unfit:
        one.row.error = _unfit_error(one.row.data, schema)
    return groups, unfit


def failed_tables(rows: Sequence[Finished], schema: pa.Schema | None) -> list[Group]:
    """Makes tables of dead letters, one for each set of column types.

    Args:
        rows: Rows with an error.
        schema: Columns and types of the input; None to take them from the rows.

    Returns:
        The rows of each table with the table, which has the columns of the input and of `columns.error_types`.
    """
    types = columns.error_types()
    if schema is not None:
        kept = [field for field in schema if field.name not in types]
        schema = pa.schema([*kept, *((name, kind) for name, kind in types.items() if name != columns.ROW_ID)])
    as_json = {field.name for field in schema or () if holds_json(field)}
    values = [{**_as_json(one.row.input, as_json), **_error_columns(one.row)} for one in rows]
    groups, unfit = _tables(rows, values, schema)
    if unfit:  # Arrow has no type for some objects of Python; their text is written in their place.
        shown = [{**_as_text(one.row.input), **_error_columns(one.row)} for one in unfit]
        groups += _tables(unfit, shown, None)[0]
    return groups


def _tables(
    rows: Sequence[Finished],
    values: Sequence[Mapping[str, Any]],
    schema: pa.Schema | None,
    max_fields: int = MAX_FIELDS,
) -> tuple[list[Group], list[Finished]]:
    """Returns one table, or a table per group of types if the rows do not fit one, and the rows that fit no table."""
    if not rows:
        return [], []

    def group(places: Sequence[int]) -> Group:
        return [rows[at] for at in places], _stored_table(rows, values, places, schema, max_fields)

    try:
        return [group(range(len(rows)))], []
    except UNFIT:
        pass
    by_schema: dict[bytes, tuple[pa.Schema, list[int]]] = {}
    unfit = []
    for at, one in enumerate(rows):
        try:
            own = group([at])[1].schema
        except UNFIT:
            unfit.append(one)
        else:
            by_schema.setdefault(own.serialize().to_pybytes(), (own, []))[1].append(at)
    groups: list[Group] = []
    for alike in _merged(by_schema.values(), max_fields):
        try:
            groups.append(group([at for places in alike for at in places]))
        except UNFIT:  # Values of types that go together may not: days of the year 3000 beside nanoseconds.
            groups += [group([at]) for places in alike for at in places]
    return groups, unfit


def _merged(by_schema: Iterable[tuple[pa.Schema, list[int]]], max_fields: int) -> list[list[list[int]]]:
    """Returns the places of rows by groups whose schemas go together, such as rows in which other columns are null."""
    groups: list[tuple[pa.Schema, list[list[int]]]] = []
    for schema, places in by_schema:
        for at, (known, alike) in enumerate(groups):
            try:
                joint = joint_schema(known, schema, are_numbers_alike=False)
            except UNFIT:
                continue
            if num_fields(joint) <= max(max_fields, num_fields(known), num_fields(schema)):
                groups[at] = joint, [*alike, places]
                break
        else:
            groups.append((schema, [places]))
    return [alike for _, alike in groups]


def _stored_table(
    rows: Sequence[Finished],
    values: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    schema: pa.Schema | None,
    max_fields: int,
) -> pa.Table:
    """Returns the table of some rows. A given schema has types that the format stores; other types need a check."""
    picked = [values[at] for at in places]
    ids = pa.array([rows[at].row_id for at in places], pa.binary(12))
    if schema is None:
        return _add_ids(ids, stored(_own_table(picked, max_fields)))
    arrays = [field_array([one.get(field.name) for one in picked], field) for field in schema]
    return _add_ids(ids, pa.table(arrays, schema=schema))


def _own_table(values: Sequence[Mapping[str, Any]], max_fields: int) -> pa.Table:
    """Returns rows as a table with the columns and types of their values."""
    if not all(one.keys() - NOT_WRITTEN for one in values):
        raise TypeError("a row has no column")
    names = dict.fromkeys(name for one in values for name in one if name not in NOT_WRITTEN)
    types = {**columns.result_types(), **columns.error_types()}
    own = [own_column(name, [one.get(name) for one in values], types.get(name), max_fields) for name in names]
    return pa.table([array for _, array in own], schema=pa.schema([field for field, _ in own]))


def _add_ids(ids: pa.Array, table: pa.Table) -> pa.Table:
    fields = [pa.field(columns.ROW_ID, ids.type), *table.schema]
    return pa.table([ids, *table.columns], schema=pa.schema(fields))


def _as_json(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns a row with JSON in its columns of JSON. Text stays as it is, unless it would be read as another value."""
    return {name: json_cell(value) if name in names else value for name, value in values.items()}


def _with_clear_text(values: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """Returns a row in whose columns of JSON no text reads as another value, such as 12."""
    clear = {name: json_cell(values[name]) for name in names if isinstance(values.get(name), str)}
    return {**values, **clear} if clear else values


def _error_columns(row: Row) -> dict[str, Any]:
    error = row.error
    assert error is not None
    return {
        columns.ERROR_STAGE: error.stage,
        columns.ERROR_KIND: error.kind,
        columns.ERROR_MESSAGE: error.message,
        columns.ERROR_RETRYABLE: error.retryable,
        columns.ERROR_ATTEMPTS: error.attempts + _earlier_attempts(row.input.get(columns.ERROR_ATTEMPTS)),
    }


def _earlier_attempts(value: Any) -> int:
    """Returns the attempts of a dead letter that ran again; a column of the user with that name may hold anything."""
    return value if type(value) is int and 0 <= value < MAX_ATTEMPTS else 0


def _unfit_error(data: Mapping[str, Any], schema: pa.Schema | None) -> RowError:
    fields: Iterable[tuple[str, pa.Field | None]] = dict.fromkeys(data).items()
    if schema is not None:
        fields = ((field.name, field) for field in schema)
    for name, field in fields:
        kind = None if field is None else field.type
        reason = misfit(name, pa.string()) or misfit(data.get(name), field)
        if reason is not None:
            lacks = "which no file format has a type for" if kind is None else f"which is not {kind}"
            said = f": {reason!s:.100}" if isinstance(reason, UNWRITABLE) else ""
            return RowError(WRITE, "TypeError", f"column {name!r} holds {quoted(data.get(name))}, {lacks}{said}")
    lacks = "the columns of the row make no table" if data.keys() - NOT_WRITTEN else "the row has no column to write"
    return RowError(WRITE, "TypeError", lacks)


def _as_text(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if fits(value, None) else quoted(value) for name, value in values.items()}
