"""What goes wrong in Ray Data LLM 2.60 and does not here: a test for each fault, which says how it goes there."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from fake_client import EchoClient, FakePool
from http_server import Server, running
from ray import cloudpickle
from ray.util import placement_group_table
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from millrace import ConfigError, MillraceError
from millrace.actors import EnginePool, PoolConfig
from millrace.pipeline import (
    EngineProcessorConfig,
    HttpRequestProcessorConfig,
    JobConfig,
    Processor,
    build_llm_processor,
    run_job,
    vLLMEngineProcessorConfig,
)
from millrace.pipeline.job.run import prepare_retry
from millrace.pipeline.processor.config import StageConfig
from millrace.pipeline.processor.engine_backend import EngineBackend
from millrace.pipeline.processor.engine_stages import finish_plans, prepare_plans
from millrace.pipeline.processor.stage_plan import CustomStage
from millrace.pipeline.stages import BatchStage

sys.path.insert(0, str(Path(__file__).parent.parent / "actors"))

import fake_engine

cloudpickle.register_pickle_by_value(fake_engine)

DEADLINE_S = 60.0
MakeConfig = Callable[..., EngineProcessorConfig]
MakeProcessor = Callable[..., Processor]


def with_fake_engines(config: EngineProcessorConfig, *functions: Any) -> tuple[Processor, EngineBackend]:
    """Builds a processor with a real pool, whose engines do what their prompts say (tests/actors/fake_engine.py)."""

    def start(settings: PoolConfig) -> EnginePool:
        factories = {"engine_factory": fake_engine.FakeEngine, "rank_main": fake_engine.run_rank}
        return EnginePool.start(dataclasses.replace(settings, **factories))

    backend = EngineBackend(config, start_pool=start)
    return Processor(config, [*prepare_plans(config), backend, *finish_plans(config)], *functions), backend


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
def test_no_placement_group_is_left(cluster: None, make_config: MakeConfig, fails: bool) -> None:
    """Fact 3. There: each call of a function makes a group that nobody removes; two are left after one dataset."""
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


def test_batch_size_of_a_stage_holds(cluster: None, make_config: MakeConfig) -> None:
    """Fact 4. There: the processor's batch_size (16 here) replaces the stage's, whichever is larger."""

    class Count(BatchStage):
        name = "count"

        def __init__(self, column: str) -> None:
            super().__init__()
            self._column = column

        def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            return [{self._column: len(rows)} for _ in rows]

    def counting(column: str, batch_size: int, **place: str) -> CustomStage:
        return CustomStage(Count, {"column": column}, config=StageConfig(batch_size=batch_size), **place)

    config = make_config(batch_size=16)
    backend = EngineBackend(config, start_pool=lambda _: FakePool(), make_client=EchoClient)  # type: ignore[arg-type, return-value]
    stages = [
        backend,
        counting("large before", 48, before="GenerateStage"),
        counting("small before", 4, before="GenerateStage"),
        counting("small after", 8),
        counting("large after", 80),
    ]
    with Processor(config, stages) as processor:
        rows = processor(ray.data.from_items([{"prompt": "a"}] * 240, override_num_blocks=1)).take_all()
    sizes = {name: {row[name] for row in rows} for name in rows[0] if name.endswith(("before", "after"))}
    # Blocks are gathered for a stage after the engine, and what is beyond a batch is a smaller one.
    assert max(sizes.pop("large after")) == 80
    assert sizes == {"large before": {48}, "small before": {4}, "small after": {8}}


@pytest.mark.parametrize(("num_blocks", "batch_size"), [(64, 1), (1, 10_000)], ids=["blocks of a row", "one block"])
def test_rows_in_flight_do_not_depend_on_blocks(
    cluster: None, make_config: MakeConfig, tmp_path: Path, num_blocks: int, batch_size: int
) -> None:
    """Fact 6. There: 256 rows are in flight with blocks of 32 rows, 960 with blocks of 320."""
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


def test_results_leave_while_others_of_the_input_block_run(
    cluster: None, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Fact 7. There: a task hands its rows on when the whole input block is done, so the slow row holds up all."""
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


STAGES = ["preprocess", "chat_template", "tokenize", "generate", "detokenize", "postprocess"]


