"""The three operators of Ray Data that a row passes: `Prepare`, `Generate`, `Finish`.

Each is a class for `Dataset.map_batches`, which maps a block to a block. Between the operators a row is pickled in one
binary column, so that its values keep their exact types. Only `Prepare` reads ordinary columns, and only `Finish`
writes them.

A call returns one block, in the order of its input. Ray repeats a call whose process died. If a call handed out several
blocks in order of completion, rows of its first attempt could stand beside rows of the second, some of them twice. The
engine does not wait for blocks: several are under way at once (see `EngineStage`).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .. import columns
from ..arrow_values import UNFIT, UNWRITABLE, fits, make_array, misfit, quoted, to_array, to_rows
from ..errors import RowFailedError
from ..mixed_values import MixedTypesError
from ..stages.base import Row, RowError, Stage

MakeStages = Callable[[], Sequence[Stage]]
"""A function that makes the stages of an operator, in the process that runs them."""

PROTOCOL = 5


class Prepare:
    """An operator that reads a dataset's blocks into `Row` objects and runs the stages before the backend over them.

    Args:
        make_stages: Function that makes the stages, in the process that runs them.
    """

    def __init__(self, make_stages: MakeStages) -> None:
        self._stages = make_stages()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Runs the stages over a block of the dataset and returns its rows as a block of `pack`."""
        rows = [Row.read(columns) for columns in to_rows(table)]
        return pack(run_stages(self._stages, rows), self._stages)


class Generate:
    """An operator that runs the stage of the backend over rows. Several calls run at once, in threads.

    Args:
        make_stages: Function that makes the stages, in the process that runs them.
    """

    def __init__(self, make_stages: MakeStages) -> None:
        self._stages = make_stages()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Runs the stages over the rows of a block of `pack` and returns a block of the same form with the rows."""
        return pack(run_stages(self._stages, unpack(table)), self._stages)


class Finish:
    """An operator that runs the stages after the backend over rows and returns the columns of the result.

    Args:
        make_stages: Function that makes the stages, in the process that runs them.
        mark_success: Whether rows without an error get an empty `__inference_error__`.
        schema: Columns and types of every block; None for the columns that the rows hold.
    """

    def __init__(self, make_stages: MakeStages, mark_success: bool, schema: pa.Schema | None = None) -> None:
        self._stages = make_stages()
        self._mark_success = mark_success
        self._schema = schema

    def __call__(self, table: pa.Table) -> pa.Table | dict[str, Any]:
        """Runs the stages over the rows of a block of `pack` and returns a block of the columns of their results."""
        rows = run_stages(self._stages, unpack(table))
        if self._schema is not None:
            return to_schema(rows, self._schema)
        results = [result_columns(row, self._mark_success) for row in rows]
        try:
            return to_table(results)
        except UNFIT:
            return to_columns([self._checked(row) for row in rows])

    def _checked(self, row: Row) -> dict[str, Any]:
        """Returns the columns of a row's result, or those of its error if a value of it fits no column of any type."""
        result = result_columns(row, self._mark_success)
        error = _unwritable(result)
        if error is None:
            return result
        if not self._mark_success:
            raise RowFailedError(f"a row failed in {error}")
        return result_columns(Row(row.input, {}, row.error or error), self._mark_success)


def run_stages(stages: Sequence[Stage], rows: list[Row]) -> list[Row]:
    """Runs rows through stages, in place.

    Args:
        stages: The stages, in order.
        rows: The rows of a block.

    Returns:
        The same rows.
    """
    for stage in stages:
        stage.run(rows)
    return rows


def pack(rows: Sequence[Row], stages: Sequence[Stage] = ()) -> pa.Table:
    """Returns a block that holds rows, pickled, in one binary column.

    A row whose columns cannot be pickled, such as lists 900 deep, fails in the last of `stages`.
    """
    return pa.table({columns.DATA: pa.array([_pickled(row, stages) for row in rows], pa.binary())})


def _pickled(row: Row, stages: Sequence[Stage]) -> bytes:
    try:
        return pickle.dumps(row, PROTOCOL)
    except Exception as error:
        if not stages:
            raise
        stages[-1].fail(row, RowError.from_exception(stages[-1].name, error), error)
        row.data = dict(row.input)
        return pickle.dumps(row, PROTOCOL)


