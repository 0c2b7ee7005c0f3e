"""`Source`: finds the files of an input from the paths that the user gave, and returns the dataset of their rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import pyarrow as pa
import ray.data

from ...engine.errors import ConfigError, StorageError, unknown_key_message
from ...engine.storage.local import refuse_special
from .. import columns
from ..files.storage import StorageOptions
from .base import TABLE_BYTES, InputFile, Unit, first_line, partition_fields, with_partition
from .datasource import UnitsDatasource
from .finding import find_files, format_of
from .formats import FORMATS
from .tables import TABLES

BLOCK_BYTES = 4 * TABLE_BYTES
"""Size of the blocks in which a read task passes rows on."""


@dataclass(frozen=True, slots=True)
class Source:
    """Input files of one format.

    Attributes:
        files: The files, in the order of the input.
        format: Name of the files' format in `FORMATS`.
        schema: Columns and types of the rows.
        units: The units that are read, in the order of the input.
        num_rows: Number of rows; None if it is not known before all files are read.
        partition: Names of the columns whose values are in the names of folders, such as ``day=3``.
    """

    files: Sequence[InputFile]
    format: str
    schema: pa.Schema
    units: Sequence[Unit]
    num_rows: int | None
    partition: Sequence[str] = ()

    @classmethod
    def find(
        cls,
        given: str | list[str],
        format: str | None = None,
        options: StorageOptions | None = None,
        versions: Mapping[str, int] | None = None,
        as_text: Sequence[str] = (),
    ) -> Source:
        """Returns the source of some files, with their columns and units. Of large files it reads only a part.

        Args:
            given: A path or URL, a pattern such as ``"data/*.parquet"``, a folder, a table, or a list of these.
            format: A name in `FORMATS` or `TABLES`; None to tell it by the extensions, or by the log of a table.
            options: Options for access to files behind a URL.
            versions: URL of a table -> version to read; other tables are read in their newest version.
            as_text: Columns that are read as text, in files of a format without types.

        Raises:
            ConfigError: A file is missing, has an unknown format, or cannot be read.
        """
        if format not in (None, *FORMATS.names, *TABLES.names):
            known = ", ".join(sorted((*FORMATS.names, *TABLES.names)))
            raise ConfigError(f"format must be one of {known}; got {format!r}")
        try:
            files = find_files(given, format, options or StorageOptions(), versions or {})
            for file in files:
                if file.storage.is_local and file.table is None:
                    refuse_special(file.path)
        except StorageError:
            raise
        except OSError as error:
            raise ConfigError(f"input {given!r} cannot be read: {first_line(error)}") from error
        kind = format if format in FORMATS.names else format_of(files)
        try:
            look = FORMATS[kind].look(files)
        except StorageError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"input {given!r} cannot be read as {kind}: {first_line(error)}") from error
        fields = partition_fields(files, look.schema)
        schema = pa.schema([*_with_text(kind, look.schema, as_text), *fields])
        _refuse_reserved(schema)
        return cls(files, kind, schema, look.units, look.num_rows, [field.name for field in fields])

    @property
    def versions(self) -> dict[str, int]:
        """URL of each table in the input -> its version."""
        return {file.table.url: file.table.version for file in self.files if file.table is not None}

    @property
    def paths(self) -> list[str]:
        """Paths or URLs of the files."""
        return [file.path for file in self.files]

    def with_columns(self, names: Collection[str]) -> Source:
        """Returns a source that reads only some columns, if its format can read a column and leave the others alone."""
        if not FORMATS[self.format].is_columnar:
            return self
        schema = pa.schema([field for field in self.schema if field.name in names])
        return replace(self, schema=schema, partition=[name for name in self.partition if name in names])

    def tables(self, unit: Unit) -> Iterator[pa.Table]:
        """Yields the rows of a unit as tables, with the columns of the dataset that `read` returns."""
        for table in FORMATS[self.format].read(unit, self.schema):
            yield with_partition(table, unit.file, self.partition)

    def read(self, limit: int | None = None, is_done: Callable[[Unit], bool] | None = None) -> ray.data.Dataset:
        """Returns the dataset of the rows.

        Args:
            limit: Number of rows to read, from the beginning of the input; None for all.
            is_done: Function that returns whether a unit can be skipped; None to read all units.

        Returns:
            Rows with the columns of the schema, `columns.POSITION`, `READ_ERROR` and `READ_ROW`. The last two are null
            for a row that was read; otherwise they hold the reason why a piece of the input is not a row, and its text.
        """
        units, max_rows = (self.units, None) if limit is None else _first_units(self.units, limit)
        # If rows are counted while they are read, the rows of finished units must be counted too.
        wanted = [unit for unit in units if is_done is None or max_rows is not None or not is_done(unit)]
        datasource = UnitsDatasource(FORMATS[self.format], wanted, self.schema, max_rows, self.partition)
        # Without a number of blocks, Ray splits the blocks that it has read to have more of them.
        dataset = ray.data.read_datasource(datasource, override_num_blocks=max(1, datasource.num_tasks))
        # Without this limit, a task holds its rows back until they take 128 MB.
        dataset.context.target_max_block_size = BLOCK_BYTES
        return dataset


def _refuse_reserved(schema: pa.Schema) -> None:
    """Raises `ConfigError` if the input has a column of a name that the pipeline gives to a column of its own."""
    if names := sorted(columns.RESERVED.intersection(schema.names)):
        raise ConfigError(
            f"the input has columns whose names the pipeline needs for itself: {', '.join(names)}; give them other "
            "names. The failed rows of a job run again with: millrace retry-failed"
        )


def _with_text(kind: str, schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """Returns the schema of an input with some of its columns as text."""
    if names and not FORMATS[kind].guesses_types:
        known = " and ".join(name for name, format in FORMATS.items() if format.guesses_types)
        raise ConfigError(f"columns_as_text is for {known}; the columns of {kind} have types")
    for name in names:
        if name not in schema.names:
            unknown = unknown_key_message("columns_as_text: the input", name, schema.names)
            raise ConfigError(unknown.replace("field", "column", 1))
    return pa.schema([field.with_type(pa.string()) if field.name in names else field for field in schema])


def _first_units(units: Sequence[Unit], limit: int) -> tuple[Sequence[Unit], int | None]:
    """Returns units with `limit` rows and None, or all units and `limit` if rows are counted while they are read."""
    if any(unit.num_rows is None or unit.num_rows != unit.stop - unit.start for unit in units):
        return units, limit
    starts = [0]
    for unit in units:
        starts.append(starts[-1] + (unit.num_rows or 0))
    pairs = takewhile(lambda pair: pair[1] < limit, zip(units, starts, strict=False))
    return [unit.first_rows(limit - start) for unit, start in pairs], None