def test_an_error_in_any_stage_is_a_row(cluster: None) -> None:
    """Fact 8. There: only an error of the engine is a row; one in any other stage ends the job."""
    config = EngineProcessorConfig(model_source="bundled:invoices", batch_size=16, should_continue_on_error=True)
    backend = EngineBackend(config, start_pool=lambda _: FakePool(), make_client=EchoClient)  # type: ignore[arg-type, return-value]

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        broken = {
            "preprocess": {},
            "chat_template": {"messages": [{"role": "user"}]},
            "tokenize": {"prompt": 3},
            "generate": {"prompt": "fail"},
            "detokenize": {"prompt": "undecodable"},
        }
        if row["at"] == "preprocess":
            raise ValueError("no")
        return broken.get(row["at"], {"prompt": "ok"})

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"at": row["at"], "text": row["generated_text"], "nothing": 1 / (row["at"] != "postprocess")}

    stages = [*prepare_plans(config), backend, *finish_plans(config)]
    with Processor(config, stages, preprocess, postprocess) as processor:
        rows = processor(ray.data.from_items([{"at": at} for at in [*STAGES, "nowhere"] * 2])).take_all()
    failed_at = [(row["at"], row["__inference_error__"].split(":")[0]) for row in rows]
    assert sorted(failed_at) == sorted([*((at, at) for at in STAGES), ("nowhere", "")] * 2)


def test_failed_rows_do_not_change_the_columns_of_the_others(
    cluster: None, make_processor: MakeProcessor, tmp_path: Path
) -> None:
    """Fact 8. There: a failed row has all internal columns and none of postprocess', so integers become floats (NaN),
    and blocks of one file have different columns."""

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "count": row["num_generated_tokens"], "text": row["generated_text"], "tags": [1, 2]}

    rows = [{"id": index, "prompt": "fail" if index < 8 or index % 5 == 0 else "x"} for index in range(64)]
    with make_processor(None, postprocess) as processor:
        processor(ray.data.from_items(rows, override_num_blocks=8)).write_parquet(str(tmp_path))
    tables = [pq.read_table(path) for path in tmp_path.glob("*.parquet")]
    table = pa.concat_tables(tables, promote_options="default")
    assert table.num_rows == 64
    assert {field.name: field.type for field in table.schema} == {
        "id": pa.int64(),
        "count": pa.int64(),
        "text": pa.string(),
        "tags": pa.list_(pa.int64()),
        "prompt": pa.string(),
        "finish_reason": pa.string(),
        "__inference_error__": pa.string(),
    }


