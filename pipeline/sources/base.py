"""The input of a job as data: its files, the units in which they are read, and the tables that formats yield."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from ...engine.errors import ConfigError, StorageError
from ...engine.shown import without_secrets
from .. import columns
from ..arrow_values import UNFIT, cast, plain_type, python_values, quoted, to_rows
from ..common_type import common_type
from ..files.storage import Storage
from ..json_text import to_json
from ..mixed_values import holds_json
from .file_name import partition_of

logger = logging.getLogger(__name__)

READ_ERROR, READ_ROW = columns.READ_ERROR, columns.READ_ROW

POSITION_TYPE = pa.binary(12)
END = 1 << 62
"""A position greater than any position in a file."""

LOOK_BYTES = 32 << 20
"""Text up to this size is read whole to find the types of its columns."""

SAMPLE_BYTES = 8 << 20
"""Of larger text, this much is read to find the types of its columns."""

INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")

TABLE_BYTES = 1 << 20
"""About the size of a table that `SourceFormat.read` yields, unless one row is larger."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """The entry for a file in the log of a table.

    Attributes:
        url: URL of the table.
        version: Version of the table that the file belongs to.
        schema: Columns and types of the table.
        partition: One row with the columns that the file lacks because all of its rows have the same values.
        file_format: Name of the format of the file.
        if_missing: Message of the error that is raised when the file does not exist.
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
        ordinal: Number of the file in the input; the first part of the position of its rows.
        storage: Place of the file.
        size: Size of the file in bytes; None if the store does not say.
        etag: Text that changes when the content changes.
        table: The entry for the file in the log of a table; None if the file belongs to no table.
    """

    ordinal: int
    storage: Storage
    size: int | None
    etag: str
    table: TableFile | None = None

    @property
    def path(self) -> str:
        """The path or URL of the file."""
        return self.storage.url


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a file that is read at once: the rows with a position from `start` to before `stop`.

    Attributes:
        file: The file.
        start: Number of the first row. For lines of JSON, the first byte at which a line may start.
        stop: Number of the row after the last one. For lines of JSON, the first byte at which no line may start.
        num_rows: Rows of the unit; None if their number is not known before they are read.
        num_bytes: About the size of the unit in the file.
    """

    file: InputFile
    start: int = 0
    stop: int = END
    num_rows: int | None = None
    num_bytes: int = 0

    def bounds(self) -> tuple[bytes, bytes]:
        """Returns the least `columns.POSITION` that a row of the unit can have, and the least one after the unit."""
        low, high = position_column(self.file.ordinal, [self.start, self.stop]).to_pylist()
        return low, high

    def first_rows(self, num_rows: int) -> Unit:
        """Returns a unit of at most the first `num_rows` rows. `start` of this unit must be a row, not a byte."""
        count = min(num_rows, self.stop - self.start)
        return replace(self, stop=self.start + count, num_rows=count)


@dataclass(frozen=True, slots=True)
class Look:
    """The facts about an input that are known before its rows are read.

    Attributes:
        schema: Columns and types.
        units: The units, in the order of the input.
    """

    schema: pa.Schema
    units: Sequence[Unit]

    @property
    def num_rows(self) -> int | None:
        """Rows of all units; None if their number is not known."""
        return count_rows(self.units)


def count_rows(units: Sequence[Unit]) -> int | None:
    """Returns the number of rows of all units; None if it is not known."""
    counts = [unit.num_rows for unit in units]
    return None if None in counts else sum(count for count in counts if count is not None)


def position_column(ordinal: int, positions: Sequence[int] | np.ndarray) -> pa.Array:
    """Returns a column of positions, whose bytes sort in the order of the input.

    A position is 4 bytes with the ordinal of the file and 8 bytes with the place in the file.

    Args:
        ordinal: The ordinal of the file.
        positions: The place of each row in the file.
    """
    places = np.asarray(positions, dtype=">u8")
    joined = np.empty((len(places), 12), np.uint8)
    joined[:, :4] = np.frombuffer(ordinal.to_bytes(4, "big"), np.uint8)
    joined[:, 4:] = places.view(np.uint8).reshape(-1, 8)
    return pa.FixedSizeBinaryArray.from_buffers(POSITION_TYPE, len(places), [None, pa.py_buffer(joined)])


def partition_fields(files: Iterable[InputFile], schema: pa.Schema) -> list[pa.Field]:
    """Returns the columns that the names of folders give to files and that the files do not have.

    Args:
        files: The files.
        schema: Columns that the files have.

    Returns:
        Fields of integers, if all values are integers as Python writes them, or else of text.
    """
    values: dict[str, list[str]] = {}
    for file in files:
        for name, value in partition_of(file.path).items() if file.table is None else ():
            if name not in schema.names:
                _refuse_odd_text(file, name + (value or ""))
                values.setdefault(name, []).extend([] if value is None else [value])
    return [
        pa.field(name, pa.int64() if given and all(map(_is_int64, given)) else pa.string())
        for name, given in values.items()
    ]


def _refuse_odd_text(file: InputFile, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"a folder of {file.path!r} names a value that is no UTF-8; rename the folder") from None


