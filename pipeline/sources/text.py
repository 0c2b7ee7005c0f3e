"""What the formats of text share: files as lines, also compressed ones, and looking through a sample of them."""

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

from .base import END, LOOK_BYTES, SAMPLE_BYTES, TABLE_BYTES, InputFile, Unit, first_line, is_damage
from .file_name import compression_of

READ_BYTES = 4 << 20
"""What a file behind a URL is read in."""

DECOMPRESSED_BYTES = 64 << 10
"""Where a compressed file is damaged, so much before the place may be lost: little."""

MAX_ROWS = 4096
"""Of a table."""

MAX_SAMPLES = 64
NUM_THREADS = 8
GROWTH = 8
"""How much larger text may be than it is compressed; only to decide how much to look through."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Line: TypeAlias = tuple[int, bytes]
"""Where it starts, in bytes of the text, and what it is, its end included."""


class DamagedTextError(Exception):
    """The text of a file ends before it should: what is compressed is truncated or damaged.

    Args:
        reason: What is wrong.
        offset: The byte of the text at which the rest starts.
    """

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


def iter_lines(file: InputFile, start: int = 0, stop: int = END) -> Iterator[Line]:
    """Yields the lines that start in a range of bytes.

    Args:
        file: The file; one that is compressed is read from its start only.
        start: The first byte at which a line may start.
        stop: The byte after the last such.

    Raises:
        DamagedTextError: The rest cannot be read; `offset` is where it starts.
    """
    offset = start
    with contextlib.ExitStack() as opened:
        lines = _open(file, opened)
        try:
            if start > 0:
                lines.seek(start - 1)
                offset += len(lines.readline()) - 1  # of a line that starts before; if none does, of its end
            while offset < stop and (line := lines.readline()):
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


def chunks(records: Iterator[Line]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Gathers records to tables' worth of them: their positions, and their bytes.

    Raises:
        DamagedTextError: As the records do, when what came before is handed out.
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
    """Returns a file that cannot be cut as a unit."""
    return Unit(file, num_bytes=text_bytes(file))


def text_bytes(file: InputFile) -> int:
    """Returns about how long the text of a file is."""
    return (file.size or 0) * (1 if compression_of(file.path) is None else GROWTH)


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen of a unit.

    Attributes:
        schema: Columns and types that hold every row of it.
        num_rows: Its rows.
        is_whole: Whether all of the unit was seen.
    """

    schema: pa.Schema
    num_rows: int
    is_whole: bool


def take_samples(
    units: Sequence[Unit], look: Callable[[Unit, int], Sample]
) -> tuple[Sequence[Sample], Sequence[int | None]]:
    """Looks through units: all of them, or if that is much, through the beginnings of some, evenly spread.

    Args:
        units: The units.
        look: Looks through a unit, for so many bytes at most.

    Returns:
        What was seen, and the number of rows of each unit, None if not known.
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
    """Returns the columns of all: of the type that holds all of a column's types, or text."""
    joined: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            joined[field.name] = common_type(joined.get(field.name, pa.null()), field.type)
    return pa.schema([(name, _writable(kind)) for name, kind in joined.items()])


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Returns the type that holds the values of both, or text, in which JSON can stand."""
    try:
        fields = [pa.schema([("value", kind)]) for kind in (one, other)]
        return pa.unify_schemas(fields, promote_options="permissive").field("value").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def _writable(kind: pa.DataType) -> pa.DataType:
    """Gives a column without any value the type text, which readers can join with anything."""
    return pa.string() if pa.types.is_null(kind) else kind
