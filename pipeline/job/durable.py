"""The two operators of a job whose rows become durable one by one: prepare new rows, generate and write.

    rows with an id -> PrepareNew -> unfinished rows, packed -> GenerateAndWrite -> counts of the written rows

`GenerateAndWrite` passes no rows on. A row is written as soon as it finishes, independently of the rest of its block,
and a call returns when its rows are durable. So Ray never needs to repeat a call that has returned. A call that Ray
does repeat skips the rows that its first attempt has written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import ActorPoolStrategy

from ...engine.errors import ConfigError
from .. import columns
from ..arrow_values import plain, to_rows
from ..errors import RowFailedError
from ..files.storage import Storage
from ..ledger import row_id
from ..ledger.index import RowIndex
from ..ledger.records import read_ids, read_records
from ..processor.assemble import Link, Operators, OperatorSpec
from ..processor.operators import MakeStages, pack, run_stages, unpack
from ..processor.resources import OPERATOR_CPUS
from ..sinks.parts import OutputSpec
from ..sinks.writer import ResultWriter
from ..sources import READ_ERROR, READ_ROW
from ..stages.base import Row, RowError

DEFAULT_MAX_BLOCKS = 4
"""Blocks under way at once where the processor has no limit of its own."""

COUNTS = "counts"
"""Column that `GenerateAndWrite` returns: counts of the rows written since any call last returned counts, as JSON."""


NOT_INPUT = (
    columns.POSITION,
    columns.ROW_ID,
    *(columns.ERROR_STAGE, columns.ERROR_KIND, columns.ERROR_MESSAGE, columns.ERROR_RETRYABLE),
)
"""Columns that stages do not see. They do see the number of attempts of a dead letter that runs again."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The columns that identify the rows of a dataset in the ledger.

    Attributes:
        key: Names of the columns of the key; None if a column holds the ids.
        column: Name of the column with the ids.
    """

    key: tuple[str, ...] | None = None
    column: str = columns.POSITION

    def ids_of(self, table: pa.Table) -> np.ndarray:
        """Returns the ids of rows, [num_rows].

        Without a key these are the values of the column `column`. With a key they are hashes of the key's values; a
        row whose key is null in all columns has its position in the input as its id, if the table knows positions.

        Raises:
            ConfigError: A row has no value in any column of the key, and no position either.
        """
        if self.key is None:
            return row_id.from_arrow(table[self.column])
        ids = row_id.key_ids(table, self.key)
        has_none = np.logical_and.reduce([pc.is_null(table[name], nan_is_null=True).to_numpy() for name in self.key])
        if not has_none.any():
            return ids
        if columns.POSITION not in table.column_names:
            raise ConfigError(
                f"key: a row has no value in {', '.join(self.key)}, so it cannot be told from others like it; leave "
                "such rows out of the dataset, give them values, or read the files with Source.find(...).read(), which "
                "knows the place of each row"
            )
        return np.where(has_none, row_id.from_arrow(table[columns.POSITION]), ids)


class PrepareNew:
    """An operator that runs the stages before the engine over rows that earlier runs have not finished.

    Args:
        make_stages: Makes the stages.
        identity: The columns that identify a row.
        work: The work folder of the job.
        records: Names of the records that earlier runs have left in the work folder.
        stop_on_error: Whether a piece of the input that is not a row stops the job.
        schema: Columns and types of the input; None if no column holds JSON.
    """

    def __init__(
        self,
        make_stages: MakeStages,
        identity: Identity,
        work: Storage,
        records: Sequence[str],
        stop_on_error: bool = False,
        schema: pa.Schema | None = None,
    ) -> None:
        self._stages = make_stages()
        self._identity = identity
        self._stop_on_error = stop_on_error
        self._schema = schema
        self._done = RowIndex(read_ids(work, one) for one in read_records(work, records))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Runs the stages over the rows of a block that are not done; returns them as by `pack`, with their row ids."""
        table = plain(table)
        ids = self._identity.ids_of(table)
        is_new = ~self._done.contains(ids)
        if not is_new.all():
            table, ids = table.filter(pa.array(is_new)), ids[is_new]
        shown = table.drop_columns([name for name in NOT_INPUT if name in table.column_names])
        rows = run_stages(self._stages, [self._row(values) for values in to_rows(shown, self._schema)])
        for row, id_ in zip(rows, row_id.as_bytes(ids), strict=True):
            row.data[columns.ROW_ID] = id_
        return pack(rows, self._stages).append_column(columns.ROW_ID, row_id.to_arrow(ids))

    def _row(self, values: dict[str, Any]) -> Row:
        row = read_row(values)
        if row.error is not None and self._stop_on_error:
            raise RowFailedError(f"a row failed in {row.error}")
        return row


