"""Input as Parquet. Files are cut by row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from ....engine.errors import ConfigError
from ..base import (
    TABLE_BYTES,
    InputFile,
    Look,
    Unit,
    error_rows,
    first_line,
    fit_rows,
    is_damage,
    unify,
)
from ..format import SourceFormat

NUM_THREADS = 16  # Most of the time, the threads wait for a store.
FOOTER_BYTES = 64 << 10
UNIT_BYTES = 64 << 20
"""About the size of a unit. Neighbouring row groups are joined to units."""

MAX_ROWS = 8192
"""Most rows of a table."""

WHOLE_CHUNK_BYTES = 64 << 20
"""A row group up to this size is fetched at once; a larger one is streamed."""

STREAM_BYTES = 4 << 20
"""Size of a request when a column is streamed."""


class ParquetFormat(SourceFormat):
    """Files of Parquet. The position of a row is its number in the file. `look` reads only the footers."""

    extensions = (".parquet", ".pq")
    is_columnar = True

    def look(self, files: Sequence[InputFile]) -> Look:
        """Reads the footers of the files, several at once, and returns the columns and units that they describe."""
        with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="millrace-footers") as pool:
            footers = list(pool.map(_read_footer, files))
        return Look(unify([schema for schema, _ in footers]), [unit for _, units in footers for unit in units])

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yields batches of rows as tables. The rows in the damaged rest of a row group become error rows."""
        with _open(unit.file, STREAM_BYTES) as source, pq.ParquetFile(source, buffer_size=STREAM_BYTES) as file:
            start, share = 0, _stored_share(unit.file, file.metadata)
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                stop, at_once = start + group.num_rows, group.total_byte_size * share <= WHOLE_CHUNK_BYTES
                if start < unit.stop and stop > unit.start:
                    yield from _read_group(unit, schema, source, file.metadata, index, start, at_once)
                start = stop


def _read_group(
    unit: Unit,
    schema: pa.Schema,
    source: pa.NativeFile,
    footer: pq.FileMetaData,
    index: int,
    first_row: int,
    at_once: bool,
) -> Iterator[pa.Table]:
    """Yields the rows of a row group that belong to the unit, as tables."""
    group = footer.row_group(index)
    position, stop = first_row, min(first_row + group.num_rows, unit.stop)
    file = pq.ParquetFile(source, metadata=footer, buffer_size=STREAM_BYTES, pre_buffer=at_once)
    present = [name for name in file.schema_arrow.names if name in schema.names]
    try:
        for batch in file.iter_batches(_batch_rows(group), row_groups=[index], columns=present, use_threads=False):
            begin, end = max(unit.start - position, 0), min(stop - position, len(batch))
            if begin < end:
                rows = pa.Table.from_batches([batch.slice(begin, end - begin)])
                positions = range(position + begin, position + end)
                yield fit_rows(_with_partition(rows, unit.file), schema, unit.file.ordinal, positions)
            position += len(batch)
            if position >= stop:
                return
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        reason = f"row group {index} of {unit.file.path} is damaged: {first_line(error)}"
        rows = range(max(position, unit.start), stop)
        for begin in range(rows.start, rows.stop, MAX_ROWS):
            part = range(begin, min(begin + MAX_ROWS, rows.stop))
            yield error_rows(schema, unit.file.ordinal, part, reason)


def _with_partition(rows: pa.Table, file: InputFile) -> pa.Table:
    """Returns rows with the columns whose values are in the log of the table and not in the file."""
    if file.table is None:
        return rows
    for name, column in zip(file.table.partition.column_names, file.table.partition.columns, strict=True):
        if name not in rows.column_names:  # Some writers put the column into the file as well.
            rows = rows.append_column(name, pa.repeat(column[0], len(rows)))
    return rows


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    return min(max(1, TABLE_BYTES // row_bytes), MAX_ROWS)


def _read_footer(file: InputFile) -> tuple[pa.Schema, list[Unit]]:
    try:
        with _open(file, FOOTER_BYTES) as source:
            footer = pq.read_metadata(source)
            schema = footer.schema.to_arrow_schema() if file.table is None else file.table.schema
            return schema, list(_units(file, footer))
    except FileNotFoundError as error:
        if file.table is None:
            raise
        raise ConfigError(file.table.if_missing) from error
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise ConfigError(f"input {file.path!r} cannot be read as parquet: {first_line(error)}") from error


def _units(file: InputFile, footer: pq.FileMetaData) -> Iterator[Unit]:
    """Yields units of whole row groups."""
    start = position = num_bytes = 0
    share = _stored_share(file, footer)
    for index in range(footer.num_row_groups):
        group = footer.row_group(index)
        position += group.num_rows
        num_bytes += max(0, round(group.total_byte_size * share))
        if num_bytes >= UNIT_BYTES or index == footer.num_row_groups - 1:
            yield Unit(file, start, position, position - start, num_bytes)
            start, num_bytes = position, 0


def _stored_share(file: InputFile, footer: pq.FileMetaData) -> float:
    """Returns about the bytes that a byte of data takes in the file, headers included.

    The exact sizes of row groups are in the columns of the footer. Arrow ends the process where these are damaged.
    """
    total = sum(max(0, footer.row_group(index).total_byte_size) for index in range(footer.num_row_groups))
    return 1.0 if file.size is None or total == 0 else file.size / total


def _open(file: InputFile, buffer_bytes: int) -> pa.NativeFile:
    return file.storage.open_arrow(buffer_bytes, file.size)


FORMAT = ParquetFormat()
