"""Input as CSV. This module finds the records, and Arrow parses many at once. Refused records are retried in halves.

A column has another type than text only if that type gives back the text of every value: `00501`, `1.50` and integers
of 20 digits stay as they are written.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ....engine.errors import ConfigError
from ....engine.shown import without_secrets
from ..base import InputFile, Look, Unit, align, error_rows, finish_table, first_line
from ..format import SourceFormat
from ..text import DamagedTextError, Line, Sample, chunks, iter_lines, take_samples, whole_file

WHOLE = re.compile(rb'(?:"(?:[^"]|"")*+"[^,]*+|[^",][^,]*+|)(?:,(?:"(?:[^"]|"")*+"[^,]*+|[^",][^,]*+|))*+', re.DOTALL)
"""A record in which every quote that opens a field is closed."""

logger = logging.getLogger(__name__)

NULLS = [""]
"""Texts that are no value in a column that is no text. NA, null and nan are text, as they are beside text."""

MAX_RECORD_BYTES = 16 << 20
"""Number of bytes after which a quote that is still open is taken for a plain character."""


class CsvFormat(SourceFormat):
    """Files of CSV. The position of a row is the number of its record, without the header."""

    extensions = (".csv",)
    guesses_types = True

    def look(self, files: Sequence[InputFile]) -> Look:
        """Returns the columns and units, with types found in samples. A column of several types is text."""
        units = [whole_file(file) for file in files]
        samples, counts = take_samples(units, _look_through)
        schema = _joined([sample.schema for sample in samples])
        return Look(schema, [replace(unit, num_rows=count) for unit, count in zip(units, counts, strict=True)])

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yields the rows of records as tables. A record that is not a row becomes an error row."""
        ordinal, count = unit.file.ordinal, 0
        records = iter_records(_file_lines(unit.file))
        try:
            names = _header(unit.file, records)
            if unknown := set(names).difference(schema.names):
                logger.warning(
                    "%s has columns that the files looked at before the start lack, and they are left out: %s",
                    without_secrets(unit.file.path),
                    ", ".join(sorted(unknown)),
                )
            for _, texts in chunks(records):
                table, errors = parse_records(texts, names, schema)
                shown = [None if error is None else _text(text) for text, error in zip(texts, errors, strict=True)]
                yield finish_table(table, ordinal, range(count, count + len(texts)), errors, shown)
                count += len(texts)
        except DamagedTextError as error:
            yield error_rows(schema, ordinal, [count], str(error))


def _file_lines(file: InputFile) -> Iterator[Line]:
    """Yields the lines of a file. Lines end in a carriage return alone if the first record of the file does."""
    _, first = next(iter_records(iter_lines(file, returns_end_lines=True)), (0, b""))
    yield from iter_lines(file, returns_end_lines=first.endswith(b"\r"))


def iter_records(lines: Iterator[Line]) -> Iterator[Line]:
    """Yields records, joined from lines, because a line end between quotes belongs to a value. Empty lines are skipped.

    Args:
        lines: Lines of the file, with the byte at which each starts.
    """
    waiting: list[Line] = []
    while True:
        offset, line = waiting.pop(0) if waiting else next(lines, (0, b""))
        if not line:
            return
        if not line.strip():
            continue
        rest, is_closed = [], _is_closed(line)
        for more in itertools.chain(waiting, lines) if not is_closed else ():
            rest.append(more)
            is_closed = b'"' in more[1] and _is_closed(b'"' + more[1])
            if is_closed or more[0] - offset > MAX_RECORD_BYTES:
                break
        if is_closed:
            yield offset, line + b"".join(text for _, text in rest)
            waiting = waiting[len(rest) :]
        else:  # The quote is never closed, so only this line is broken.
            yield offset, line
            waiting = rest + waiting[len(rest) :]


def _is_closed(text: bytes) -> bool:
    return b'"' not in text or WHOLE.fullmatch(text) is not None


def parse_records(
    records: Sequence[bytes], names: Sequence[str], schema: pa.Schema
) -> tuple[pa.Table, list[str | None]]:
    """Returns the rows that records hold.

    Args:
        records: The records.
        names: The header.
        schema: Columns of the rows.

    Returns:
        A row for each record, and for each record None or the reason why it is not a row. Such a row has no values.
    """
    try:
        types = {name: schema.field(name).type for name in names if name in schema.names}
        text = b"".join(records)
        table = _parse(text, names, pyarrow.csv.ConvertOptions(column_types=types, null_values=NULLS))
        if len(table) != len(records):
            reason = f"Arrow finds {len(table)} records in it"
        elif changed := _changed(table.select(list(types)), names, text):
            reason = f"{types[changed[0]]} does not give back the text of {changed[0]!r}; list it in columns_as_text"
        else:
            return align(table, schema), [None] * len(records)
    except pa.ArrowInvalid as error:
        reason = first_line(error)
    if len(records) == 1:
        return pa.Table.from_pylist([{}], schema), [f"the record is not a row ({reason}): {_text(records[0]):.200}"]
    half = len(records) // 2
    (left, left_errors), (right, right_errors) = (
        parse_records(part, names, schema) for part in (records[:half], records[half:])
    )
    return pa.concat_tables([left, right]), left_errors + right_errors


