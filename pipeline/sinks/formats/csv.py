"""Output as CSV. Text, numbers and dates are plain cells; of any other type, a cell holds JSON, and of bytes base64."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.csv

from ...arrow_values import cell_values
from ...json_text import to_json
from ...mixed_values import holds_json
from ..format import SinkFormat


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a file that holds the rows of a table."""
    cells = [_cells(column, field) for field, column in zip(table.schema, table.columns, strict=True)]
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(pa.table(cells, names=table.column_names), sink)
    return sink.getvalue().to_pybytes()


def _is_plain(kind: pa.DataType) -> bool:
    """Returns whether Arrow writes values of a type as they are. It would write bytes that are no text unchanged."""
    types = pa.types
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    return not (is_bytes or types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType) or types.is_interval(kind))


def _cells(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    if _is_plain(column.type) and not holds_json(field) and _is_utf8(column):
        return column
    return pa.array([None if value is None else _cell(value) for value in cell_values(column, field)], pa.string())


def _is_utf8(column: pa.ChunkedArray) -> bool:
    """Returns whether all text in a column is UTF-8. Arrow would write other bytes as they are."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _cell(value: Any) -> str:
    """Returns a value as JSON, or without the quotes of JSON if it is a string there."""
    text = to_json(value)
    return json.loads(text) if text.startswith('"') else text


FORMAT = SinkFormat("csv", encode, max_fields=0)