def read_row(values: dict[str, Any]) -> Row:
    """Returns a row with the columns that a source has read; an error row for a piece of the input that is no row.

    Args:
        values: The columns without `NOT_INPUT`. A piece of the input that is not a row has the reason in `READ_ERROR`,
            and becomes an error row.
    """
    reason = values.get(READ_ERROR)
    if reason is not None:
        return Row(values, values, RowError("read", "ReadError", reason))
    for name in (READ_ERROR, READ_ROW):
        values.pop(name, None)
    return Row.read(values)


class GenerateAndWrite:
    """An operator that generates rows and writes each one as it finishes. Several calls run at once, in threads.

    Args:
        make_generate: Function that makes the stages of the backend.
        make_finish: Function that makes the stages after the backend.
        spec: Format and place of the output.
        max_blocks: Most calls at once.
    """

    def __init__(self, make_generate: MakeStages, make_finish: MakeStages, spec: OutputSpec, max_blocks: int) -> None:
        self._generate = make_generate()
        self._finish = make_finish()
        self._writer = ResultWriter(spec, max_blocks)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Runs all stages over a block, writes each row when it leaves the last one, and returns the counts of rows."""
        with self._writer.block(row_id.from_arrow(table[columns.ROW_ID])) as block:
            rows = [row for row, is_new in zip(unpack(table), block.is_new, strict=True) if is_new]
            ids = dict(zip(map(id, rows), block.row_ids, strict=True))
            for row in self._generated(rows):
                generated = Row(row.input, row.data, row.error)
                run_stages(self._finish, [row])
                self._writer.append(block, ids[id(row)], row, generated)
        return pa.table({COUNTS: [json.dumps(self._writer.take_counts().as_dict())]})

    def _generated(self, rows: list[Row]) -> Iterator[Row]:
        """Yields each row when it is generated. Stages after the first get the rows one by one."""
        if not self._generate:
            yield from rows
            return
        first, *others = self._generate
        for row in first.stream(rows):
            yield run_stages(others, [row])[0]


@dataclass(frozen=True)
class RowWriter:
    """The writer of a job, which replaces a processor's operators by `PrepareNew` and `GenerateAndWrite`.

    Attributes:
        identity: Columns that identify a row.
        spec: Format and place of the output.
        records: Names of the records that former runs have left in the work folder.
        stop_on_error: Whether a piece of the input that is not a row stops the job.
    """

    identity: Identity
    spec: OutputSpec
    records: Sequence[str]
    stop_on_error: bool

    def links(self, operators: Operators) -> Iterator[Link]:
        """Yields `PrepareNew` and `GenerateAndWrite` with the stages and resources of the processor's operators."""
        prepare = operators.prepare
        stop, schema = self.stop_on_error, self.spec.input_schema
        arguments = [prepare.make_stages, self.identity, self.spec.work, self.records, stop, schema]
        yield PrepareNew, arguments, prepare
        generate = operators.generate or _without_backend(operators.block_rows)
        given = generate.resources["compute"]
        max_blocks = given.max_concurrent_calls_per_actor or DEFAULT_MAX_BLOCKS
        # One process writes, so that a later run can tell which files count.
        one = ActorPoolStrategy(
            size=1,
            max_tasks_in_flight_per_actor=given.max_tasks_in_flight_per_actor,
            max_concurrent_calls_per_actor=max_blocks,
            enable_true_multi_threading=True,
        )
        arguments = [generate.make_stages, operators.finish.make_stages, self.spec, max_blocks]
        yield GenerateAndWrite, arguments, replace(generate, resources={**generate.resources, "compute": one})


def _without_backend(block_rows: int) -> OperatorSpec:
    """Returns an operator without stages, which takes the place of the backend in a processor without one."""
    resources = {"num_cpus": OPERATOR_CPUS, "compute": ActorPoolStrategy(size=1)}
    return OperatorSpec(list, resources, block_rows)
