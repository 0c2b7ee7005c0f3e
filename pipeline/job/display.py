"""The view of a job on the command line: its progress while it runs, and its summary at the end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..plain_text import without_controls
from ..report.number_text import clock
from ..report.summary import JobSummary
from .progress import Progress

PLAIN_INTERVAL_S = 10.0
"""Seconds between lines if the output is not a terminal."""

BAR_WIDTH = 32


class ProgressView:
    """A context manager that shows the progress of a job while its block runs.

    A terminal has a live view. Any other output gets a plain line every `PLAIN_INTERVAL_S`.

    Args:
        console: Console that the progress is written to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_s = -PLAIN_INTERVAL_S
        self._live: Live | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(BAR_WIDTH),
                MofNCompleteColumn(),
                TaskProgressColumn(),
            )
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task("starting", total=None)
            self._live = Live(self._bar, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Updates the live view; without a terminal, prints a line at most every `PLAIN_INTERVAL_S`."""
        if self._live is not None:
            total = progress.num_rows if progress.phase == "running" else None
            self._bar.update(self._task, description=progress.phase, total=total, completed=progress.num_done)
            self._live.update(Group(self._bar, details(progress)))
        elif time.monotonic() - self._shown_s >= PLAIN_INTERVAL_S:
            self._shown_s = time.monotonic()
            self._console.print(f"{progress.phase}: {describe_progress(progress)}", highlight=False)


def details(progress: Progress) -> Table:
    """Returns the lines under the bar: failed rows, tokens per second, replicas, cache, remaining time."""
    failed = f"{progress.num_failed:,} failed"
    replicas = f"{progress.num_ready} of {progress.num_replicas} replicas up"
    if progress.num_restarts:
        replicas += f", {progress.num_restarts} restarted"
    basis = f" [dim]from {progress.eta_basis}[/]" if progress.eta_basis else ""
    table = Table.grid(padding=(0, 2))
    table.add_row("[dim]rows[/]", f"[red]{failed}[/]" if progress.num_failed else failed)
    table.add_row(
        "[dim]tok/s[/]", f"{progress.input_tokens_per_s:,.0f} in, [bold]{progress.output_tokens_per_s:,.0f}[/] out"
    )
    table.add_row(
        "[dim]engine[/]",
        f"{replicas}; {progress.num_running:,} running, {progress.num_waiting:,} waiting; "
        f"KV cache {progress.kv_cache_usage:.0%} in use, {progress.cache_hit_rate:.0%} of prompts found in it",
    )
    table.add_row("[dim]time[/]", f"{clock(progress.elapsed_s)} gone, ETA {_eta(progress)}{basis}")
    return table


def describe_progress(progress: Progress) -> str:
    """Returns one line with rows, failures, tokens per second and the remaining time."""
    total = "?" if progress.num_rows is None else f"{progress.num_rows:,}"
    return (
        f"{progress.num_done:,}/{total} rows, {progress.num_failed:,} failed, "
        f"{progress.input_tokens_per_s:,.0f} tok/s in, {progress.output_tokens_per_s:,.0f} tok/s out, "
        f"{clock(progress.elapsed_s)} gone, ETA {_eta(progress)}"
    )


def describe_summary(summary: JobSummary) -> str:
    """Returns the summary of a job as lines for people."""
    reasons = (
        ", ".join(f"{_plain(reason)} {count:,}" for reason, count in sorted(summary.finish_reasons.items())) or "none"
    )
    lines = [
        f"rows      {summary.num_rows_in or 0:,} in, {summary.num_rows_out:,} out, {summary.num_rows_failed:,} failed",
        f"tokens    {summary.num_input_tokens:,} in ({summary.num_cached_tokens:,} cached), "
        f"{summary.num_output_tokens:,} out",
        f"speed     {summary.input_tokens_per_s:,.0f} tok/s in, {summary.output_tokens_per_s:,.0f} tok/s out",
        f"seconds   {summary.start_up_s:.1f} start-up, {summary.generate_s:.1f} generate, {summary.write_s:.1f} write",
        f"finished  {reasons}",
    ]
    lines += [f"[red]error[/]     {error.num_rows:,} x {_plain(error.example)}" for error in summary.errors.values()]
    output = _plain(summary.output)
    return "\n".join([*lines, f"output    {output}", f"report    {output}/_millrace/report.html"])


def _plain(text: str) -> str:
    return escape(without_controls(text))


def _eta(progress: Progress) -> str:
    return "?" if progress.eta_s is None else clock(progress.eta_s)
