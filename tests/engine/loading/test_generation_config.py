"""The sampling parameters that a model recommends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from millrace.engine import SamplingParams
from millrace.engine.config import EngineConfig
from millrace.engine.loading.generation_config import recommended_params, recommended_values


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_k": 20, "top_p": None, "bos_token_id": 1}, {"temperature": 0.6, "top_k": 20}),
        ({"max_new_tokens": 16, "skip_special_tokens": False}, {"max_tokens": 16, "skip_special_tokens": False}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 1.5}, {"temperature": 1.5}),
        ({"temperature": -1, "top_k": 20}, {}),
    ],
)
def test_the_values_that_a_model_recommends_are_the_defaults(
    tmp_path: Path, content: dict[str, Any], values: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    config = EngineConfig(model=str(tmp_path))
    assert recommended_values(config) == values
    assert recommended_params(config) == SamplingParams(**values)
    assert recommended_values(EngineConfig(model=str(tmp_path), generation_config="vllm")) == {}
