"""`millrace embed IN OUT`: writes the embedding of each row of files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..pooling.vectors import EmbeddingDtype
from ..sources.formats import InputFormat
from .running import (
    BatchSize,
    EndpointUrl,
    EngineSettings,
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
    engine_setting,
    run_shown,
)

if TYPE_CHECKING:
    from ..job.run import PreparedJob

Input = Annotated[
    str,
    typer.Argument(metavar="IN", help="File, folder, pattern or URL: Parquet, JSON lines, CSV, text or a Delta table."),
]
Prompt = Annotated[
    str | None, typer.Option(help='Text with {column} fields in place of --column, such as "query: {text}".')
]
Dtype = Annotated[EmbeddingDtype | None, typer.Option(help="Type of the numbers; float32 if not given.")]
Pooling = Annotated[
    Literal["last", "mean", "cls", "max"] | None, typer.Option(help="Pooling, if not that of the model's folder.")
]
Normalize = Annotated[
    bool | None, typer.Option("--normalize/--no-normalize", help="Whether vectors are scaled to length 1.")
]
Format = Annotated[InputFormat | None, typer.Option(help="Format of the input, if the names of files do not tell.")]


def embed(
    input: Input,
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL for the results.")],
    *,
    model: Annotated[str, typer.Option(help="Model folder, URL or hub repository.", show_default=False)],
    column: Annotated[str, typer.Option(help="Column with the texts. A text file has the column text.")] = "text",
    prompt: Prompt = None,
    dimensions: Annotated[int | None, typer.Option(help="Leading numbers of each vector to keep.")] = None,
    embedding_dtype: Dtype = None,
    pooling: Pooling = None,
    normalize: Normalize = None,
    output_column: Annotated[str | None, typer.Option(help="Column for the vectors; embeddings if not given.")] = None,
    columns: KeptColumns = None,
    key: KeyColumns = None,
    format: Format = None,
    output_format: ResultFormat = None,
    order: Order = None,
    limit: Limit = None,
    replicas: Replicas = None,
    batch_size: BatchSize = None,
    engine: EngineSettings = None,
    endpoint_url: EndpointUrl = None,
    on_error: OnError = None,
    overwrite: Overwrite = False,
    take_over: TakeOver = False,
    verbose: Verbose = False,
) -> None:
    """Embed the texts of files and write the vectors. An interrupted job resumes where it stopped."""
    fields = {
        "model": model,
        "input": input,
        "output": output,
        "prompt": "{" + column + "}" if prompt is None else prompt,
        "pooling": _given({"dimensions": dimensions, "use_activation": normalize}),
        "embedding_dtype": embedding_dtype,
        "output_column": output_column,
        "columns": columns or None,
        "key": key or None,
        "format": format,
        "output_format": output_format,
        "order": order,
        "limit": limit,
        "replicas": replicas,
        "batch_size": batch_size,
        "endpoint_url": endpoint_url,
        "on_error": on_error,
    }
    run_shown(lambda: _prepare(fields, pooling, engine or [], overwrite, take_over), verbose=verbose)


def _prepare(
    fields: dict[str, Any], pooling: str | None, engine: list[str], overwrite: bool, take_over: bool
) -> PreparedJob:
    """Returns the checked job, which differs from a job of a job file only in where its fields come from."""
    from ..job.file import load_job
    from ..job.run import prepare_job

    own = _given({"pooler_config": pooling and {"pooling_type": pooling.upper()}}) or {}
    settings = {**own, **dict(map(engine_setting, engine))}
    job = load_job(None, **fields, engine=settings or None, task_type="embed")
    return prepare_job(job, overwrite=overwrite, take_over=take_over)


def _given(values: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the options that were given; None if none was."""
    return {name: value for name, value in values.items() if value is not None} or None
