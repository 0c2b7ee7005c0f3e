"""The settings of the processor of a job, and the columns of its output."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import pyarrow as pa

from ...engine import resolve_model
from ...engine.errors import ConfigError, PoolingParamsError, PromptTypeError
from ...engine.loading.hub import HubSettings
from .. import columns
from ..files.storage import StorageOptions
from ..mixed_values import holds_json
from ..pooling.model import vector_size
from ..pooling.pairs import ScoreAnswers, pair_columns
from ..processor.config import EngineProcessorConfig
from ..processor.pooling_stages import answers_of, make_scoring
from ..sinks.formats import FORMATS
from ..sources import Source
from ..stages.declared.detokenize import DetokenizeStageConfig
from .config import JobConfig, RowSetting
from .rows import answer_names, reported
from .template import Template

logger = logging.getLogger(__name__)

SMALL_BLOCK_ROWS, LARGE_BLOCK_ROWS = 128, 1024
LARGE_INPUT_ROWS = 100_000
"""Rows of a block. Ray's driver keeps a record of every block, so the blocks of a large input are larger. Blocks of
long rows stay smaller, because a source yields tables of a few megabytes."""


def processor_config(job: JobConfig, num_rows: int | None = 0) -> EngineProcessorConfig:
    """Returns the processor's settings for a job.

    Args:
        job: The job.
        num_rows: Rows of the job's input; None, for an unknown number, counts as a large input.

    Raises:
        ConfigError: The model folder or a setting of the engine cannot be used.
    """
    asked, path = job.engine_kwargs(), Path(job.model).expanduser()
    folder = resolve_model(job.model, HubSettings(asked.get("revision"), asked.get("download_dir")))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model folder {str(folder)!r} holds no config.json; pass a folder in Hugging Face's layout")
    return EngineProcessorConfig(
        model_source=str(path.resolve()) if path.exists() else job.model,
        engine_kwargs=asked,
        task_type=job.task_type,
        pooling_params=job.pooling,
        embedding_dtype=(job.embedding_dtype or "float32") if job.task.makes_vectors else None,
        score_columns=(columns.TEXT_1, columns.TEXT_2) if job.task.reads_pairs else None,
        batch_size=job.batch_size or block_rows(num_rows),
        concurrency=job.replicas,
        lora_modules=job.lora_modules,
        dynamic_lora_loading_path=job.dynamic_lora_loading_path,
        should_continue_on_error=job.on_error == "row",
        deduplicate=job.dedup,
        # The engine also detokenizes: it has a tokenizer, and so one process less must load one.
        detokenize_stage=DetokenizeStageConfig(enabled=False),
    )


def find_source(job: JobConfig, versions: Mapping[str, int] | None = None) -> Source:
    """Returns the source of the input of a job.

    Args:
        job: The job.
        versions: As in `Source.find`.

    Raises:
        ConfigError: The input cannot be read as the job says.
    """
    options = StorageOptions(endpoint_url=job.endpoint_url)
    return Source.find(job.input, job.format, options, versions, job.columns_as_text or ())


def warn_of_unread(job: JobConfig, given: pa.Schema) -> None:
    """Warns of columns of the input that would be settings of a conversation if the job file named them.

    It also warns if the job has adapters and the input no column that names them.

    Args:
        job: The job. One that makes the prompt itself gets no warning of the first kind.
        given: Columns of its input.
    """
    unread = [name for name in get_args(RowSetting) if name in given.names and name not in (job.row_settings or ())]
    if unread and not job.templates():
        names = ", ".join(unread)
        logger.warning("columns %s of the input are kept but not used; to use them: row_settings: [%s]", names, names)
    if job.has_adapters and columns.MODEL not in given.names:
        logger.warning("the input has no column 'model' that names an adapter; all rows run on the model itself")


def block_rows(num_rows: int | None) -> int:
    """Returns the rows of a block for a job without `batch_size`.

    Args:
        num_rows: Rows of the job's input; None, for an unknown number, counts as a large input.
    """
    return LARGE_BLOCK_ROWS if num_rows is None or num_rows >= LARGE_INPUT_ROWS else SMALL_BLOCK_ROWS


def input_columns(job: JobConfig, given: pa.Schema) -> set[str]:
    """Returns the names of the input's columns that a job reads: those that it names, keeps, or that stages look for.

    Args:
        job: The job.
        given: Columns and types of its input.
    """
    named = {name for template in job.templates() for name in template.columns}
    if job.task.reads_pairs:
        named.update(_pair_columns(job, given.names))
    kept = given.names if job.columns is None else job.columns
    return named.union(kept, job.key or [], columns.READ_BY_STAGES, [columns.MODEL] if job.has_adapters else [])


def result_schema(job: JobConfig, given: pa.Schema, config: EngineProcessorConfig | None = None) -> pa.Schema:
    """Returns the schema of the output: the kept columns of the input, the answer, and columns about its run.

    Args:
        job: The job.
        given: Columns and types of its input.
        config: The settings of its processor, from whose model the size of vectors follows; None for a job that
            generates.

    Raises:
        ConfigError: The job names a column that the input lacks, a column would be written twice, the model cannot do
            the task, or the output format has no type for a column.
    """
    names = given.names
    _check_columns(job, names)
    types = columns.result_types()
    result = _answer_columns(job, given, config)
    if (job.sampling or {}).get("n", 1) != 1:
        result.append((columns.OUTPUTS, pa.list_(pa.string())))
    result += [(name, types[name]) for name in reported(job)]
    if job.answer_column in [name for name, _ in result[1:]] or job.answer_column in columns.RESERVED:
        raise ConfigError(f"output_column {job.answer_column!r} is the name of another column; pass another name")
    kept = [given.field(name) for name in (names if job.columns is None else dict.fromkeys(job.columns))]
    for name in [field.name for field in kept]:
        if name in dict(result):
            raise ConfigError(
                f"the input's column {name!r} would be overwritten by the result; leave it out of columns, "
                "or set output_column"
            )
    schema = pa.schema([*kept, *(pa.field(*one) for one in result)])
    schema = FORMATS[job.output_format].fit_schema(schema)
    # Rows that are put in order at the end wait in Parquet.
    return FORMATS["parquet"].fit_schema(schema) if job.order == "input" else schema


def _check_columns(job: JobConfig, names: Sequence[str]) -> None:
    """Raises if the input, which has columns of these names, lacks one that the job needs."""
    asked = [*(job.columns or []), *(job.key or []), *(job.row_settings or [])]
    if job.task.reads_pairs:
        asked += _pair_columns(job, names)
    for template in (*job.templates(), *(Template("", (("", name),)) for name in asked)):
        template.check_columns(names)
    has_prompt = job.templates() or job.task.reads_pairs or {columns.PROMPT, columns.MESSAGES} & set(names)
    if not has_prompt:
        raise ConfigError(
            f"the job has neither prompt nor messages, and the input no column of these names: {', '.join(names)}"
        )


def _pair_columns(job: JobConfig, names: Sequence[str]) -> Sequence[str]:
    try:
        return job.score_columns or pair_columns(names)
    except PromptTypeError as error:
        raise ConfigError(str(error)) from None


def _answer_columns(
    job: JobConfig, given: pa.Schema, config: EngineProcessorConfig | None
) -> list[tuple[str, pa.DataType]]:
    """Returns the names and types of the columns that the task adds to a row; the answer is the first."""
    if not job.task.is_pooling:
        return [(job.answer_column, pa.string())]
    assert config is not None
    if job.task.reads_pairs:
        make_scoring(config)  # This raises if the model cannot score pairs.
        texts = [given.field(name) for name in _pair_columns(job, given.names)]
        are_listed = any(pa.types.is_nested(one.type) or holds_json(one) for one in texts)
        types = ScoreAnswers(are_listed=are_listed).types(0)
    else:
        try:
            types = answers_of(config).types(vector_size(config.engine_config, config.default_pooling_params))
        except PoolingParamsError as error:
            raise ConfigError(f"pooling: {error}") from error
    return [
        (own, types[name]) for name, own in answer_names(job.task.answers, job.answer_column).items() if name in types
    ]
