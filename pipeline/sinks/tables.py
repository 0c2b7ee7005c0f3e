"""Makes Arrow tables of finished rows: `result_tables` of results, and `failed_tables` of dead letters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .. import columns
from ..arrow_values import UNFIT, UNWRITABLE, field_array, fits, holds_json, misfit, quoted, stored, to_array
from ..json_text import json_cell
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


NOT_WRITTEN = (columns.ROW_ID, columns.IS_DUPLICATE)
"""Columns of a row that are not written as they are: the id is the first column of every table."""

Group = tuple[list[Finished], pa.Table]
"""Rows, and their table."""


def result_tables(rows: Sequence[Finished], schema: pa.Schema | None) -> tuple[list[Group], list[Finished]]:
    """Makes tables of rows without an error, one for each set of column types, and finds the rows that fit no table.

    Args:
        rows: Rows without an error.
        schema: Columns and types; None to take them from the rows.

    Returns:
        The rows of each table with the table, which has the column `columns.ROW_ID`; and the rows that cannot be
        written, whose `error` this function sets to the reason.
    """
    groups, unfit = _tables(rows, [one.row.data for one in rows], schema)
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
    rows: Sequence[Finished], values: Sequence[Mapping[str, Any]], schema: pa.Schema | None
) -> tuple[list[Group], list[Finished]]:
    """Returns one table, or a table per group of types if the rows do not fit one, and the rows that fit no table."""
    if not rows:
        return [], []
    try:
        return [(list(rows), _stored_table(rows, values, schema))], []
    except UNFIT:
        pass
    groups: dict[str, list[int]] = {}
    unfit = []
    for index, one in enumerate(rows):
        try:
            kind = str(_table([one], [values[index]], schema).schema)
        except UNFIT:
            unfit.append(one)
        else:
            groups.setdefault(kind, []).append(index)
    picked = ([rows[at] for at in group] for group in groups.values())
    tables = (_stored_table([rows[at] for at in at_], [values[at] for at in at_], schema) for at_ in groups.values())
    return list(zip(picked, tables, strict=True)), unfit


def _stored_table(rows: Sequence[Finished], values: Sequence[Mapping[str, Any]], schema: pa.Schema | None) -> pa.Table:
    """Returns the table of some rows. A given schema has types that the format stores; other types need a check."""
    table = _table(rows, values, schema)
    return stored(table) if schema is None else table


def _table(rows: Sequence[Finished], values: Sequence[Mapping[str, Any]], schema: pa.Schema | None) -> pa.Table:
    if schema is None:
        names = dict.fromkeys(name for one in values for name in one if name not in NOT_WRITTEN)
        types = {**columns.result_types(), **columns.error_types()}
        arrays = {name: to_array([one.get(name) for one in values], types.get(name)) for name in names}
    else:
        arrays = {field.name: field_array([one.get(field.name) for one in values], field) for field in schema}
    return pa.table({columns.ROW_ID: pa.array([one.row_id for one in rows], pa.binary(12)), **arrays})


def _as_json(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns a row with JSON in its columns of JSON. Text stays as it is, unless it would be read as another value."""
    return {name: json_cell(value) if name in names else value for name, value in values.items()}


def _error_columns(row: Row) -> dict[str, Any]:
    error = row.error
    assert error is not None
    return {
        columns.ERROR_STAGE: error.stage,
        columns.ERROR_KIND: error.kind,
        columns.ERROR_MESSAGE: error.message,
        columns.ERROR_RETRYABLE: error.retryable,
        columns.ERROR_ATTEMPTS: error.attempts + (row.input.get(columns.ERROR_ATTEMPTS) or 0),
    }


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
    return RowError(WRITE, "TypeError", "the columns of the row make no table")


def _as_text(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if fits(value, None) else quoted(value) for name, value in values.items()}
