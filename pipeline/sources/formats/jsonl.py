"""Input as lines of JSON. Files are cut by bytes, and a line belongs to the unit in which it starts."""

from __future__ import annotations

import codecs
import itertools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from ....engine.errors import ConfigError
from ....engine.shown import without_secrets
from ... import columns
from ...arrow_values import UNFIT, make_array, misfit, quoted
from ...common_type import common_type
from ...mixed_values import JSON, holds_json
from ..base import InputFile, Look, Unit, error_rows, finish_table, first_line
from ..format import SourceFormat
from ..text import (
    DamagedTextError,
    Line,
    Sample,
    chunks,
    cut_by_bytes,
    iter_lines,
    join_schemas,
    take_samples,
)

logger = logging.getLogger(__name__)

MAX_COLUMNS = 10_000
"""Most names in the objects of an input. Objects with more have values as names, and no table can hold them."""

ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*(\{|$)")


class JsonLinesFormat(SourceFormat):
    """Files with a JSON object per line. The position of a row is the byte at which its line starts."""

    extensions = (".jsonl", ".ndjson", ".json")
    guesses_types = True

    def look(self, files: Sequence[InputFile]) -> Look:
        """Returns the columns and units. A small input is read whole for exact types, and a large one is sampled."""
        units = [unit for file in files for unit in cut_by_bytes(file)]
        samples, counts = take_samples(units, _look_through)
        schema = join_schemas([sample.schema for sample in samples])
        _refuse_many_columns(schema.names)
        return Look(schema, [replace(unit, num_rows=count) for unit, count in zip(units, counts, strict=True)])

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yields the rows of lines as tables. A line that is not a row becomes an error row."""
        unknown: set[str] = set()
        try:
            for positions, lines in chunks(_lines(unit)):
                table, errors = parse_lines(lines, schema, unknown)
                texts = [None if error is None else _text(line) for line, error in zip(lines, errors, strict=True)]
                yield finish_table(table, unit.file.ordinal, positions, errors, texts)
        except DamagedTextError as error:
            yield error_rows(schema, unit.file.ordinal, [error.offset], str(error))
        if unknown:
            logger.warning(
                "%s has columns that were not among those looked at before the start, and are left out: %s",
                without_secrets(unit.file.path),
                ", ".join(sorted(unknown)),
            )

    def row_bytes(self, table: pa.Table) -> float:
        """Estimates the bytes of a row in the file: the mean distance between the starts of consecutive lines."""
        first, last = (int.from_bytes(table[columns.POSITION][row].as_py()[4:]) for row in (0, table.num_rows - 1))
        return (last - first) / (table.num_rows - 1)


def parse_lines(
    lines: Sequence[bytes], schema: pa.Schema, unknown: set[str] | None = None
) -> tuple[pa.Table, list[str | None]]:
    """Returns the rows that lines of JSON hold.

    Args:
        lines: Lines of JSON, as bytes.
        schema: Columns of the rows.
        unknown: Set to which the names of other columns in the lines are added.

    Returns:
        A row for each line, and for each line None or the reason why it is not a row. Such a row has only the values
        that fit their columns.
    """
    pairs = [parse_line(line, Fraction) for line in lines]
    rows = [row for row, _ in pairs]
    errors = [error for _, error in pairs]
    if unknown is not None:
        unknown.update(name for row in rows for name in row if name not in schema.names)
    try:
        return _table(rows, schema), errors
    except UNFIT:
        misfits = [_take_misfits(row, schema) for row in rows]
        return _table(rows, schema), [error or misfit for error, misfit in zip(errors, misfits, strict=True)]


def _table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    arrays = [_column([row.get(field.name) for row in rows], field) for field in schema]
    return pa.table(arrays, names=schema.names)


def _column(values: list[Any], field: pa.Field) -> pa.Array:
    """Returns values as a column. Objects that fit the type of the column are JSON in it, so each keeps its own keys.

    Raises:
        ValueError: A value does not fit, as do the other errors of `UNFIT`.
    """
    if not holds_json(field):
        return make_array([_fit(value, field.type) for value in values], field.type)
    if not pa.types.is_string(field.type):
        make_array(values, field.type)
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def _take_misfits(row: dict[str, Any], schema: pa.Schema) -> str | None:
    """Takes the values that do not fit their columns out of a row, and returns the reason; None if all fit."""
    reason = None
    for field in schema:
        value = row.get(field.name)
        try:
            _column([value], field)
        except UNFIT as error:
            row[field.name] = None
            said = f"column {field.name!r} holds {quoted(value)}, which is not {field.type}: {first_line(error):.200}"
            reason = reason or said
    return reason


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="backslashreplace").strip()


class Fraction(float):
    """A number with a point or an exponent that knows its text, since 1.10 and 1e5 are not 1.1 and 100000.0 as text."""

    def __new__(cls, text: str) -> Fraction:
        """Returns the number that a text of JSON is."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def parse_line(line: bytes, parse_float: Callable[[str], float] = float) -> tuple[dict[str, Any], str | None]:
    """Returns the row that a line of JSON holds.

    Args:
        line: One line.
        parse_float: Makes the numbers with a point or an exponent.

    Returns:
        The row and None, or an empty row and the reason why the line is not a row.
    """
    text = line.decode("utf-8", errors="replace").strip()
    try:
        value = json.loads(line.decode("utf-8"), parse_float=parse_float)
    except UnicodeDecodeError as error:
        return {}, f"the line is not UTF-8 ({error.reason} at its byte {error.start}): {text:.200}"
    except (ValueError, RecursionError) as error:
        return {}, f"the line is not JSON ({first_line(error)}): {text:.200}"
    if not isinstance(value, dict):
        return {}, f"the line is a JSON {type(value).__name__}, not an object: {text:.200}"
    if not _are_utf8(value):
        return {}, f"a name in the line holds half of a surrogate pair, which no text has: {text:.200}"
    return value, None


def _are_utf8(names: Iterable[str]) -> bool:
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(unit: Unit) -> Iterator[Line]:
    # JSON has no carriage return inside of a text, so each of them may end a line.
    lines = iter_lines(unit.file, unit.start, unit.stop, returns_end_lines=True)
    return ((offset, line) for offset, line in lines if line.strip())


def _look_through(unit: Unit, max_bytes: int) -> Sample:
    """Samples the first lines of a unit, about `max_bytes`, and finds column types that hold their values."""
    types: dict[str, pa.DataType] = {}
    nested: set[str] = set()
    num_rows = num_bytes = 0
    try:
        for positions, lines in chunks(_lines(unit)):
            if unit.start == 0 and num_rows == 0:
                _refuse_others(unit.file, lines[0])
            num_rows += len(positions)
            num_bytes += sum(map(len, lines))
            _widen(types, nested, [parse_line(line)[0] for line in lines])
            _refuse_many_columns(types)
            if num_bytes >= max_bytes:
                return Sample(_schema(types, nested), num_rows, is_whole=False)
    except DamagedTextError:
        num_rows += 1  # The damage becomes an error row.
    return Sample(_schema(types, nested), num_rows, is_whole=True)


def _refuse_many_columns(names: Collection[str]) -> None:
    if len(names) > MAX_COLUMNS:
        shown = ", ".join(quoted(name) for name in itertools.islice(names, 3))
        raise ConfigError(
            f"the objects of the input have more than {MAX_COLUMNS:,} names, such as {shown}; if these are values, "
            'write them as such: {"name": ..., "value": ...}'
        )


def _schema(types: dict[str, pa.DataType], nested: set[str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata=JSON if name in nested else None) for name, kind in types.items()])


