"""Processors under SGLang's names: settings of the engine, and sampling parameters of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millrace import ConfigError
from millrace.pipeline import SGLangEngineProcessorConfig, build_llm_processor
from millrace.pipeline.processor.sglang import SamplingNamesStage
from millrace.pipeline.stages.base import Row


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
