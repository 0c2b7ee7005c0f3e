"""`forecast_job`: makes the forecast of a job from a sample of its rows, the model, and the cluster's resources."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from ...actors.supervisor.nodes import cluster_nodes
from ...engine import EngineConfig, Footprint, SamplingParams
from ...engine.device import num_accelerators
from ...engine.errors import AdapterError, ConfigError, quote
from .. import columns
from ..files.storage import Storage
from ..job.config import JobConfig
from ..job.durable import NOT_INPUT, read_row
from ..job.folder import JobFolder
from ..job.rows import MakePrompt
from ..job.settings import find_source, input_columns, processor_config, result_schema
from ..processor.assemble import make_stages
from ..processor.config import EngineProcessorConfig
from ..processor.default_params import default_params
from ..processor.engine_stages import stages_on
from ..processor.operators import run_stages
from ..session import MIN_CPUS, cluster_address
from ..stages.adapters import AdapterNames
from ..stages.base import Row, RowError
from ..stages.declaration import Side
from ..stages.user_function import PreprocessStage, UserFunction
from .forecast import AdapterRoom, Forecast, Lengths, Replicas
from .sample import Sample
from .throughput import Throughput

MAX_MEASURED_ROWS = 256


def forecast_job(
    job: JobConfig,
    *,
    sample_size: int = 1000,
    seed: int = 0,
    memory_bytes: int | None = None,
    within_s: float | None = None,
    throughput: Throughput | None = None,
    report: str | None = None,
    measure: bool = False,
) -> Forecast:
    """Returns the forecast of a job.

    Args:
        job: The job.
        sample_size: Most rows to sample.
        seed: Seed with which the sample is drawn.
        memory_bytes: Memory of one accelerator, if the job will run on another machine; None for this machine's.
        within_s: Seconds that the job may take, from which the number of replicas follows; None for any time.
        throughput: Speed of a replica, if the user knows it; `report` is then not read.
        report: The `report.json` of an earlier job, which says the speed of a replica; None for the report in the
            output folder, if there is one.
        measure: Whether to measure the speed with an engine in this process, on rows of the sample. The measured
            speed is used in place of `throughput` and `report`.

    Raises:
        ConfigError: A setting, the input or the report cannot be used.
    """
    job = job.relative_to(Path.cwd())
    if job.task.reads_pairs:
        raise ConfigError("plan counts the tokens of prompts, and a job of task_type='score' has pairs of texts")
    if measure and job.task.is_pooling:
        raise ConfigError(f"--measure generates text, and a job of task_type={job.task_type!r} generates none")
    config = processor_config(job)
    source = find_source(job)
    result_schema(job, source.schema, config)
    source = source.with_columns(input_columns(job, source.schema))
    footprint = Footprint.of(config.engine_config, memory_bytes)
    sample = Sample.take(source, sample_size, seed)
    if job.limit is not None and sample.num_rows is not None:
        sample = Sample(sample.rows, min(sample.num_rows, job.limit), sample.is_exact)
    # A vector counts as one token, which is all that a pooled row makes.
    params = SamplingParams(max_tokens=1) if config.is_pooling else default_params(config)
    lengths = Lengths.of(_prepared(job, config, sample), params, footprint.max_model_len)
    if measure:
        prompts, each = lengths.prompts[:MAX_MEASURED_ROWS], lengths.params[:MAX_MEASURED_ROWS]
        throughput = Throughput.measure({"model": config.model_source, **config.engine_kwargs}, prompts, each)
    elif throughput is None:
        throughput = _pace_of_report(job, report)
    placeable, where = _placeable(config.engine_config)
    replicas = Replicas(job.replicas, placeable, where, within_s)
    room = AdapterRoom.of(config.engine_config, footprint)
    return Forecast(job.model, sample, seed, lengths, footprint, replicas, throughput, job.prices, room)


def _prepared(job: JobConfig, config: EngineProcessorConfig, sample: Sample) -> list[Row]:
    """Returns the rows of a sample after the stages before the engine: prompt of the job, chat template, tokenizer."""
    prompt = UserFunction(PreprocessStage, MakePrompt.of(job))
    stages = make_stages(stages_on(Side.BEFORE_ENGINE, config), prompt, stop_on_error=False)
    shown = [{name: value for name, value in row.items() if name not in NOT_INPUT} for row in sample.rows]
    rows = run_stages(stages, [read_row(values) for values in shown])
    for row in rows:
        if row.error is None:
            _note_adapter(row, config.adapter_names)
    return rows


def _note_adapter(row: Row, names: AdapterNames) -> None:
    """Adds the name of the adapter of a row to its columns, or its error if there is no such adapter."""
    try:
        found = names.find(row.data.get(columns.MODEL))
        if found is not None and os.path.isabs(found.lora_path) and not os.path.isdir(found.lora_path):
            raise AdapterError(f"the adapter {quote(found.lora_name)} has no folder {quote(found.lora_path)}")
    except AdapterError as error:
        row.error = RowError.from_exception("generate", error)
    else:
        row.data[columns.ADAPTER] = None if found is None else found.lora_name


def _pace_of_report(job: JobConfig, report: str | None) -> Throughput | None:
    """Reads the throughput from `report`, or else from the report in the output folder; None without a usable one."""
    if report is not None:
        throughput = Throughput.of_report(Storage.at(report), job.model)
        if throughput is None:
            raise ConfigError(
                f"the job of report {report!r} was of another model than {job.model!r}, or came to nothing"
            )
        return throughput
    last = JobFolder(Storage.at(job.output, job.endpoint_url)).report_file
    return Throughput.of_report(last, job.model) if last.exists() else None


def _placeable(config: EngineConfig) -> tuple[int, str]:
    """Returns the number of replicas that have room if nothing else runs, and a phrase that names the resources."""
    with _nodes() as (nodes, where):
        num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        num_cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    if config.device != "cpu" and num_gpus:
        return num_gpus // config.num_ranks, f"{where}, {num_gpus} GPUs"
    # One CPU is left for reading. A replica may reserve less than a CPU, and then shares it with another replica.
    return max(0, num_cpus - 1) // config.num_ranks, f"{where}, {num_cpus} CPUs of which one is for reading"


@contextmanager
def _nodes() -> Iterator[tuple[list[dict[str, float]], str]]:
    """Yields the resources of each node of the running cluster, or else of this machine, and a phrase for the place."""
    if ray.is_initialized():
        yield (nodes := cluster_nodes()), f"in the cluster of {len(nodes)} node(s)"
        return
    if (address := cluster_address()) is None:
        yield [{"CPU": max(MIN_CPUS, os.cpu_count() or 1), "GPU": num_accelerators()}], "on this machine"
        return
    ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False)
    try:
        nodes = cluster_nodes()
        yield nodes, f"in the cluster of {len(nodes)} node(s)"
    finally:
        ray.shutdown()
