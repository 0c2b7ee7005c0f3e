"""`SourceFormat` and `TableKind`: how files of a format are read, and how the files of a table are found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from ..files.storage import Storage
from .base import InputFile, Look, Unit


class SourceFormat(ABC):
    """A format of input files.

    Attributes:
        extensions: Extensions of its files, with the dot and in lower case.
        guesses_types: Whether the files do not say the types of columns, so that `look` finds them in samples.
        is_columnar: Whether a reader of some columns leaves the others alone.
        is_often_a_note: Whether such files often explain the data beside them, so that a folder with files of other
            formats is read without them.
    """

    extensions: tuple[str, ...]
    guesses_types: bool = False
    is_columnar: bool = False
    is_often_a_note: bool = False

    @abstractmethod
    def look(self, files: Sequence[InputFile]) -> Look:
        """Finds the columns and the units of files, and reads no more of the files than that takes.

        Args:
            files: The files.

        Raises:
            ConfigError: A file is not of this format.
        """

    @abstractmethod
    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yields the rows of a unit as tables.

        Args:
            unit: The unit.
            schema: Columns and types.

        Yields:
            Small tables with the columns of `schema`, `columns.POSITION`, `READ_ERROR` and `READ_ROW`.
        """

    def row_bytes(self, table: pa.Table) -> float:
        """Estimates the bytes that a row takes in the file: the bytes in memory, unless a format overrides this method.

        Args:
            table: Two or more rows that `read` has yielded.
        """
        return table.nbytes / table.num_rows


@dataclass(frozen=True, slots=True)
class TableKind:
    """A kind of table: a folder whose log says which files hold the rows.

    Attributes:
        title: Name of the kind, for people.
        log_folder: Name of the folder in the table that holds the log.
        file_format: Name of the source format of the files.
        files: Function that returns the files of a version of a table, or of its newest version, numbered from 0.
    """

    title: str
    log_folder: str
    file_format: str
    files: Callable[[Storage, int | None], list[InputFile]]
