"""The end of a batch in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

from rich.markup import escape

from ..ledger.counts import Counts, ErrorKind


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """What came of a batch.

    Attributes:
        model: The model.
        output: The out file.
        errors: The error file.
        num_rows_in: Lines of the input that are not empty.
        num_empty: Lines that are.
        counts: What the lines of both files add up to, whichever run wrote them.
        codes: Code of an error -> lines that have it, and one message.
        seconds: What this run took.
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
        """Lines of both files."""
        return self.counts.num_rows

    @property
    def num_rows_failed(self) -> int:
        """Lines of the error file."""
        return self.counts.num_failed

    @property
    def is_complete(self) -> bool:
        """Whether every line of the input has one in the output."""
        return self.num_rows_in == self.num_rows_out


def describe_batch(summary: BatchSummary) -> str:
    """Returns the summary of a batch in lines for people."""
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
