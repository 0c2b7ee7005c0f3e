"""`millrace run JOB.yaml`, or the same job in flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..sinks.formats import OutputFormat
from .running import run_shown

if TYPE_CHECKING:
    from ..job.run import PreparedJob


def run(
    job_file: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="Job file.", show_default=False)] = None,
    *,
    model: Annotated[str | None, typer.Option(help="Model folder, or bundled:NAME.")] = None,
    input: Annotated[list[str] | None, typer.Option(help="File, folder or pattern; may be repeated.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the results.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt with {column} fields, in place of the job file's.")] = None,
    columns: Annotated[list[str] | None, typer.Option(help="Column of the input to keep; may be repeated.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Column that tells rows apart; may be repeated.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate for a row.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 for the most probable tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the job's draws.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per block.")] = None,
    limit: Annotated[int | None, typer.Option(help="Run only the first rows.")] = None,
    order: Annotated[Literal["any", "input"] | None, typer.Option(help="Order of the rows of the output.")] = None,
    output_format: Annotated[OutputFormat | None, typer.Option(help="Format of the results.")] = None,
    on_error: Annotated[
        Literal["row", "stop"] | None,
        typer.Option(help="A failed row goes to the folder _failed of the output, or stops the job."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the job in the output folder.")] = False,
    set_fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Field of the job; may be repeated.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's logs, and tracebacks.")] = False,
) -> None:
    """Run a job: rows of files through a model into files. A job that was interrupted goes on where it stopped."""
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
    run_shown(lambda: _prepare(job_file, flags, sampling, set_fields or [], overwrite), verbose=verbose)


def _prepare(
    job_file: Path | None, flags: dict[str, Any], sampling: dict[str, Any], settings: list[str], overwrite: bool
) -> PreparedJob:
    """Joins job file, environment and flags, later ones win, and checks the job."""
    from ..job.file import load_job
    from ..job.run import prepare_job

    given = {name: value for name, value in flags.items() if value is not None and value != []}
    changed = [f"sampling.{name}={value}" for name, value in sampling.items() if value is not None]
    job = load_job(job_file, settings=[*changed, *settings], **given)
    return prepare_job(job, overwrite=overwrite)
