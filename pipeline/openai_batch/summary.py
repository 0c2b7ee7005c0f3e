"""The counts of a finished batch: `BatchSummary`, and `describe_batch`, which shows it as text."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape

from ..ledger.counts import Counts, ErrorKind


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """The counts of a finished batch.

    Attributes:
        model: Folder, URL or bundled name of the model.
        output: URL of the out file.
        errors: URL of the error file.
        num_rows_in: Number of lines of the input that are not empty.
        num_empty: Number of empty lines of the input.
        counts: Counts of rows, tokens and finish reasons over both files and all runs of the batch.
        codes: Error code -> the number of lines with this code, and one of their messages.
        seconds: Duration of the last run.
    """

    model: str
    output: str
    errors: str
    num_rows_in: int
    num_empty: int
    counts: Counts
    codes: dict[str, ErrorKind]
    seconds: float

    @property
    def num_rows_out(self) -> int:
        """Number of lines in the out file and the error file together."""
        return self.counts.num_rows

    @property
    def num_rows_failed(self) -> int:
        """Number of lines in the error file."""
        return self.counts.num_failed

    @property
    def is_complete(self) -> bool:
        """Whether every line of the input that is not empty has a line in one of the two files."""
        return self.num_rows_in == self.num_rows_out


def describe_batch(summary: BatchSummary) -> str:
    """Returns the summary as lines of text with rich markup, for the terminal."""
    counts = summary.counts
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.finish_reasons.items())) or "none"
    answered = counts.num_rows - counts.num_failed
    lines = [
        f"lines     {summary.num_rows_in:,} in, {answered:,} answered, {counts.num_failed:,} not"
        + (f", {summary.num_empty:,} empty" if summary.num_empty else ""),
        f"tokens    {counts.num_input_tokens:,} in ({counts.num_cached_tokens:,} cached), "
        f"{counts.num_output_tokens:,} out",
        f"finished  {reasons}",
        f"seconds   {summary.seconds:.1f}",
    ]
    lines += [
        f"[red]error[/]     {one.num_rows:,} x {code}: {escape(one.example)}" for code, one in summary.codes.items()
    ]
    return "\n".join([*lines, f"output    {summary.output}", f"errors    {summary.errors}"])
