"""What can be set, and what is said when it is set wrong."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from millrace import ConfigError
from millrace.pipeline import (
    ChatTemplateStageConfig,
    EngineProcessorConfig,
    PrepareMultimodalStageConfig,
    TokenizerStageConfig,
    build_llm_processor,
    vLLMEngineProcessorConfig,
)


def make(**fields: Any) -> EngineProcessorConfig:
    return EngineProcessorConfig(**{"model_source": "somewhere", **fields})


def test_the_name_of_ray_data_llm_is_the_same_class() -> None:
    assert vLLMEngineProcessorConfig is EngineProcessorConfig


@pytest.mark.parametrize("given", [2, "2", 2.0, (2, 2), [2, 2]])
def test_concurrency_is_a_fixed_number_of_replicas(given: Any) -> None:
    assert make(concurrency=given).concurrency == 2
    assert make(concurrency=given).num_replicas == 2


@pytest.mark.parametrize("given", [0, -1, "x", 1.5, True, None, (1, 2, 3), (2, 1), (0, 1), {}])
def test_concurrency_must_be_a_positive_integer_or_a_pair(given: Any) -> None:
    with pytest.raises(ConfigError, match="concurrency"):
        make(concurrency=given)


def test_concurrency_can_be_the_fewest_and_the_most_replicas() -> None:
    config = make(concurrency=(1, 4))
    assert (config.min_replicas, config.num_replicas) == (1, 4)


def test_placement_is_checked_when_the_config_is_made(caplog: pytest.LogCaptureFixture) -> None:
    tp2 = {"tensor_parallel_size": 2}
    assert make(engine_kwargs=tp2, placement_group_config={"bundle_per_worker": {"GPU": 1}}).placement_group_config
    with pytest.raises(ConfigError, match="bundles must be a list of 2"):
        make(engine_kwargs=tp2, placement_group_config={"bundles": [{"GPU": 1}]})
    make(placement_group_config={"bundles": [{"GPU": 1}]}, num_gpus_per_replica=1)
    assert "give way to placement_group_config" in caplog.text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"concurency": 1}, "no field 'concurency'; did you mean 'concurrency'?"),
        ({"engine_kwargs": {"max_num_sqs": 3}}, "did you mean 'max_num_seqs'?"),
        ({"engine_kwargs": {"data_parallel_size": 2}}, "data_parallel_size=2 is not supported"),
        ({"engine_kwargs": {"model": "elsewhere"}}, "drop one"),
        ({"engine_kwargs": {"hf_overrides": len}}, "hf_overrides is a function, which only LLM takes; pass a dict"),
        ({"chat_template_stage": {"enabld": True}}, "did you mean 'enabled'?"),
        ({"tokenize_stage": 3}, "tokenize_stage must be a bool, a dict or a TokenizerStageConfig; got int 3"),
        ({"sampling_params": {"temprature": 0}}, "did you mean 'temperature'?"),
        (
            {"task_type": "scores"},
            "task_type must be 'generate', 'embed', 'classify', 'score'",
        ),
        ({"task_type": "embed", "sampling_params": {"n": 2}}, "sampling_params are for generation"),
        ({"task_type": "embed", "engine_kwargs": {"task": "classify"}}, "say it once, with task_type"),
        ({"engine_kwargs": {"runner": "pooling"}}, "say it once, with task_type"),
        ({"task_type": "embed", "reasoning_stage": {"parser": "qwen3"}}, "reasoning_stage reads generated text"),
        ({"batch_size": 0}, "batch_size: input should be greater than 0; got 0"),
        ({"has_image": True}, "needs images"),
        ({"lora_modules": {"a": 3}}, "lora_modules must map names of adapters to folders"),
        ({"lora_modules": ["a=x", "a=y"]}, "lora_modules name 'a' twice"),
        ({"lora_modules": {"somewhere": "x"}}, "which is the model itself"),
        ({"dynamic_lora_loading_path": ""}, "dynamic_lora_loading_path is empty"),
        (
            {"dynamic_lora_loading_path": "x", "engine_kwargs": {"enable_lora": False}},
            "and engine_kwargs say False; drop one",
        ),
        ({"lora_config": {"max_adapters": 3}}, "has no field 'max_adapters'"),
        ({"lora_config": {"dynamic_lora_loading_path": "x"}, "dynamic_lora_loading_path": "y"}, "drop one"),
    ],
)
def test_a_mistake_is_said_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**fields)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_of_several_mistakes_gets_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        make(batch_size=0, runtime_env=3)
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="model_source is missing"):
        EngineProcessorConfig()


@pytest.mark.parametrize("given", [False, {"enabled": False}, TokenizerStageConfig(enabled=False)])
def test_a_stage_is_switched_in_three_ways(given: Any) -> None:
    assert make(tokenize_stage=given).tokenize_stage == TokenizerStageConfig(enabled=False)


def test_legacy_flags_become_stages_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = make(apply_chat_template=True, chat_template="{{ messages }}", tokenize=False, detokenize=True)
    assert config.chat_template_stage == ChatTemplateStageConfig(chat_template="{{ messages }}")
    assert not config.tokenize_stage.enabled
    assert config.detokenize_stage.enabled
    assert len(caplog.records) == 4


def test_flags_that_are_off_need_no_feature() -> None:
    make(has_image=False, prepare_multimodal_stage={"enabled": False}, dynamic_lora_loading_path=None)


def test_adapters_that_are_named_turn_the_engines_adapters_on(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    listed = make(lora_modules=[f"a={tmp_path}/./a", {"name": "b", "path": "s3://bucket/b"}])
    assert listed.lora_modules == {"a": str(tmp_path / "a"), "b": "s3://bucket/b"}
    assert listed.engine_config.enable_lora
    assert make(dynamic_lora_loading_path="adapters").adapter_names.loading_path == str(Path("adapters").absolute())
    served = make(lora_config={"dynamic_lora_loading_path": "x", "max_num_adapters_per_replica": 6})
    assert served.engine_config.max_cpu_loras == 6
    assert served.adapter_names == make(dynamic_lora_loading_path="x").adapter_names
    assert make().adapter_names.is_empty


def test_rows_name_places_only_if_the_job_names_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = make(engine_kwargs={"enable_lora": True, "served_model_name": ["us", "we"]})
    assert "rows name folders and hub repositories of adapters" in caplog.text
    assert config.adapter_names.takes_places
    assert config.adapter_names.base_names[1:] == ("us", "we")
    assert not make(engine_kwargs={"enable_lora": True}, lora_modules={}).adapter_names.takes_places


def test_a_legacy_flag_beside_its_stage_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="use tokenize_stage only"):
        make(tokenize=False, tokenize_stage=TokenizerStageConfig())


def test_engine_settings_are_checked_and_at_hand() -> None:
    assert make(engine_kwargs={"max_num_seqs": 7, "seed": 3}).engine_config.max_num_seqs == 7


def test_a_config_travels_to_workers() -> None:
    config = make(engine_kwargs={"seed": 3}, chat_template_stage={"chat_template_kwargs": {"a": 1}})
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.engine_config == config.engine_config


def test_a_stage_config_is_kept_as_it_was_given() -> None:
    stage = ChatTemplateStageConfig(chat_template="{{ x }}")
    config = EngineProcessorConfig(model_source="somewhere", concurrency=2, chat_template_stage=stage)
    assert config.chat_template_stage == stage
    assert stage.concurrency is None


@pytest.mark.parametrize("given", [1, "yes", TokenizerStageConfig(), None])
def test_a_stage_is_given_as_a_bool_a_dict_or_its_own_config(given: Any) -> None:
    with pytest.raises(ConfigError, match="must be a bool, a dict or a ChatTemplateStageConfig"):
        EngineProcessorConfig(model_source="somewhere", chat_template_stage=given)


@pytest.mark.parametrize("given", [True, {"enabled": True}, PrepareMultimodalStageConfig(enabled=True)])
def test_images_are_refused_and_off_is_off(given: Any) -> None:
    with pytest.raises(ConfigError, match="needs images, audio and video, which this release does not have"):
        EngineProcessorConfig(model_source="somewhere", prepare_multimodal_stage=given)
    for off in (False, {"chat_template_content_format": "openai"}, PrepareMultimodalStageConfig()):
        EngineProcessorConfig(model_source="somewhere", prepare_multimodal_stage=off)


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
    "dynamic_lora_loading_path": [None, "s3://bucket/adapters"],
    "lora_config": [{"dynamic_lora_loading_path": "s3://bucket/adapters", "max_num_adapters_per_replica": 4}],
    "placement_group_config": [
        None,
        {"bundle_per_worker": {"CPU": 1}},
        {"bundles": [{"CPU": 1, "mill": 0.5}], "strategy": "SPREAD"},
        {"bundle_per_worker": {"GPU": 1}, "strategy": "STRICT_PACK"},
    ],
}
CASES = [(field, value) for field, values in DOCUMENTED.items() for value in values] + [
    (stage, {field: value})
    for stage in ("chat_template_stage", "tokenize_stage", "detokenize_stage")
    for field, values in STAGE_FIELDS.items()
    for value in values
]


@pytest.mark.parametrize(("field", "value"), CASES, ids=repr)
def test_every_documented_value_builds_a_processor(field: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = vLLMEngineProcessorConfig(**{"model_source": "bundled:invoices", field: value})
    assert build_llm_processor(config).list_stage_names()
    ignored = [record.message for record in caplog.records if "ignored" in record.message]
    assert bool(ignored) == ((field, value) == ("log_engine_metrics", False)), "a setting that is ignored warns"
