"""`Counts`: rows, tokens, times and errors of finished rows, summed. Counts merge, and have a form in JSON.

Rows are counted where they are written, and each piece of an output keeps its own counts. The counts of a job are the
sum over its pieces, so a job that was resumed counts the rows of all its runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .. import columns
from ..stages.base import Row, RowError
from .histogram import Histogram, count_of, number_of

__all__ = ["AdapterRows", "Counts", "ErrorKind", "count_of", "number_of"]

MAX_EXAMPLE_CHARS = 500
MAX_AMOUNT = 2**53
"""Greatest number of tokens or seconds that a row is counted with."""


@dataclass(slots=True)
class ErrorKind:
    """Failed rows with one kind of error.

    Attributes:
        num_rows: Number of rows.
        example: Message of one of these rows.
        num_retryable: Number of rows that may succeed when they run again unchanged.
    """

    num_rows: int
    example: str
    num_retryable: int = 0


@dataclass(slots=True)
class AdapterRows:
    """Rows that one adapter has answered.

    Attributes:
        num_rows: Number of rows.
        num_input_tokens: Prompt tokens of the rows.
        num_output_tokens: Output tokens of the rows.
    """

    num_rows: int = 0
    num_input_tokens: int = 0
    num_output_tokens: int = 0

    def add(self, other: AdapterRows) -> None:
        """Adds the numbers of other rows of the adapter."""
        self.num_rows += other.num_rows
        self.num_input_tokens += other.num_input_tokens
        self.num_output_tokens += other.num_output_tokens


@dataclass(slots=True)
class Counts:
    """Sums of rows, tokens, times and errors over finished rows.

    The tokens are the tokens of the rows. The engine computed fewer: it found the cached prompt tokens in the KV cache,
    and it did not run duplicates, which took the output of an identical row.

    Attributes:
        num_rows: Rows, failed ones included.
        num_failed: Rows with an error.
        num_duplicates: Rows that took the output of an identical row.
        num_input_tokens: Prompt tokens of the rows without an error.
        num_cached_tokens: Prompt tokens found in the KV cache.
        num_output_tokens: Output tokens of the rows without an error.
        num_duplicate_input_tokens: Prompt tokens of the duplicates, which were not computed.
        num_duplicate_output_tokens: Output tokens of the duplicates, which were not generated again.
        num_left_out: Rows that did not run because a row of the same key did. The writer of the rows adds them, and the
            records of a job do not keep them.
        blocked_s: Seconds that outputs waited for the sink. The writer of the rows adds them.
        finish_reasons: Finish reason -> number of rows.
        errors: Text with the stage and the class of an error -> the failed rows with that error.
        adapters: Name of an adapter -> the rows that it has answered; rows without an adapter are not among them.
        input_tokens: Histogram of the prompt tokens of a row.
        output_tokens: Histogram of the output tokens of a row.
        queue_s: Histogram of the seconds from submission to the first step, over the rows that ran.
        ttft_s: Histogram of the seconds from submission to the first token, over the rows that ran.
        e2e_s: Histogram of the seconds from submission to the end, over the rows that ran.
    """

    num_rows: int = 0
    num_failed: int = 0
    num_duplicates: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_duplicate_input_tokens: int = 0
    num_duplicate_output_tokens: int = 0
    num_left_out: int = 0
    blocked_s: float = 0.0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    errors: dict[str, ErrorKind] = field(default_factory=dict)
    adapters: dict[str, AdapterRows] = field(default_factory=dict)
    input_tokens: Histogram = field(default_factory=Histogram)
    output_tokens: Histogram = field(default_factory=Histogram)
    queue_s: Histogram = field(default_factory=Histogram)
    ttft_s: Histogram = field(default_factory=Histogram)
    e2e_s: Histogram = field(default_factory=Histogram)

    def add(self, row: Row) -> None:
        """Counts a row.

        Args:
            row: The row as generation left it, before `postprocess`, which may drop the columns that are read here. A
                true value in `columns.IS_DUPLICATE` marks a duplicate, and `columns.ADAPTER` names the adapter.
        """
        self.num_rows += 1
        if row.error is not None:
            self.add_error(row.error)
            return
        data = row.data
        num_in, num_out = _count(data, columns.NUM_INPUT_TOKENS), _count(data, columns.NUM_GENERATED_TOKENS)
        self.num_input_tokens += num_in
        self.num_output_tokens += num_out
        self.input_tokens.add(num_in)
        self.output_tokens.add(num_out)
        if (adapter := data.get(columns.ADAPTER)) is not None:
            self.adapters.setdefault(adapter, AdapterRows()).add(AdapterRows(1, num_in, num_out))
        reason = data.get(columns.FINISH_REASON)
        if reason and isinstance(reason, str):
            self.finish_reasons[reason] += 1
        if data.get(columns.IS_DUPLICATE):
            self.num_duplicates += 1
            self.num_duplicate_input_tokens += num_in
            self.num_duplicate_output_tokens += num_out
        else:
            self.num_cached_tokens += _count(data, columns.NUM_CACHED_TOKENS)
            self._add_times(data.get(columns.METRICS))

    def add_error(self, error: RowError) -> None:
        """Counts the error of a row that `num_rows` already counts."""
        self.num_failed += 1
        kind = f"{error.stage}: {error.kind}"
        known = self.errors.setdefault(kind, ErrorKind(0, str(error)[:MAX_EXAMPLE_CHARS]))
        known.num_rows += 1
        known.num_retryable += error.retryable

    def merge(self, other: Counts) -> None:
        """Adds the counts of other rows to this object."""
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in HISTOGRAMS:
            getattr(self, name).merge(getattr(other, name))
        self.finish_reasons.update(other.finish_reasons)
        for name, rows in other.adapters.items():
            self.adapters.setdefault(name, AdapterRows()).add(rows)
        for kind, error in other.errors.items():
            known = self.errors.setdefault(kind, ErrorKind(0, error.example))
            known.num_rows += error.num_rows
            known.num_retryable += error.num_retryable

    @classmethod
    def sum(cls, pieces: Iterable[Counts]) -> Counts:
        """Returns new counts, the sum of all given ones."""
        total = cls()
        for piece in pieces:
            total.merge(piece)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts as plain data for JSON."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            "finish_reasons": dict(self.finish_reasons),
            "errors": {kind: asdict(error) for kind, error in self.errors.items()},
            "adapters": {name: asdict(rows) for name, rows in self.adapters.items()},
            **{name: getattr(self, name).as_dict() for name in HISTOGRAMS},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """Returns the counts of which `as_dict` made `data`. A number that an older version did not have is 0.

        Raises:
            ValueError: A value is of another kind, as do AttributeError, KeyError and TypeError.
        """
        known: dict[str, Any] = {name: number_of(data.get(name, 0)) for name in NUMBERS}
        known |= {name: Histogram.from_dict(data[name]) for name in HISTOGRAMS if name in data}
        errors = {
            kind: ErrorKind(
                count_of(error["num_rows"]),
                str(error["example"])[:MAX_EXAMPLE_CHARS],
                count_of(error.get("num_retryable", 0)),
            )
            for kind, error in data.get("errors", {}).items()
        }
        reasons = {reason: count_of(count) for reason, count in data.get("finish_reasons", {}).items()}
        adapters = {
            name: AdapterRows(**{one.name: count_of(rows[one.name]) for one in fields(AdapterRows)})
            for name, rows in data.get("adapters", {}).items()
        }
        return cls(finish_reasons=Counter(reasons), errors=errors, adapters=adapters, **known)

    def _add_times(self, times: Any) -> None:
        for name in TIMES if isinstance(times, dict) else ():
            if _is_amount(times.get(name)):
                getattr(self, name).add(float(times[name]))


def _count(data: Mapping[str, Any], name: str) -> int:
    """Returns the number of tokens in a column, or 0 if a column of the user with that name holds something else."""
    value: Any = data.get(name)
    return int(value) if _is_amount(value) and value == int(value) else 0


def _is_amount(value: Any) -> bool:
    """Returns whether a value is a number of tokens or seconds. Rows that no engine ran may hold others."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_AMOUNT


NUMBERS = (
    "num_rows",
    "num_failed",
    "num_duplicates",
    "num_input_tokens",
    "num_cached_tokens",
    "num_output_tokens",
    "num_duplicate_input_tokens",
    "num_duplicate_output_tokens",
    "num_left_out",
    "blocked_s",
)
TIMES = ("queue_s", "ttft_s", "e2e_s")
HISTOGRAMS = ("input_tokens", "output_tokens", *TIMES)
