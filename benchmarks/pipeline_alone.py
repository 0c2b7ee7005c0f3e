"""Measures the pipeline without an engine: rows are generated, prepared, answered at once, written and published.

    python benchmarks/pipeline_alone.py [--rows 10000000] [--block 1024] [--cpus 2] [--every 5]

A JSON line every few seconds: rows written, rows a second since the last line, the resident memory of the driver and
of each kind of worker (`anonymous` leaves out pages of files and of Ray's shared memory). The last line has the rows a
second of the whole run, from the moment at which the first row was written, and the rows for each CPU second of all
processes together, which other work on the machine affects less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
from ray import cloudpickle
from ray.data import DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from millrace.engine import CompletionOutput, GenerateRequest, RequestOutput
from millrace.pipeline import EngineProcessorConfig, Processor, columns
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.durable import Identity
from millrace.pipeline.job.folder import JobFolder
from millrace.pipeline.job.writing import Done, LiveCounts, write_rows
from millrace.pipeline.processor.engine_backend import EngineBackend
from millrace.pipeline.sinks.parts import OutputSpec
from millrace.pipeline.sinks.publish import publish
from millrace.pipeline.sources.base import position_column

ROWS_PER_TASK = 500_000
ROWS_PER_TABLE = 8192


class NullClient:
    """Answers every request at once with the first tokens of its prompt."""

    def generate(self, requests: list[GenerateRequest]) -> Iterator[RequestOutput]:
        """Yields an answer to each."""
        for request in requests:
            tokens = request.prompt_token_ids or [1]
            answer = CompletionOutput(0, request.prompt or "", tokens[:4], finish_reason="stop")
            yield RequestOutput(request.request_id, request.prompt, tokens, None, [answer], True)


class NoPool:
    """Takes the place of a pool of engines."""

    name = "none"

    def stats(self, with_engines: bool = False) -> None:
        """Returns None, since no engine runs."""

    def close(self) -> None:
        """Does nothing: no engine runs."""


class Rows(Datasource):
    """A datasource of short rows, made while they are read.

    Args:
        num_rows: Number of rows.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self._num_rows = num_rows

    def estimate_inmemory_data_size(self) -> int | None:
        """Returns the size of all rows."""
        return self._num_rows * 100

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Returns tasks of `ROWS_PER_TASK` rows."""
        starts = range(0, self._num_rows, ROWS_PER_TASK)
        return [self._task(start, min(ROWS_PER_TASK, self._num_rows - start)) for start in starts]

    def _task(self, start: int, num_rows: int) -> ReadTask:
        def read() -> Iterator[pa.Table]:
            for first in range(start, start + num_rows, ROWS_PER_TABLE):
                yield rows_from(first, min(ROWS_PER_TABLE, start + num_rows - first))

        return ReadTask(read, BlockMetadata(num_rows, num_rows * 100, None, None))


def rows_from(first: int, num_rows: int) -> pa.Table:
    """Makes rows: an id, a prompt of eight tokens, a position."""
    numbers = np.arange(first, first + num_rows)
    return pa.table(
        {
            "id": numbers,
            columns.PROMPT: [f"Say hello to {number}." for number in numbers],
            columns.TOKENIZED_PROMPT: [[5, 6, 7, 8, *divmod(int(number), 1000), 9, 10] for number in numbers],
            columns.POSITION: position_column(0, numbers),
        }
    )


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns of the result."""
    return {"id": row["id"], "text": row[columns.GENERATED_TEXT]}


def make_processor(block: int, folder: Path) -> Processor:
    """Makes a processor without an engine and without a tokenizer."""
    (folder / "config.json").write_text("{}")
    off: dict[str, Any] = dict.fromkeys(["chat_template_stage", "tokenize_stage", "detokenize_stage"], False)
    config = EngineProcessorConfig(
        model_source=str(folder), batch_size=block, should_continue_on_error=True, max_concurrent_batches=8, **off
    )
    backend = EngineBackend(config, lambda config: NoPool(), lambda name: NullClient())  # type: ignore[arg-type, return-value]
    return Processor(config, [backend], postprocess=answer_of)


def memory_by_process() -> dict[str, dict[str, int]]:
    """Returns resident and anonymous memory in MB of the driver and of Ray's workers, by their operator."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: {"rss_mb": 0, "anonymous_mb": 0})
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for process in family:
        try:
            name = "driver" if process == family[0] else process.cmdline()[0]
            memory = process.memory_info()
        except (psutil.NoSuchProcess, IndexError):
            continue
        if name == "driver" or (name.startswith("ray::") and name != "ray::IDLE"):
            sums[name]["rss_mb"] += memory.rss // 1_000_000
            sums[name]["anonymous_mb"] += (memory.rss - memory.shared) // 1_000_000
    return dict(sums)


def cpu_seconds() -> float:
    """Returns the CPU seconds that this process and its descendants have taken."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def watch(live: LiveCounts, every_s: float, stop: threading.Event) -> None:
    """Prints a line every `every_s` seconds until `stop` is set."""
    before, before_s = 0, time.monotonic()
    while not stop.wait(every_s):
        num_rows, now_s = live.update().num_rows, time.monotonic()
        rate = (num_rows - before) / (now_s - before_s)
        line = {"benchmark": "pipeline_alone", "rows": num_rows, "rows_per_s": round(rate)}
        print(json.dumps({**line, "memory": memory_by_process()}), flush=True)
        before, before_s = num_rows, now_s


def run(num_rows: int, block: int, every_s: float, folder: Path) -> dict[str, Any]:
    """Runs the rows and returns the last line."""
    job = JobFolder(Storage.at(folder / "out"))
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    spec = OutputSpec(job.work, schema=schema)
    live, stop = LiveCounts(), threading.Event()
    first: list[tuple[float, int, float]] = []

    def add(counts: Any) -> None:
        if not first:
            first.append((time.monotonic(), counts.num_rows, cpu_seconds()))
        live.add(counts)

    watcher = threading.Thread(target=watch, args=[live, every_s, stop])
    watcher.start()
    with make_processor(block, folder) as processor:
        dataset = ray.data.read_datasource(Rows(num_rows))
        write_rows(processor, dataset, Identity(), spec, Done.find(job.work), add)
        written_s, used_s = time.monotonic(), cpu_seconds()
        manifest = publish(job.root, spec)
    stop.set()
    watcher.join()
    assert manifest.num_rows == num_rows, manifest.num_rows
    start_s, start_rows, start_cpu_s = first[0]
    seconds, cpu_s = written_s - start_s, used_s - start_cpu_s
    return {
        "benchmark": "pipeline_alone",
        "case": "whole",
        "rows": num_rows,
        "seconds": round(seconds, 2),
        "publish_s": round(time.monotonic() - written_s, 2),
        "rows_per_s": round((num_rows - start_rows) / seconds) if seconds else None,
        "rows_per_cpu_s": round((num_rows - start_rows) / cpu_s) if cpu_s > 0 else None,
    }


def main() -> None:
    """Prints lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--every", type=float, default=5.0)
    options = parser.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=options.cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(options.rows, options.block, options.every, Path(folder))))


if __name__ == "__main__":
    main()
