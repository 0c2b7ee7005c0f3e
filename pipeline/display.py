"""What the command line shows of a job: a line while it runs, a few at its end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from .progress import Progress
from .report import JobSummary, summary_path

PLAIN_INTERVAL_S = 10.0
"""Seconds between lines where the output is no terminal."""


class ProgressLine:
    """A line that follows a job; where the output is no terminal, a plain line now and then.

    A context manager: the line is there while the block runs.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_s = -PLAIN_INTERVAL_S
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=console, transient=True)
            self._task = self._bar.add_task("starting", total=None, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Shows how far the job is."""
        text = describe_progress(progress)
        if self._bar is not None:
            total = progress.num_rows if progress.phase == "running" else None
            self._bar.update(
                self._task, description=progress.phase, total=total, completed=progress.num_done, text=text
            )
        elif time.monotonic() - self._shown_s >= PLAIN_INTERVAL_S:
            self._shown_s = time.monotonic()
            self._console.print(f"{progress.phase}: {text}", highlight=False)


def describe_progress(progress: Progress) -> str:
    """Returns one line: rows, failures, tokens per second, time to go."""
    eta = "?" if progress.eta_s is None else _clock(progress.eta_s)
    return (
        f"{progress.num_done:,}/{progress.num_rows:,} rows, {progress.num_failed:,} failed, "
        f"{progress.input_tokens_per_s:,.0f} tok/s in, {progress.output_tokens_per_s:,.0f} tok/s out, "
        f"{_clock(progress.elapsed_s)} gone, ETA {eta}"
    )


def describe_summary(summary: JobSummary) -> str:
    """Returns the summary of a job in lines for people."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(summary.finish_reasons.items())) or "none"
    lines = [
        f"rows      {summary.num_rows_in:,} in, {summary.num_rows_out:,} out, {summary.num_rows_failed:,} failed",
        f"tokens    {summary.num_input_tokens:,} in ({summary.num_cached_tokens:,} cached), "
        f"{summary.num_output_tokens:,} out",
        f"speed     {summary.input_tokens_per_s:,.0f} tok/s in, {summary.output_tokens_per_s:,.0f} tok/s out",
        f"seconds   {summary.start_up_s:.1f} start-up, {summary.generate_s:.1f} generate, {summary.write_s:.1f} write",
        f"finished  {reasons}",
    ]
    lines += [f"[red]error[/]     {error.num_rows:,} x {escape(error.example)}" for error in summary.errors.values()]
    return "\n".join([*lines, f"output    {summary.output}", f"summary   {summary_path(summary.output)}"])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
