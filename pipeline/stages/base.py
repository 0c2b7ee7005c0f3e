"""`Stage`: computes columns of a row from other columns, such that an error fails only its own row.

A stage computes columns from columns, and `Stage.run` handles the errors. An exception belongs to the row for which it
was raised: either the row becomes an error row, which later stages skip, or the job stops with the message. A stage
knows neither Ray nor blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...engine.errors import RequestError, UserError
from ...engine.shown import without_secrets
from ..errors import RowFailedError

MAX_MESSAGE = 4000
"""Number of characters of an error's message that are kept."""


@dataclass(frozen=True, slots=True)
class RowError:
    """The reason that a row has no result.

    Attributes:
        stage: Name of the stage that failed.
        kind: Class name of the error.
        message: Text for people: the given value, the allowed values, and what to do.
        retryable: Whether the same row may succeed when it runs again.
        attempts: Number of times that the row was tried.
    """

    stage: str
    kind: str
    message: str
    retryable: bool = False
    attempts: int = 1

    def __post_init__(self) -> None:
        # An exception may quote any text of its row, but a column of text holds neither halves of surrogate pairs nor
        # a gigabyte.
        text = self.message[:MAX_MESSAGE].encode("utf-8", "backslashreplace").decode()
        object.__setattr__(self, "message", without_secrets(text))

    @classmethod
    def from_exception(cls, stage: str, error: BaseException) -> RowError:
        """Describes an exception raised for a row in a stage."""
        described = RequestError.from_exception(error)
        return cls(stage, described.kind, described.message, described.retryable)

    def __str__(self) -> str:
        return f"{self.stage}: {self.kind}: {self.message}"


@dataclass(slots=True)
class Row:
    """A row in the stages: its columns, and its error if it has failed.

    Attributes:
        input: The row as it was read. A failed row keeps exactly this, and its error.
        data: The row as it is now: the input columns, and the columns that stages have merged in.
        error: The reason of the failure; None for a row that has not failed.
    """

    input: dict[str, Any]
    data: dict[str, Any]
    error: RowError | None = None

    @classmethod
    def read(cls, columns: dict[str, Any]) -> Row:
        """Makes a row for the first stage from the columns of a dataset row, without an error.

        `input` is `columns` itself, and `data` a copy of it, so that stages change only the copy.
        """
        return cls(columns, dict(columns))


class Stage(ABC):
    """One step of the computation of rows, which by default handles one row at a time.

    A worker makes the stages that it runs, so a constructor may load a large object, such as a tokenizer.

    Attributes:
        name: Name of the stage in errors.
        stop_on_error: Whether the first failed row stops the job.
        batch_size: Most rows that the stage gets in one call; None for all rows of a block.
    """

    name: ClassVar[str]
    batch_size: int | None = None

    def __init__(self, *, stop_on_error: bool = False) -> None:
        self.stop_on_error = stop_on_error

    @abstractmethod
    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the columns to merge into a row. An exception becomes the error of the row."""

    def run(self, rows: Sequence[Row]) -> None:
        """Runs the stage over rows in place. Rows that have failed stay as they are.

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
        """Runs the stage in place over at most `batch_size` rows, of which none has failed."""
        for row in rows:
            self._run_one(row)

    def stream(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Runs the stage over rows in place and yields each row when it is done, in any order.

        Args:
            rows: The rows of a block.

        Yields:
            The same rows, failed ones included.
        """
        self.run(rows)
        yield from rows

    def merge(self, row: Row, columns: Mapping[str, Any]) -> None:
        """Merges the columns that the stage computed into the row."""
        row.data = {**row.data, **columns}

    def fail(self, row: Row, error: RowError, cause: BaseException | None = None) -> None:
        """Gives a row its error, or stops the job with it.

        Args:
            row: The row that failed.
            error: The error.
            cause: The exception behind the error, if there is one.

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
    """A stage that computes many rows in one call, which is faster.

    If the call for all rows raises, it is repeated row by row, so that one bad row fails alone. `process_batch`
    must therefore be free of side effects.
    """

    @abstractmethod
    def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Returns the columns to merge into each row, in the order of the rows."""

    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the columns of one row, from a call for this row alone."""
        return self.process_batch([row])[0]

    def run_batch(self, rows: Sequence[Row]) -> None:
        """Runs `process_batch` over all rows in one call, and over each row alone if that call raises."""
        try:
            results = [
                checked_columns(self.name, columns) for columns in self.process_batch([row.data for row in rows])
            ]
            pairs = list(zip(rows, results, strict=True))
        except Exception:  # noqa: BLE001  # the call is repeated row by row, which finds the row at fault
            super().run_batch(rows)
        else:
            for row, columns in pairs:
                self.merge(row, columns)


def checked_columns(stage: str, columns: Any) -> Mapping[str, Any]:
    """Returns the result of a stage for a row, if it is a dict of columns.

    Args:
        stage: Name of the stage.
        columns: The result.

    Raises:
        UserError: The result is of another type.
    """
    if not isinstance(columns, Mapping):
        raise UserError(f"{stage} must return a dict of columns; got {type(columns).__name__}")
    return columns
