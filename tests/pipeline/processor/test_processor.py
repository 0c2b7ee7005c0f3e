"""A processor on Ray with an engine that reads the prompt back: rows, errors, life cycle."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray.data
from fake_client import FakePool

from millrace import ConfigError
from millrace.actors import EnginePool, PoolConfig
from millrace.pipeline import (
    EngineProcessorConfig,
    Processor,
    RowFailedError,
    build_llm_processor,
    build_processor,
    find_millrace_error,
)
from millrace.pipeline.processor.engine_backend import EngineBackend

pytestmark = pytest.mark.usefixtures("cluster")

Make = Callable[..., Processor]


@pytest.fixture
def run(make_processor: Make) -> Callable[..., list[dict[str, Any]]]:
    """Runs rows through a processor and returns the result by id."""

    def run_rows(rows: list[dict[str, Any]], *functions: Any, **changes: Any) -> list[dict[str, Any]]:
        with make_processor(*functions, **changes) as processor:
            out = processor(ray.data.from_items(rows)).take_all()
        return sorted(out, key=lambda row: row["id"])

    return run_rows


def test_every_row_once_good_or_bad(run: Callable[..., list[dict[str, Any]]], tmp_path: Any) -> None:
    rows: list[dict[str, Any]] = [{"id": index, "text": f"t{index}"} for index in range(60)]
    rows += [{"id": 60, "text": 3}, {"id": 61, "text": None}, {"id": 62, "text": ""}, {"id": 63, "text": "fail"}]

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 5:
            raise ValueError("five")
        return {"prompt": row["text"]}

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 7:
            raise ValueError("seven")
        return {"id": row["id"], "answer": row["generated_text"]}

    out = run(rows, preprocess, postprocess)
    assert [row["id"] for row in out] == list(range(64))
    bad = {row["id"]: row for row in out if row["__inference_error__"]}
    assert sorted(bad) == [5, 7, 60, 61, 62, 63]
    assert [bad[index]["__inference_error__"].split(":")[0] for index in sorted(bad)] == [
        "preprocess", "postprocess", "generate", "generate", "generate", "generate",
    ]  # fmt: skip
    assert [row["text"] for row in bad.values()] == ["t5", "t7", 3, None, "", "fail"]
    assert {row["finish_reason"] for row in bad.values()} == {"error"}
    assert all(row["answer"] == f"T{row['id']}0" for row in out if row["id"] not in bad)


def test_parquet_of_good_and_failed_rows_reads_back(make_processor: Make, tmp_path: Any) -> None:
    rows = [{"id": index, "prompt": "fail" if index % 3 == 0 else "x"} for index in range(40)]
    with make_processor(None, lambda row: {"id": row["id"], "generated_text": row["generated_text"]}) as processor:
        processor(ray.data.from_items(rows)).write_parquet(str(tmp_path))
    failed = {row["id"] for row in ray.data.read_parquet(str(tmp_path)).take_all() if row["__inference_error__"]}
    assert failed == {index for index in range(40) if index % 3 == 0}
    assert sum(pq.read_metadata(path).num_rows for path in tmp_path.glob("*.parquet")) == 40


def test_a_job_that_stops_raises_our_error_with_its_message(run: Callable[..., list[dict[str, Any]]]) -> None:
    with pytest.raises(Exception, match="NumericalError") as caught:
        run([{"id": 0, "prompt": "fail"}], should_continue_on_error=False)
    ours = find_millrace_error(caught.value)
    assert isinstance(ours, RowFailedError)
    assert str(ours) == "a row failed in generate: NumericalError: NaN in the logits"


def test_a_processor_serves_several_datasets_with_one_pool(make_processor: Make) -> None:
    pool = FakePool()
    with make_processor(pool=pool) as processor:
        for text in ("a", "b"):
            (row,) = processor(ray.data.from_items([{"prompt": text}])).take_all()
            assert row["generated_text"] == f"{text.upper()}0"
            assert row["prompt"] == text
        assert pool.num_closed == 0
    processor.close()
    assert pool.num_closed == 1
    with pytest.raises(ConfigError, match="closed"):
        processor(ray.data.range(1))


def test_the_pool_starts_with_the_first_dataset_and_not_before(make_config: Any) -> None:
    started: list[PoolConfig] = []

    def start(config: PoolConfig) -> EnginePool:
        started.append(config)
        return FakePool()  # type: ignore[return-value]

    config = make_config(concurrency=2, engine_kwargs={"seed": 4})
    processor = Processor(config, [EngineBackend(config, start_pool=start)])
    assert not started
    processor(ray.data.range(1))
    processor(ray.data.range(1))
    (pool,) = started
    assert (pool.num_replicas, pool.engine_kwargs["seed"]) == (2, 4)


def test_a_lazy_dataset_keeps_the_pool_of_a_forgotten_processor(make_processor: Make) -> None:
    pool = FakePool()
    processor: Processor | None = make_processor(pool=pool)
    assert processor is not None
    alive = weakref.ref(processor)
    results = processor(ray.data.from_items([{"prompt": "a"}]))
    processor = None
    gc.collect()
    assert pool.num_closed == 0
    assert results.take_all()[0]["generated_text"] == "A0"
    left = alive()
    assert left is not None
    left.close()


def test_stages_are_listed_and_found(model_folder: Any) -> None:
    processor = build_llm_processor(EngineProcessorConfig(model_source=str(model_folder), detokenize_stage=False))
    assert processor.list_stage_names() == ["ChatTemplateStage", "TokenizeStage", "GenerateStage"]
    assert processor.get_stage_by_name("TokenizeStage").required == ("prompt",)
    with pytest.raises(ConfigError, match="no stage 'TokeniseStage'; did you mean 'TokenizeStage'"):
        processor.get_stage_by_name("TokeniseStage")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"preprocess": 3}, "preprocess must be a function of a row; got int"),
        ({"preprocess_map_kwargs": {"num_cpu": 1}}, "did you mean 'num_cpus'?"),
        ({"builder_kwargs": {"preprocess": dict}}, "builder_kwargs hold 'preprocess'"),
        ({"builder_kwargs": {"chat_template_kwarg": {}}}, "did you mean 'chat_template_kwargs'?"),
        ({"config": 3}, "config must be one of EngineProcessorConfig, "),
    ],
)
def test_builder_mistakes_are_said(model_folder: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_llm_processor(**{"config": EngineProcessorConfig(model_source=str(model_folder)), **fields})
    assert said in str(caught.value)


def test_both_names_build_and_template_kwargs_arrive(model_folder: Any) -> None:
    config = EngineProcessorConfig(model_source=str(model_folder))
    processor = build_processor(config, builder_kwargs={"chat_template_kwargs": {"enable_thinking": False}})
    assert processor.config.chat_template_stage.chat_template_kwargs == {"enable_thinking": False}
    assert build_processor is build_llm_processor
    assert config.chat_template_stage.chat_template_kwargs is None


def test_a_model_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="is no local folder"):
        build_llm_processor(EngineProcessorConfig(model_source="facebook/opt-125m"))


def test_building_changes_nothing_of_ray_and_starts_nothing(model_folder: Any) -> None:
    context = ray.data.DataContext.get_current()
    before = {name: value for name, value in vars(context).items() if isinstance(value, int | float | str | None)}
    actors = len(ray.util.list_named_actors(all_namespaces=True))
    build_llm_processor(EngineProcessorConfig(model_source=str(model_folder), concurrency=4))
    assert {name: vars(context)[name] for name in before} == before
    assert len(ray.util.list_named_actors(all_namespaces=True)) == actors