def with_partition(rows: pa.Table, file: InputFile, names: Collection[str]) -> pa.Table:
    """Returns rows of a file with the values of the partition columns from the names of the folders above the file.

    Args:
        rows: Rows of the file, in which these columns are null.
        file: The file.
        names: Names of the partition columns.
    """
    for name, value in partition_of(file.path).items() if names else ():
        if name in names:
            index = rows.column_names.index(name)
            field = rows.schema.field(index)
            column = pa.repeat(pa.scalar(value, pa.string()).cast(field.type), len(rows))
            rows = rows.set_column(index, field, column)
    return rows


def _is_int64(text: str) -> bool:
    return INTEGER.fullmatch(text) is not None and -(2**63) <= int(text) < 2**63


def full_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the schema of the tables of an input: objects as JSON, and the columns that `SourceFormat.read` adds."""
    kept = [pa.field(field.name, pa.string()) if holds_json(field) else field for field in schema]
    return pa.schema([*kept, (columns.POSITION, POSITION_TYPE), (READ_ERROR, pa.string()), (READ_ROW, pa.string())])


def finish_table(
    table: pa.Table,
    ordinal: int,
    positions: Sequence[int] | np.ndarray,
    errors: Sequence[str | None] | None = None,
    texts: Sequence[str | None] | None = None,
) -> pa.Table:
    """Returns a table with the columns `POSITION`, `READ_ERROR` and `READ_ROW` added.

    Args:
        table: The rows. The table may have no columns.
        ordinal: The ordinal of the file.
        positions: The place of each row in the file.
        errors: The reason why a row could not be read, or None, for each row.
        texts: The text of a row with an error as it was read, or None, for each row.
    """
    shown = None if errors is None else without_secrets(list(errors))  # Reasons name files, whose URLs may hold keys.
    read = [
        pa.nulls(len(positions), pa.string()) if values is None else pa.array(values, pa.string())
        for values in (shown, texts)
    ]
    return pa.table([*table.columns, position_column(ordinal, positions), *read], schema=full_schema(table.schema))


def error_rows(schema: pa.Schema, ordinal: int, positions: Sequence[int], reason: str) -> pa.Table:
    """Returns a table with a row of nulls for each position whose data cannot be read; `READ_ERROR` is `reason`."""
    kinds = [pa.string() if holds_json(field) else field.type for field in schema]
    nothing = pa.table([pa.nulls(len(positions), kind) for kind in kinds], names=schema.names)
    return finish_table(nothing, ordinal, positions, [reason] * len(positions))


def align(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns a table with exactly the columns of `schema`. A missing column is null; a column of another type is cast.

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


def fit_rows(table: pa.Table, schema: pa.Schema, ordinal: int, positions: Sequence[int]) -> pa.Table:
    """Returns rows with exactly the columns of `schema` and those of `finish_table`.

    A missing column is null; a column of another type is cast. A row with a value that does not fit its column becomes
    an error row, which keeps its other values and has all of them in `READ_ROW`.

    Args:
        table: The rows as they are in the file.
        schema: Columns and types.
        ordinal: The ordinal of the file.
        positions: The place of each row in the file.
    """
    errors: dict[int, str] = {}
    fitted = [_fit_column(table, field, errors) for field in schema]
    rows = pa.table(fitted, schema=_nullable(schema))
    if not errors:
        return finish_table(rows, ordinal, positions)
    unfit = [row for at in errors for row in to_rows(table.slice(at, 1))]
    texts = dict(zip(errors, map(to_json, unfit), strict=True))
    places = range(len(table))
    return finish_table(rows, ordinal, positions, [errors.get(at) for at in places], [texts.get(at) for at in places])


def _fit_column(table: pa.Table, field: pa.Field, errors: dict[int, str]) -> pa.ChunkedArray | pa.Array:
    """Returns a column in the type of `field`, with null for each value that does not fit, and adds to `errors`."""
    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    column = table[field.name]
    try:
        return cast(column, field.type)
    except UNFIT:
        pass
    pieces: list[pa.Array] = []
    for at in range(len(column)):
        try:
            pieces += cast(column.slice(at, 1), field.type).chunks
        except UNFIT:
            pieces.append(pa.nulls(1, field.type))
            (value,) = python_values(column.slice(at, 1))
            errors.setdefault(at, f"column {field.name!r} holds {quoted(value)}, which is not {field.type}")
    return pa.concat_arrays(pieces)


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Returns the columns of the schemas of all files. A column has a type that holds its values in the files, or text.

    Raises:
        ConfigError: A file has two columns of one name.
    """
    joined: dict[str, pa.DataType] = {}
    for schema in schemas:
        twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"a file of the input has two columns {twice!r}; columns need names of their own")
        for field in schema:
            kind, known = plain_type(field.type), joined.get(field.name, pa.null())
            joined[field.name] = common_type(known, kind)
            if pa.types.is_string(joined[field.name]) and not {known, kind} <= {pa.string(), pa.null()}:
                logger.warning(
                    "column %r is %s in some files and %s in others; it is read as text", field.name, known, kind
                )
    return pa.schema(list(joined.items()))


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_nullable(True) for field in schema])


def is_damage(error: BaseException) -> bool:
    """Returns whether a read error comes from the content of a file, not from the storage or a lack of memory.

    An error of the operating system has a number; an error of a decoder has none.
    """
    if isinstance(error, StorageError | MemoryError):
        return False
    return not isinstance(error, OSError) or error.errno is None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of the error's class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
