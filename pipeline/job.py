"""Runs a job: input -> processor -> files, resumed after any death, and its failed rows again on request."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset

from .. import __version__
from ..engine import resolve_model
from ..engine.errors import ConfigError
from . import columns
from .config import DetokenizeStageConfig, EngineProcessorConfig
from .durable import Identity
from .job_config import JobConfig
from .job_file import load_job
from .job_rows import REPORTED, MakePrompt, MakeResult
from .ledger.folder import OURS, RETRY, JobFolder, JobState
from .ledger.index import RowIndex
from .plan import UserFunction
from .processor import Processor
from .progress import Progress, ProgressMonitor
from .report import Counts, JobSummary, Report, ReportWriter, Run
from .sinks.parts import OutputSpec
from .sinks.publish import Manifest, publish
from .sources import READ_ERROR, Source, Unit
from .storage import Storage, StorageOptions
from .template import Template
from .writing import Done, LiveCounts, write_rows

__all__ = ["JobConfig", "PreparedJob", "load_job", "prepare_job", "prepare_resume", "prepare_retry", "run_job"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job whose every part was checked, ready to run.

    Attributes:
        job: The job.
        config: Settings of its processor.
        state: What is noted of it in its folder.
        folder: Where its output goes.
        spec: What that looks like.
        source: Its input; None if its dead letters are to run again.
        resumes: Whether it has begun already and goes on.
        former: What its output consists of, if its dead letters are to run again.
    """

    job: JobConfig
    config: EngineProcessorConfig
    state: JobState
    folder: JobFolder
    spec: OutputSpec
    source: Source | None
    resumes: bool = False
    former: Manifest | None = None

    @property
    def num_rows(self) -> int | None:
        """Rows to run; None if that is not known."""
        if self.former is not None:
            return self.former.num_failed
        known = self.state.num_rows
        return known if self.job.limit is None else min(known or self.job.limit, self.job.limit)

    @property
    def identity(self) -> Identity:
        """What its rows are known by."""
        if self.former is not None:
            return Identity(column=columns.ROW_ID)
        return Identity(None if self.job.key is None else tuple(self.job.key))


def prepare_job(job: JobConfig, *, overwrite: bool = False) -> PreparedJob:
    """Checks a job against the model, the input and what is in the output folder, without Ray. Nothing is written.

    Args:
        job: The job.
        overwrite: Whether the output of another job gives way, when this one runs.

    Raises:
        ConfigError: Something in the job cannot be used, or the folder holds something else.
    """
    job = job.relative_to(Path.cwd())
    config = processor_config(job)
    source = Source.find(job.input, job.format, StorageOptions(endpoint_url=job.endpoint_url))
    schema = result_schema(job, source.schema)
    state = _state(job, source)
    folder = JobFolder(Storage.at(job.output, job.endpoint_url))
    resumes = folder.check(state, overwrite)
    return PreparedJob(job, config, state, folder, _spec(job, folder, schema, source.schema), source, resumes)


def prepare_resume(output: str, endpoint_url: str | None = None, **changes: Any) -> PreparedJob:
    """Checks an unfinished job in an output folder, so that it can go on.

    Args:
        output: The folder.
        endpoint_url: Where ``s3://`` leads, if the folder is there.
        **changes: Fields of the job that are to be others now, such as `replicas`.

    Raises:
        ConfigError: There is no unfinished job, or its input has changed.
    """
    folder, state = _begun(output, endpoint_url)
    if folder.is_retrying:
        return prepare_retry(output, endpoint_url, **changes)
    if folder.is_finished:
        raise ConfigError(f"the job in {output!r} is finished; there is nothing to resume")
    return prepare_job(_changed(state, output, changes))


