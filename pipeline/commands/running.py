"""Runs a job at the command line: `run_shown` shows progress, then a summary or an error, and exits with a status."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TextIO

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from ...engine.errors import ConfigError, MillraceError, UserError
from ..plain_text import without_controls
from ..sinks.formats import OutputFormat
from .stopping import Stopping, ignore_signals, stop_on_signals

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_ROWS_FAILED = 3

OutputFolder = Annotated[str, typer.Argument(metavar="DIR", help="Output folder of the job.", show_default=False)]
Replicas = Annotated[int | None, typer.Option(help="Copies of the model.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per block.")]
EngineSettings = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of the engine; may be repeated.")
]
EndpointUrl = Annotated[str | None, typer.Option(help="Address of the S3 server, if it is not Amazon's.")]
KeptColumns = Annotated[
    list[str] | None, typer.Option(help="Column of the input to keep; may be repeated. By default all are kept.")
]
KeyColumns = Annotated[list[str] | None, typer.Option(help="Column of the key that identifies a row; may be repeated.")]
Limit = Annotated[int | None, typer.Option(help="Run only the first rows.")]
Order = Annotated[Literal["any", "input"] | None, typer.Option(help="Order of the rows of the output.")]
ResultFormat = Annotated[OutputFormat | None, typer.Option(help="Format of the results.")]
OnError = Annotated[
    Literal["row", "stop"] | None,
    typer.Option(help="A failed row goes to the folder _failed of the output, or stops the job."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the job in the output folder.")]
TakeOver = Annotated[bool, typer.Option("--take-over", help="Take the output over from another run that writes to it.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs, and tracebacks.")]


@dataclass(frozen=True, slots=True)
class JobKind:
    """The functions that differ between a job of a job file and a batch file.

    Attributes:
        run: Function that runs a prepared job. It takes `on_progress` and `started_s`, and returns a summary.
        describe: Function that returns a summary as lines of text for the terminal.
        how_to_go_on: Function of a prepared job that returns the command with which a user resumes it.
    """

    run: Callable[..., Any]
    describe: Callable[[Any], str]
    how_to_go_on: Callable[[Any], str]


def run_shown(prepare: Callable[[], Any], *, verbose: bool, load_kind: Callable[[], JobKind] | None = None) -> None:
    """Prepares and runs a job, shows its progress, and exits with the status of the job.

    Args:
        prepare: Function that checks and returns the job.
        verbose: Whether Ray's logs and tracebacks are shown.
        load_kind: Function that imports the modules of a kind of job and returns its `JobKind`; None for jobs of job
            files.

    Raises:
        Exit: The job has ended: with status 0, or one of the `EXIT_...` constants. After Ctrl-C, SIGTERM or SIGHUP
            the process closes everything and exits at once.
    """
    started_s = time.monotonic()
    from ..session import quiet_stderr

    with quiet_stderr(verbose=verbose) as stream, _shown_warnings(stream), stop_on_signals() as stopping:
        errors = Console(file=stream, soft_wrap=True, highlight=False)
        kind, prepared = None, None
        try:
            kind = (load_kind or _job_kind)()
            prepared = prepare()
            summary = run(prepared, kind, stopping, verbose=verbose, started_s=started_s, console=errors)
        except (KeyboardInterrupt, SystemExit) as stopped:
            ignore_signals()
            errors.print(f"[yellow]stopped[/]{_advice(kind, prepared)}")
            # Everything is closed by now. Ray's threads may crash while the interpreter shuts down after an interrupt,
            # so the process exits without that shutdown.
            os._exit(stopping.status(stopped))
        except Exception as error:  # noqa: BLE001  # whatever fails, the program ends with a line and a status
            raise typer.Exit(_explain(error, errors, verbose, _advice(kind, prepared))) from None
    _finish(summary, kind.describe(summary))


def run(prepared: Any, kind: JobKind, stopping: Stopping, *, verbose: bool, started_s: float, console: Console) -> Any:
    """Runs a job in a session of Ray while a line shows its progress, and returns the summary.

    Args:
        prepared: The prepared job.
        kind: The functions for this kind of job.
        stopping: The handler of signals, which is set again after Ray has started.
        verbose: Whether Ray's logs are shown.
        started_s: Time at which the start-up began, on `time.monotonic`.
        console: Console for the line of progress.
    """
    from ..job.display import ProgressView
    from ..session import ray_session

    if prepared.resumes:
        console.print(f"going on with the job in {prepared.folder.root.url}")
    with ray_session(verbose=verbose), ProgressView(console) as view:
        stopping.heed_signals()
        return kind.run(prepared, on_progress=view.show, started_s=started_s)


def engine_setting(text: str) -> tuple[str, Any]:
    """Returns the name and the value of one `EngineSettings`; the value is YAML, or else a text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--engine takes KEY=VALUE, such as max_model_len=4096; got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # A date that does not exist is a ValueError.
        return key, value


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command so that an exception in it is printed as one line and becomes the exit status."""

    @functools.wraps(command)
    def explained(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:  # the command chose its status
            raise
        except Exception as error:  # noqa: BLE001  # whatever fails, the program ends with a line and a status
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            raise typer.Exit(_explain(error, console, kwargs.get("verbose", False), "")) from None

    return explained


def _advice(kind: JobKind | None, prepared: Any) -> str:
    """Returns the end of an error message that tells how to resume the job; empty if the job never began."""
    if kind is None or prepared is None or not _has_begun(prepared):
        return ""
    return f"; what has finished is kept, go on with: {kind.how_to_go_on(prepared)}"


def _has_begun(prepared: Any) -> bool:
    try:
        return bool(prepared.folder.root.exists())
    except MillraceError:  # The storage itself may have failed. The advice is harmless if the job never began.
        return True


def _job_kind() -> JobKind:
    from ..job.display import describe_summary
    from ..job.run import run_job

    return JobKind(run_job, describe_summary, lambda prepared: f"millrace resume {prepared.folder.root.url}")


def _finish(summary: Any, description: str) -> None:
    """Prints the description of a finished job, and exits with the status for lost rows, failed rows or success."""
    try:
        Console(soft_wrap=True, highlight=False).print(description)
        if not summary.is_complete:
            lost = f"{summary.num_rows_in} rows went in and {summary.num_rows_out} came out"
            Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {lost}")
    except OSError:  # Nobody reads it any more. Without a file behind it, the stream would fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not summary.is_complete:
        raise typer.Exit(EXIT_FAILED)
    raise typer.Exit(EXIT_ROWS_FAILED if summary.num_rows_failed else 0)


class _OneLine(logging.Formatter):
    """Formats a record as one line, which obeys no control character of what it quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return without_controls(super().format(record))


@contextmanager
def _shown_warnings(stream: TextIO) -> Iterator[None]:
    """Writes the warnings of this package to a stream while the `with` block runs, one line each."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    ours = logging.getLogger(__package__.partition(".")[0])
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


def _explain(error: Exception, console: Console, verbose: bool, advice: str) -> int:
    """Prints an error and `advice` as one line, after the traceback if `verbose`.

    Returns:
        The exit status: `EXIT_USER_ERROR` for a mistake of the user, else `EXIT_FAILED`.
    """
    from ..errors import find_cause, find_millrace_error

    ours = find_millrace_error(error)
    if verbose:
        console.print_exception()
    shown: BaseException = ours if ours is not None else find_cause(error)
    text = str(shown).strip() if isinstance(shown, MillraceError) else _first_line(shown)
    # A message may quote a stranger's file, whose characters must not move the cursor or change the title.
    lines = "\n".join(map(without_controls, text.splitlines()))
    console.print(f"[red]error:[/] {escape(lines + advice)}")
    return EXIT_USER_ERROR if isinstance(ours, UserError) else EXIT_FAILED


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''} (run again with --verbose for the traceback)"
