"""The end of a job in a few numbers, and the counts of a folder of Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from .. import columns
from ..stages.base import RowError
from .counts import Counts, ErrorKind
from .run import Run

COUNTED = (
    columns.FINISH_REASON,
    columns.INFERENCE_ERROR,
    columns.NUM_INPUT_TOKENS,
    columns.NUM_CACHED_TOKENS,
    columns.NUM_GENERATED_TOKENS,
)


class OutputScan:
    """Counts the rows of an output folder, file by file, while it fills.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[Path] = set()
        self.counts = Counts()

    def update(self) -> Counts:
        """Counts the files that are new since the last call.

        Returns:
            The counts of all files seen.
        """
        for path in sorted(set(self._folder.glob("*.parquet")) - self._seen):
            try:
                table = pyarrow.parquet.read_table(path, columns=list(COUNTED))
            except (pa.ArrowInvalid, OSError):
                continue  # Being written just now: it has no footer yet.
            self._seen.add(path)
            add_table(self.counts, table)
        return self.counts


@dataclass(slots=True)
class JobSummary:
    """The end of a job.

    Attributes:
        model: The model.
        output: The output folder.
        num_rows_in: Rows of the input.
        num_rows_out: Rows of the output, failed ones included.
        num_rows_failed: Rows that hold an error instead of a result.
        num_input_tokens: Prompt tokens of the rows that went through.
        num_cached_tokens: Those of them found in the KV cache.
        num_output_tokens: Generated tokens.
        start_up_s: Seconds until the model was loaded, of all runs of the job.
        generate_s: Seconds from then until the last token, of all runs.
        write_s: Seconds from then until the last file, of all runs.
        finish_reasons: Finish reason -> rows.
        errors: Stage and class of the error -> rows and one message.
        num_duplicates: Rows that took the output of an identical one.
    """

    model: str
    output: str
    num_rows_in: int
    num_rows_out: int
    num_rows_failed: int
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    start_up_s: float
    generate_s: float
    write_s: float
    finish_reasons: dict[str, int]
    errors: dict[str, ErrorKind]
    num_duplicates: int = 0

    @classmethod
    def of(cls, model: str, output: str, num_rows_in: int, counts: Counts, runs: Sequence[Run]) -> JobSummary:
        """Sums up a job.

        Args:
            model: The model.
            output: The output folder.
            num_rows_in: Rows of the input.
            counts: Of all rows of the output, whichever run wrote them.
            runs: The runs of the job.
        """
        return cls(
            model=model,
            output=output,
            num_rows_in=num_rows_in,
            num_rows_out=counts.num_rows,
            num_rows_failed=counts.num_failed,
            num_input_tokens=counts.num_input_tokens,
            num_cached_tokens=counts.num_cached_tokens,
            num_output_tokens=counts.num_output_tokens,
            start_up_s=sum(run.start_up_s for run in runs),
            generate_s=sum(run.generate_s for run in runs),
            write_s=sum(run.write_s for run in runs),
            finish_reasons=dict(counts.finish_reasons),
            errors=counts.errors,
            num_duplicates=counts.num_duplicates,
        )

    @property
    def is_complete(self) -> bool:
        """Whether every row of the input has a row in the output."""
        return self.num_rows_in == self.num_rows_out

    @property
    def input_tokens_per_s(self) -> float:
        """Prompt tokens per second of generation."""
        return self.num_input_tokens / self.generate_s if self.generate_s > 0 else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second of generation."""
        return self.num_output_tokens / self.generate_s if self.generate_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the summary as plain data, rates included."""
        rates = {"input_tokens_per_s": self.input_tokens_per_s, "output_tokens_per_s": self.output_tokens_per_s}
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in {**asdict(self), **rates}.items()
        }


def add_table(counts: Counts, table: pa.Table) -> None:
    """Counts the rows of a table with the columns `COUNTED`."""
    counts.num_rows += table.num_rows
    counts.num_input_tokens += _sum(table, columns.NUM_INPUT_TOKENS)
    counts.num_cached_tokens += _sum(table, columns.NUM_CACHED_TOKENS)
    counts.num_output_tokens += _sum(table, columns.NUM_GENERATED_TOKENS)
    counts.finish_reasons.update(reason or "none" for reason in table[columns.FINISH_REASON].to_pylist())
    for message in table[columns.INFERENCE_ERROR].to_pylist():
        if message:
            counts.add_error(RowError(*[*message.split(": ", 2), "", ""][:3]))


def _sum(table: pa.Table, name: str) -> int:
    return sum(value for value in table[name].to_pylist() if value is not None)
