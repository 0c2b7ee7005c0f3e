"""Runs a job: input -> processor -> Parquet, with a summary beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from ..engine import resolve_model
from ..engine.errors import ConfigError, PromptTypeError
from . import columns
from .config import DetokenizeStageConfig, EngineProcessorConfig
from .engine_backend import EngineBackend
from .job_config import JobConfig, load_job
from .plan import finish_plans, prepare_plans
from .processor import Processor
from .progress import Progress, ProgressMonitor
from .report import JobSummary, OutputScan, summary_path
from .sources import READ_ERROR, Source
from .template import Template

__all__ = ["JobConfig", "PreparedJob", "load_job", "prepare_job", "run_job"]

FILES_PER_JOB = 20
MAX_ROWS_PER_FILE = 50_000


@dataclass(frozen=True)
class MakePrompt:
    """The job's `preprocess`: what a row asks the model.

    Attributes:
        templates: Of the prompt, or of each message.
        roles: Of the messages; empty for a prompt.
        sampling: The job's sampling parameters.
    """

    templates: tuple[Template, ...]
    roles: tuple[str, ...]
    sampling: Mapping[str, Any] | None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns that the stages read; those that the job leaves open are not the input's either."""
        if row.get(READ_ERROR) is not None:
            raise PromptTypeError(row[READ_ERROR])
        asked: dict[str, Any] = {columns.INPUT: row, columns.SAMPLING_PARAMS: self.sampling, columns.MODEL: None}
        if not self.templates:
            return asked
        texts = [template.render(row) for template in self.templates]
        if self.roles:
            pairs = zip(self.roles, texts, strict=True)
            messages = [{"role": role, "content": text} for role, text in pairs]
            return {**asked, columns.PROMPT: None, columns.MESSAGES: messages, columns.TOKENIZED_PROMPT: None}
        return {**asked, columns.PROMPT: texts[0], columns.MESSAGES: None, columns.TOKENIZED_PROMPT: None}


@dataclass(frozen=True)
class MakeResult:
    """The job's `postprocess`: the row as it was read, and what came of it.

    Attributes:
        output_column: Name of the column of the text.
    """

    output_column: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns of the output; those not in its schema are left out when it is written."""
        texts = [one["text"] for one in row[columns.OUTPUTS] or []]
        return {
            **row[columns.INPUT],
            self.output_column: row[columns.GENERATED_TEXT],
            columns.OUTPUTS: texts,
            **{name: row[name] for name in REPORTED},
        }


REPORTED = (
    columns.FINISH_REASON,
    columns.NUM_INPUT_TOKENS,
    columns.NUM_CACHED_TOKENS,
    columns.NUM_GENERATED_TOKENS,
)
"""What every output says of a row, besides its text and its error."""


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job whose every part was checked, ready to run.

    Attributes:
        job: The job.
        config: Settings of its processor.
        source: Its input.
        schema: Columns of its output.
        folder: Where that goes; empty.
    """

    job: JobConfig
    config: EngineProcessorConfig
    source: Source
    schema: pa.Schema
    folder: Path

    @property
    def num_rows(self) -> int:
        """Rows to run."""
        return min(self.source.num_rows, self.job.limit or self.source.num_rows)


def prepare_job(job: JobConfig, *, overwrite: bool = False) -> PreparedJob:
    """Checks a job against the model and the input, without Ray.

    Args:
        job: The job.
        overwrite: Whether Parquet files that are in the output folder give way.

    Raises:
        ConfigError: Something in the job cannot be used.
    """
    config = processor_config(job)
    source = Source.find(job.input, job.format)
    schema = result_schema(job, source)
    return PreparedJob(job, config, source, schema, prepare_output(job.output, overwrite))


def run_job(
    job: JobConfig | PreparedJob,
    *,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    started_s: float | None = None,
) -> JobSummary:
    """Runs a job to its end. Ray is started if it is not, and left as it is after.

    Args:
        job: The job.
        overwrite: As in `prepare_job`; without effect on a job that is prepared.
        on_progress: Called with each look at the running job, from another thread.
        started_s: When the start-up began, on `time.monotonic`; None for now.

    Returns:
        The summary, counted from what was written; it is also written beside the output folder.

    Raises:
        ConfigError: Something in the job cannot be used; nothing has been run.
        MillraceError: The job failed. What was written until then stays.
    """
    started_s = time.monotonic() if started_s is None else started_s
    prepared = job if isinstance(job, PreparedJob) else prepare_job(job, overwrite=overwrite)
    with _processor(prepared) as processor:
        scan = OutputScan(prepared.folder)
        monitor = ProgressMonitor(processor, scan, prepared.num_rows, started_s, on_progress)
        if prepared.num_rows:
            results = processor(_read(prepared))
            with monitor:
                results.write_parquet(str(prepared.folder), min_rows_per_file=_rows_per_file(prepared))
        ended_s = time.monotonic()
    summary = _summarise(prepared, monitor, started_s, ended_s)
    summary.write(summary_path(prepared.folder))
    return summary


