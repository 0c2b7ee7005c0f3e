"""A scan of the whole batch file before the run: `InputIndex` holds chunk offsets and the lines that repeat an id.

One process reads the file once, as OpenAI's service does before it accepts a file. The index is small, whatever the
size of the file. The folder of the work in progress keeps the index, so that a resumed batch does not scan again.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..files.storage import Storage
from .duplicates import DuplicateFinder
from .lines.refusal import Refusal
from .lines.request import custom_id_of, parse_object

CHUNK = np.dtype([("offset", "<u8"), ("num_bytes", "<u8"), ("first_line", "<u8"), ("num_rows", "<u8")])
CHUNK_BYTES = 1 << 20
CHUNK_ROWS = 512


@dataclass(frozen=True)
class InputIndex:
    """The result of a scan of a batch file: the ranges of bytes to read it by, and its duplicates and empty lines.

    Attributes:
        chunks: Array of dtype `CHUNK`. Each element is a range of whole lines, of about a megabyte or `CHUNK_ROWS`
            lines: its byte offset, its size, the number of its first line (from 1), and its count of lines that are not
            empty.
        duplicates: Byte offsets of the lines that repeat the `custom_id` of an earlier line, ascending, as uint64.
        num_empty: Number of empty lines, which the run skips.
        model: Model name in the first line that gives one; None if no line does.
    """

    chunks: np.ndarray
    duplicates: np.ndarray
    num_empty: int
    model: str | None

    @property
    def num_rows(self) -> int:
        """Number of lines that are not empty."""
        return int(self.chunks["num_rows"].sum())

    @classmethod
    def scan(cls, file: Storage) -> InputIndex:
        """Reads a whole batch file and returns its index.

        Args:
            file: The batch file.
        """
        with tempfile.TemporaryDirectory() as folder, file.open_input() as lines:
            return _scan(lines, DuplicateFinder(Path(folder)))

    def to_bytes(self) -> bytes:
        """Returns the index as the bytes of an ``.npz`` file."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            chunks=self.chunks,
            duplicates=self.duplicates,
            num_empty=self.num_empty,
            model=np.frombuffer((self.model or "").encode(), np.uint8),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> InputIndex | None:
        """Returns the index whose `to_bytes` returned these bytes; None if the bytes are damaged."""
        try:
            with np.load(io.BytesIO(data)) as kept:
                model = kept["model"].tobytes().decode()
                index = cls(kept["chunks"], kept["duplicates"], int(kept["num_empty"]), model or None)
        except (ValueError, TypeError, AttributeError, KeyError, EOFError, OSError, zipfile.BadZipFile):
            return None
        return index if index.chunks.dtype == CHUNK else None


def read_lines(file: BinaryIO, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line) of every line of a file, empty lines included.

    Args:
        file: The file, positioned at the start of a line.
        offset: Byte offset in the batch file of the current position of `file`; yielded offsets count from there.
    """
    for line in file:
        yield offset, line
        offset += len(line)


def _scan(file: BinaryIO, finder: DuplicateFinder) -> InputIndex:
    chunks: list[tuple[int, int, int, int]] = []
    begin, first, num_rows, end, num_empty, model = 0, 1, 0, 0, 0, None
    for number, (offset, line) in enumerate(read_lines(file), start=1):
        if num_rows and (offset - begin >= CHUNK_BYTES or num_rows >= CHUNK_ROWS):
            chunks.append((begin, offset - begin, first, num_rows))
            begin, first, num_rows = offset, number, 0
        end = offset + len(line)
        if not line.strip():
            num_empty += 1
            continue
        num_rows += 1
        custom_id, named = _look_at(line)
        model = model or named
        if custom_id is not None:
            finder.add(custom_id, offset)
    if num_rows:
        chunks.append((begin, end - begin, first, num_rows))
    return InputIndex(np.array(chunks, CHUNK), finder.places(), num_empty, model)


def _look_at(line: bytes) -> tuple[str | None, str | None]:
    """Returns the `custom_id` and the model name of a line; None in place of one that is missing or invalid."""
    with suppress(Refusal):
        values = parse_object(line)
        body = values.get("body")
        model = body.get("model") if isinstance(body, dict) else None
        return custom_id_of(values), model if isinstance(model, str) else None
    return None, None
