"""`JobSummary`: a job in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..ledger.counts import Counts, ErrorKind
from .run import Run


@dataclass(slots=True)
class JobSummary:
    """The main numbers of a job: its rows, tokens, durations and errors.

    Attributes:
        model: Folder or bundled name of the model.
        output: The output folder.
        num_rows_in: Rows of the input; None while their number is not known.
        num_rows_out: Rows of the output, failed ones included.
        num_rows_failed: Rows that have an error in place of a result.
        num_input_tokens: Prompt tokens of the rows without an error.
        num_cached_tokens: Prompt tokens found in the KV cache.
        num_output_tokens: Generated tokens.
        start_up_s: Sum of `Run.start_up_s` over all runs of the job.
        generate_s: Sum of `Run.generate_s` over all runs.
        write_s: Sum of `Run.write_s` over all runs.
        finish_reasons: Finish reason -> rows.
        errors: Stage and class of the error -> rows and one message.
        num_duplicates: Rows that took the output of an identical row.
    """

    model: str
    output: str
    num_rows_in: int | None
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
    def of(cls, model: str, output: str, num_rows_in: int | None, counts: Counts, runs: Sequence[Run]) -> JobSummary:
        """Makes the summary of a job from its counts and the durations of its runs.

        Args:
            model: Folder or bundled name of the model.
            output: The output folder.
            num_rows_in: Rows of the input; None while their number is not known.
            counts: Counts of all rows of the output, whichever run wrote them.
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
