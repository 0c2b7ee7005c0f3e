"""Output as text with a JSON object on every line."""

from __future__ import annotations

import io

import pyarrow as pa

from ...arrow_values import to_rows
from ...json_text import to_json
from ..format import SinkFormat

BATCH_ROWS = 16_384
"""Number of rows that are converted to Python objects at once."""


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a file that holds the rows of a table."""
    text = io.StringIO()
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        for row in to_rows(pa.Table.from_batches([batch])):
            text.write(to_json(row))
            text.write("\n")
    return text.getvalue().encode()


FORMAT = SinkFormat("jsonl", encode)
