"""`dead_letters`: the failed rows of a finished job as a datasource, for a run that tries them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ...engine.errors import DamagedOutputError
from .. import columns
from ..files.storage import Storage
from ..sinks.manifest import OutputFile
from ..sources import READ_ERROR, READ_ROW
from ..sources.base import InputFile, Unit
from ..sources.datasource import UnitsDatasource
from ..sources.formats.parquet import ParquetFormat

__all__ = ["dead_letters"]


def dead_letters(root: Storage, files: Sequence[OutputFile], schema: pa.Schema) -> UnitsDatasource:
    """Returns the rows in files of dead letters, whose types may differ from file to file.

    Args:
        root: Output folder of the job.
        files: The files, with names in the folder.
        schema: Columns and types of the input of the job, as `OutputSpec.input_schema`.
    """
    units = [
        Unit(InputFile(at, root / file.name, file.num_bytes, ""), 0, file.num_rows, file.num_rows, file.num_bytes)
        for at, file in enumerate(files)
    ]
    types = columns.error_types()
    kept = [field for field in schema if field.name not in (READ_ERROR, READ_ROW, *types)]
    return UnitsDatasource(_DeadLetterFormat(), units, pa.schema([*kept, *types.items()]))


class _DeadLetterFormat(ParquetFormat):
    """Files of dead letters. A value that could not be kept in the type of its column is an error of its row again."""

    def read(self, unit: Unit, schema: pa.Schema) -> Iterator[pa.Table]:
        """Yields the rows of a file as tables, with the reasons why they were no rows of the input."""
        written = pa.schema([*schema, (READ_ERROR, pa.string()), (READ_ROW, pa.string())])
        for table in super().read(unit, written):
            if table[columns.ROW_ID].null_count:
                raise DamagedOutputError(f"the failed rows cannot run again: {table[-2][0].as_py():.500}")
            *kept, reason, text = table.columns
            names = table.column_names[:-2]
            old = {name: kept.pop(names.index(name)) for name in (READ_ROW, READ_ERROR)}
            names = [name for name in names if name not in old]
            yield pa.table(
                [*kept, pc.coalesce(old[READ_ERROR], reason), pc.coalesce(old[READ_ROW], text)],
                names=[*names, READ_ERROR, READ_ROW],
            )