def prepare_retry(output: str, endpoint_url: str | None = None, **changes: Any) -> PreparedJob:
    """Checks a finished job whose dead letters are to run again.

    Args:
        output: The output folder of the job.
        endpoint_url: Where ``s3://`` leads, if the folder is there.
        **changes: Fields of the job that are to be others now, such as `engine`.

    Raises:
        ConfigError: There is no finished job, or no row of it has failed.
    """
    folder, state = _begun(output, endpoint_url)
    former = Manifest.read(folder.root)
    if former is None:
        raise ConfigError(f"the job in {output!r} is not finished; first: millrace resume {output}")
    if not former.failed_files:
        raise ConfigError(f"the job in {output!r} has no failed rows; there is nothing to run again")
    job = _changed(state, output, changes)
    given = _read_schema(state.input_schema)
    spec = _spec(job, folder, result_schema(job, given), given)
    return PreparedJob(job, processor_config(job), state, folder, spec, None, folder.is_retrying, former)


def run_job(
    job: JobConfig | PreparedJob,
    *,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    started_s: float | None = None,
) -> JobSummary:
    """Runs a job to its end, or on to its end if it has begun. Ray is started if it is not, and left as it is after.

    Args:
        job: The job.
        overwrite: As in `prepare_job`; on a job that is prepared it must be said there.
        on_progress: Called with each look at the running job, from another thread.
        started_s: When the start-up began, on `time.monotonic`; None for now.

    Returns:
        The summary of all its runs.

    Raises:
        ConfigError: Something in the job cannot be used; nothing has been run.
        MillraceError: The job failed. What has finished until then stays: run it again to go on.
    """
    started_s = time.monotonic() if started_s is None else started_s
    prepared = job if isinstance(job, PreparedJob) else prepare_job(job, overwrite=overwrite)
    _begin(prepared)
    report = _ReportOfJob(prepared)
    with _processor(prepared) as processor:
        live = LiveCounts()
        # While dead letters run again, the report is that of the output as it still is.
        save = report.write if prepared.former is None else None
        monitor = ProgressMonitor(processor, live, prepared.num_rows, started_s, show=on_progress, save=save)
        if not prepared.folder.is_publishing:
            _run_rows(prepared, processor, live, monitor)
        manifest = publish(prepared.folder.root, prepared.spec, prepared.former)
    return report.write(monitor.finish(live.update()), manifest.total, is_over=True).summary


class _ReportOfJob:
    """Writes the report of a job into its folder.

    Args:
        prepared: The job.
    """

    def __init__(self, prepared: PreparedJob) -> None:
        job = prepared.job
        self._prepared = prepared
        self._writer = ReportWriter(prepared.folder.root / OURS, job.model, job.output, job.prices)

    def write(self, run: Run, counts: Counts, *, is_over: bool = False) -> Report:
        """Writes it as things stand.

        Args:
            run: The run that is under way, or has ended.
            counts: Of everything written.
            is_over: Whether the output is whole; then an input of unknown length had as many rows.
        """
        prepared = self._prepared
        known = prepared.num_rows if prepared.former is None else prepared.former.total.num_rows
        return self._writer.write(run, counts, counts.num_rows if known is None and is_over else known)


def resume_job(output: str, **options: Any) -> JobSummary:
    """Runs an unfinished job on to its end.

    Args:
        output: Its output folder.
        **options: As of `run_job`.

    Raises:
        ConfigError: There is no unfinished job, or its input has changed.
        MillraceError: The job failed.
    """
    return run_job(prepare_resume(output), **options)


def retry_failed(output: str, **options: Any) -> JobSummary:
    """Runs the failed rows of a finished job again. Those that succeed now are added to its results.

    Args:
        output: Its output folder.
        **options: As of `run_job`.

    Raises:
        ConfigError: There is no finished job, or no row of it has failed.
        MillraceError: The run failed; the output is as it was.
    """
    return run_job(prepare_retry(output), **options)


def _begin(prepared: PreparedJob) -> None:
    """Leaves in the folder what a resume needs."""
    folder = prepared.folder
    if prepared.resumes:
        return
    if prepared.former is not None:
        folder.work.remove()
        (folder.work / RETRY).write_bytes(b"{}")
    else:
        folder.clear()
        folder.write_state(prepared.state)


