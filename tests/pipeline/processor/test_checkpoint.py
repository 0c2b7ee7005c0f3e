"""Ray Data's own checkpoints with a processor in the middle, on two CPUs: a resumed job ends, and repeats no row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from fake_client import FakePool
from http_server import Server, running
from ray import cloudpickle
from ray.data.checkpoint import CheckpointConfig

from millrace import ConfigError
from millrace.actors import PoolConfig
from millrace.pipeline import EngineProcessorConfig, HttpRequestProcessorConfig, Processor, build_llm_processor
from millrace.pipeline.processor.engine_backend import EngineBackend

cloudpickle.register_pickle_by_value(sys.modules[__name__])

DEADLINE_S = 120
"""A job that waits forever fails after so long without progress."""


@pytest.fixture
def checkpoints(tmp_path: Path, cluster: None) -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    patience_s, context.execution_no_progress_timeout_s = context.execution_no_progress_timeout_s, DEADLINE_S
    context.checkpoint_config = CheckpointConfig("id", str(tmp_path / "done"), delete_checkpoint_on_success=False)
    yield
    context.checkpoint_config, context.execution_no_progress_timeout_s = None, patience_s


def write_rows(folder: Path, start: int, stop: int) -> None:
    """Adds a file to the input."""
    folder.mkdir(exist_ok=True)
    ids = list(range(start, stop))
    table = pa.table({"id": ids, "prompt": [f"p{index}" for index in ids]})
    pq.write_table(table, folder / f"{start}.parquet", row_group_size=8)


def run(processor: Processor, folder: Path) -> list[tuple[int, str]]:
    """Runs what is not done of the input, and returns the whole output."""
    processor(ray.data.read_parquet(str(folder / "in"))).write_parquet(str(folder / "out"))
    table = pq.read_table(folder / "out")
    return sorted(zip(table["id"].to_pylist(), table["answer"].to_pylist(), strict=True))


@pytest.mark.soak
def test_a_job_goes_on_through_an_engine(
    checkpoints: None, make_processor: Callable[..., Processor], tmp_path: Path
) -> None:
    write_rows(tmp_path / "in", 0, 40)
    with make_processor(None, lambda row: {"id": row["id"], "answer": row["generated_text"]}) as processor:
        assert run(processor, tmp_path) == [(index, f"P{index}0") for index in range(40)]
        before = set((tmp_path / "out").iterdir())
        write_rows(tmp_path / "in", 40, 60)
        assert run(processor, tmp_path) == [(index, f"P{index}0") for index in range(60)]
    added = set((tmp_path / "out").iterdir()) - before
    assert sum(pq.read_metadata(path).num_rows for path in added) == 20


@pytest.mark.soak  # The way of the rows is that of the test above; only the middle differs.
def test_a_job_goes_on_through_an_http_endpoint(checkpoints: None, tmp_path: Path) -> None:
    with running(Server()) as server:
        config = HttpRequestProcessorConfig(url=server.url)
        processor = build_llm_processor(
            config,
            lambda row: {"payload": row["id"]},
            lambda row: {"id": row["id"], "answer": str(row["http_response"]["echo"])},
        )
        for start, stop in ((0, 20), (20, 30)):
            write_rows(tmp_path / "in", start, stop)
            assert run(processor, tmp_path) == [(index, str(index)) for index in range(stop)]
        assert len(server.seen) == 30


def test_replicas_leave_room_for_the_filter_or_the_job_is_refused(
    checkpoints: None, make_config: Callable[..., EngineProcessorConfig]
) -> None:
    started: list[PoolConfig] = []

    def start(config: PoolConfig) -> Any:
        started.append(config)
        return FakePool()

    def processor(**changes: Any) -> Processor:
        config = make_config(**changes)
        return Processor(config, [EngineBackend(config, start_pool=start)])

    with processor() as free:
        free(ray.data.range(1))
    assert started[0].num_cpus_per_replica == 0
    with processor(num_cpus_per_replica=0.5) as held:
        with pytest.raises(ConfigError, match="wait forever"):
            held(ray.data.range(1))
        context = ray.data.DataContext.get_current()
        config, context.checkpoint_config = context.checkpoint_config, None
        held(ray.data.range(1))
        context.checkpoint_config = config
        with pytest.raises(ConfigError, match="wait forever"):
            held(ray.data.range(1))
