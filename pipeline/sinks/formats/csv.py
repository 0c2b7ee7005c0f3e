"""Output as CSV. Text, numbers and dates are plain cells; a list or a struct is a cell with JSON."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv

from ...arrow_values import python_values
from ...json_text import to_json
from ..format import SinkFormat


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a file that holds the rows of a table."""
    cells = [_json_cells(column) if pa.types.is_nested(column.type) else column for column in table.columns]
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(pa.table(cells, names=table.column_names), sink)
    return sink.getvalue().to_pybytes()


def _json_cells(column: pa.ChunkedArray) -> pa.Array:
    return pa.array((None if value is None else to_json(value) for value in python_values(column)), pa.string())


FORMAT = SinkFormat("csv", encode)