def _read(prepared: PreparedJob) -> Dataset:
    dataset = prepared.source.read()
    return dataset if prepared.job.limit is None else dataset.limit(prepared.job.limit)


def _rows_per_file(prepared: PreparedJob) -> int:
    """Returns the least rows of a file: several files for a small job, so that progress shows, few for a large one."""
    return min(MAX_ROWS_PER_FILE, max(prepared.job.batch_size, prepared.num_rows // FILES_PER_JOB))


def processor_config(job: JobConfig) -> EngineProcessorConfig:
    """Returns the processor's settings for a job.

    Args:
        job: The job.

    Raises:
        ConfigError: The model folder or a setting of the engine cannot be used.
    """
    folder = resolve_model(job.model)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model folder {str(folder)!r} holds no config.json; pass a folder in Hugging Face's layout")
    return EngineProcessorConfig(
        model_source=job.model if job.model.startswith("bundled:") else str(folder.resolve()),
        engine_kwargs=job.engine_kwargs(),
        batch_size=job.batch_size,
        concurrency=job.replicas,
        should_continue_on_error=job.on_error == "row",
        # The engine makes the text as well, and has a tokenizer already: one process less that has to load one.
        detokenize_stage=DetokenizeStageConfig(enabled=False),
    )


def result_schema(job: JobConfig, source: Source) -> pa.Schema:
    """Returns the columns of the output: those kept of the input, the text, and what is reported of a row.

    Args:
        job: The job.
        source: Its input.

    Raises:
        ConfigError: The job names a column that the input does not have, or one would be written twice.
    """
    names = source.schema.names
    asked = [Template("", (("", name),)) for name in job.columns or []]
    for template in (*job.templates(), *asked):
        template.check_columns(names)
    if not job.templates() and not {columns.PROMPT, columns.MESSAGES} & set(names):
        raise ConfigError(
            f"the job has neither prompt nor messages, and the input no column of these names: {', '.join(names)}"
        )
    types = columns.result_types()
    result = [(job.output_column, pa.string())]
    if (job.sampling or {}).get("n", 1) != 1:
        result.append((columns.OUTPUTS, pa.list_(pa.string())))
    result += [(name, types[name]) for name in (*REPORTED, columns.INFERENCE_ERROR)]
    kept = [source.schema.field(name) for name in (names if job.columns is None else job.columns)]
    for name in [field.name for field in kept]:
        if name in dict(result):
            raise ConfigError(
                f"the input's column {name!r} would be overwritten by the result; leave it out of columns, "
                "or set output_column"
            )
    return pa.schema([*kept, *(pa.field(*one) for one in result)])


def prepare_output(output: str, overwrite: bool) -> Path:
    """Makes the output folder, empty.

    Args:
        output: The folder.
        overwrite: Whether Parquet files in it are removed. Nothing else ever is.

    Returns:
        The folder.

    Raises:
        ConfigError: It holds something that must not be mixed with the output.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {output!r} is a file; pass a folder")
    present = sorted(folder.iterdir()) if folder.exists() else []
    foreign = [path.name for path in present if not (path.is_file() and path.suffix == ".parquet")]
    if present and (foreign or not overwrite):
        advice = "pass another folder" if foreign else "pass --overwrite to replace them, or another folder"
        raise ConfigError(f"output folder {output!r} already holds {(foreign or [present[0].name])[0]!r}; {advice}")
    try:
        for path in present:
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output folder {output!r} cannot be written: {error.strerror}") from error
    return folder


def _processor(prepared: PreparedJob) -> Processor:
    job = prepared.job
    roles = tuple(message.role for message in job.messages or [])
    prompt = MakePrompt(tuple(job.templates()), roles, job.sampling)
    config = prepared.config
    return Processor(
        config,
        [*prepare_plans(config), EngineBackend(config), *finish_plans(config)],
        prompt,
        MakeResult(job.output_column),
        schema=prepared.schema,
    )


def _summarise(prepared: PreparedJob, monitor: ProgressMonitor, started_s: float, ended_s: float) -> JobSummary:
    counts = OutputScan(prepared.folder).update()
    ready_s = monitor.ready_s or ended_s
    last_token_s = min(ended_s, max(ready_s, monitor.last_token_s or ended_s))
    return JobSummary(
        model=prepared.job.model,
        output=prepared.job.output,
        num_rows_in=prepared.num_rows,
        num_rows_out=counts.num_rows,
        num_rows_failed=counts.num_failed,
        num_input_tokens=counts.num_input_tokens,
        num_cached_tokens=counts.num_cached_tokens,
        num_output_tokens=counts.num_output_tokens,
        start_up_s=ready_s - started_s,
        generate_s=last_token_s - ready_s,
        write_s=ended_s - last_token_s,
        finish_reasons=dict(counts.finish_reasons),
        errors=counts.errors,
    )
