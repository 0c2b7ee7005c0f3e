"""A processor is a list of stages: those of the user's own, builders for configs of the user's own, no engine at all.

Behaviours of Ray Data LLM's processors that scripts rely on, and what is said where they are used wrongly.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import ray.data
from fake_client import FakePool
from ray import cloudpickle

from millrace import ConfigError
from millrace.pipeline import (
    CustomStage,
    EngineProcessorConfig,
    HttpRequestProcessorConfig,
    Processor,
    ProcessorBuilder,
    ProcessorConfig,
    Stage,
    StageConfig,
    build_llm_processor,
)
from millrace.pipeline.processor.engine_backend import EngineBackend

# Workers cannot import from the tests, so what is defined here travels as it is.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Double(Stage):
    """Doubles a number."""

    name = "double"

    def __init__(self, column: str = "x") -> None:  # It does not pass on `stop_on_error`.
        self._column = column

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {self._column: 2 * row[self._column]}


class Shout(Stage):
    """Sets the prompt in capitals, or the answer."""

    name = "shout"

    def __init__(self, column: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._column = column

    def process(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {self._column: f"{row[self._column]}!"}


class DoublingConfig(ProcessorConfig):
    """Settings of a processor without an engine."""

    times: int = 1


def build_doubling(config: DoublingConfig, functions: Mapping[str, Any], *, column: str = "x") -> Processor:
    return Processor(config, [CustomStage(Double, {"column": column})] * config.times, **functions)


@pytest.fixture
def registered() -> Iterator[None]:
    ProcessorBuilder.register(DoublingConfig, build_doubling)
    yield
    ProcessorBuilder.clear_registry()


def run(processor: Processor, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    with processor:
        return processor(ray.data.from_items(list(rows))).take_all()


@pytest.mark.usefixtures("cluster")
class TestStagesOnly:
    """Processors without anything in the middle."""

    def test_preprocess_merges_and_postprocess_decides(self) -> None:
        assert Processor(ProcessorConfig()).list_stage_names() == []
        processor = Processor(ProcessorConfig(), [], lambda row: {"b": 1}, lambda row: {"seen": sorted(row)})
        (row,) = run(processor, {"a": 0})
        assert row.keys() == {"seen"}
        assert list(row["seen"]) == ["a", "b"]

    def test_stages_and_functions_in_their_order(self) -> None:
        processor = Processor(
            ProcessorConfig(batch_size=2),
            [CustomStage(Double), CustomStage(Double), CustomStage(Shout, {"column": "x"})],
            lambda row: {"x": row["id"] + 1},
            lambda row: {"id": row["id"], "y": row["x"]},
        )
        assert processor.list_stage_names() == ["Double", "Double_1", "Shout"]
        rows = run(processor, *({"id": index} for index in range(5)))
        assert sorted((row["id"], row["y"]) for row in rows) == [(index, f"{4 * (index + 1)}!") for index in range(5)]

    def test_error_rows_pass_stages_and_postprocess_by(self) -> None:
        processor = Processor(
            ProcessorConfig(should_continue_on_error=True), [CustomStage(Double)], None, lambda row: {"y": row["x"]}
        )
        good, bad = sorted(run(processor, {"x": 1}, {"x": None}), key=lambda row: row["__inference_error__"])
        assert (good["y"], good["__inference_error__"]) == (2, "")
        assert bad["__inference_error__"].startswith("double: TypeError: ")
        assert bad["finish_reason"] == "error"

    def test_a_failed_row_ends_a_job_that_stops(self) -> None:
        with pytest.raises(Exception, match="a row failed in double: TypeError"):
            run(Processor(ProcessorConfig(), [CustomStage(Double)]), {"x": None})

    def test_resources_that_leave_no_cpu_to_read_with_are_refused(self) -> None:
        processor = Processor(ProcessorConfig(), [CustomStage(Double, config=StageConfig(num_cpus=1.5))])
        with pytest.raises(ConfigError, match="would wait forever"):
            processor(ray.data.range(1))

    def test_a_config_of_ones_own_builds_its_processor_for_several_datasets(self, registered: None) -> None:
        config, kwargs = DoublingConfig(times=3), {"column": "z"}
        with build_llm_processor(config, None, lambda row: {"z": row["z"] + 1}, builder_kwargs=kwargs) as processor:
            for number in (1, 7):
                assert processor(ray.data.from_items([{"z": number}])).take_all() == [{"z": 8 * number + 1}]


def test_a_class_derived_from_a_registered_one_is_built_alike(registered: None) -> None:
    class Derived(DoublingConfig):
        pass

    assert build_llm_processor(Derived(times=2)).list_stage_names() == ["Double", "Double_1"]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: ProcessorBuilder.register(DoublingConfig, build_doubling), "DoublingConfig has a builder"),
        (lambda: ProcessorBuilder.register(EngineProcessorConfig, dict), "EngineProcessorConfig has a builder"),
        (lambda: ProcessorBuilder.register(dict, build_doubling), "derived from ProcessorConfig"),
        (lambda: build_llm_processor(ProcessorConfig()), "config must be one of DoublingConfig, EngineProcessorConfig"),
        (
            lambda: build_llm_processor(DoublingConfig(), builder_kwargs={"colum": "z"}),
            "builder_kwargs has no field 'colum'; did you mean 'column'?",
        ),
        *(
            (
                lambda name=name: build_llm_processor(DoublingConfig(), builder_kwargs={name: None}),
                f"builder_kwargs hold '{name}', which is a parameter of its own",
            )
            for name in ("preprocess", "postprocess", "preprocess_map_kwargs", "postprocess_map_kwargs", "stages")
        ),
    ],
)  # fmt: skip
def test_a_mistake_with_builders_is_said(registered: None, act: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        act()
    assert said in str(caught.value)


def test_forgetting_what_was_registered_keeps_ours(registered: None, model_folder: Any) -> None:
    ProcessorBuilder.clear_registry()
    with pytest.raises(ConfigError, match="config must be one of"):
        build_llm_processor(DoublingConfig())
    assert build_llm_processor(EngineProcessorConfig(model_source=str(model_folder))).list_stage_names()
    ProcessorBuilder.register(DoublingConfig, build_doubling)


NAMES = ["ChatTemplateStage", "TokenizeStage", "GenerateStage", "DetokenizeStage"]


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ({}, [*NAMES, "Double"]),
        ({"before": "ChatTemplateStage"}, ["Double", *NAMES]),
        ({"before": "GenerateStage"}, [*NAMES[:2], "Double", *NAMES[2:]]),
        ({"after": "GenerateStage"}, [*NAMES[:3], "Double", *NAMES[3:]]),
    ],
)
def test_a_stage_of_ones_own_has_its_place(model_folder: Any, place: dict[str, str], names: list[str]) -> None:
    config = EngineProcessorConfig(model_source=str(model_folder))
    stage = CustomStage(Double, required=("x",), **place)
    processor = build_llm_processor(config, stages=[stage])
    assert processor.list_stage_names() == names
    assert processor.get_stage_by_name("Double").required == ("x",)


def test_stages_on_both_sides_of_an_engine(make_processor: Any, cluster: None) -> None:
    processor = make_processor(should_continue_on_error=False)
    processor.add_stage(CustomStage(Shout, {"column": "prompt"}, before="GenerateStage"))
    processor.add_stage(CustomStage(Shout, {"column": "generated_text"}))
    (row,) = run(processor, {"prompt": "a"})
    assert row["generated_text"] == "A!0!"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CustomStage(dict), "a class derived from Stage; got <class 'dict'>"),
        (lambda: CustomStage(Double, before="a", after="b"), "name one stage only"),
        (
            lambda: Processor(ProcessorConfig(), [CustomStage(Double), CustomStage(Shout, before="Duble")]),
            "no stage 'Duble'; did you mean 'Double'?",
        ),
    ],
)
def test_a_mistake_with_stages_is_said(make: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert said in str(caught.value)


def test_there_is_one_backend(make_config: Any) -> None:
    backends = [EngineBackend(make_config(), start_pool=lambda config: FakePool()) for _ in range(2)]  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="one backend; GenerateStage is there"):
        Processor(make_config(), backends)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (HttpRequestProcessorConfig(url="http://here"), "HttpRequestStage: payload"),
        (DoublingConfig(), "no input columns"),
    ],
)
def test_needed_columns_are_logged(config: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        processor = Processor(config) if isinstance(config, DoublingConfig) else build_llm_processor(config)
        processor.log_input_column_names()
    assert said in caplog.text.replace("No stages, so ", "")


def test_configs_do_not_change_and_replace_checks() -> None:
    config = ProcessorConfig(batch_size=3)
    with pytest.raises(ConfigError, match=r"does not change; use config.replace\(batch_size=5\)"):
        config.batch_size = 5
    assert (config.replace(concurrency="2").concurrency, config.replace(concurrency=2).batch_size) == (2, 3)
    with pytest.raises(ConfigError, match="batch_size: input should be greater than 0"):
        config.replace(batch_size=0)


def test_the_data_column_has_the_name_of_ray_data_llm() -> None:
    assert Processor.DATA_COLUMN == "__data"
