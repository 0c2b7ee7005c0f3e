"""Output in Arrow's own file format, which is also called Feather."""

from __future__ import annotations

import pyarrow as pa

from ..format import SinkFormat


def encode(table: pa.Table) -> bytes:
    """Returns the bytes of a file that holds the rows of a table."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


FORMAT = SinkFormat("arrow", encode)