def unpack(table: pa.Table) -> list[Row]:
    """Returns the rows of a block that `pack` made."""
    return [pickle.loads(value.as_buffer()) for value in table[columns.DATA]]


def result_columns(row: Row, mark_success: bool) -> dict[str, Any]:
    """Returns the columns that a row has in the result.

    Args:
        row: A row that passed all stages.
        mark_success: Whether a row without an error gets an empty `__inference_error__`.

    Returns:
        The columns. A failed row has the columns that it was read with, its error, and finish reason ``"error"``.
    """
    if row.error is not None:
        return {**row.input, columns.INFERENCE_ERROR: str(row.error), columns.FINISH_REASON: "error"}
    data = without_marks(row.data)
    return {**data, columns.INFERENCE_ERROR: columns.NO_ERROR} if mark_success else data


def without_marks(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns of a row without `columns.MARKS`, which only the pipeline reads."""
    return {name: value for name, value in data.items() if name not in columns.MARKS}


def to_columns(rows: Sequence[Mapping[str, Any]]) -> pa.Table | dict[str, Any]:
    """Builds a block from rows whose columns may differ.

    Args:
        rows: Values of each row by column name; None fills the columns that a row lacks.

    Returns:
        An Arrow table. If Arrow has no type for a column (it holds several types, tensors, objects), a dict of numpy
        arrays, which Ray Data converts as it would have converted such rows.
    """
    try:
        return to_table(rows)
    except UNFIT:
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: [row.get(name) for row in rows] for name in names}
        if any(_is_mixed(own) for own in values.values()):
            return _to_pickled(values)
        return {name: _to_objects(own) for name, own in values.items()}


def _is_mixed(values: list[Any]) -> bool:
    """Returns whether Ray, which makes the same columns as Arrow, would change a value to fit it beside the others."""
    try:
        make_array(values, None)
    except MixedTypesError:
        return True
    except UNFIT:
        return False
    return False


def _to_pickled(values: Mapping[str, list[Any]]) -> pa.Table:
    """Returns a block in which a column that Arrow has no type for holds pickled values, as Ray keeps other objects."""
    from ray.data.extensions import ArrowPythonObjectArray

    types, arrays = columns.result_types(), {}
    for name, own in values.items():
        try:
            arrays[name] = to_array(own, types.get(name))
        except UNFIT:
            arrays[name] = ArrowPythonObjectArray.from_objects(own)
    return pa.table(arrays)


def to_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns rows whose columns may differ as an Arrow table.

    Raises:
        ValueError: Arrow has no type for a column, as the other errors of `UNFIT` say too.
    """
    types = columns.result_types()
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: to_array([row.get(name) for row in rows], types.get(name)) for name in names})


def _unwritable(values: Mapping[str, Any]) -> RowError | None:
    """Returns the error of a row with a value that no column can hold, such as half of a surrogate pair; else None.

    Objects and tensors are not among these values, because Ray has columns for them.
    """
    for name, value in values.items():
        reason = misfit(value, None) or misfit(name, pa.string())
        if isinstance(reason, UNWRITABLE):
            message = f"column {quoted(name)} holds {quoted(value)}, which no column can hold: {reason!s:.100}"
            return RowError("write", type(reason).__name__, message)
    return None


def to_schema(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Builds a block with exactly the columns of a schema.

    A value that does not fit its column turns its row into an error row in which the value is left out.

    Args:
        rows: Rows that passed all stages.
        schema: Columns and types.

    Returns:
        An Arrow table.
    """
    results = [result_columns(row, mark_success=True) for row in rows]
    try:
        return _typed(results, schema)
    except UNFIT:
        return _typed([_fitted(row, result, schema) for row, result in zip(rows, results, strict=True)], schema)


def _typed(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.table([make_array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema)


def _fitted(row: Row, result: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    unfit = {field.name for field in schema if not fits(result.get(field.name), field.type)}
    if not unfit:
        return dict(result)
    name = min(unfit)
    error = row.error or RowError(
        "write",
        "TypeError",
        f"column {name!r} holds {quoted(result.get(name))}, which is not {schema.field(name).type}",
    )
    kept = {name: value for name, value in row.input.items() if name not in unfit}
    return result_columns(Row(kept, {}, error), mark_success=True)


def _to_objects(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
