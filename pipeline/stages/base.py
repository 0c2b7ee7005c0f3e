"""What a stage is: a function of a row that cannot take other rows down with it.

A stage computes columns from columns; `Stage.run` owns the errors. An exception in any stage belongs to the row it was
raised for: the row becomes an error row, which later stages pass by, or the job stops with that message. A stage knows
neither Ray nor blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...engine.errors import RequestError, UserError
from ..errors import RowFailedError


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no result.

    Attributes:
        stage: Name of the stage that failed.
        kind: Class name of the error.
        message: What was given, what is allowed, what to do.
        retryable: Whether the same row may succeed when run again.
        attempts: How often it was tried.
    """

    stage: str
    kind: str
    message: str
    retryable: bool = False
    attempts: int = 1

    @classmethod
    def from_exception(cls, stage: str, error: BaseException) -> RowError:
        """Describes an exception raised for a row in a stage."""
        described = RequestError.from_exception(error)
        return cls(stage, described.kind, described.message, described.retryable)

    def __str__(self) -> str:
        return f"{self.stage}: {self.kind}: {self.message}"


@dataclass(slots=True)
class Row:
    """A row on its way through the stages.

    Attributes:
        input: The row as it was read. A failed row keeps exactly this, and its error.
        data: The row as it is now: input columns, and those that stages have merged in.
        error: Why it failed; None while it has not.
    """

    input: dict[str, Any]
    data: dict[str, Any]
    error: RowError | None = None

    @classmethod
    def read(cls, columns: dict[str, Any]) -> Row:
        """Starts a row from the columns of the dataset."""
        return cls(columns, dict(columns))


class Stage(ABC):
    """One step of a row, computed row by row.

    A stage is made in the worker that runs it; what is heavy to make (a tokenizer) is made in its constructor.

    Attributes:
        name: How errors name the stage.
        stop_on_error: Whether the first failed row stops the job.
        batch_size: Rows that the stage is given at once, at most; None for all rows of a block.
    """

    name: ClassVar[str]
    batch_size: int | None = None

    def __init__(self, *, stop_on_error: bool = False) -> None:
        self.stop_on_error = stop_on_error

    @abstractmethod
    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Computes the columns to merge into a row; whatever it raises becomes the row's error."""

    def run(self, rows: Sequence[Row]) -> None:
        """Runs the stage over rows in place; rows that have failed already are left alone.

        Args:
            rows: The rows of a block.

        Raises:
            RowFailedError: A row failed, and the stage stops at errors.
        """
        live = [row for row in rows if row.error is None]
        size = self.batch_size or len(live) or 1
        for start in range(0, len(live), size):
            self.run_batch(live[start : start + size])

    def run_batch(self, rows: Sequence[Row]) -> None:
        """Runs the stage over rows that have not failed, `batch_size` of them at most, in place."""
        for row in rows:
            self._run_one(row)

    def stream(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Runs the stage over rows in place and yields each once it is through, in any order.

        Args:
            rows: The rows of a block.

        Yields:
            The same rows, those that have failed among them.
        """
        self.run(rows)
        yield from rows

    def merge(self, row: Row, columns: Mapping[str, Any]) -> None:
        """Puts what the stage computed into the row."""
        row.data = {**row.data, **columns}

    def fail(self, row: Row, error: RowError, cause: BaseException | None = None) -> None:
        """Gives a row its error, or stops the job with it.

        Args:
            row: The row that failed.
            error: Why.
            cause: The exception behind it, if there is one.

        Raises:
            RowFailedError: The stage stops at errors.
        """
        if self.stop_on_error:
            raise RowFailedError(f"a row failed in {error}") from cause
        row.error = error

    def _run_one(self, row: Row) -> None:
        try:
            columns = checked_columns(self.name, self.process(row.data))
        except Exception as error:  # noqa: BLE001  # whatever a stage raises for a row is that row's error
            self.fail(row, RowError.from_exception(self.name, error), error)
        else:
            self.merge(row, columns)


class BatchStage(Stage):
    """A stage that is faster for many rows at once.

    If the call for all of them raises, it is repeated row by row, so that one bad row fails alone. `process_batch`
    must therefore be free of side effects.
    """

    @abstractmethod
    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Computes, for each row and in their order, the columns to merge into it."""

    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Computes the columns of one row, alone."""
        return self.process_batch([row])[0]

    def run_batch(self, rows: Sequence[Row]) -> None:
        """Runs the stage over all rows at once; if that raises, over each alone."""
        try:
            results = [
                checked_columns(self.name, columns) for columns in self.process_batch([row.data for row in rows])
            ]
            pairs = list(zip(rows, results, strict=True))
        except Exception:  # noqa: BLE001  # repeated row by row, where it finds the row it belongs to
            super().run_batch(rows)
        else:
            for row, columns in pairs:
                self.merge(row, columns)


def checked_columns(stage: str, columns: Any) -> Mapping[str, Any]:
    """Returns what a stage made of a row, if it is columns.

    Args:
        stage: Name of the stage.
        columns: What it returned.

    Raises:
        UserError: It is something else.
    """
    if not isinstance(columns, Mapping):
        raise UserError(f"{stage} must return a dict of columns; got {type(columns).__name__}")
    return columns
