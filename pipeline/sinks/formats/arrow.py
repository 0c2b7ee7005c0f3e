"""Files in Arrow's own format, which is also Feather."""

from __future__ import annotations

import pyarrow as pa

from ..format import SinkFormat


def encode(table: pa.Table) -> bytes:
    """Returns the content of a file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


FORMAT = SinkFormat("arrow", encode)
