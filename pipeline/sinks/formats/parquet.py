"""Parquet files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet

from ..format import SinkFormat

ROW_GROUP_ROWS = 16_384
"""Rows of a row group: a reader of a few rows reads the whole group."""


def encode(table: pa.Table) -> bytes:
    """Returns the content of a file."""
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=ROW_GROUP_ROWS)
    return sink.getvalue().to_pybytes()


FORMAT = SinkFormat("parquet", encode)