def _text(record: bytes) -> str:
    return record.decode("utf-8", errors="backslashreplace").rstrip()


def _look_through(unit: Unit, max_bytes: int) -> Sample:
    """Samples the first records of a file, about `max_bytes`; Arrow finds the types of the columns in them."""
    records = iter_records(_file_lines(unit.file))
    names = _header(unit.file, records)
    texts: list[bytes] = []
    num_rows = num_bytes = 0
    is_whole = True
    try:
        for _, text in records:
            texts.append(text)
            num_bytes += len(text)
            if num_bytes >= max_bytes:
                is_whole = False
                break
        num_rows = len(texts)
    except DamagedTextError:
        num_rows = len(texts) + 1  # The damage becomes an error row.
    if not texts:
        return Sample(pa.schema([(name, pa.null()) for name in names]), num_rows, is_whole)
    text = b"".join(texts)
    table = _parse(text, names, pyarrow.csv.ConvertOptions(null_values=NULLS), _skip)
    as_text = [*_changed(table, names, text), *(field.name for field in table.schema if pa.types.is_binary(field.type))]
    fields = [field.with_type(pa.string()) if field.name in as_text else field for field in table.schema]
    return Sample(pa.schema(fields), num_rows, is_whole)


def _joined(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Returns the columns of all schemas. A column without values or with several types is text."""
    kinds: dict[str, set[pa.DataType]] = {}
    for field in itertools.chain.from_iterable(schemas):
        kinds.setdefault(field.name, set()).add(field.type)
    one_kind = {name: known - {pa.null()} for name, known in kinds.items()}
    return pa.schema([(name, known.pop() if len(known) == 1 else pa.string()) for name, known in one_kind.items()])


def _changed(table: pa.Table, names: Sequence[str], text: bytes) -> list[str]:
    """Returns the names of the columns whose type does not give back the text of every value.

    Args:
        table: Columns of the table that `_parse` made of the text.
        names: The header.
        text: Records of CSV.
    """
    typed = {field.name: pa.string() for field in table.schema if not _is_text(field.type)}
    if not typed:
        return []
    convert = pyarrow.csv.ConvertOptions(column_types=typed, include_columns=list(typed), null_values=NULLS)
    written = _parse(text, names, convert, _skip)
    return [name for name in typed if not _gives_back(table[name], written[name])]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_null(kind)


def _gives_back(column: pa.ChunkedArray, written: pa.ChunkedArray) -> bool:
    """Returns whether each value of a column, except null, has the given text, for Arrow and for Python."""
    if not pc.all(pc.fill_null(pc.equal(column.cast(pa.string()), written), True)).as_py():
        return False
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return True
    pairs = zip(column.to_pylist(), written.to_pylist(), strict=True)
    return all(value is None or str(value) == text for value, text in pairs)


def _header(file: InputFile, records: Iterator[Line]) -> list[str]:
    try:
        first = next(records, None)
        names = [] if first is None else pyarrow.csv.read_csv(pa.BufferReader(first[1])).schema.names
    except (pa.ArrowInvalid, UnicodeDecodeError, DamagedTextError) as error:
        raise ConfigError(f"the header of {file.path!r} cannot be read: {first_line(error)}") from error
    if not names:
        raise ConfigError(f"input {file.path!r} is empty; a CSV file begins with the names of its columns")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"the header of {file.path!r} names {twice[0]!r} twice; columns need names of their own")
    return names


def _skip(row: pyarrow.csv.InvalidRow) -> str:
    return "skip"


def _parse(
    text: bytes, names: Sequence[str], convert: pyarrow.csv.ConvertOptions, on_invalid: object = None
) -> pa.Table:
    """Parses CSV text into a table, as one block, so that Arrow looks at all values of a column to find its type."""
    if on_invalid is not None:  # Arrow would show the function each invalid row as text.
        text = text.decode("utf-8", "replace").encode()
    return pyarrow.csv.read_csv(
        pa.BufferReader(text),
        pyarrow.csv.ReadOptions(use_threads=False, column_names=list(names), block_size=len(text) + 1),
        pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=on_invalid),
        convert,
    )


FORMAT = CsvFormat()
