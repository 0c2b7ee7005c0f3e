"""The formats of an output, as data: an extension, and how a table becomes the bytes of a file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ..files.delta import DELTA

ROW_GROUP_ROWS = 16_384
"""Rows of a row group of Parquet: what a reader of a few rows reads."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format that results are written in.

    Attributes:
        extension: Of its files, without the dot.
        encode: Makes a file's content of a table.
    """

    extension: str
    encode: Callable[[pa.Table], bytes]


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=ROW_GROUP_ROWS)
    return sink.getvalue().to_pybytes()


def _arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _jsonl(table: pa.Table) -> bytes:
    text = io.StringIO()
    for batch in table.to_batches(max_chunksize=ROW_GROUP_ROWS):
        for row in batch.to_pylist():
            text.write(json.dumps(row, ensure_ascii=False, default=_plain))
            text.write("\n")
    return text.getvalue().encode()


def _csv(table: pa.Table) -> bytes:
    """Writes text, numbers and dates as they are; what CSV has no cell for, lists above all, as JSON."""
    cells = [_cells(column) if pa.types.is_nested(column.type) else column for column in table.columns]
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(pa.table(cells, names=table.column_names), sink)
    return sink.getvalue().to_pybytes()


def _cells(column: pa.ChunkedArray) -> pa.Array:
    values = (
        None if one is None else json.dumps(one, ensure_ascii=False, default=_plain) for one in column.to_pylist()
    )
    return pa.array(values, pa.string())


def _plain(value: Any) -> Any:
    """Returns what JSON has for a value it does not know: base64 for bytes, text for the others."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


FORMATS = {
    "parquet": Format("parquet", _parquet),
    "jsonl": Format("jsonl", _jsonl),
    "csv": Format("csv", _csv),
    "arrow": Format("arrow", _arrow),
    DELTA: Format("parquet", _parquet),  # What makes files a table is their publication.
}
"""Name in a job file -> format."""
