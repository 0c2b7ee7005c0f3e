"""Output as text with a JSON object on every line."""

from __future__ import annotations

import io

import pyarrow as pa

from ...arrow_values import cell_values
from ...json_text import to_json
from ..format import SinkFormat

BATCH_ROWS = 16_384
"""Number of rows that are converted to Python objects at once."""


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a file that holds the rows of a table."""
    text = io.StringIO()
    for start in range(0, len(table), BATCH_ROWS):
        batch = table.slice(start, BATCH_ROWS)
        columns = [cell_values(column, field) for field, column in zip(batch.schema, batch.columns, strict=True)]
        for row in zip(*columns, strict=True):
            text.write(to_json(dict(zip(table.column_names, row, strict=True))))
            text.write("\n")
    return text.getvalue().encode()


FORMAT = SinkFormat("jsonl", encode, max_fields=0)
