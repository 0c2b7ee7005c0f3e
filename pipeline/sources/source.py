"""`Source`: the input of a job, from what the user wrote to a dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import pyarrow as pa
import ray.data

from ...engine.errors import ConfigError, StorageError
from ..files.storage import StorageOptions
from .base import TABLE_BYTES, InputFile, Unit, first_line
from .datasource import UnitsDatasource
from .finding import find_files, format_of
from .formats import FORMATS
from .tables import TABLES

BLOCK_BYTES = 4 * TABLE_BYTES
"""Ray hands on what a task has read when it is so much."""


@dataclass(frozen=True, slots=True)
class Source:
    """Files with rows of one kind.

    Attributes:
        files: The files, in the order of the input.
        format: Name of their format in `FORMATS`.
        schema: Columns and types.
        units: The parts that are read, in the order of the input.
        num_rows: Number of rows; None if it takes reading everything to know.
    """

    files: Sequence[InputFile]
    format: str
    schema: pa.Schema
    units: Sequence[Unit]
    num_rows: int | None

    @classmethod
    def find(
        cls,
        given: str | list[str],
        format: str | None = None,
        options: StorageOptions | None = None,
        versions: Mapping[str, int] | None = None,
    ) -> Source:
        """Finds the files and looks into them, without reading all of a large input.

        Args:
            given: A path or URL, a pattern such as ``"data/*.parquet"``, a folder, a Delta table, or a list of these.
            format: A name in `FORMATS` or `TABLES`; None to tell it by the extensions, or by the log of a table.
            options: How to reach what is behind a URL.
            versions: Versions of Delta tables to read, by the URL of the table; the newest of others.

        Raises:
            ConfigError: A file is missing, of an unknown kind, or cannot be read.
        """
        if format not in (None, *FORMATS.names, *TABLES.names):
            known = ", ".join(sorted((*FORMATS.names, *TABLES.names)))
            raise ConfigError(f"format must be one of {known}; got {format!r}")
        files = find_files(given, format, options or StorageOptions(), versions or {})
        kind = format if format in FORMATS.names else format_of(files)
        try:
            look = FORMATS[kind].look(files)
        except StorageError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"input {given!r} cannot be read as {kind}: {first_line(error)}") from error
        return cls(files, kind, look.schema, look.units, look.num_rows)

    @property
    def versions(self) -> dict[str, int]:
        """URLs of the tables that files are of, and the versions that were read."""
        return {file.table.url: file.table.version for file in self.files if file.table is not None}

    @property
    def paths(self) -> list[str]:
        """Paths or URLs of the files."""
        return [file.path for file in self.files]

    def read(self, limit: int | None = None, is_done: Callable[[Unit], bool] | None = None) -> ray.data.Dataset:
        """Returns the dataset of the rows.

        Args:
            limit: Rows to read at most, the first ones of the input; None for all.
            is_done: Whether a part need not be read; None to read all.

        Returns:
            Rows with the columns of the schema, `columns.POSITION`, and `READ_ERROR`, which says why a piece of the
            input is no row, and is null otherwise.
        """
        units, max_rows = (self.units, None) if limit is None else _first_units(self.units, limit)
        # Where rows are counted while they are read, those of parts that are done count too.
        wanted = [unit for unit in units if is_done is None or max_rows is not None or not is_done(unit)]
        datasource = UnitsDatasource(FORMATS[self.format], wanted, self.schema, max_rows)
        # The number of blocks, so that Ray does not split what it reads in order to have more of them.
        dataset = ray.data.read_datasource(datasource, override_num_blocks=max(1, datasource.num_tasks))
        # Else a task keeps what it has read until it is 128 MB.
        dataset.context.target_max_block_size = BLOCK_BYTES
        return dataset


def _first_units(units: Sequence[Unit], limit: int) -> tuple[Sequence[Unit], int | None]:
    """Cuts parts so that they have `limit` rows; where that is not known, says to count while reading."""
    if any(unit.num_rows is None or unit.num_rows != unit.stop - unit.start for unit in units):
        return units, limit
    starts = [0]
    for unit in units:
        starts.append(starts[-1] + (unit.num_rows or 0))
    pairs = takewhile(lambda pair: pair[1] < limit, zip(units, starts, strict=False))
    return [unit.first_rows(limit - start) for unit, start in pairs], None