def _run_rows(prepared: PreparedJob, processor: Processor, live: LiveCounts, monitor: ProgressMonitor) -> None:
    done = Done.find(prepared.folder.work)
    live.add(done.counts)
    if done.counts.num_rows == prepared.num_rows:
        return
    dataset = _read(prepared, done)
    with monitor:
        write_rows(processor, dataset, prepared.identity, prepared.spec, done, live.add)


def _read(prepared: PreparedJob, done: Done) -> Dataset:
    if prepared.source is not None:
        index = done.index()
        return prepared.source.read(prepared.job.limit, lambda unit: _is_done(unit, index))
    assert prepared.former is not None
    files = [prepared.folder.root / one.name for one in prepared.former.failed_files]
    filesystem, _ = files[0].filesystem()
    return ray.data.read_parquet([file.filesystem()[1] for file in files], filesystem=filesystem)


def _is_done(unit: Unit, index: RowIndex) -> bool:
    """Whether every row of a part of the input is done; where a key says so, only reading tells."""
    return unit.num_rows is not None and index.count_between(*unit.bounds()) == unit.num_rows


def _begun(output: str, endpoint_url: str | None) -> tuple[JobFolder, JobState]:
    folder = JobFolder(Storage.at(output, endpoint_url))
    state = folder.read_state()
    if state is None:
        raise ConfigError(f"{output!r} is no output folder of a job: it holds no {folder.state_file.url}")
    return folder, state


def _changed(state: JobState, output: str, changes: dict[str, Any]) -> JobConfig:
    given = {name: value for name, value in changes.items() if value is not None}
    return JobConfig(**{**state.job, "output": output, **given})


def _state(job: JobConfig, source: Source) -> JobState:
    inputs = [{"url": file.path, "size": file.size, "etag": file.etag} for file in source.files]
    schema = base64.b64encode(_with_read_error(source.schema).serialize().to_pybytes()).decode()
    return JobState(job.model_dump(mode="json"), inputs, source.num_rows, schema, __version__)


def _read_schema(text: str) -> pa.Schema:
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
    return pa.schema([field for field in schema if field.name != READ_ERROR])


def _with_read_error(schema: pa.Schema) -> pa.Schema:
    """Returns the columns of a row as it is read: a dead letter keeps why its line is no row."""
    return schema.append(pa.field(READ_ERROR, pa.string()))


def _spec(job: JobConfig, folder: JobFolder, schema: pa.Schema, given: pa.Schema) -> OutputSpec:
    return OutputSpec(
        folder.work,
        job.output_format,
        schema,
        _with_read_error(given),
        is_ordered=job.order == "input",
        max_rows_per_file=job.max_rows_per_file,
        flush_interval_s=job.flush_interval_s,
    )


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
        deduplicate=job.dedup,
        # The engine makes the text as well, and has a tokenizer already: one process less that has to load one.
        detokenize_stage=DetokenizeStageConfig(enabled=False),
    )


def result_schema(job: JobConfig, given: pa.Schema) -> pa.Schema:
    """Returns the columns of the output: those kept of the input, the text, and what is reported of a row.

    Args:
        job: The job.
        given: Columns and types of its input.

    Raises:
        ConfigError: The job names a column that the input does not have, or one would be written twice.
    """
    names = given.names
    asked = [Template("", (("", name),)) for name in [*(job.columns or []), *(job.key or [])]]
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
    result += [(name, types[name]) for name in REPORTED]
    kept = [given.field(name) for name in (names if job.columns is None else job.columns)]
    for name in [field.name for field in kept]:
        if name in dict(result):
            raise ConfigError(
                f"the input's column {name!r} would be overwritten by the result; leave it out of columns, "
                "or set output_column"
            )
    return pa.schema([*kept, *(pa.field(*one) for one in result)])


def _processor(prepared: PreparedJob) -> Processor:
    job = prepared.job
    roles = tuple(message.role for message in job.messages or [])
    prompt = MakePrompt(tuple(job.templates()), roles, job.sampling)
    return Processor(
        prepared.config,
        UserFunction("preprocess", prompt),
        UserFunction("postprocess", MakeResult(job.output_column)),
    )
