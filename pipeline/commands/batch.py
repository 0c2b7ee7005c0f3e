"""`millrace batch in.jsonl out.jsonl`: answers every line of an OpenAI batch file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .running import EndpointUrl, EngineSettings, JobKind, TakeOver, Verbose, engine_setting, run_shown

if TYPE_CHECKING:
    from ..openai_batch.job import PreparedBatch


def batch(
    input: Annotated[str, typer.Argument(metavar="IN.jsonl", help="A request on every line.", show_default=False)],
    output: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="File for the answers.", show_default=False)],
    *,
    model: Annotated[str, typer.Option(help="Model folder, URL, or bundled:NAME.", show_default=False)],
    errors: Annotated[
        str | None, typer.Option(help="File for the lines without an answer; OUT.errors.jsonl if not given.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Model name that lines may ask for; may be repeated. By default the name in the first line."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PLACE", help="LoRA adapter that lines may ask for as a model; may be repeated."),
    ] = None,
    dynamic_lora_loading_path: Annotated[
        str | None, typer.Option(help="Folder or URL whose subfolders are LoRA adapters that lines may ask for.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate for a line without a limit.")] = None,
    replicas: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    engine: EngineSettings = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="Format of the tool calls, such as hermes; calls stay in the text if not given.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="Format of the reasoning, such as qwen3; it stays in the text if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for lines that give none.")] = 0,
    endpoint_url: EndpointUrl = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files and begin anew.")] = False,
    take_over: TakeOver = False,
    verbose: Verbose = False,
) -> None:
    """Answer an OpenAI batch file. An interrupted run resumes where it stopped."""
    fields: dict[str, Any] = {
        "model": model,
        "input": input,
        "output": output,
        "errors": errors,
        "served_model_names": served_model_name or [],
        "lora_modules": lora,
        "dynamic_lora_loading_path": dynamic_lora_loading_path,
        "max_tokens": max_tokens,
        "replicas": replicas,
        "seed": seed,
        "tool_call_parser": tool_call_parser,
        "reasoning_parser": reasoning_parser,
        "endpoint_url": endpoint_url,
    }
    run_shown(lambda: _prepare(fields, engine or [], overwrite, take_over), verbose=verbose, load_kind=_kind)


def _prepare(fields: dict[str, Any], engine: list[str], overwrite: bool, take_over: bool) -> PreparedBatch:
    from ..openai_batch.batch_config import BatchConfig
    from ..openai_batch.job import prepare_batch

    return prepare_batch(
        BatchConfig(**fields, engine=dict(map(engine_setting, engine))), overwrite=overwrite, take_over=take_over
    )


def _kind() -> JobKind:
    from ..openai_batch.job import run_batch
    from ..openai_batch.summary import describe_batch

    return JobKind(run_batch, describe_batch, lambda prepared: "the same command")
