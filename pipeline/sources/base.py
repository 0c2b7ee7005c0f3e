"""The input of a job as data: its files, the units in which they are read, and what a format of files does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ...engine.errors import ConfigError, StorageError
from .. import columns
from ..files.storage import Storage

READ_ERROR = "__read_error"
"""Why a piece of the input is not a row; only between reading and preparing."""

POSITION_TYPE = pa.binary(12)
END = 1 << 62
"""A position after every one that a file can have."""

LOOK_BYTES = 32 << 20
"""Text is looked through whole for the types of its columns up to this size."""

SAMPLE_BYTES = 8 << 20
"""Of more text than that, so much is looked through."""

TABLE_BYTES = 1 << 20
"""A table that a reader hands out has about so many bytes, if a row is no larger."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """What the log of a table says about one of the table's files.

    Attributes:
        url: The table.
        version: The version of the table that has the file.
        schema: Columns and types of the table.
        partition: One row with the columns that the file lacks because all of its rows have the same values.
        file_format: Name of the format of the file.
        if_missing: Message for a user whose file is gone.
    """

    url: str
    version: int
    schema: pa.Schema
    partition: pa.Table
    file_format: str
    if_missing: str


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input.

    Attributes:
        ordinal: Its number in the input; the first part of the position of its rows.
        storage: Where it is.
        size: In bytes; None where the store does not say.
        etag: Changes when the content does.
        table: What the log of its table says of it; None for a file that belongs to none.
    """

    ordinal: int
    storage: Storage
    size: int | None
    etag: str
    table: TableFile | None = None

    @property
    def path(self) -> str:
        """Its path or URL."""
        return self.storage.url


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a file that is read in one go: the rows with a position from `start` to before `stop`.

    Attributes:
        file: The file.
        start: Number of the first row, or for lines of JSON the byte from which on a line may start.
        stop: Number after that of the last row, or the byte from which on no line may start.
        num_rows: Rows of the part; None if that takes reading it.
        num_bytes: What it takes in the file, roughly.
    """

    file: InputFile
    start: int = 0
    stop: int = END
    num_rows: int | None = None
    num_bytes: int = 0

    def bounds(self) -> tuple[bytes, bytes]:
        """Returns the least value of `columns.POSITION` that it may hold, and the least beyond it."""
        low, high = position_column(self.file.ordinal, [self.start, self.stop]).to_pylist()
        return low, high

    def first_rows(self, num_rows: int) -> Unit:
        """Returns the part with these many rows at most, of one that is cut by rows."""
        count = min(num_rows, self.stop - self.start)
        return replace(self, stop=self.start + count, num_rows=count)


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of the input before it is read.

    Attributes:
        schema: Columns and types.
        units: The parts, in the order of the input.
    """

    schema: pa.Schema
    units: Sequence[Unit]

    @property
    def num_rows(self) -> int | None:
        """Rows of all parts; None if not known."""
        return count_rows(self.units)


def count_rows(units: Sequence[Unit]) -> int | None:
    """Returns the rows of all parts; None if not known."""
    counts = [unit.num_rows for unit in units]
    return None if None in counts else sum(count for count in counts if count is not None)


class SourceFormat(ABC):
    """A format of input files.

    Attributes:
        extensions: Extensions of its files, with the dot and in lower case.
    """

    extensions: tuple[str, ...]

    @abstractmethod
    def look(self, files: Sequence[InputFile]) -> Look:
        """Finds out the columns and the units of files, and reads little of them.

        Args:
            files: The files.

        Raises:
            ConfigError: A file is not of this format.
        """

    @abstractmethod
    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Reads a unit.

        Args:
            unit: The unit.
            schema: Columns and types.

        Yields:
            Small tables with these columns, `columns.POSITION` and `READ_ERROR`.
        """

    def row_bytes(self, table: pa.Table) -> float:
        """Returns about how many bytes a row takes in the file: as many as in memory, unless a format knows better.

        Args:
            table: Two or more rows that `read` has yielded.
        """
        return table.nbytes / table.num_rows


@dataclass(frozen=True, slots=True)
class TableKind:
    """A kind of table: a folder whose log says which files hold the rows.

    Attributes:
        title: Its name for people.
        log_folder: Name of the folder in the table that holds the log.
        file_format: Name of the source format of the files.
        files: Returns the files of a version of a table, or of its newest one, numbered from 0.
    """

    title: str
    log_folder: str
    file_format: str
    files: Callable[[Storage, int | None], list[InputFile]]


def position_column(ordinal: int, positions: Sequence[int] | np.ndarray) -> pa.Array:
    """Returns the column of positions: 4 bytes of the file's ordinal, 8 of the place in it, so that bytes sort as rows.

    Args:
        ordinal: Of the file.
        positions: Places in it, by row.
    """
    places = np.asarray(positions, dtype=">u8")
    joined = np.empty((len(places), 12), np.uint8)
    joined[:, :4] = np.frombuffer(ordinal.to_bytes(4, "big"), np.uint8)
    joined[:, 4:] = places.view(np.uint8).reshape(-1, 8)
    return pa.FixedSizeBinaryArray.from_buffers(POSITION_TYPE, len(places), [None, pa.py_buffer(joined)])


def full_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the columns of the tables that a reader hands out."""
    return pa.schema([*schema, pa.field(columns.POSITION, POSITION_TYPE), pa.field(READ_ERROR, pa.string())])


def finish_table(
    table: pa.Table, ordinal: int, positions: Sequence[int] | np.ndarray, errors: Sequence[str | None] | None = None
) -> pa.Table:
    """Adds to rows where they are from, and which of them are none. There may be rows without any column."""
    reasons = pa.nulls(len(positions), pa.string()) if errors is None else pa.array(errors, pa.string())
    return pa.table([*table.columns, position_column(ordinal, positions), reasons], schema=full_schema(table.schema))


def error_rows(schema: pa.Schema, ordinal: int, positions: Sequence[int], reason: str) -> pa.Table:
    """Returns rows without values, for what cannot be read."""
    nothing = pa.table([pa.nulls(len(positions), field.type) for field in schema], schema=_nullable(schema))
    return finish_table(nothing, ordinal, positions, [reason] * len(positions))


def align(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns a table with exactly these columns: a missing one is null, one of another type is cast.

    Raises:
        ArrowInvalid: A value does not fit its column.
    """
    names = set(table.column_names)
    return pa.table(
        [
            table[field.name].cast(field.type) if field.name in names else pa.nulls(len(table), field.type)
            for field in schema
        ],
        schema=_nullable(schema),
    )


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Returns the columns of all files.

    Raises:
        ConfigError: A column has types that no type holds.
    """
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive").remove_metadata()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(
            f"the files of the input have columns that do not go together: {first_line(error)}"
        ) from error


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_nullable(True) for field in schema])


def is_damage(error: BaseException) -> bool:
    """Whether an error of reading is about what the file holds, rather than about reaching it or having no memory.

    Errors of the system have a number, those of a decoder have none.
    """
    if isinstance(error, StorageError | MemoryError):
        return False
    return not isinstance(error, OSError) or error.errno is None


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
