"""Finished rows as tables: results in their columns, dead letters as they were read and with what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .. import columns
from ..stages.base import Row, RowError

UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)
"""What Arrow raises for a value that does not fit a type."""

WRITE = "write"
"""How errors name the stage that makes tables of rows."""


@dataclass(slots=True)
class Finished:
    """A row that is through all stages.

    Attributes:
        row_id: What the ledger knows it by.
        row: The row.
        generated: The row as generation left it, before `postprocess`: what is counted.
    """

    row_id: bytes
    row: Row
    generated: Row


NOT_WRITTEN = (columns.ROW_ID, columns.IS_DUPLICATE)
"""Columns of a row that only the pipeline reads; the id is put first by itself."""

Group = tuple[list[Finished], pa.Table]
"""Rows, and the table of them."""


def result_tables(rows: Sequence[Finished], schema: pa.Schema | None) -> tuple[list[Group], list[Finished]]:
    """Makes tables of rows that went through.

    Args:
        rows: The rows.
        schema: Columns and types; None for what the rows hold.

    Returns:
        Tables with the column `columns.ROW_ID`, and the rows that cannot be written, which now hold the reason.
    """
    groups, unfit = _tables(rows, [one.row.data for one in rows], schema)
    for one in unfit:
        one.row.error = _unfit_error(one.row.data, schema)
    return groups, unfit


def failed_tables(rows: Sequence[Finished], schema: pa.Schema | None) -> list[Group]:
    """Makes tables of dead letters.

    Args:
        rows: Rows with an error.
        schema: Columns and types of the rows as they were read; None for what they hold.

    Returns:
        Tables with the columns of the rows as they were read and those of `columns.error_types`.
    """
    types = columns.error_types()
    if schema is not None:
        kept = [field for field in schema if field.name not in types]
        schema = pa.schema([*kept, *((name, kind) for name, kind in types.items() if name != columns.ROW_ID)])
    groups, unfit = _tables(rows, [{**one.row.input, **_error_columns(one.row)} for one in rows], schema)
    if unfit:  # Objects that only Python knows: their text is better than nothing.
        shown = [{**_as_text(one.row.input), **_error_columns(one.row)} for one in unfit]
        groups += _tables(unfit, shown, None)[0]
    return groups


def typed(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """Types a column as it is known by name, or else by its values."""
    if kind is not None:
        try:
            return pa.array(values, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass  # The user's postprocess gave the name a meaning of its own.
    return pa.array(values)


def fits(value: Any, kind: pa.DataType) -> bool:
    """Whether a value can stand in a column of a type."""
    try:
        pa.array([value], kind)
    except UNFIT:
        return False
    return True


def _tables(
    rows: Sequence[Finished], values: Sequence[Mapping[str, Any]], schema: pa.Schema | None
) -> tuple[list[Group], list[Finished]]:
    """Makes one table if all rows fit one; else takes those out that fit none, and groups the others by their types."""
    if not rows:
        return [], []
    try:
        return [(list(rows), _table(rows, values, schema))], []
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
    tables = (_table([rows[at] for at in at_], [values[at] for at in at_], schema) for at_ in groups.values())
    return list(zip(picked, tables, strict=True)), unfit


def _table(rows: Sequence[Finished], values: Sequence[Mapping[str, Any]], schema: pa.Schema | None) -> pa.Table:
    if schema is None:
        names = dict.fromkeys(name for one in values for name in one if name not in NOT_WRITTEN)
        types = {**columns.result_types(), **columns.error_types()}
        arrays = {name: typed([one.get(name) for one in values], types.get(name)) for name in names}
    else:
        arrays = {field.name: pa.array([one.get(field.name) for one in values], field.type) for field in schema}
    return pa.table({columns.ROW_ID: pa.array([one.row_id for one in rows], pa.binary(12)), **arrays})


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
    if schema is not None:
        kinds: Iterable[tuple[str, pa.DataType]] = ((field.name, field.type) for field in schema)
        name, kind = next((name, kind) for name, kind in kinds if not fits(data.get(name), kind))
        return RowError(WRITE, "TypeError", f"column {name!r} holds {data[name]!r:.80}, which is not {kind}")
    name = next(name for name, value in data.items() if not fits(value, None))
    return RowError(
        WRITE, "TypeError", f"column {name!r} holds {data[name]!r:.80}, which no file format has a type for"
    )


def _as_text(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if fits(value, None) else repr(value) for name, value in values.items()}
