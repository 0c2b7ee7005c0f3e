"""Scores, rankings and classes in batch files: what a line may ask, what the answer is, and whole files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.engine import LLM
from millrace.pipeline import columns
from millrace.pipeline.openai_batch.batch_config import BatchConfig
from millrace.pipeline.openai_batch.job import run_batch
from millrace.pipeline.openai_batch.lines.classification import ClassifyRequest
from millrace.pipeline.openai_batch.lines.line_error import LineError
from millrace.pipeline.openai_batch.lines.request import RequestReader
from millrace.pipeline.openai_batch.lines.response import answer_line
from millrace.pipeline.openai_batch.lines.scoring import ScoreRequest

SCORES, CLASSES = RequestReader(("m",), task="score"), RequestReader(("m",), task="classify")


def line(url: str, custom_id: str = "a", **body: Any) -> bytes:
    fields = {"custom_id": custom_id, "method": "POST", "url": url}
    return json.dumps({**fields, "body": {"model": "m", **body}}).encode()


def answer(read: Any, **row: Any) -> dict[str, Any]:
    return json.loads(answer_line(read, {columns.NUM_INPUT_TOKENS: 5, **row}, 7, "fp"))["response"]["body"]


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": "a", "text_2": ["b", "c"]},
        {"data_1": ["a"], "data_2": ["b", {"text": "c"}]},
        {"queries": {"text": "a"}, "items": ["b", "c"]},
        {"queries": "a", "documents": ["b", "c"], "user": "me", "priority": 1},
    ],
)
def test_a_score_takes_every_spelling(body: dict[str, Any]) -> None:
    read = SCORES.read(line("/score", **body, use_activation=False))
    assert isinstance(read, ScoreRequest)
    assert (read.columns[columns.TEXT_1], read.columns[columns.TEXT_2]) == (["a"], ["b", "c"])
    assert read.pooling.use_activation is False
    said = answer(read, score=[0.25, 0.5])
    assert said["data"] == [
        {"index": 0, "object": "score", "score": 0.25},
        {"index": 1, "object": "score", "score": 0.5},
    ]
    assert (said["object"], said["created"], said["model"]) == ("list", 7, "m")
    assert said["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


@pytest.mark.parametrize("url", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_a_ranking_has_the_best_document_first(url: str) -> None:
    documents = ["b", {"text": "c"}, "d"]
    read = SCORES.read(line(url, query="a", documents=documents, top_n=2))
    said = answer(read, score=[0.25, 0.5, 0.25])
    first, second = said["results"]
    assert first == {"index": 1, "document": {"text": "c"}, "relevance_score": 0.5}
    assert second["index"] == 0  # Of equal documents, the earlier one is first.
    assert said["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    whole = answer(SCORES.read(line(url, query="a", documents=documents, return_documents=False)), score=[1, 2, 3])
    assert [one["index"] for one in whole["results"]] == [2, 1, 0]
    assert all(set(one) == {"index", "relevance_score"} for one in whole["results"])


def test_classes_have_their_probabilities() -> None:
    one = CLASSES.read(line("/v1/classify", input="a"))
    assert isinstance(one, ClassifyRequest) and one.columns[columns.PROMPT] == "a"
    said = answer(one, probs=[0.25, 0.75], label="yes")
    assert said["data"] == [{"index": 0, "label": "yes", "probs": [0.25, 0.75], "num_classes": 2}]
    two = CLASSES.read(line("/classify", input=[[5], [6, 7]]))
    assert (two.columns[columns.TOKENIZED_PROMPT], two.columns[columns.MORE_PROMPTS]) == ([5], [[6, 7]])
    data = answer(two, probs=[np.float32([1, 0]), np.float32([0.5, 0.5])], label=["no", "no"])["data"]
    assert [(one["index"], one["probs"]) for one in data] == [(0, [1.0, 0.0]), (1, [0.5, 0.5])]


@pytest.mark.parametrize(
    ("reader", "text", "code", "param"),
    [
        (SCORES, line("/rerank", documents=["a"]), "missing_required_parameter", "query"),
        (SCORES, line("/rerank", query="a"), "missing_required_parameter", "documents"),
        (SCORES, line("/rerank", query="a", documents=[]), "invalid_value", "documents"),
        (SCORES, line("/rerank", query="a", documents=["b", 3]), "invalid_type", "documents[1]"),
        (SCORES, line("/rerank", query="a", documents=[{"content": []}]), "unsupported_value", "documents[0]"),
        (SCORES, line("/rerank", query="a", documents=["b"], top_n=-1), "invalid_value", "top_n"),
        (SCORES, line("/rerank", query="a", documents=["b"], topn=1), "unknown_parameter", "topn"),
        (SCORES, line("/score"), "missing_required_parameter", "text_1"),
        (SCORES, line("/score", text_1="a", data_2="b"), "invalid_value", "text_1"),
        (SCORES, line("/score", text_1="a", text_2="b", items="c"), "invalid_value", "text_1"),
        (SCORES, line("/score", text_1=["a", "b"], text_2=["c"]), "invalid_value", "text_1"),
        (SCORES, line("/v1/classify", input="a"), "unsupported_endpoint", "url"),
        (SCORES, line("/v1/rank", query="a"), "invalid_url", "url"),
        (CLASSES, line("/classify"), "missing_required_parameter", "input"),
        (CLASSES, line("/classify", input=["a", 5]), "invalid_type", "input"),
        (
            CLASSES,
            line("/classify", input="a", truncate_prompt_tokens=5),
            "unsupported_value",
            "truncate_prompt_tokens",
        ),
    ],
)
def test_a_wrong_body_is_named(reader: RequestReader, text: bytes, code: str, param: str) -> None:
    read = reader.read(text)
    assert isinstance(read, LineError)
    assert (read.code, read.param) == (code, param)


def run_lines(folder: Path, model: Path, lines: list[bytes]) -> tuple[dict[str, Any], list[str]]:
    """Returns the bodies of the answers by id, and the codes of the errors."""
    (folder / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    files = {"input": str(folder / "in.jsonl"), "output": str(folder / "out.jsonl")}
    engine = {"max_num_seqs": 32, "max_model_len": 64, "num_threads": 1, "dtype": "float32"}
    summary = run_batch(BatchConfig(model=str(model), engine=engine, **files))
    assert summary.num_rows_in == len(lines)
    answers = [json.loads(text) for text in (folder / "out.jsonl").read_text().splitlines()]
    errors = [json.loads(text)["error"]["code"] for text in (folder / "out.errors.jsonl").read_text().splitlines()]
    return {one["custom_id"]: one["response"]["body"] for one in answers}, errors


@pytest.mark.slow
def test_a_file_of_scores_and_rankings_comes_back_as_those_of_the_engine(cluster: None, tmp_path: Path) -> None:
    from checkpoints import tiny_classifier  # not above: workers import this file, and not that folder

    model = tiny_classifier(tmp_path / "model", "qwen3", num_labels=1)
    documents = [f"line {i} of the bill" for i in range(6)]
    lines = [
        line("/v1/rerank", "rank", query="which line?", documents=documents, top_n=3),
        line("/v1/score", "score", text_1="which line?", text_2=documents, use_activation=False),
        line("/score", "pairs", text_1=documents, text_2=documents[::-1]),
        line("/score", "long", text_1="a", text_2=["b", "too long " * 99]),
        line("/v1/classify", "other", input="a"),
    ]
    bodies, errors = run_lines(tmp_path, model, lines)
    assert errors == ["context_length_exceeded", "unsupported_endpoint"]
    with LLM(str(model), dtype="float32") as llm:
        scores = [one.outputs.score for one in llm.score("which line?", documents, use_tqdm=False)]
        pairs = [one.outputs.score for one in llm.score(documents, documents[::-1], use_tqdm=False)]
    best = sorted(range(6), key=lambda i: -scores[i])[:3]
    assert [one["index"] for one in bodies["rank"]["results"]] == best
    found = [one["relevance_score"] for one in bodies["rank"]["results"]]
    np.testing.assert_allclose(found, [scores[i] for i in best], atol=1e-4)
    plain = np.array([one["score"] for one in bodies["score"]["data"]])
    np.testing.assert_allclose(1 / (1 + np.exp(-plain)), scores, atol=1e-4)
    np.testing.assert_allclose([one["score"] for one in bodies["pairs"]["data"]], pairs, atol=1e-4)


@pytest.mark.slow
def test_a_file_of_classes_comes_back_as_those_of_the_engine(cluster: None, tmp_path: Path) -> None:
    from checkpoints import tiny_classifier

    labels = {0: "no", 1: "perhaps", 2: "yes"}
    model = tiny_classifier(tmp_path / "model", "llama", num_labels=3, id2label=labels)
    texts = [f"line {i} of the bill" for i in range(4)]
    lines = [
        *(line("/v1/classify", f"c{i}", input=text) for i, text in enumerate(texts)),
        line("/classify", "many", input=texts),
        line("/classify", "empty", input=[]),
    ]
    bodies, errors = run_lines(tmp_path, model, lines)
    assert errors == ["invalid_value"]
    with LLM(str(model), dtype="float32") as llm:
        expected = [one.outputs.probs for one in llm.classify(texts, use_tqdm=False)]
    for i, probs in enumerate(expected):
        for one in (bodies[f"c{i}"]["data"][0], bodies["many"]["data"][i]):
            np.testing.assert_allclose(one["probs"], probs, atol=1e-4)
            assert (one["label"], one["num_classes"]) == (labels[int(np.argmax(probs))], 3)
    assert [one["index"] for one in bodies["many"]["data"]] == [0, 1, 2, 3]
