"""Reads text files, plain or compressed, as lines, and samples them to find the columns and their types."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from ..arrow_values import has_struct
from ..common_type import common_type
from ..mixed_values import JSON, holds_json
from .base import END, LOOK_BYTES, SAMPLE_BYTES, TABLE_BYTES, InputFile, Unit, first_line, is_damage
from .file_name import compression_of

UNIT_BYTES = 16 << 20
"""Size of a unit of a file that is cut by bytes."""

READ_BYTES = 4 << 20
"""Size of a read request for a file behind a URL."""

DECOMPRESSED_BYTES = 64 << 10
"""Size of a decompression step. It is small, because up to one step before a damaged place may be lost."""

MAX_LINE_BYTES = 256 << 20
"""Size of the longest line that is read. A compressed file of a few megabytes may hold a line that fills the memory."""

LINE_ENDS = (b"\n", b"\r")

MAX_ROWS = 4096
"""Most rows of a table."""

MAX_SAMPLES = 64
NUM_THREADS = 8
GROWTH = 8
"""Guess of the ratio of text to compressed text. It only decides how much of a file is sampled."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Line: TypeAlias = tuple[int, bytes]
"""(offset of a line in the text, in bytes; bytes of the line with its end)"""


class DamagedTextError(Exception):
    """A compressed file is truncated or damaged, so its text ends early.

    Args:
        reason: Description of the damage.
        offset: The byte of the text from which on it cannot be read.
    """

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


def iter_lines(file: InputFile, start: int = 0, stop: int = END, *, returns_end_lines: bool = False) -> Iterator[Line]:
    """Yields the lines that start in a range of bytes.

    Args:
        file: The file. A compressed file can only be read from its start.
        start: The first byte at which a line may start.
        stop: The first byte after `start` at which no line may start.
        returns_end_lines: Whether a carriage return alone ends a line too.

    Raises:
        DamagedTextError: The text cannot be read from `offset` on.
    """
    offset = start
    with contextlib.ExitStack() as opened:
        lines = _open(file, opened)
        try:
            if start > 0:
                lines.seek(start - 1)
            read_line = _reader_to_any_end(lines) if returns_end_lines else lines.readline
            if start > 0:  # The first bytes are the rest of a line that started before, or only its end.
                offset += _skip_line(read_line) - 1
            while offset < stop and (line := read_line(MAX_LINE_BYTES)):
                if len(line) >= MAX_LINE_BYTES and line[-1:] not in LINE_ENDS:
                    said = f"a line of more than {MAX_LINE_BYTES} bytes at byte {offset} of its text"
                    raise DamagedTextError(f"{file.path} has {said}, so its rows from there on are not read", offset)
                yield offset, line.removeprefix(BYTE_ORDER_MARK) if offset == 0 else line
                offset += len(line)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            reason = f"{file.path} cannot be read from byte {offset} of its text on: {first_line(error)}"
            raise DamagedTextError(reason, offset) from error


def _open(file: InputFile, opened: contextlib.ExitStack) -> Any:
    raw = opened.enter_context(file.storage.open_input(READ_BYTES, file.size))
    compression = compression_of(file.path)
    if compression is None:
        return raw
    if compression == "gzip":
        return opened.enter_context(gzip.GzipFile(fileobj=raw))
    stream = opened.enter_context(pa.CompressedInputStream(raw, compression))
    return opened.enter_context(io.BufferedReader(stream, DECOMPRESSED_BYTES))


def _skip_line(read_line: Callable[[int], bytes]) -> int:
    """Reads the rest of a line, and returns its number of bytes."""
    num_bytes = 0
    while piece := read_line(MAX_LINE_BYTES):
        num_bytes += len(piece)
        if piece[-1:] in LINE_ENDS:
            break
    return num_bytes


def _reader_to_any_end(lines: Any) -> Callable[[int], bytes]:
    """Returns a function that reads the next line, which ends in a line feed, a carriage return, or both."""
    # In Latin-1 every byte is a character, so the text gives the bytes back.
    text = io.TextIOWrapper(lines, encoding="latin-1", newline="")
    return lambda max_bytes: text.readline(max_bytes).encode("latin-1")


