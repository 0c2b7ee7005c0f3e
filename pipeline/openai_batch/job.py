"""Runs a batch: `run_batch` sends lines through a processor to durable rows, the out file and the error file."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...engine.errors import ConfigError
from ...engine.loading.generation_config import recommended_values
from ..job.config import JobConfig
from ..job.durable import Identity
from ..job.progress import Progress, ProgressMonitor
from ..job.settings import processor_config
from ..job.writing import Done, LiveCounts, write_rows
from ..ledger.claim import Claim, refuse_if_held
from ..ledger.records import check_file
from ..processor.config import EngineProcessorConfig
from ..processor.engine_stages import engine_stages
from ..processor.processor import Processor
from ..sinks.manifest import Manifest
from ..sinks.parts import OutputSpec
from ..sinks.publish import PLAN, Expected, publish
from .assemble import write_answers, write_errors
from .batch_config import BatchConfig
from .folder import BatchFolder
from .input_index import InputIndex
from .lines.fields import KINDS, task_of
from .lines.request import RequestReader, first_endpoint
from .output_file import remove_drafts
from .rows import RESULT_SCHEMA, AnswerLine, AskLine
from .source import BatchSource
from .summary import BatchSummary

logger = logging.getLogger(__name__)

MAX_ROWS_PER_PART = 20_000
"""Most lines in memory while the results are sorted."""


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A run of a batch file whose settings were checked, and which has not begun.

    Attributes:
        config: Settings of the run.
        processor: Settings of the processor that answers the lines.
        folder: Folder of the work in progress.
        resumes: Whether an earlier run began to answer the batch file, so that this run continues it.
        overwrite: Whether the run may replace existing files and an unfinished batch.
        take_over: Whether the run takes the batch over from another run that answers it.
    """

    config: BatchConfig
    processor: EngineProcessorConfig
    folder: BatchFolder
    resumes: bool
    overwrite: bool = False
    take_over: bool = False


def prepare_batch(config: BatchConfig, *, overwrite: bool = False, take_over: bool = False) -> PreparedBatch:
    """Checks the settings of a batch against the model and the existing files, without Ray. Nothing is written.

    Args:
        config: Settings of the batch.
        overwrite: Whether the run may replace existing files and an unfinished batch.
        take_over: Whether the run may take the batch over from another run that answers it.

    Returns:
        The checked batch, which `run_batch` runs.

    Raises:
        ConfigError: A setting or a file cannot be used.
        OutputInUseError: Another run answers the batch.
    """
    # Lines never name folders or repositories themselves, so without a list none names an adapter.
    listed: dict[str, str] | None = (
        {} if config.engine.get("enable_lora") and config.dynamic_lora_loading_path is None else None
    )
    endpoint = first_endpoint(config.input_file) if config.input_file.exists() else None
    task: Any = "generate" if endpoint is None else task_of(endpoint)
    job = JobConfig(
        model=config.model,
        lora_modules=listed if config.lora_modules is None else config.lora_modules,
        dynamic_lora_loading_path=config.dynamic_lora_loading_path,
        input=config.input,
        output=config.output,
        engine=config.engine,
        seed=config.seed,
        replicas=config.replicas,
        batch_size=config.batch_size,
        task_type=task,
    )
    parsers = {"tool_call_stage": config.tool_call_parser, "reasoning_stage": config.reasoning_parser}
    stages = {field: {"parser": parser} for field, parser in parsers.items() if parser is not None}
    if stages and task != "generate":
        raise ConfigError(
            f"{' and '.join(stages)} read generated text, and the file is one of {KINDS[task]}; drop the parsers"
        )
    folder = BatchFolder(config)
    if not take_over:
        refuse_if_held(folder.writers, config.output, watch=False)
    processor = processor_config(job).replace(**stages, embedding_dtype=None)
    return PreparedBatch(config, processor, folder, folder.check(overwrite), overwrite, take_over)


def run_batch(
    batch: BatchConfig | PreparedBatch,
    *,
    overwrite: bool = False,
    take_over: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    started_s: float | None = None,
) -> BatchSummary:
    """Answers the lines of a batch file that no earlier run has answered, and writes the out file and the error file.

    The function starts Ray if Ray does not run yet, and leaves Ray running.

    Args:
        batch: The settings of the batch, or a batch that `prepare_batch` has checked.
        overwrite: As in `prepare_batch`; it has no effect on a prepared batch.
        take_over: As in `prepare_batch`; it has no effect on a prepared batch.
        on_progress: Function that another thread calls with the progress of the batch every half second.
        started_s: Time at which the start-up began, on `time.monotonic`; None for now.

    Returns:
        The summary of all runs of the batch.

    Raises:
        ConfigError: A setting or a file cannot be used; nothing has been run.
        OutputInUseError: Another run answers the batch, or has taken it over.
        MillraceError: The run failed. Finished lines are kept: run the batch again to go on.
    """
    started_s = time.monotonic() if started_s is None else started_s
    if not isinstance(batch, PreparedBatch):
        batch = prepare_batch(batch, overwrite=overwrite, take_over=take_over)
    folder = batch.folder
    with Claim.held(folder.writers, batch.config.output, batch.take_over) as claim:
        now = replace(batch, resumes=folder.check(batch.overwrite))  # Another run may have changed it since.
        return _run_claimed(now, claim, on_progress, started_s)


