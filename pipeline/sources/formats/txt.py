"""Input as text files, with a row for each line. Files are cut by bytes, and a line belongs to where it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from ... import columns
from ..base import InputFile, Look, Unit, error_rows, finish_table
from ..format import SourceFormat
from ..text import DamagedTextError, Line, Sample, chunks, cut_by_bytes, iter_lines, take_samples

TEXT = "text"
"""Name of the only column."""

SCHEMA = pa.schema([(TEXT, pa.string())])


class TextLinesFormat(SourceFormat):
    """Files of plain text in UTF-8. A line is a row with the column `text`; lines without text are left out."""

    extensions = (".txt",)
    is_often_a_note = True

    def look(self, files: Sequence[InputFile]) -> Look:
        """Returns the column, and the units. The lines of a small input are counted."""
        units = [unit for file in files for unit in cut_by_bytes(file)]
        _, counts = take_samples(units, _look_through)
        return Look(SCHEMA, [replace(unit, num_rows=count) for unit, count in zip(units, counts, strict=True)])

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yields the lines as tables. A line that is not UTF-8 becomes an error row."""
        try:
            for positions, lines in chunks(_lines(unit)):
                errors = [_fault_of(line) for line in lines]
                texts = [line.decode("utf-8", "backslashreplace").rstrip("\r\n") for line in lines]
                rows = [None if error else text for text, error in zip(texts, errors, strict=True)]
                table = pa.table({TEXT: pa.array(rows, pa.string())})
                shown = [text if error else None for text, error in zip(texts, errors, strict=True)]
                yield finish_table(table, unit.file.ordinal, positions, errors, shown)
        except DamagedTextError as error:
            yield error_rows(schema, unit.file.ordinal, [error.offset], str(error))

    def row_bytes(self, table: pa.Table) -> float:
        """Estimates the bytes of a row in the file: the mean distance between the starts of consecutive lines."""
        first, last = (int.from_bytes(table[columns.POSITION][row].as_py()[4:]) for row in (0, table.num_rows - 1))
        return (last - first) / (table.num_rows - 1)


def _lines(unit: Unit) -> Iterator[Line]:
    lines = iter_lines(unit.file, unit.start, unit.stop, returns_end_lines=True)
    return ((offset, line) for offset, line in lines if line.strip())


def _fault_of(line: bytes) -> str | None:
    """Returns why a line is no text; None if it is."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 ({error.reason} at its byte {error.start})"
    return None


def _look_through(unit: Unit, max_bytes: int) -> Sample:
    num_rows = num_bytes = 0
    try:
        for positions, lines in chunks(_lines(unit)):
            num_rows += len(positions)
            num_bytes += sum(map(len, lines))
            if num_bytes >= max_bytes:
                return Sample(SCHEMA, num_rows, is_whole=False)
    except DamagedTextError:
        num_rows += 1  # The damage becomes an error row.
    return Sample(SCHEMA, num_rows, is_whole=True)


FORMAT = TextLinesFormat()
