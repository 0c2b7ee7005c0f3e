"""Joins the parts of a finished run: `write_answers` and `write_errors` write the two files in input order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from .. import columns
from ..files.storage import Storage
from ..ledger.counts import ErrorKind
from .lines.request import RequestReader
from .lines.response import error_line
from .output_file import whole_file
from .rows import error_of_row
from .source import LINE, LINE_NUMBER

ROWS_AT_ONCE = 1024


def write_answers(parts: Sequence[Storage], target: Storage, check: Callable[[], None]) -> int:
    """Writes the answers of a batch to the out file.

    Args:
        parts: Parquet files of the results, in input order.
        target: The out file; the file appears when all lines are written.
        check: Function that raises if this process may no longer write the file. It is called just before the file
            appears.

    Returns:
        The number of lines that the out file holds.
    """
    return _write(target, (row[LINE] for part in parts for row in _rows(part)), check)


def write_errors(
    parts: Sequence[Storage], target: Storage, reader: RequestReader, check: Callable[[], None]
) -> dict[str, ErrorKind]:
    """Writes the errors of a batch to the error file, in input order.

    Args:
        parts: Parquet files of the dead letters, each sorted in input order.
        target: The error file; the file appears when all lines are written.
        reader: The reader that the run parsed its lines with.
        check: As in `write_answers`.

    Returns:
        Error code -> the number of lines with this code, and the message of the first of these lines.
    """
    codes: dict[str, ErrorKind] = {}

    def lines() -> Iterator[bytes]:
        for row in heapq.merge(*map(_rows, parts), key=lambda row: row[columns.ROW_ID]):
            error = error_of_row(row, reader)
            codes.setdefault(error.code, ErrorKind(0, error.message)).num_rows += 1
            yield error_line(error, row[LINE_NUMBER])

    _write(target, lines(), check)
    return codes


def _rows(part: Storage) -> Iterator[dict[str, Any]]:
    with part.open_arrow() as opened, pq.ParquetFile(opened, pre_buffer=False) as parquet:
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            yield from batch.to_pylist()


def _write(target: Storage, lines: Iterable[bytes], check: Callable[[], None]) -> int:
    num_lines = 0
    with whole_file(target) as file:
        for line in lines:
            file.write(line)
            num_lines += 1
        check()
    return num_lines
