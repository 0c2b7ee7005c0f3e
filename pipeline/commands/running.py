"""A job at the command line: quiet Ray, a line of progress, the summary, one line for an error, and the exit status."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from ...engine.errors import MillraceError, UserError

if TYPE_CHECKING:
    from ..job import PreparedJob
    from ..report import JobSummary

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_ROWS_FAILED = 3
EXIT_INTERRUPTED = 130


def run_shown(prepare: Callable[[], PreparedJob], *, verbose: bool) -> None:
    """Prepares and runs a job, shows how it goes, and ends with the status that it asks for.

    Args:
        prepare: Makes the job; what it raises is shown as the user's mistake that it is.
        verbose: Whether Ray's logs and tracebacks are shown.

    Raises:
        Exit: Always, with the status of the job.
    """
    started_s = time.monotonic()
    from ..session import quiet_stderr

    with quiet_stderr(verbose=verbose) as stream, _shown_warnings(stream):
        errors = Console(file=stream, soft_wrap=True, highlight=False)
        prepared = None
        try:
            prepared = prepare()
            summary = run(prepared, verbose=verbose, started_s=started_s, console=errors)
        except KeyboardInterrupt:
            errors.print(f"[yellow]stopped[/]{_how_to_go_on(prepared)}")
            # Everything is closed by now. Ray's threads do not always survive the end of an interpreter that an
            # interrupt has torn out of them: leave without it.
            os._exit(EXIT_INTERRUPTED)
        except Exception as error:  # noqa: BLE001  # the last resort of the program: a line and an exit status
            raise typer.Exit(_explain(error, errors, verbose, prepared)) from None
    _finish(summary)


def run(prepared: PreparedJob, *, verbose: bool, started_s: float, console: Console) -> JobSummary:
    """Runs a job with a Ray of its own and a line of progress.

    Args:
        prepared: The job.
        verbose: Whether Ray's logs are shown.
        started_s: When the start-up began, on `time.monotonic`.
        console: Where the line goes.
    """
    from ..display import ProgressView
    from ..job import run_job
    from ..session import ray_session

    if prepared.resumes:
        console.print(f"going on with the job in {prepared.folder.root.url}")
    with ray_session(verbose=verbose), ProgressView(console) as view:
        return run_job(prepared, on_progress=view.show, started_s=started_s)


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command whose errors are lines and an exit status."""

    @functools.wraps(command)
    def explained(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the last resort of the program: a line and an exit status
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            raise typer.Exit(_explain(error, console, kwargs.get("verbose", False), None)) from None

    return explained


def _how_to_go_on(prepared: PreparedJob | None) -> str:
    if prepared is None:
        return ""
    return f"; what has finished is kept, go on with: millrace resume {prepared.folder.root.url}"


def _finish(summary: JobSummary) -> None:
    """Prints the summary and exits with the status that it asks for."""
    from ..display import describe_summary

    Console(soft_wrap=True, highlight=False).print(describe_summary(summary))
    if not summary.is_complete:
        lost = f"{summary.num_rows_in} rows went in and {summary.num_rows_out} came out"
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {lost}")
        raise typer.Exit(EXIT_FAILED)
    raise typer.Exit(EXIT_ROWS_FAILED if summary.num_rows_failed else 0)


@contextmanager
def _shown_warnings(stream: TextIO) -> Iterator[None]:
    """Shows the warnings of this package during a block, one line each."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    ours = logging.getLogger(__package__.partition(".")[0])
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


def _explain(error: Exception, console: Console, verbose: bool, prepared: PreparedJob | None) -> int:
    """Prints one line for an error and returns the exit status; what is not ours keeps its traceback with --verbose."""
    from ..errors import find_millrace_error

    ours = find_millrace_error(error)
    if verbose:
        console.print_exception()
    shown: BaseException = ours if ours is not None else error
    text = str(shown).strip() if isinstance(shown, MillraceError) else _first_line(shown)
    console.print(f"[red]error:[/] {escape(text + _how_to_go_on(prepared))}")
    return EXIT_USER_ERROR if isinstance(ours, UserError) else EXIT_FAILED


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''} (run again with --verbose for the traceback)"
