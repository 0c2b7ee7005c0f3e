"""`run_job` runs a job from input to files, `resume_job` continues one, and `retry_failed` runs failed rows again."""

from __future__ import annotations

import base64
import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset

from ..._version import __version__
from ...engine.errors import ConfigError, DamagedOutputError
from ...engine.shown import HIDDEN, without_secrets
from .. import columns
from ..arrow_values import json_field
from ..files.storage import Storage
from ..ledger.claim import Claim, refuse_if_held
from ..ledger.index import RowIndex
from ..mixed_values import holds_json
from ..processor.config import EngineProcessorConfig
from ..processor.engine_stages import engine_stages
from ..processor.processor import Processor
from ..report import JobSummary, ReportWriter
from ..sinks.formats import FORMATS
from ..sinks.manifest import Manifest
from ..sinks.parts import OutputSpec
from ..sinks.publish import RETRY, Expected, publish
from ..sources import READ_ERROR, READ_ROW, Source, Unit
from .config import JobConfig
from .dead_letters import dead_letters
from .durable import Identity
from .file import load_job
from .folder import OURS, JobFolder, JobState
from .progress import Progress, ProgressMonitor
from .rows import MakePrompt, MakeResult
from .settings import find_source, input_columns, processor_config, result_schema, warn_of_unread
from .writing import Done, LiveCounts, warn_of_left_out, write_rows

__all__ = ["JobConfig", "PreparedJob", "load_job", "prepare_job", "prepare_resume", "prepare_retry", "run_job"]

logger = logging.getLogger(__name__)

