"""The units of an input as a datasource of Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from .base import Unit, count_rows, full_schema, with_partition
from .format import SourceFormat

TASK_BYTES = 64 << 20
MAX_TASKS = 10_000
"""The driver keeps a record of every task, so the tasks of a huge input read more than `TASK_BYTES`."""


class UnitsDatasource(Datasource):
    """Reads units of files. A task reads one or more neighbouring units.

    Args:
        format: Format of the files.
        units: The units, in the order of the input.
        schema: Columns and types.
        max_rows: Number of rows to read. They are counted in the order of the input, so a single task reads them.
        partition: Names of the columns whose values are in the names of folders.
    """

    def __init__(
        self,
        format: SourceFormat,
        units: Sequence[Unit],
        schema: pa.Schema,
        max_rows: int | None = None,
        partition: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._format = format
        self._units = units
        groups = list(_grouped(units)) if max_rows is None else [list(units)]
        self._groups = [group for group in groups if group]
        self._schema = schema
        self._max_rows = max_rows
        self._partition = partition

    def get_name(self) -> str:
        """Returns the name that Ray shows."""
        return "Input"

    @property
    def num_tasks(self) -> int:
        """Number of tasks that `get_read_tasks` returns."""
        return len(self._groups)

    def estimate_inmemory_data_size(self) -> int | None:
        """Returns the size of the units in their files, because the size in memory is unknown before they are read."""
        return sum(unit.num_bytes for unit in self._units)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Returns the tasks that read the units. Each task yields small tables one after the other.

        Args:
            parallelism: Ignored, because a task has a size that a worker reads in seconds.
            per_task_row_limit: Most rows of a task.
            data_context: Ignored.
        """
        limits = [limit for limit in (self._max_rows, per_task_row_limit) if limit is not None]
        return [
            ReadTask(
                _reader(self._format, units, self._schema, self._partition),
                _metadata(units, self._max_rows),
                full_schema(self._schema),
                per_task_row_limit=min(limits, default=None),
            )
            for units in self._groups
        ]


def _grouped(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Yields the units of each task: neighbouring units of at most `TASK_BYTES`, or more to keep to `MAX_TASKS`."""
    most = max(TASK_BYTES, sum(unit.num_bytes for unit in units) // MAX_TASKS)
    group: list[Unit] = []
    num_bytes = 0
    for unit in units:
        if group and num_bytes + unit.num_bytes > most:
            yield group
            group, num_bytes = [], 0
        group.append(unit)
        num_bytes += unit.num_bytes
    yield group


def _reader(
    format: SourceFormat, units: Sequence[Unit], schema: pa.Schema, partition: Sequence[str]
) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for unit in units:
            for table in format.read(unit, schema):
                yield with_partition(table, unit.file, partition)

    return read


def _metadata(units: Sequence[Unit], max_rows: int | None) -> BlockMetadata:
    num_rows = count_rows(units)
    return BlockMetadata(
        num_rows=num_rows if num_rows is None or max_rows is None else min(num_rows, max_rows),
        size_bytes=sum(unit.num_bytes for unit in units),
        input_files=tuple(dict.fromkeys(unit.file.path for unit in units)),
        exec_stats=None,
    )
