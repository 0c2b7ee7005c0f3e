"""Output as Parquet files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet

from ...arrow_values import stored_type
from ..format import SinkFormat

ROW_GROUP_ROWS = 16_384
"""Rows of a row group. It is small, because a reader of a few rows reads a whole group."""


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a file that holds the rows of a table."""
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=ROW_GROUP_ROWS)
    return sink.getvalue().to_pybytes()


FORMAT = SinkFormat("parquet", encode, stored_type)
