"""Processors on a real pool, whose engines do what their prompts say (tests/actors/fake_engine.py)."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.util import placement_group_table
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from millrace.actors import EnginePool, PoolConfig
from millrace.pipeline import EngineProcessorConfig, Processor
from millrace.pipeline.processor.engine_backend import EngineBackend
from millrace.pipeline.processor.engine_stages import engine_stages

sys.path.insert(0, str(Path(__file__).parents[2] / "actors"))

import fake_engine

cloudpickle.register_pickle_by_value(fake_engine)

DEADLINE_S = 60.0
MakeConfig = Callable[..., EngineProcessorConfig]


def with_fake_engines(config: EngineProcessorConfig) -> tuple[Processor, EngineBackend]:
    """Builds a processor whose pool has fake engines."""

    def start(settings: PoolConfig) -> EnginePool:
        factories = {"engine_factory": fake_engine.FakeEngine, "rank_main": fake_engine.run_rank}
        return EnginePool.start(dataclasses.replace(settings, **factories))

    backend = EngineBackend(config, start_pool=start)
    return Processor(config, engine_stages(config, backend)), backend


def until(condition: Callable[[], Any]) -> Any:
    """Waits for an event, and fails if it never comes."""
    calls = Retrying(
        stop=stop_after_delay(DEADLINE_S), wait=wait_fixed(0.05), retry=retry_if_result(lambda met: not met)
    )
    return calls(condition)


def groups_of(pool_name: str) -> list[str]:
    """Returns the placement groups of a pool that hold something of the cluster."""
    entries = placement_group_table().values()
    return [one["name"] for one in entries if one["name"].startswith(pool_name) and one["state"] != "REMOVED"]


@pytest.mark.parametrize("fails", [False, True], ids=["to its end", "with an exception"])
def test_no_placement_group_outlives_the_processor(cluster: None, make_config: MakeConfig, fails: bool) -> None:
    config = make_config(engine_kwargs={"tensor_parallel_size": 2}, should_continue_on_error=False)
    processor, backend = with_fake_engines(config)
    rows = [{"prompt": "refuse" if fails and index == 3 else "steps 1"} for index in range(8)]
    with processor:
        results = processor(ray.data.from_items(rows))
        backend.wait_ready(DEADLINE_S)
        stats = backend.stats()
        assert stats is not None
        assert groups_of(stats.name)
        if fails:
            with pytest.raises(Exception, match="EmptyPromptError"):
                results.materialize()
        else:
            assert results.count() == 8
    until(lambda: not groups_of(stats.name))


@pytest.mark.parametrize(("num_blocks", "batch_size"), [(64, 1), (1, 10_000)], ids=["blocks of a row", "one block"])
def test_the_rows_in_flight_are_four_times_max_num_seqs_whatever_the_blocks(
    cluster: None, make_config: MakeConfig, tmp_path: Path, num_blocks: int, batch_size: int
) -> None:
    gate = tmp_path / "gate"
    config = make_config(batch_size=batch_size, engine_kwargs={"max_num_seqs": 8})
    processor, backend = with_fake_engines(config)

    def num_running() -> int:
        stats = backend.stats()
        return sum(one.engine["num_running"] for one in stats.replicas if one.engine) if stats else 0  # type: ignore[index]

    rows = [{"prompt": f"gate {gate} {index}"} for index in range(64)]
    with processor, ThreadPoolExecutor(1) as thread:
        results = processor(ray.data.from_items(rows, override_num_blocks=num_blocks))
        count = thread.submit(results.count)
        try:
            until(lambda: num_running() == 32)
        finally:
            gate.touch()
        assert count.result(DEADLINE_S) == 64


def test_a_slow_row_holds_up_only_the_rows_of_its_small_block(
    cluster: None, make_config: MakeConfig, tmp_path: Path
) -> None:
    gate, seen = tmp_path / "gate", []
    rows = [{"id": index, "prompt": f"gate {gate}" if index == 5 else "steps 1"} for index in range(64)]
    given_up = threading.Timer(DEADLINE_S, gate.touch)
    given_up.start()
    with with_fake_engines(make_config(batch_size=4))[0] as processor:
        for row in processor(ray.data.from_items(rows, override_num_blocks=1)).iter_rows():
            seen.append(row["id"])
            if len(seen) == 48:
                assert not gate.exists(), "the first rows came when the slow one was given up"
                gate.touch()
    given_up.cancel()
    assert sorted(seen) == list(range(64))
    assert 5 not in seen[:48]
