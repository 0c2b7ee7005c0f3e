"""A job of a pooling task in this process: its stages, an engine, and its files, without Ray."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from millrace.engine import LLM, EngineOutput, Request
from millrace.pipeline.job.config import JobConfig
from millrace.pipeline.job.rows import MakePrompt, MakeResult
from millrace.pipeline.job.run import prepare_job
from millrace.pipeline.ledger import row_id
from millrace.pipeline.processor.engine_stages import stages_on
from millrace.pipeline.processor.operators import run_stages
from millrace.pipeline.processor.pooling_stages import make_pooling_stage
from millrace.pipeline.sinks.manifest import Manifest
from millrace.pipeline.sinks.publish import publish
from millrace.pipeline.sinks.writer import ResultWriter
from millrace.pipeline.sources.base import position_column
from millrace.pipeline.stages.base import Row
from millrace.pipeline.stages.declaration import Side
from millrace.pipeline.stages.user_function import PostprocessStage, PreprocessStage


class OneEngine:
    """The client of a pool that is an engine of this process."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.llm_engine

    def generate(self, requests: list[Request]) -> Iterator[EngineOutput]:
        for request in requests:
            self._engine.add_request(request)
        while self._engine.has_unfinished_requests():
            yield from self._engine.step()


def run_here(job: JobConfig, llm: LLM) -> Manifest:
    """Runs a job as its operators do, with an engine that is already there, and publishes its files."""
    prepared = prepare_job(job)
    assert prepared.source is not None
    assert prepared.spec.schema is not None
    prepared.folder.clear(prepared.state.publisher)
    prepared.folder.write_state(prepared.state)
    given = [
        row for unit in prepared.source.units for table in prepared.source.tables(unit) for row in table.to_pylist()
    ]
    rows = [Row.read({name: value for name, value in row.items() if not name.startswith("__")}) for row in given]
    settings = {"adapters": prepared.config.adapter_names, "stop_on_error": False}
    before = [
        PreprocessStage(MakePrompt.of(job)),
        *(one.make() for one in stages_on(Side.BEFORE_ENGINE, prepared.config)),
    ]
    done = run_stages([*before, make_pooling_stage(prepared.config, OneEngine(llm), settings)], rows)
    generated = [Row(row.input, dict(row.data), row.error) for row in done]
    run_stages([PostprocessStage(MakeResult.of(job, prepared.spec.schema))], rows)
    ids = row_id.from_arrow(position_column(0, np.arange(len(rows))))
    writer = ResultWriter(prepared.spec, max_blocks=1)
    with writer.block(ids) as block:
        for known, row, own in zip(row_id.as_bytes(ids), rows, generated, strict=True):
            writer.append(block, known, row, own)
    return publish(prepared.folder.root, prepared.spec)