def _widen(types: dict[str, pa.DataType], nested: set[str], rows: Sequence[dict[str, Any]]) -> None:
    """Widens the types of columns to hold the values of rows, and adds columns with lists or objects to `nested`."""
    for name in dict.fromkeys(name for row in rows for name in row):
        if any(isinstance(row.get(name), list | dict) for row in rows):
            nested.add(name)
        types[name] = common_type(types.get(name, pa.null()), _type_of([row.get(name) for row in rows]))


def _type_of(values: Iterable[Any]) -> pa.DataType:
    given = list(values)
    try:
        return make_array(given, None).type
    except UNFIT:
        if any(isinstance(value, list | dict) for value in given):
            return pa.string()  # As JSON, which can write any text.
        readable = [value for value in given if not isinstance(misfit(value, None), UnicodeError)]
        # A text that no column holds costs its row, and says nothing about the type of the others.
        return _type_of(readable) if len(readable) < len(given) else pa.string()


def _fit(value: Any, kind: pa.DataType) -> Any:
    """Returns a value for a column: as JSON text if the column is text and the value is not, else unchanged."""
    if value is None or isinstance(value, str) or kind != pa.string():
        return value
    return value.text if isinstance(value, Fraction) else json.dumps(value, ensure_ascii=False)


def _refuse_others(file: InputFile, line: bytes) -> None:
    """Raises if the first line of a file shows that no line of the file is an object in UTF-8."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(
            f"input {file.path!r} is UTF-16; JSON lines are UTF-8, so convert it, for example with: iconv -f UTF-16 -t "
            "UTF-8"
        )
    if ARRAY_OF_OBJECTS.match(line) is not None:
        raise ConfigError(
            f"input {file.path!r} is one JSON array; write one object per line instead, for example with: jq -c '.[]'"
        )


FORMAT = JsonLinesFormat()
