"""The command line: `millrace run JOB.yaml`, or the same job in flags.

Exit status: 0 every row got through, 1 the job failed, 2 a mistake in what was given, 3 some rows failed, 130 stopped
by Ctrl-C.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..engine.errors import MillraceError, UserError
from .commands.init import init, schema
from .commands.plan import plan

if TYPE_CHECKING:
    from .job_config import JobConfig
    from .report import JobSummary

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_ROWS_FAILED = 3
EXIT_INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run large language models over datasets.",
)


def main() -> None:
    """Runs the command line."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"millrace {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Holds what stands before a command."""


@app.command()
def run(
    job_file: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="Job file.", show_default=False)] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Model folder, or bundled:NAME.")] = None,
    input: Annotated[list[str] | None, typer.Option(help="File, folder or pattern; may be repeated.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the Parquet files.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt with {column} fields, in place of the job file's.")] = None,
    columns: Annotated[list[str] | None, typer.Option(help="Column of the input to keep; may be repeated.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate for a row.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 for the most probable tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the job's draws.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per block.")] = None,
    limit: Annotated[int | None, typer.Option(help="Run only the first rows.")] = None,
    on_error: Annotated[
        Literal["row", "stop"] | None,
        typer.Option(help="A failed row becomes an error row, or stops the job."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace Parquet files in the output folder.")] = False,
    set_fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Field of the job; may be repeated.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs, and tracebacks.")] = False,
) -> None:
    """Run a job: rows of a file through a model into Parquet."""
    started_s = time.monotonic()
    flags = {
        "model": model,
        "input": input,
        "output": output,
        "prompt": prompt,
        "columns": columns,
        "seed": seed,
        "replicas": replicas,
        "batch_size": batch_size,
        "limit": limit,
        "on_error": on_error,
    }
    from .session import quiet_stderr

    with quiet_stderr(verbose=verbose) as stream, _shown_warnings(stream):
        errors = Console(file=stream, soft_wrap=True, highlight=False)
        try:
            job = _read_job(job_file, flags, {"max_tokens": max_tokens, "temperature": temperature}, set_fields or [])
            summary = _run(job, overwrite=overwrite, verbose=verbose, started_s=started_s, console=errors)
        except KeyboardInterrupt:
            errors.print("[yellow]stopped[/]; what was written so far stays in the output folder")
            # Everything is closed by now. Ray's threads do not always survive the end of an interpreter that an
            # interrupt has torn out of them: leave without it.
            os._exit(EXIT_INTERRUPTED)
        except Exception as error:  # noqa: BLE001  # the last resort of the program: a line and an exit status
            raise typer.Exit(_explain(error, errors, verbose)) from None
    _finish(summary)


def _finish(summary: JobSummary) -> None:
    """Prints the summary and exits with the status that it asks for."""
    from .display import describe_summary

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


def _read_job(job_file: Path | None, flags: dict[str, Any], sampling: dict[str, Any], settings: list[str]) -> JobConfig:
    """Joins job file, environment and flags; later ones win."""
    from .job_file import load_job

    given = {name: value for name, value in flags.items() if value is not None and value != []}
    changed = [f"sampling.{name}={value}" for name, value in sampling.items() if value is not None]
    return load_job(job_file, settings=[*changed, *settings], **given)


def _run(job: JobConfig, *, overwrite: bool, verbose: bool, started_s: float, console: Console) -> JobSummary:
    from .display import ProgressView
    from .job import prepare_job, run_job
    from .session import ray_session

    prepared = prepare_job(job, overwrite=overwrite)
    with ray_session(verbose=verbose), ProgressView(console) as view:
        return run_job(prepared, on_progress=view.show, started_s=started_s)


def _explain(error: Exception, console: Console, verbose: bool) -> int:
    """Prints one line for an error and returns the exit status; what is not ours keeps its traceback with --verbose."""
    from .errors import find_millrace_error

    ours = find_millrace_error(error)
    if verbose:
        console.print_exception()
    shown: BaseException = ours if ours is not None else error
    text = str(shown).strip() if isinstance(shown, MillraceError) else _first_line(shown)
    console.print(f"[red]error:[/] {escape(text)}")
    return EXIT_USER_ERROR if isinstance(ours, UserError) else EXIT_FAILED


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''} (run again with --verbose for the traceback)"


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command whose errors are lines and an exit status."""

    @functools.wraps(command)
    def explained(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # the last resort of the program: a line and an exit status
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            raise typer.Exit(_explain(error, console, kwargs.get("verbose", False))) from None

    return explained


for _command in (plan, init, schema):
    app.command()(_explained(_command))


if __name__ == "__main__":
    main()