_ADDRESSES = ("model", "input", "lora_modules", "dynamic_lora_loading_path")
_WITH_SECRETS = (*_ADDRESSES, "output", "endpoint_url", "engine")
"""Fields of a job whose values may hold passwords or keys, which are not kept. Prompts are kept as they are."""


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A checked job, ready to run.

    Attributes:
        job: The job.
        config: Settings of the processor.
        state: Description of the job, as in its folder.
        folder: Output folder.
        spec: Format and place of the output.
        source: Input of the job; None if its dead letters run again.
        resumes: Whether an earlier run began the job, so that this run continues it.
        former: Manifest of the finished output, if its dead letters run again; otherwise None.
        overwrite: Whether the run may replace the output of another job.
        take_over: Whether the run takes the output over from another run that writes to it.
    """

    job: JobConfig
    config: EngineProcessorConfig
    state: JobState
    folder: JobFolder
    spec: OutputSpec
    source: Source | None
    resumes: bool = False
    former: Manifest | None = None
    overwrite: bool = False
    take_over: bool = False

    @property
    def num_rows_in(self) -> int | None:
        """Rows of the input; None if the number is not known."""
        if self.former is not None:
            return self.former.total.num_rows
        known = self.state.num_rows
        return known if known is None or self.job.limit is None else min(known, self.job.limit)

    @property
    def identity(self) -> Identity:
        """The columns by which the ledger identifies the rows."""
        if self.former is not None:
            return Identity(column=columns.ROW_ID)
        return Identity(None if self.job.key is None else tuple(self.job.key))


def prepare_job(job: JobConfig, *, overwrite: bool = False, take_over: bool = False) -> PreparedJob:
    """Checks a job against the model, the input and the output folder, without Ray. Nothing is written.

    Args:
        job: The job.
        overwrite: Whether the run may replace the output of another job.
        take_over: Whether the run may take the output over from another run that writes to it.

    Raises:
        ConfigError: A part of the job cannot be used, or the folder holds other files.
        OutputInUseError: Another run writes to the folder.
    """
    job = job.relative_to(Path.cwd())
    folder = JobFolder(Storage.at(job.output, job.endpoint_url))
    folder.check_links()
    if not take_over:
        refuse_if_held(folder.writers, job.output, watch=False)
    began = None if overwrite or folder.is_finished else folder.read_state()
    versions = {} if began is None else began.table_versions  # Tables may have grown since the job began.
    source = find_source(job, versions)
    folder.refuse_input(source.paths)
    config = processor_config(job, source.num_rows)
    warn_of_unread(job, source.schema)
    schema = result_schema(job, source.schema, config)
    source = source.with_columns(input_columns(job, source.schema))
    state = _state(job, source)
    resumes = folder.check(state, overwrite)
    spec = _spec(job, folder, schema, source.schema)
    return PreparedJob(job, config, state, folder, spec, source, resumes, None, overwrite, take_over)


def prepare_resume(
    output: str, endpoint_url: str | None = None, *, take_over: bool = False, **changes: Any
) -> PreparedJob:
    """Checks the unfinished job of an output folder, or its unfinished retry, so that a run can continue it.

    Args:
        output: The folder.
        endpoint_url: Address of the store behind ``s3://``, if the folder is there.
        take_over: As in `prepare_job`.
        **changes: Fields of the job that change from now on, such as `replicas`.

    Raises:
        ConfigError: The folder has no unfinished job, or the input of the job has changed.
    """
    folder, state = _begun(output, endpoint_url)
    if folder.is_retrying:
        return prepare_retry(output, endpoint_url, take_over=take_over, **changes)
    if folder.is_finished:
        raise ConfigError(f"the job in {output!r} is finished; there is nothing to resume")
    return prepare_job(_changed(state, output, changes), take_over=take_over)


def prepare_retry(
    output: str, endpoint_url: str | None = None, *, take_over: bool = False, **changes: Any
) -> PreparedJob:
    """Checks a finished job, so that its dead letters can run again.

    Args:
        output: The output folder of the job.
        endpoint_url: Address of the store behind ``s3://``, if the folder is there.
        take_over: As in `prepare_job`.
        **changes: Fields of the job that change from now on, such as `engine`.

    Raises:
        ConfigError: The folder has no finished job, or no row of the job has failed.
    """
    folder, state = _begun(output, endpoint_url)
    if not take_over:
        refuse_if_held(folder.writers, output, watch=False)
    former = Manifest.read(folder.root)
    if former is None:
        raise ConfigError(f"the job in {output!r} is not finished; first: millrace resume {output}")
    if not former.failed_files and not folder.is_publishing:
        raise ConfigError(f"the job in {output!r} has no failed rows; there is nothing to run again")
    job = _changed(state, output, changes)
    given = _read_schema(state.input_schema)
    config = processor_config(job)
    spec = _spec(job, folder, result_schema(job, given, config), given)
    return PreparedJob(job, config, state, folder, spec, None, folder.is_retrying, former, take_over=take_over)


def run_job(
    job: JobConfig | PreparedJob,
    *,
    overwrite: bool = False,
    take_over: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    started_s: float | None = None,
) -> JobSummary:
    """Runs a job to its end, from where an earlier run stopped. Starts Ray if none runs, and leaves it running.

    Args:
        job: The job, or a job that `prepare_job` has checked.
        overwrite: As in `prepare_job`; it has no effect on a prepared job.
        take_over: As in `prepare_job`; it has no effect on a prepared job.
        on_progress: Function that another thread calls with the progress of the job every half second.
        started_s: Time at which the start-up began, on `time.monotonic`; None for now.

    Returns:
        The summary of all runs of the job.

    Raises:
        ConfigError: A part of the job cannot be used; nothing has been run.
        OutputInUseError: Another run writes to the output, or has taken it over.
        MillraceError: The job failed. Finished rows are kept: run the job again to go on.
    """
    started_s = time.monotonic() if started_s is None else started_s
    if not isinstance(job, PreparedJob):
        job = prepare_job(job, overwrite=overwrite, take_over=take_over)
    with Claim.held(job.folder.writers, job.job.output, job.take_over) as claim:
        return _run_claimed(_as_now(job), claim, on_progress, started_s)


def _as_now(prepared: PreparedJob) -> PreparedJob:
    """Returns a job as its folder is now, since another run may have changed the folder after the job was prepared."""
    folder = prepared.folder
    folder.sweep()
    if prepared.former is None:
        return replace(prepared, resumes=folder.check(prepared.state, prepared.overwrite))
    if Manifest.read(folder.root) != prepared.former:
        raise ConfigError(f"another run has changed output {prepared.job.output!r}; run the command again")
    return replace(prepared, resumes=folder.is_retrying)


def _run_claimed(
    prepared: PreparedJob, claim: Claim, on_progress: Callable[[Progress], None] | None, started_s: float
) -> JobSummary:
    """Runs a job whose output this process has claimed."""
    _begin(prepared)
    job = prepared.job
    report = ReportWriter(prepared.folder.root / OURS, job.model, job.output, job.prices)
    write = functools.partial(report.write, num_rows_in=prepared.num_rows_in)
    live = LiveCounts()
    with _processor(prepared) as processor:
        monitor = ProgressMonitor(processor, live, prepared.num_rows_in, started_s, show=on_progress, save=write)
        if not prepared.folder.is_publishing:
            _run_rows(prepared, processor, live, monitor, claim)
        manifest = publish(prepared.folder.root, prepared.spec, prepared.former, claim, _expected(prepared, live))
    counts = manifest.total
    num_rows_in = counts.num_rows if prepared.num_rows_in is None else prepared.num_rows_in
    known_left_out = num_rows_in - counts.num_rows
    if job.key is not None and known_left_out > 0:
        num_rows_in = counts.num_rows
    warn_of_left_out(max(known_left_out, live.update().num_left_out), job.key)
    return report.write(monitor.finish(counts), counts, num_rows_in).summary


def resume_job(output: str, endpoint_url: str | None = None, *, take_over: bool = False, **options: Any) -> JobSummary:
    """Runs an unfinished job to its end.

    Args:
        output: Output folder of the job.
        endpoint_url: As in `prepare_resume`.
        take_over: As in `prepare_job`.
        **options: Options of `run_job`.

    Raises:
        ConfigError: The folder has no unfinished job, or the input of the job has changed.
        MillraceError: The job failed.
    """
    return run_job(prepare_resume(output, endpoint_url, take_over=take_over), **options)


def retry_failed(
    output: str, endpoint_url: str | None = None, *, take_over: bool = False, **options: Any
) -> JobSummary:
    """Runs the failed rows of a finished job again. Rows that succeed now are added to its results.

    Args:
        output: Output folder of the job.
        endpoint_url: As in `prepare_resume`.
        take_over: As in `prepare_job`.
        **options: Options of `run_job`.

    Raises:
        ConfigError: The folder has no finished job, or no row of the job has failed.
        MillraceError: The run failed; the output is as it was.
    """
    return run_job(prepare_retry(output, endpoint_url, take_over=take_over), **options)


def _begin(prepared: PreparedJob) -> None:
    """Clears the folder of a new job and describes the job there, or marks a retry, so that a later run can resume."""
    folder = prepared.folder
    if prepared.resumes:
        return
    if prepared.former is not None:
        folder.work.remove()
        (folder.work / RETRY).write_bytes(b"{}")
    else:
        folder.clear(prepared.state.publisher)
        folder.write_state(prepared.state)


def _expected(prepared: PreparedJob, live: LiveCounts) -> Expected:
    """Returns the number of rows that the output must have: of rows with the same key, one runs."""
    if prepared.num_rows_in is not None and prepared.job.key is None:
        return Expected(prepared.num_rows_in, is_exact=True)
    return Expected(live.update().num_rows)


def _run_rows(
    prepared: PreparedJob, processor: Processor, live: LiveCounts, monitor: ProgressMonitor, claim: Claim
) -> None:
    done = Done.find(prepared.folder.work)
    live.add(done.counts)
    if prepared.former is not None:
        live.add(prepared.former.counts)
    if live.update().num_rows == prepared.num_rows_in:
        return
    dataset = _read(prepared, done)
    with monitor:
        write_rows(processor, dataset, prepared.identity, prepared.spec, done, live.add, claim)


def _read(prepared: PreparedJob, done: Done) -> Dataset:
    if prepared.source is not None:
        index = done.index()
        return prepared.source.read(prepared.job.limit, lambda unit: _is_done(unit, index))
    assert prepared.former is not None
    assert prepared.spec.input_schema is not None
    letters = dead_letters(prepared.folder.root, prepared.former.failed_files, prepared.spec.input_schema)
    return ray.data.read_datasource(letters, override_num_blocks=max(1, letters.num_tasks))


def _is_done(unit: Unit, index: RowIndex) -> bool:
    """Returns whether the index has the position of each row of a unit; False where ids are hashes of a key."""
    return unit.num_rows is not None and index.count_between(*unit.bounds()) == unit.num_rows


def _begun(output: str, endpoint_url: str | None) -> tuple[JobFolder, JobState]:
    folder = JobFolder(Storage.at(output, endpoint_url))
    state = folder.read_state()
    if state is None:
        raise ConfigError(f"{output!r} is no output folder of a job: it holds no {folder.state_file.url}")
    folder.check_links()
    return folder, state


def _changed(state: JobState, output: str, changes: dict[str, Any]) -> JobConfig:
    if "model" not in state.job:
        raise ConfigError(
            f"{output!r} was written by write_results: call that again, with the same processor and dataset"
        )
    given = {name: value for name, value in changes.items() if value is not None}
    if HIDDEN in json.dumps([state.job.get(name) for name in _ADDRESSES]):
        raise ConfigError(
            f"the model, an adapter or the input of {output!r} has a password or a key in its address, which is not "
            "kept; go on with `millrace run` and the job file"
        )
    return JobConfig(**{**state.job, "output": output, **given})


def _state(job: JobConfig, source: Source) -> JobState:
    tables = [{"table": without_secrets(url), "version": version} for url, version in source.versions.items()]
    files = [{"url": without_secrets(file.path), "size": file.size, "etag": file.etag} for file in source.files]
    schema = base64.b64encode(_with_read_columns(source.schema).serialize().to_pybytes()).decode()
    fields = job.model_dump(mode="json")
    fields |= without_secrets({name: fields[name] for name in _WITH_SECRETS})
    return JobState(fields, [*tables, *files], source.num_rows, schema, __version__)


def _read_schema(text: str) -> pa.Schema:
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DamagedOutputError(f"the columns of the input in job.json cannot be read ({error!s:.200})") from error
    return pa.schema([field for field in schema if field.name not in (READ_ERROR, READ_ROW)])


def _with_read_columns(schema: pa.Schema) -> pa.Schema:
    """Adds the columns in which a dead letter says why a piece of the input is no row, and what was read."""
    return pa.schema([*schema, (READ_ERROR, pa.string()), (READ_ROW, pa.string())])


def _dead_letter_schema(given: pa.Schema) -> pa.Schema:
    """Returns columns for rows as they were read. Objects that came as JSON stay JSON, so each keeps its own keys."""
    fields = [json_field(field.name) if holds_json(field) else field for field in _with_read_columns(given)]
    # Arrow does not read a category that is no UTF-8 from Parquet, though it writes it.
    return pa.schema(
        [one.with_type(one.type.value_type) if pa.types.is_dictionary(one.type) else one for one in fields]
    )


def _spec(job: JobConfig, folder: JobFolder, schema: pa.Schema, given: pa.Schema) -> OutputSpec:
    return OutputSpec(
        folder.work,
        job.output_format,
        schema,
        FORMATS["parquet"].fit_schema(_dead_letter_schema(given)),
        is_ordered=job.order == "input",
        max_rows_per_file=job.max_rows_per_file,
        flush_interval_s=job.flush_interval_s,
    )


def _processor(prepared: PreparedJob) -> Processor:
    job, config = prepared.job, prepared.config
    assert prepared.spec.schema is not None
    result = MakeResult.of(job, prepared.spec.schema)
    return Processor(config, engine_stages(config), MakePrompt.of(job), result)
