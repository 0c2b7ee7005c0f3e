"""Output as text with a JSON object on every line."""

from __future__ import annotations

import io

import pyarrow as pa

from ..format import SinkFormat
from ..json_text import to_json

BATCH_ROWS = 16_384
"""Number of rows that are converted to Python objects at once."""


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a file that holds the rows of a table."""
    text = io.StringIO()
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        for row in batch.to_pylist():
            text.write(to_json(row))
            text.write("\n")
    return text.getvalue().encode()


FORMAT = SinkFormat("jsonl", encode)
