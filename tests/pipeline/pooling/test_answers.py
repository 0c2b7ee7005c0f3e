"""The columns of an answer, for the vector of a prompt and for those of its tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.engine import PoolingOutput, PoolingRequestOutput
from millrace.engine.errors import PoolingParamsError
from millrace.engine.pooling import params as pooling_params
from millrace.pipeline import EngineProcessorConfig
from millrace.pipeline.arrow_values import to_array
from millrace.pipeline.columns import result_types
from millrace.pipeline.pooling.answers import Answers, ClassAnswers, RewardAnswers, VectorAnswers
from millrace.pipeline.pooling.vectors import VECTOR_FORMS
from millrace.pipeline.processor.pooling_stages import answers_of

TOKENS = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)


def answer(answers: Answers, data: Any) -> dict[str, Any]:
    return answers.of(PoolingRequestOutput("r", PoolingOutput(np.float32(data)), [1]), {})


def column(answers: Answers, name: str, *data: Any, size: int) -> pa.Array:
    return pa.array([answer(answers, one)[name] for one in data], answers.types(size)[name])


def test_vectors_of_tokens_are_lists_of_vectors() -> None:
    plain = answer(VectorAnswers(is_by_token=True), TOKENS)["embeddings"]
    assert np.array_equal(plain, TOKENS)
    coded = VectorAnswers(VECTOR_FORMS["int8"], is_by_token=True)
    vectors, scales = (column(coded, name, TOKENS, TOKENS[:1], size=8) for name in ("embeddings", "embeddings_scale"))
    assert vectors.type == pa.list_(pa.list_(pa.int8(), 8))
    assert [len(one) for one in scales.to_pylist()] == [3, 1]
    back = np.array(vectors[0].as_py()) * np.array(scales[0].as_py())[:, None]
    np.testing.assert_allclose(back, TOKENS, atol=max(scales[0].as_py()) * 0.51)
    # Without a schema, as between the operators of a processor.
    found = to_array([answer(coded, TOKENS)["embeddings"], None], result_types()["embeddings"])
    assert found.type == pa.list_(pa.list_(pa.int8(), 8))


def test_a_processor_without_a_dtype_has_lists_of_any_length() -> None:
    values = [answer(VectorAnswers(), row)["embeddings"] for row in (TOKENS[0], TOKENS[1, :4])]
    assert to_array(values, result_types()["embeddings"]).type == pa.list_(pa.float32())


def test_classes_have_probabilities_and_the_best_label() -> None:
    named = ClassAnswers(["no", "yes"])
    one = answer(named, [0.25, 0.75])
    assert (one["probs"], one["label"], one["label_probability"]) == ([0.25, 0.75], "yes", 0.75)
    assert one["embeddings"] == one["probs"]
    assert answer(ClassAnswers(), [0.75, 0.25])["label"] == "LABEL_0"
    tokens = ClassAnswers(["no", "yes"], is_by_token=True)
    data = [[0.25, 0.75], [0.5, 0.5], [1, 0]]
    assert column(tokens, "label", data, size=2).to_pylist() == [["yes", "no", "no"]]
    assert column(tokens, "probs", data, size=2).to_pylist() == [data]
    assert column(tokens, "label_probability", data, size=2).to_pylist() == [[0.75, 0.5, 1.0]]


def test_a_reward_is_the_only_number_of_a_vector() -> None:
    assert answer(RewardAnswers(), [-2.5])["reward"] == -2.5
    with pytest.raises(PoolingParamsError, match="reward takes a model of one class; this one has 3: use classify"):
        answer(RewardAnswers(), [1, 2, 3])


def test_every_task_says_what_it_asks_and_adds(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ("embed", "classify", "token_embed", "token_classify")
    monkeypatch.setattr(pooling_params, "POOLING_TASKS", tasks)  # The engine may not have them all.
    asked: dict[str, tuple[Any, Any, Any]] = {}
    for name in ("embed", "classify", "score", "token_embed", "token_classify", "reward"):
        config: EngineProcessorConfig = make_config(task_type=name)
        assert config.is_pooling
        params = config.default_pooling_params
        asked[name] = (config.engine_config.task, params.task, params.use_activation)
        kinds = dataclasses.replace(answers_of(config), form=VECTOR_FORMS["float32"]) if "embed" in name else None
        assert set((kinds or answers_of(config)).types(1)) <= set(config.task.answers)
    assert asked == {
        "embed": ("embed", "embed", None),
        "classify": ("classify", "classify", None),
        "score": ("auto", None, None),
        "token_embed": ("embed", "token_embed", None),
        "token_classify": ("classify", "token_classify", None),
        "reward": ("classify", "classify", False),
    }
