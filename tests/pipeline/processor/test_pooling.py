"""Processors that embed and classify, with the real engine on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data

from millrace.engine import LLM, PoolingParams
from millrace.pipeline import EngineProcessorConfig, build_llm_processor

pytestmark = pytest.mark.slow

ENGINE = {"max_num_seqs": 32, "max_model_len": 128, "num_threads": 1, "dtype": "float32"}
TEXTS = [f"row {i} of a table with {i * 7 % 5} entries" for i in range(30)]


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    number = row["id"]
    if number == 30:
        return {"prompt": None}
    if number == 31:
        return {"prompt": "far too long " * 99}
    if number == 32:
        return {"prompt": "a", "pooling_params": {"dimension": 3}}
    params = {"dimensions": 8} if number % 2 else {"use_activation": False} if number % 4 else None
    return {"prompt": TEXTS[number], "pooling_params": params}


def run(model: Path, task_type: str, num_rows: int, **changes: Any) -> dict[int, dict[str, Any]]:
    config = EngineProcessorConfig(
        model_source=str(model), engine_kwargs=ENGINE, task_type=task_type, should_continue_on_error=True, **changes
    )
    with build_llm_processor(config, preprocess=preprocess) as processor:
        rows = processor(ray.data.range(num_rows)).take_all()
    assert len(rows) == num_rows
    return {row["id"]: row for row in rows}


def test_rows_are_embedded_each_as_it_asks_and_bad_ones_become_error_rows(cluster: None, tiny_model: Any) -> None:
    model = tiny_model("qwen3")
    rows = run(model, "embed", 33, chat_template_stage=False)
    with LLM(str(model), runner="pooling", dtype="float32") as llm:
        whole = llm.encode(TEXTS, PoolingParams(use_activation=False), pooling_task="embed", use_tqdm=False)
    for number, one in enumerate(whole):
        plain = one.outputs.data[:8] if number % 2 else one.outputs.data
        expected = plain if number % 4 == 2 else plain / np.linalg.norm(plain)
        np.testing.assert_allclose(rows[number]["embeddings"], expected, atol=1e-4)
        assert rows[number]["num_input_tokens"] == len(one.prompt_token_ids)
        assert rows[number]["__inference_error__"] == ""
    errors = [rows[number]["__inference_error__"] for number in (30, 31, 32)]
    for error, said in zip(
        errors, ("missing its value", "PromptTooLongError", "did you mean 'dimensions'"), strict=True
    ):
        assert said in error
    assert [rows[number]["finish_reason"] for number in (0, 30)] == ["stop", "error"]


@pytest.mark.soak
def test_rows_are_classified(cluster: None, tmp_path: Path) -> None:
    from checkpoints import tiny_classifier  # not above: workers import this file, and not that folder

    model = tiny_classifier(tmp_path, "llama", num_labels=3)
    rows = run(model, "classify", 1, chat_template_stage=False, tokenize_stage=False)
    with LLM(str(model), dtype="float32") as llm:
        (expected,) = llm.classify(TEXTS[0], use_tqdm=False)
    np.testing.assert_allclose(rows[0]["embeddings"], expected.outputs.probs, atol=1e-4)
    assert "generated_text" not in rows[0] and sum(rows[0]["embeddings"]) == pytest.approx(1)