def chunks(records: Iterator[Line]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Groups records into chunks of the size of a table, and yields the positions and the bytes of each chunk.

    Raises:
        DamagedTextError: `records` raised this error. The records before the damage have been yielded.
    """
    positions: list[int] = []
    texts: list[bytes] = []
    num_bytes = 0
    damage = None
    try:
        for position, text in records:
            positions.append(position)
            texts.append(text)
            num_bytes += len(text)
            if num_bytes >= TABLE_BYTES or len(texts) >= MAX_ROWS:
                yield positions, texts
                positions, texts, num_bytes = [], [], 0
    except DamagedTextError as error:
        damage = error
    if texts:
        yield positions, texts
    if damage is not None:
        raise damage


def whole_file(file: InputFile) -> Unit:
    """Returns a unit that is the whole file."""
    return Unit(file, num_bytes=text_bytes(file))


def cut_by_bytes(file: InputFile) -> Iterator[Unit]:
    """Yields the units of a file whose lines can be read from any byte; a compressed file is one unit."""
    if file.size is None or compression_of(file.path) is not None:
        yield whole_file(file)
        return
    for start in range(0, file.size, UNIT_BYTES):
        stop = min(start + UNIT_BYTES, file.size)
        yield Unit(file, start, stop, num_bytes=stop - start)


def text_bytes(file: InputFile) -> int:
    """Returns the number of bytes of a file's text; of a compressed file, an estimate of the decompressed size."""
    return (file.size or 0) * (1 if compression_of(file.path) is None else GROWTH)


@dataclass(frozen=True, slots=True)
class Sample:
    """The sampled part of a unit.

    Attributes:
        schema: Columns and types that hold every sampled row.
        num_rows: Number of sampled rows.
        is_whole: Whether the sample is the whole unit.
    """

    schema: pa.Schema
    num_rows: int
    is_whole: bool


def take_samples(
    units: Sequence[Unit], look: Callable[[Unit, int], Sample]
) -> tuple[Sequence[Sample], Sequence[int | None]]:
    """Samples units: all of them if they are small, otherwise the beginnings of evenly spread ones.

    Args:
        units: The units.
        look: Function that samples a unit, up to a number of bytes.

    Returns:
        The samples, and the number of rows of each unit, None where it is not known.
    """
    is_small = sum(unit.num_bytes for unit in units) <= LOOK_BYTES
    step = 1 if is_small else -(-len(units) // MAX_SAMPLES)
    chosen = units[::step]
    max_bytes = LOOK_BYTES if is_small else SAMPLE_BYTES // len(chosen)
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="millrace-look") as pool:
        samples = list(pool.map(look, chosen, [max_bytes] * len(chosen)))
    seen = {index * step: sample.num_rows for index, sample in enumerate(samples) if sample.is_whole}
    return samples, [seen.get(index) for index in range(len(units))]


def join_schemas(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Returns the columns of all schemas. A column has a type that holds all values of its types, or is text.

    A column keeps the mark `JSON` of any schema if it holds structs, or is text because its types have no other.
    """
    joined: dict[str, pa.DataType] = {}
    nested = {field.name for schema in schemas for field in schema if holds_json(field)}
    for schema in schemas:
        for field in schema:
            joined[field.name] = common_type(joined.get(field.name, pa.null()), field.type)
    return pa.schema([_marked(name, _writable(kind), name in nested) for name, kind in joined.items()])


def _marked(name: str, kind: pa.DataType, is_nested: bool) -> pa.Field:
    is_json = is_nested and (pa.types.is_string(kind) or has_struct(kind))
    return pa.field(name, kind, metadata=JSON if is_json else None)


def _writable(kind: pa.DataType) -> pa.DataType:
    """Returns a type, with text in place of the null type of a column without values, because text can be joined."""
    return pa.string() if pa.types.is_null(kind) else kind