@pytest.mark.slow
def test_a_restart_neither_waits_for_itself_nor_forgets_the_failed(
    cluster: None, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Fact 8 and research 6.1. There: on two CPUs a job that goes on from a checkpoint makes no progress, since its two
    actors hold both and no read task ever runs; and a failed row counts as done, so that a rerun leaves it out."""
    lines = [f"line {index}" for index in range(40)]
    lines[20] = "z " * 60
    pq.write_table(pa.table({"line": lines}), tmp_path / "in.parquet")
    job = JobConfig(
        model=str(tiny_model("llama")),
        input=str(tmp_path / "in.parquet"),
        output=str(tmp_path / "out"),
        prompt="{line}",
        sampling={"max_tokens": 4},
        engine={"max_model_len": 32, "num_threads": 1},
        batch_size=8,
        flush_interval_s=0.1,
        on_error="stop",
    )
    with pytest.raises(MillraceError, match="PromptTooLongError"):
        run_job(job)
    gone_on = run_job(job.model_copy(update={"on_error": "row"}))
    assert (gone_on.num_rows_out, gone_on.num_rows_failed) == (40, 1)
    again = run_job(prepare_retry(job.output, engine={**job.engine, "max_model_len": 256}))
    assert (again.num_rows_out, again.num_rows_failed) == (40, 0)
    assert sorted(pq.read_table(tmp_path / "out")["line"].to_pylist()) == sorted(lines)


def test_requests_are_under_way_together(cluster: None) -> None:
    """Fact 9. There: the next request is sent when the one before is answered, so this server never answers."""
    server = Server(hold=10)
    with running(server):
        config = HttpRequestProcessorConfig(url=server.url, request_timeout_s=2 * DEADLINE_S)
        with build_llm_processor(config, lambda row: {"payload": {"id": row["id"]}}) as processor:
            together = ray.data.from_items([{"id": index} for index in range(10)], override_num_blocks=1)
            rows = processor(together).take_all()
    assert sorted(row["http_response"]["echo"]["id"] for row in rows) == list(range(10))
    assert server.max_in_flight == 10


STAGE_FIELDS = {
    "enabled": [True, False],
    "batch_size": [1, 512],
    "concurrency": [1, (1, 2), [1, 2], "2", 2.0],
    "runtime_env": [{"env_vars": {"A": "b"}}],
    "num_cpus": [0.5, 2],
    "memory": [1e9],
    "model_source": ["bundled:invoices"],
}
DOCUMENTED: dict[str, list[Any]] = {
    "batch_size": [1, 32, 10_000],
    "accelerator_type": [None, "L4"],
    "concurrency": [1, "1", 1.0, "1.0", (1, 2), [2, 2]],
    "runtime_env": [None, {"env_vars": {"A": "b"}}],
    "max_pending_requests": [None, 512, 0, -1],
    "max_concurrent_batches": [1, 8],
    "max_tasks_in_flight_per_actor": [None, 4],
    "should_continue_on_error": [True, False],
    "chat_template_stage": [True, False, {"chat_template": "{{ messages }}"}, {"chat_template_kwargs": {"a": 1}}],
    "tokenize_stage": [True, False],
    "detokenize_stage": [True, False],
    "prepare_multimodal_stage": [False, {"enabled": False}],
    "engine_kwargs": [{}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "max_model_len": 256}],
    "task_type": ["generate", "embed", "classify"],
    "log_engine_metrics": [True, False],
    "dynamic_lora_loading_path": [None],
    "placement_group_config": [
        None,
        {"bundle_per_worker": {"CPU": 1}},
        {"bundles": [{"CPU": 1, "mill": 0.5}], "strategy": "SPREAD"},
        {"bundle_per_worker": {"GPU": 1}, "strategy": "STRICT_PACK"},
    ],
}
NOT_THERE_YET = {
    "task_type": ["score"],
    "prepare_multimodal_stage": [True, {"enabled": True}],
    "dynamic_lora_loading_path": ["s3://adapters"],
}
CASES = [(field, value) for field, values in DOCUMENTED.items() for value in values] + [
    (stage, {field: value})
    for stage in ("chat_template_stage", "tokenize_stage", "detokenize_stage")
    for field, values in STAGE_FIELDS.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), CASES, ids=repr)
def test_every_documented_value_builds_a_processor(field: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Facts 4 and 6, research 1.2. There: a max_pending_requests of 0 or less ends in an AttributeError of asyncio."""
    config = vLLMEngineProcessorConfig(**{"model_source": "bundled:invoices", field: value})
    assert build_llm_processor(config).list_stage_names()
    ignored = [record.message for record in caplog.records if "ignored" in record.message]
    assert bool(ignored) == ((field, value) == ("log_engine_metrics", False)), "what is ignored is said"


@pytest.mark.parametrize(
    ("field", "value"), [(one, value) for one, values in NOT_THERE_YET.items() for value in values]
)
def test_what_is_not_there_yet_says_so(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"not there yet|does not have"):
        vLLMEngineProcessorConfig(**{"model_source": "bundled:invoices", field: value})


def test_resources_of_a_stage_reach_its_process(cluster: None, make_config: MakeConfig) -> None:
    """Research 1.2: a stage's num_cpus, memory and runtime_env are those of the process it runs in."""

    class Look(BatchStage):
        name = "look"

        def process_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            import os

            given = ray.get_runtime_context().get_assigned_resources()
            seen = {"cpus": given["CPU"], "memory": given["memory"], "variable": os.environ.get("MILL")}
            return [seen for _ in rows]

    settings = StageConfig(num_cpus=0.25, memory=2e6, runtime_env={"env_vars": {"MILL": "turns"}})
    config = make_config()
    stages = [CustomStage(Look, config=settings)]
    with Processor(config, stages) as processor:
        (row,) = processor(ray.data.from_items([{"prompt": "a"}])).take_all()
    assert (row["cpus"], row["memory"], row["variable"]) == (0.25, 2e6, "turns")
