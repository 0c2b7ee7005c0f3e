"""`millrace run JOB.yaml`: runs a job, given as a file, as flags, or as both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .running import (
    BatchSize,
    KeptColumns,
    KeyColumns,
    Limit,
    OnError,
    Order,
    Overwrite,
    Replicas,
    ResultFormat,
    TakeOver,
    Verbose,
    run_shown,
)

if TYPE_CHECKING:
    from ..job.run import PreparedJob


def run(
    job_file: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="Job file.", show_default=False)] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Model folder, or bundled:NAME.")] = None,
    input: Annotated[list[str] | None, typer.Option(help="File, folder or pattern; may be repeated.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the results.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt with {column} fields; replaces the job file's.")] = None,
    columns: KeptColumns = None,
    key: KeyColumns = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate for a row.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 for the most probable tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the job.")] = None,
    replicas: Replicas = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    order: Order = None,
    output_format: ResultFormat = None,
    on_error: OnError = None,
    overwrite: Overwrite = False,
    take_over: TakeOver = False,
    set_fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Field of the job; may be repeated.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run a model over the rows of files and write files. An interrupted job resumes where it stopped."""
    flags = {
        "model": model,
        "input": input,
        "output": output,
        "prompt": prompt,
        "columns": columns,
        "key": key,
        "seed": seed,
        "replicas": replicas,
        "batch_size": batch_size,
        "limit": limit,
        "order": order,
        "output_format": output_format,
        "on_error": on_error,
    }
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    run_shown(lambda: _prepare(job_file, flags, sampling, set_fields or [], overwrite, take_over), verbose=verbose)


def _prepare(
    job_file: Path | None,
    flags: dict[str, Any],
    sampling: dict[str, Any],
    settings: list[str],
    overwrite: bool,
    take_over: bool,
) -> PreparedJob:
    """Returns the checked job. Flags override the environment, and the environment overrides the job file."""
    from ..job.file import load_job
    from ..job.run import prepare_job

    given = {name: value for name, value in flags.items() if value is not None and value != []}
    changed = [f"sampling.{name}={value}" for name, value in sampling.items() if value is not None]
    job = load_job(job_file, settings=[*changed, *settings], **given)
    return prepare_job(job, overwrite=overwrite, take_over=take_over)
