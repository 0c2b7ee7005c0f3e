"""What scripts for Ray Data LLM set, and what comes of it: stage settings, pools, placement, imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.data

from millrace import ConfigError
from millrace.pipeline import (
    ChatTemplateStageConfig,
    EngineProcessorConfig,
    PrepareMultimodalStageConfig,
    SGLangEngineProcessorConfig,
    TokenizerStageConfig,
    build_llm_processor,
)
from millrace.pipeline.processor.engine_stages import UserFunction, generate_kwargs, operator_kwargs, pool_config
from millrace.pipeline.processor.sglang import SamplingNamesStage
from millrace.pipeline.stages import Row

HEAVY = ("torch", "transformers", "vllm", "ray.serve", "aiohttp")
NO_FUNCTION = UserFunction("preprocess")


def prepare_kwargs(**fields: Any) -> dict[str, Any]:
    """How the operator before the engine runs."""
    config = EngineProcessorConfig(model_source="somewhere", **fields)
    return operator_kwargs(config, NO_FUNCTION, config.chat_template_stage, config.tokenize_stage)


def test_a_stage_that_says_nothing_takes_what_the_processor_says() -> None:
    kwargs = prepare_kwargs(concurrency=3, runtime_env={"env_vars": {"A": "1"}})
    assert (kwargs["compute"].min_size, kwargs["compute"].max_size) == (1, 3)
    assert kwargs["runtime_env"] == {"env_vars": {"A": "1"}}
    assert kwargs["num_cpus"] == 0


def test_what_a_stage_says_counts_and_replaces() -> None:
    env = {"env_vars": {"B": "2"}}
    kwargs = prepare_kwargs(
        concurrency=3,
        runtime_env={"env_vars": {"A": "1"}},
        chat_template_stage={"num_cpus": 0.25, "runtime_env": env},
        tokenize_stage=TokenizerStageConfig(num_cpus=0.5, concurrency=(2, 4), memory=100),
    )
    assert kwargs["runtime_env"] == env  # Not merged.
    assert (kwargs["compute"].min_size, kwargs["compute"].max_size) == (2, 4)
    assert (kwargs["num_cpus"], kwargs["memory"]) == (0.75, 100)


def test_stages_of_one_process_agree_on_its_environment() -> None:
    with pytest.raises(ConfigError, match="give them one runtime_env"):
        prepare_kwargs(
            chat_template_stage={"runtime_env": {"pip": ["a"]}}, tokenize_stage={"runtime_env": {"pip": ["b"]}}
        )


def test_settings_given_as_a_class_are_not_touched() -> None:
    stage = ChatTemplateStageConfig(chat_template="{{ x }}")
    config = EngineProcessorConfig(model_source="somewhere", concurrency=2, chat_template_stage=stage)
    assert config.chat_template_stage == stage
    assert stage.concurrency is None


@pytest.mark.parametrize("given", [1, "yes", TokenizerStageConfig(), None])
def test_other_things_are_no_stage(given: Any) -> None:
    with pytest.raises(ConfigError, match="must be a bool, a dict or a ChatTemplateStageConfig"):
        EngineProcessorConfig(model_source="somewhere", chat_template_stage=given)


@pytest.mark.parametrize("given", [True, {"enabled": True}, PrepareMultimodalStageConfig(enabled=True)])
def test_images_are_refused_and_off_is_off(given: Any) -> None:
    with pytest.raises(ConfigError, match="needs images, audio and video, which this release does not have"):
        EngineProcessorConfig(model_source="somewhere", prepare_multimodal_stage=given)
    for off in (False, {"chat_template_content_format": "openai"}, PrepareMultimodalStageConfig()):
        EngineProcessorConfig(model_source="somewhere", prepare_multimodal_stage=off)


def test_a_group_of_cpus_only_takes_no_gpu(cluster: None, make_config: Any) -> None:
    config = make_config(placement_group_config={"bundles": [{"CPU": 0.75}]})
    pool = pool_config(config, [generate_kwargs(config)])
    assert pool.placement.bundles == ({"CPU": 0.75},)


def test_building_changes_nothing_of_ray_and_starts_nothing(cluster: None, model_folder: Path) -> None:
    context = ray.data.DataContext.get_current()
    before = {name: value for name, value in vars(context).items() if isinstance(value, int | float | str | None)}
    actors = len(ray.util.list_named_actors(all_namespaces=True))
    build_llm_processor(EngineProcessorConfig(model_source=str(model_folder), concurrency=4))
    assert {name: vars(context)[name] for name in before} == before
    assert len(ray.util.list_named_actors(all_namespaces=True)) == actors


@pytest.mark.parametrize("name", ["HttpRequestProcessorConfig", "ServeDeploymentProcessorConfig", "build_processor"])
def test_importing_a_name_loads_nothing_heavy(name: str, tmp_path: Path) -> None:
    code = f"import sys; from millrace.pipeline import {name}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_sglang_are_read() -> None:
    kwargs = {
        "tp_size": 2,
        "context_length": 64,
        "disable_radix_cache": True,
        "skip_tokenizer_init": True,
        "dp_size": 1,
    }
    engine = SGLangEngineProcessorConfig(model_source="somewhere", engine_kwargs=kwargs).engine_config
    assert (engine.tensor_parallel_size, engine.max_model_len, engine.enable_prefix_caching) == (2, 64, False)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"dp_size": 2}, "replicas are said with concurrency"),
        ({"tp_size": 2, "tensor_parallel_size": 2}, "are the same setting; drop one"),
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm"),
    ],
)
def test_what_the_engine_lacks_is_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SGLangEngineProcessorConfig(model_source="somewhere", engine_kwargs=kwargs)


def test_rows_may_use_names_of_sglang_or_ours(model_folder: Path) -> None:
    config = SGLangEngineProcessorConfig(model_source=str(model_folder), detokenize_stage=False)
    names = ["ChatTemplateStage", "TokenizeStage", "SamplingNamesStage", "GenerateStage"]
    assert build_llm_processor(config).list_stage_names() == names
    given = [{"max_new_tokens": 3, "stop": None}, {"max_tokens": 4}, {"top_p": 0.5, "json_schema": "{}"}, None]
    rows = [Row.read({"sampling_params": one}) for one in [*given, {"max_new_tokens": 3, "max_tokens": 3}]]
    SamplingNamesStage().run(rows)
    assert [row.data["sampling_params"] for row in rows[:4]] == [
        {"max_tokens": 3},
        {"max_tokens": 4},
        {"max_tokens": 128, "top_p": 0.5, "structured_outputs": {"json": "{}"}},
        None,
    ]
    assert "are the same setting" in str(rows[4].error)


def test_every_public_name_of_ray_data_llm_is_here() -> None:
    import millrace.pipeline

    theirs = {
        "ProcessorConfig", "Processor", "SGLangEngineProcessorConfig", "HttpRequestProcessorConfig",
        "vLLMEngineProcessorConfig",
        "ServeDeploymentProcessorConfig", "ChatTemplateStageConfig", "DetokenizeStageConfig",
        "PrepareMultimodalStageConfig", "TokenizerStageConfig", "HttpRequestStageConfig", "build_processor",
    }  # fmt: skip
    assert theirs <= set(millrace.pipeline.__all__)
