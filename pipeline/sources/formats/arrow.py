"""Input in Arrow's own format: files with a footer, which are also Feather, and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.ipc

from ....engine.errors import ConfigError
from ..base import (
    LOOK_BYTES,
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

MAGIC = b"ARROW1"
READ_BYTES = 4 << 20
MAX_ROWS = 8192
"""Most rows of a table of error rows."""


LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_view),
    (pa.types.is_large_list_view, pa.large_list_view),
)


class ArrowFormat(SourceFormat):
    """Files of Arrow. The position of a row is its number in the file."""

    extensions = (".arrow", ".arrows", ".feather", ".ipc")
    is_columnar = True

    def look(self, files: Sequence[InputFile]) -> Look:
        """Reads the schemas of the files, and returns the columns and units. The rows of small files are counted."""
        is_small = sum(file.size or LOOK_BYTES for file in files) <= LOOK_BYTES
        looks = [_look_at(file, is_small) for file in files]
        return Look(unify([schema for schema, _ in looks]), [unit for _, unit in looks])

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yields slices of record batches as tables, and an error row in place of the damaged rest of a file."""
        position = 0
        try:
            with unit.file.storage.open_arrow(READ_BYTES, unit.file.size) as source:
                for batch in _batches(source):
                    if (reason := _damage_of(batch)) is not None:
                        said = (
                            f"{unit.file.path} is damaged in rows {position} to {position + len(batch) - 1}: {reason}"
                        )
                        for begin in range(position, position + len(batch), MAX_ROWS):
                            places = range(begin, min(begin + MAX_ROWS, position + len(batch)))
                            yield error_rows(schema, unit.file.ordinal, places, said)
                        position += len(batch)
                        continue
                    for part in _slices(pa.Table.from_batches([batch])):
                        yield fit_rows(part, schema, unit.file.ordinal, range(position, position + len(part)))
                        position += len(part)
        except (pa.ArrowException, OSError) as error:
            if not is_damage(error):
                raise
            reason = f"{unit.file.path} cannot be read from row {position} on: {first_line(error)}"
            stop = position + 1 if unit.num_rows is None else unit.stop
            for begin in range(position, stop, MAX_ROWS):
                yield error_rows(schema, unit.file.ordinal, range(begin, min(begin + MAX_ROWS, stop)), reason)


def _look_at(file: InputFile, count: bool) -> tuple[pa.Schema, Unit]:
    unit = Unit(file, num_bytes=file.size or 0)
    try:
        with file.storage.open_arrow(READ_BYTES, file.size) as source:
            if not count:
                return _open(source).schema, unit
            batches = _open(source)
            num_rows = sum(len(batch) for batch in _iterate(batches))
            return batches.schema, Unit(file, 0, num_rows, num_rows, unit.num_bytes)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        raise ConfigError(f"input {file.path!r} cannot be read as arrow: {first_line(error)}") from error


def _open(source: pa.NativeFile) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    is_file = source.read(len(MAGIC)) == MAGIC
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _iterate(reader: pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return iter(reader)


def _batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    return _iterate(_open(source))


def _damage_of(batch: pa.RecordBatch) -> str | None:
    """Returns what is wrong with the numbers of a batch that Arrow trusts, and with which it would read anywhere.

    Raises:
        ArrowInvalid: The number of rows itself cannot be right.
    """
    try:
        _with_bytes(batch).validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        if len(batch) > 8 * batch.get_total_buffer_size():
            raise pa.ArrowInvalid(f"a batch of {len(batch)} rows has fewer bits") from error
        return first_line(error)
    return None


def _with_bytes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns a batch with the same buffers and types of bytes, so that a value that is wrong costs its own row."""
    schema = pa.schema([pa.field(field.name, _bytes_type(field.type)) for field in batch.schema])
    return pa.RecordBatch._import_from_c_capsule(schema.__arrow_c_schema__(), batch.__arrow_c_array__()[1])


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    """Returns a type of the same layout with bytes in place of text and of decimals, whose digits may be too many."""
    types = pa.types
    if types.is_decimal(kind):
        return pa.binary(kind.byte_width)
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _bytes_type(kind.value_type), kind.ordered)
    if types.is_map(kind):
        return pa.map_(_bytes_type(kind.key_type), kind.item_field.with_type(_bytes_type(kind.item_type)))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    if isinstance(kind, pa.BaseExtensionType):
        return _bytes_type(kind.storage_type)
    for is_list, make in LISTS:
        if is_list(kind):
            return make(kind.value_field.with_type(_bytes_type(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_bytes_type(kind.value_type)), kind.list_size)
    texts = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return texts.get(kind, kind)


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    """Yields slices of a table of about `TABLE_BYTES`."""
    row_bytes = max(1, table.nbytes // max(1, len(table)))
    step = max(1, TABLE_BYTES // row_bytes)
    return (table.slice(start, step) for start in range(0, len(table), step))


FORMAT = ArrowFormat()
