"""A job at the command line: a line of progress without Ray's logs, then a summary or an error, and the exit status."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from ...engine.errors import MillraceError, UserError

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_ROWS_FAILED = 3
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class JobKind:
    """The functions in which kinds of jobs differ.

    Attributes:
        run: Runs a prepared job; takes `on_progress` and `started_s`, and returns a summary.
        describe: Returns the summary in lines for people.
        how_to_go_on: Returns the command that goes on with an interrupted job.
    """

    run: Callable[..., Any]
    describe: Callable[[Any], str]
    how_to_go_on: Callable[[Any], str]


def run_shown(prepare: Callable[[], Any], *, verbose: bool, load_kind: Callable[[], JobKind] | None = None) -> None:
    """Prepares and runs a job, shows its progress, and exits with the status of the job.

    Args:
        prepare: Makes the job. An exception of it is shown as a mistake of the user.
        verbose: Whether Ray's logs and tracebacks are shown.
        load_kind: Imports and returns the functions for this kind of job; None for the jobs of job files.

    Raises:
        Exit: Always, with the status of the job.
    """
    started_s = time.monotonic()
    from ..session import quiet_stderr

    with quiet_stderr(verbose=verbose) as stream, _shown_warnings(stream):
        errors = Console(file=stream, soft_wrap=True, highlight=False)
        kind, prepared = (load_kind or _job_kind)(), None
        try:
            prepared = prepare()
            summary = run(prepared, kind, verbose=verbose, started_s=started_s, console=errors)
        except KeyboardInterrupt:
            errors.print(f"[yellow]stopped[/]{_advice(kind, prepared)}")
            # Everything is closed by now. After an interrupt, Ray's threads may crash in the clean-up of the
            # interpreter, so the process exits without it.
            os._exit(EXIT_INTERRUPTED)
        except Exception as error:  # noqa: BLE001  # whatever fails, the program ends with a line and a status
            raise typer.Exit(_explain(error, errors, verbose, _advice(kind, prepared))) from None
    _finish(summary, kind.describe(summary))


def run(prepared: Any, kind: JobKind, *, verbose: bool, started_s: float, console: Console) -> Any:
    """Runs a job with a Ray of its own and a line of progress, and returns its summary.

    Args:
        prepared: The job.
        kind: The functions for this kind of job.
        verbose: Whether Ray's logs are shown.
        started_s: Time at which the start-up began, on `time.monotonic`.
        console: Console for the line of progress.
    """
    from ..job.display import ProgressView
    from ..session import ray_session

    if prepared.resumes:
        console.print(f"going on with the job in {prepared.folder.root.url}")
    with ray_session(verbose=verbose), ProgressView(console) as view:
        return kind.run(prepared, on_progress=view.show, started_s=started_s)


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command so that an error of it becomes a line and an exit status."""

    @functools.wraps(command)
    def explained(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # whatever fails, the program ends with a line and a status
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            raise typer.Exit(_explain(error, console, kwargs.get("verbose", False), "")) from None

    return explained


def _advice(kind: JobKind, prepared: Any) -> str:
    """Returns a sentence on how to go on with a job; an empty text if the job never began."""
    if prepared is None or not _has_begun(prepared):
        return ""
    return f"; what has finished is kept, go on with: {kind.how_to_go_on(prepared)}"


def _has_begun(prepared: Any) -> bool:
    try:
        return bool(prepared.folder.root.exists())
    except MillraceError:  # The store itself may have failed. To go on with a job that never began does no harm.
        return True


def _job_kind() -> JobKind:
    from ..job.display import describe_summary
    from ..job.run import run_job

    return JobKind(run_job, describe_summary, lambda prepared: f"millrace resume {prepared.folder.root.url}")


def _finish(summary: Any, description: str) -> None:
    """Prints the summary and exits with the status of the job."""
    Console(soft_wrap=True, highlight=False).print(description)
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


def _explain(error: Exception, console: Console, verbose: bool, advice: str) -> int:
    """Prints one line for an error, and the traceback with --verbose; returns the exit status."""
    from ..errors import find_millrace_error

    ours = find_millrace_error(error)
    if verbose:
        console.print_exception()
    shown: BaseException = ours if ours is not None else error
    text = str(shown).strip() if isinstance(shown, MillraceError) else _first_line(shown)
    console.print(f"[red]error:[/] {escape(text + advice)}")
    return EXIT_USER_ERROR if isinstance(ours, UserError) else EXIT_FAILED


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''} (run again with --verbose for the traceback)"