def _run_claimed(
    prepared: PreparedBatch, claim: Claim, on_progress: Callable[[Progress], None] | None, started_s: float
) -> BatchSummary:
    """Answers a batch that this process has claimed."""
    config, folder = prepared.config, prepared.folder
    for file in (config.output_file, config.error_file):
        remove_drafts(file)
    if not prepared.resumes:
        folder.begin()
    index = folder.index()
    reader = _reader(prepared, index)
    manifest = Manifest.read(folder.root)
    if manifest is None:
        manifest = _run_lines(prepared, index, reader, claim, on_progress, started_s)
    else:  # A former run has published these parts.
        for one in (*manifest.files, *manifest.failed_files):
            check_file(folder.root / one.name, one.num_bytes, one.checksum)
    errors = [folder.root / one.name for one in manifest.failed_files]
    codes = write_errors(errors, config.error_file, reader, claim.check)
    # The out file is written last: when it exists, the error file exists too.
    write_answers([folder.root / one.name for one in manifest.files], config.output_file, claim.check)
    claim.check()
    folder.root.remove()
    return BatchSummary(
        config.model,
        config.output_file.url,
        config.error_file.url,
        index.num_rows,
        index.num_empty,
        manifest.total,
        codes,
        time.monotonic() - started_s,
    )


def _run_lines(
    prepared: PreparedBatch,
    index: InputIndex,
    reader: RequestReader,
    claim: Claim,
    on_progress: Callable[[Progress], None] | None,
    started_s: float,
) -> Manifest:
    """Runs the lines that have no result yet, and publishes the results of all lines in input order."""
    source = BatchSource(prepared.config.input_file, index)
    spec = OutputSpec(
        prepared.folder.root / "work",
        schema=RESULT_SCHEMA,
        input_schema=source.schema,
        is_ordered=True,
        max_rows_per_file=MAX_ROWS_PER_PART,
        flush_interval_s=prepared.config.flush_interval_s,
    )
    expected = Expected(index.num_rows, is_exact=True)
    if (spec.work / PLAN).exists():
        return publish(prepared.folder.root, spec, None, claim, expected)
    done, live = Done.find(spec.work), LiveCounts()
    live.add(done.counts)
    if done.counts.num_rows < index.num_rows:
        lines = source.read(done.index())
        with (
            _processor(prepared, reader) as processor,
            ProgressMonitor(processor, live, index.num_rows, started_s, show=on_progress),
        ):
            write_rows(processor, lines, Identity(), spec, done, live.add, claim)
    return publish(prepared.folder.root, spec, None, claim, expected)


def _processor(prepared: PreparedBatch, reader: RequestReader) -> Processor:
    config = prepared.processor
    return Processor(config, engine_stages(config), AskLine(reader), AnswerLine(_fingerprint(prepared)))


def _reader(prepared: PreparedBatch, index: InputIndex) -> RequestReader:
    """Returns the parser of lines, made with the model names that lines may use and the default sampling parameters."""
    config, adapters = prepared.config, prepared.processor.adapter_names
    first = None if index.model is None or adapters.has(index.model) else index.model
    named = config.served_model_names or ([] if first is None else [first])
    if not config.served_model_names and first not in (None, config.model):
        logger.warning(
            "lines that ask for %r, as the first one does, are answered by %s; --served-model-name says which are",
            first,
            config.model,
        )
    defaults = {} if prepared.processor.is_pooling else recommended_values(prepared.processor.engine_config)
    if config.max_tokens is not None:
        defaults["max_tokens"] = config.max_tokens
    models = tuple(dict.fromkeys([*named, config.model]))
    return RequestReader(models, defaults, config.seed, prepared.processor.task_type, adapters)


def _fingerprint(prepared: PreparedBatch) -> str:
    """Returns the `system_fingerprint` of answers, which is the same for the same model and settings."""
    processor = prepared.processor
    adapters = (processor.lora_modules, processor.dynamic_lora_loading_path)
    settings = [processor.model_source, processor.engine_kwargs, *(one for one in adapters if one is not None)]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=5)
    return f"fp_{digest.hexdigest()}"
